"""A search, generation after generation.

Every number of it follows from its seed: one generator on the CPU, the same on every rank; the order in which
individuals are evaluated, and by how many processes, changes nothing. An individual is evaluated once, and then
remembered.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..population import Memo
from ..population.masks import mask_id, to_hex
from ..runtime.world import World
from . import operators, pareto
from .algorithms import Algorithm, Scores
from .fitness import FitnessError
from .problem import Problem
from .result import Individuals, Result, Seen

__all__ = ["Evaluated", "Search"]


class Evaluated(NamedTuple):
    """Individuals, and what was measured of them."""

    masks: Tensor
    """bool [n, genes], on the device where they are bred."""
    values: Tensor
    """float64 [n, columns of the fitness], on the CPU."""

    def rows(self, which: Tensor) -> Evaluated:
        return Evaluated(self.masks[which.to(self.masks.device)], self.values[which])


class Search:
    """Where a search is.

    Attributes:
        population, best, front: of the latest generation and so far; empty before the first.
        memo: all that was evaluated.
        generation, seconds, history: see :class:`Result`.
        reference: from which the hypervolume counts, both minimised; None until it is known.
        checkpoints: whether one is written after every generation.
        full_cost: of the full network, in the cost's own unit.
    """

    def __init__(self, problem: Problem, world: World, checkpoints: bool) -> None:
        self.problem, self.world, self.checkpoints, self.full_cost = problem, world, checkpoints, 1.0
        fitness = problem.fitness
        self.generator = torch.Generator().manual_seed(problem.seed)
        columns = len(fitness.columns)
        nobody = Evaluated(
            torch.empty(0, problem.space.num_genes, dtype=torch.bool, device=problem.device),
            torch.empty(0, columns, dtype=torch.float64),
        )
        self.population = self.best = self.front = nobody
        self.memo = Memo(columns)
        self.part: int | None = None  # of the images
        self.reference: list[float] | None = (
            None if fitness.reference is None else [-fitness.reference[0], fitness.reference[1]]
        )
        self.generation, self.seconds = 0, 0.0
        self.history: list[dict[str, Any]] = []
        self.asked = 0  # the generation whose individuals are evaluated

    # --- generations -------------------------------------------------------------------------------

    def step(self) -> None:
        """The next population, and its values."""
        problem, device, parents = self.problem, self.problem.device, self.population
        self.asked = self.generation + 1
        children = self._children()
        if problem.fitness.rotate is None:
            bred = Evaluated(children, self._measured(children))
        else:
            bred = self._rotated(children)
            parents = self.population  # on the same images now
        both = _joined(parents, bred)
        scores = _moved(self.scores(both.values), device)
        stay = problem.algorithm.tell(parents.masks, children, scores)
        self._keep_best(bred)
        self.population = both.rows(stay.cpu())

    def _children(self) -> Tensor:
        """bool [Q, genes], within the limits."""
        problem, device, limits = self.problem, self.problem.device, self.problem.limits
        scores = self.scores(self.population.values)
        if len(self.population.masks):
            children = problem.algorithm.ask(limits, self.population.masks, _moved(scores, device), self.generator)
        else:
            children = problem.algorithm.initial(
                limits, problem.population, scores.objectives.shape[1], self.generator, device
            )
            if problem.initial is not None:
                children[: len(problem.initial)] = problem.initial
        return limits.repair(children)

    def _rotated(self, children: Tensor) -> Evaluated:
        """The children on the next images; and on these all that they are compared with."""
        self.part = self.problem.fitness.part(self.generation + 1)
        parents = self.population.masks
        if type(self.problem.algorithm).tell is Algorithm.tell:
            parents = parents[:0]  # all of them go
        groups = children, self.best.masks, self.front.masks, parents
        values = torch.split(self._measured(torch.cat(groups)), [len(group) for group in groups])
        self.best, self.front = Evaluated(self.best.masks, values[1]), Evaluated(self.front.masks, values[2])
        if len(parents):
            self.population = Evaluated(parents, values[3])
            self._keep_best(self.population)  # one of them may be the best on these
        return Evaluated(children, values[0])

    def finish(self) -> None:
        """All images decide among those who came through the parts of them."""
        self.part = None
        masks = torch.cat((self.population.masks, self.best.masks, self.front.masks))
        everyone = Evaluated(masks, self._measured(masks))
        self.population = everyone.rows(torch.arange(len(self.population.masks)))
        self.best = self.front = everyone.rows(torch.arange(0))
        self._keep_best(everyone)

    def scores(self, values: Tensor) -> Scores:
        """Of values float64 [n, columns]."""
        return self.problem.fitness.scores(values, self.full_cost)

    # --- evaluation --------------------------------------------------------------------------------

    def _measured(self, masks: Tensor) -> Tensor:
        """float64 [P, columns]; what is not known yet is shared among ranks."""
        fitness, world = self.problem.fitness, self.world
        images = b""
        if fitness.rotate is not None:
            images = (-1 if self.part is None else self.part).to_bytes(8, "little", signed=True)

        def measure(new: Tensor, remember: Callable[[slice, Tensor], None]) -> None:
            mine = world.range(len(new))
            values = torch.zeros(len(new), len(fitness.columns), dtype=torch.float64)
            if mine.start < mine.stop:
                on_images = fitness.on(self.part)
                values[mine] = on_images.measure(self.problem.evaluator, self.problem.limits, new[mine])
            if world.size > 1:  # as integers: nothing is rounded, and not even a nan is changed
                values = world.sum(values.view(torch.int64)).view(torch.float64)
            self._require_finite(masks, new, values)
            remember(slice(0, len(new)), values)

        return self.memo.recall(masks, measure, images)

    def _require_finite(self, masks: Tensor, new: Tensor, values: Tensor) -> None:
        """Raises FitnessError, which names the first individual whose values [n, columns] are not all finite."""
        finite = values.isfinite().all(1)
        if bool(finite.all()):
            return
        row = int((~finite).nonzero()[0])
        mask, columns = new[row], self.problem.fitness.columns
        individual = int((masks == mask).all(1).nonzero()[0])
        numbers = ", ".join(f"{name} = {x}" for name, x in zip(columns, values[row].tolist(), strict=True))
        whole = (
            f"; the checkpoint of generation {self.generation} is whole, and the same command goes on from there"
            if self.checkpoints and self.generation
            else ""
        )
        raise FitnessError(
            f"individual {individual} of generation {self.asked} (mask {mask_id(mask)}, {int(mask.sum())} of "
            f"{len(mask)} genes) has no finite fitness: {numbers}{whole}"
        )

    # --- the best ----------------------------------------------------------------------------------

    def _keep_best(self, evaluated: Evaluated) -> None:
        """The best so far, and the front."""
        scores = self.scores(evaluated.values)
        p = int(scores.score.argmax())
        if not len(self.best.masks) or float(scores.score[p]) > float(self.scores(self.best.values).score):
            self.best = Evaluated(evaluated.masks[p : p + 1].clone(), evaluated.values[p : p + 1])
        if scores.objectives.shape[1] == 1:
            self.front = self.best
            return
        if self.reference is None:
            self.reference = [float(scores.objectives[:, 0].max()), max(1.0, float(scores.objectives[:, 1].max()))]
        merged = _joined(self.front, evaluated)
        stay = pareto.nondominated(self.scores(merged.values).objectives)
        self.front = merged.rows(stay[merged.values[stay, 1].argsort(stable=True)])

    # --- what is reported --------------------------------------------------------------------------

    def record(self, seconds: float) -> None:
        """Adds a generation, which took so long, to the history."""
        self.generation += 1
        self.seconds += seconds
        masks, scores = self.population.masks, self.scores(self.population.values).score
        best, values = self.scores(self.best.values), self.best.values[0]
        on, n = operators.occurrences(masks), len(masks)
        differ = 2 * int((on * (n - on)).sum())  # ordered pairs of individuals, times genes
        volume = None
        if self.reference is not None and self.front.values.shape[1] == 2:
            volume = pareto.hypervolume(self.scores(self.front.values).objectives, self.reference)
        self.history.append(
            {
                "generation": self.generation,
                "best": float(best.score),
                "quality": float(values[0]),
                "cost": float(values[1]) if len(values) > 1 else None,
                "mean": math.fsum(scores.tolist()) / n,
                "diversity": differ / max(n * (n - 1) * masks.shape[1], 1),
                "hypervolume": volume,
                "evaluations": len(self.memo),
                "seconds": self.seconds,
                "mask": to_hex(self.best.masks[0]),
            }
        )

    def result(self, generations: int) -> Result:
        """Where it is, of so many generations."""

        def individuals(those: Evaluated) -> Individuals:
            return Individuals(those.masks, self.scores(those.values).score, *_columns(those.values))

        best = individuals(self.best)
        return Result(
            self.best.masks[0],
            float(best.score),
            float(best.quality),
            None if best.cost is None else float(best.cost),
            individuals(self.population),
            individuals(self.front),
            Seen([key.hex()[:12] for key in self.memo.keys], *_columns(self.memo.values)),
            list(self.history),
            self.generation,
            generations,
            len(self.memo),
            None if self.problem.fitness.cost is None else self.full_cost,
        )


def _columns(values: Tensor) -> tuple[Tensor, Tensor | None]:
    """Quality and cost, each float64 [n]."""
    return values[:, 0], values[:, 1] if values.shape[1] > 1 else None


def _joined(first: Evaluated, second: Evaluated) -> Evaluated:
    return Evaluated(torch.cat((first.masks, second.masks)), torch.cat((first.values, second.values)))


def _moved(scores: Scores, device: torch.device) -> Scores:
    return Scores(scores.score.to(device), scores.objectives.to(device))
