"""What is searched for: the arguments of a search, checked, and the identity by which a checkpoint knows them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .._checks import integer
from ..population import GeneSpace, PopulationEvaluator
from ..population.masks import packed
from .algorithms import ALGORITHMS, NSGA2, Algorithm
from .fitness import Fitness, MaskFunction
from .limits import Limits

__all__ = ["Problem", "problem_of"]

SCHEMA = 2  # of checkpoints


@dataclass(frozen=True)
class Problem:
    """Everything that a search's result follows from, but how many generations it has."""

    evaluator: PopulationEvaluator | GeneSpace
    space: GeneSpace
    fitness: Fitness
    limits: Limits
    algorithm: Algorithm
    population: int
    seed: int
    initial: Tensor | None
    """bool [n, genes], on the device where masks are bred."""
    device: torch.device

    def identity(self) -> dict[str, Any]:
        """As JSON gives it back."""
        if isinstance(self.evaluator, PopulationEvaluator):
            evaluator = self.evaluator.identity()
        else:
            evaluator = {"genes": self.space.num_genes, "order": _digest(self.limits.order)}
        identity: dict[str, Any] = json.loads(
            json.dumps(
                {
                    "schema": SCHEMA,
                    "algorithm": self.algorithm.identity(),
                    "population": self.population,
                    "seed": self.seed,
                    "initial": None if self.initial is None else _digest(packed(self.initial)),
                    "fitness": {**self.fitness.identity(), **self.limits.identity()},
                    "evaluator": {**evaluator, "costs": self.limits.full},
                }
            )
        )
        return identity


def problem_of(
    evaluator: PopulationEvaluator | GeneSpace,
    fitness: Fitness | MaskFunction,
    algorithm: str | Algorithm,
    population: int,
    seed: int,
    budget: Mapping[str, float] | None,
    k_min: int | None,
    limits: Limits | None,
    initial: Tensor | None,
    device: torch.device,
) -> Problem:
    """Of the arguments of :func:`fastkd.evolve.evolve`, with its errors."""
    integer("population", population, 1)
    integer("seed", seed, 0)
    if isinstance(algorithm, str):
        if algorithm not in ALGORITHMS:
            raise ValueError(f"algorithm must be one of {', '.join(ALGORITHMS)}, or an Algorithm, got {algorithm!r}")
        algorithm = ALGORITHMS[algorithm]()
    if not isinstance(algorithm, Algorithm):
        raise TypeError(f"algorithm must be a name or an Algorithm, got {type(algorithm).__name__}")
    if not isinstance(evaluator, (PopulationEvaluator, GeneSpace)):
        raise TypeError(
            "evaluator must be a PopulationEvaluator, or a GeneSpace where the quality is a callable, "
            f"got {type(evaluator).__name__}"
        )
    if not isinstance(fitness, Fitness):
        if not callable(fitness):
            raise TypeError(f"fitness must be a Fitness or a callable, got {type(fitness).__name__}")
        fitness = Fitness(fitness)
    if isinstance(algorithm, NSGA2) and fitness.cost is None:
        raise ValueError(
            "algorithm 'nsga2' weighs the quality against a cost: name one, as in Fitness(..., cost='macs')"
        )
    if algorithm.replayed and fitness.rotate is not None:
        raise ValueError(
            f"fitness must be without rotate for algorithm {algorithm.name!r}, which keeps scores of "
            f"other generations, got rotate = {fitness.rotate}"
        )
    space = evaluator if isinstance(evaluator, GeneSpace) else evaluator.space
    if space.num_genes == 0:
        raise ValueError("evaluator has no genes: nothing of this network can be removed")
    limits = _limits(space, fitness, budget, k_min, limits)
    if initial is not None:
        initial = _checked(initial, space, population).to(device)
    return Problem(evaluator, space, fitness, limits, algorithm, population, seed, initial, device)


def _limits(
    space: GeneSpace, fitness: Fitness, budget: Mapping[str, float] | None, k_min: int | None, limits: Limits | None
) -> Limits:
    """The limits of a search, however they are stated."""
    if limits is not None:
        if not isinstance(limits, Limits):
            raise TypeError(f"limits must be a Limits or None, got {type(limits).__name__}")
        if limits.space is not space:
            raise ValueError("limits must be of the evaluator's space: Limits(evaluator.space, ...)")
    for name, argument, stated in (("budget", budget, fitness.budget), ("k_min", k_min, fitness.k_min)):
        if (argument is not None) + (stated is not None) + (limits is not None) > 1:
            raise ValueError(
                f"{name} must be stated once, in evolve, in Fitness or in limits, got {name} = {argument!r}, "
                f"fitness.{name} = {stated!r}" + (" and limits" if limits is not None else "")
            )
    if limits is not None:
        return limits
    budget = fitness.budget if budget is None else budget
    k_min = fitness.k_min if k_min is None else k_min
    return Limits(space, budget, 1 if k_min is None else k_min, fill=not fitness.weight)


def _checked(initial: Tensor, space: GeneSpace, population: int) -> Tensor:
    if not isinstance(initial, Tensor) or initial.dtype != torch.bool:
        raise TypeError(
            "initial must be a torch.bool tensor, got "
            f"{initial.dtype if isinstance(initial, Tensor) else type(initial).__name__}"
        )
    if initial.dim() != 2 or initial.shape[1] != space.num_genes:
        raise ValueError(f"initial must have shape [n, {space.num_genes}], got {list(initial.shape)}")
    if len(initial) > population:
        raise ValueError(f"initial must have at most population = {population} individuals, got {len(initial)}")
    return initial


def _digest(x: Tensor) -> str:
    return hashlib.blake2b(x.numpy().data, digest_size=16).hexdigest()
