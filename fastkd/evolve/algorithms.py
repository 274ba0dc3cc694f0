"""How one population leads to the next: what is asked for, and who stays."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from .._checks import integer, number, one_of, probability
from ..population.masks import duplicates
from . import operators, pareto
from .limits import Limits

__all__ = ["ALGORITHMS", "ECS", "GA", "NSGA2", "Algorithm", "Random", "Scores"]

GENOMES = ("filters", "widths")


class Scores(NamedTuple):
    """Of a population, in its order."""

    score: Tensor
    """float64 [P], one number each, larger is better."""
    objectives: Tensor
    """float64 [P, K], minimised: minus the quality, and if there is one the cost, relative to the full network."""


class Algorithm:
    """How a search goes on: it asks for individuals, which are evaluated, and then tells their scores."""

    name: ClassVar[str]
    replayed: ClassVar[bool] = False
    """Has a state beside the population and the generator: a resumed run asks and tells from the beginning, with
    what is remembered."""

    def identity(self) -> dict[str, Any]:
        """All options, for JSON."""
        raise NotImplementedError

    def initial(
        self, limits: Limits, population: int, objectives: int, generator: torch.Generator, device: torch.device
    ) -> Tensor:
        """bool [population, genes] of limits.space; what is not within the limits is repaired."""
        raise NotImplementedError

    def ask(self, limits: Limits, masks: Tensor, scores: Scores, generator: torch.Generator) -> Tensor:
        """Individuals to evaluate, bool [Q, genes]; what is not within the limits is repaired. The arguments stay as
        they are."""
        raise NotImplementedError

    def tell(self, masks: Tensor, children: Tensor, scores: Scores) -> Tensor:
        """Who is the next population: int64, into the old one (empty at the beginning) followed by the children, as
        `scores` is."""
        return torch.arange(len(masks), len(scores.score), device=children.device)


@dataclass(frozen=True)
class _Drawn(Algorithm):
    """Of options alone, with an initial population of independent genes.

    Args:
        density: probability of each gene, or "random": one per individual.
    """

    density: float | Literal["random"] = 0.5

    def __post_init__(self) -> None:
        if isinstance(self.density, str):
            one_of("density", self.density, ("random",))
        else:
            probability("density", self.density)

    def identity(self) -> dict[str, Any]:
        return {"name": self.name, **dataclasses.asdict(self)}

    def initial(
        self, limits: Limits, population: int, objectives: int, generator: torch.Generator, device: torch.device
    ) -> Tensor:
        return operators.initial(population, limits.space.num_genes, self.density, generator, device)


@dataclass(frozen=True)
class ECS(_Drawn):
    """The evolution of arXiv:1707.08005: copies, crossovers and mutations until the next population is full.

    Defaults are as published: the best one first, then one operation after the other, drawn with these
    probabilities; parents by roulette; a two-point crossover gives both its children; a mutation flips every
    bit of one random segment. Where only one place is left, a second child has none.

    >>> ECS(selection="tournament", elites=2).identity()["elites"]
    2

    Args:
        copy, crossover, mutation: probabilities, of sum 1.
        selection: "roulette", "rank", "tournament".
        crossover_by: "two_point", "uniform", "group" (each group of filters from one parent).
        mutation_by: "segment", or "bit": every gene with probability `rate`.
        rate: default 1 / genes, at least one gene of each individual on average.
        elites: so many of the best are kept as they are.
        density: of the initial population: probability of each gene, or "random": one per individual.
    """

    copy: float = 0.2
    crossover: float = 0.7
    mutation: float = 0.1
    selection: str = "roulette"
    crossover_by: str = "two_point"
    mutation_by: str = "segment"
    rate: float | None = None
    elites: int = 1

    name: ClassVar[str] = "ecs"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("copy", "crossover", "mutation"):
            probability(name, getattr(self, name))
        if abs(self.copy + self.crossover + self.mutation - 1) > 1e-9:
            raise ValueError(
                f"copy + crossover + mutation must be 1, got {self.copy} + {self.crossover} + {self.mutation}"
            )
        _check_operators(self.selection, self.crossover_by, self.rate, self.elites)
        one_of("mutation_by", self.mutation_by, operators.MUTATIONS)

    def ask(self, limits: Limits, masks: Tensor, scores: Scores, generator: torch.Generator) -> Tensor:
        space, population, device, score = limits.space, len(masks), masks.device, scores.score
        wanted = max(population - self.elites, 0)
        # As many operations as could be needed; 0: copy, 1: crossover, 2: mutation.
        drawn = torch.rand(wanted, generator=generator, dtype=torch.float64)
        kind = (drawn >= self.copy).long() + (drawn >= self.copy + self.crossover).long()
        places = 1 + (kind == 1).long()
        at = places.cumsum(0) - places + self.elites
        kind, at = kind[at < population].to(device), at[at < population].to(device)
        first, second = operators.SELECTIONS[self.selection](score, 2 * len(kind), generator).view(2, -1)

        out = torch.empty(population + 1, masks.shape[1], dtype=torch.bool, device=device)  # a place too much
        elites = min(self.elites, population)
        out[:elites] = masks[score.argsort(descending=True, stable=True)[:elites]]
        copied, crossed, mutated = ((kind == k).nonzero()[:, 0] for k in range(3))
        out[at[copied]] = masks[first[copied]]
        pattern = operators.CROSSOVERS[self.crossover_by](len(crossed), space, generator, device)
        operators.crossover(masks, first[crossed], second[crossed], pattern, out, at[crossed])
        if self.mutation_by == "segment":
            pattern = operators.segment(len(mutated), space, generator, device)
            operators.mutate(masks, first[mutated], pattern, out, at[mutated])
        else:
            changed = masks[first[mutated]]
            operators.flip(changed, 1 / max(space.num_genes, 1) if self.rate is None else self.rate, generator)
            out[at[mutated]] = changed
        return out[:population]


@dataclass(frozen=True)
class _Sized(_Drawn):
    """With a genome: of filters, or of widths."""

    density: float | Literal["random"] = "random"
    genome: str = "filters"

    fills: ClassVar[bool] = True
    """Widths below the budget are scaled up to it, too, if the limits say so."""

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("genome", self.genome, GENOMES)

    def initial(
        self, limits: Limits, population: int, objectives: int, generator: torch.Generator, device: torch.device
    ) -> Tensor:
        if self.genome == "filters" or not isinstance(self.density, str):
            masks = super().initial(limits, population, objectives, generator, device)
            return masks if self.genome == "filters" else self._of(limits, limits.counts(masks))
        # A mean density for each individual, and around it one for each group.
        mean = torch.rand(population, 1, generator=generator, dtype=torch.float64).clamp(min=1e-3)
        density = torch.rand(population, len(limits.sizes), generator=generator, dtype=torch.float64) ** (1 / mean - 1)
        return self._of(limits, (density * limits.sizes).to(device))

    def _of(self, limits: Limits, widths: Tensor) -> Tensor:
        """bool [P, genes], of widths [P, groups], which need not be whole."""
        return limits.widest(limits.scaled(widths, up=self.fills and limits.fill))


@dataclass(frozen=True)
class _Mating(_Sized):
    """Pairs of parents, a crossover with some probability, then a mutation of every child.

    Args:
        density: of the initial population, as for :class:`ECS`; of random widths, every group has one of its own.
        genome: "filters", or "widths": how many filters every group keeps is bred; those of largest norm
            (:func:`fastkd.evolve.ranking.group_norm`) are kept. A search then has as many unknowns as there are groups,
            and finds more with few images. With a budget, widths are all multiplied by what leads to it; where the
            fitness gives the cost a weight, only those beyond it are. Others who search for widths: Liu et al.,
            "MetaPruning", arXiv:1903.10258; Lin et al., "Channel Pruning via Automatic Structure Search",
            arXiv:2001.08565.
        selection: "roulette", "rank", "tournament".
        crossover: probability that a pair is crossed.
        crossover_by: "two_point", "uniform", "group"; widths are crossed group by group.
        rate: probability that a gene is flipped, default 1 / genes, or that a group's width is changed, default
            2 / groups.
        rates: "constant", or "adaptive": `crossover` and `rate` are the most, and good parents change less
            (:func:`fastkd.evolve.operators.adaptive_rates`); then `rate` defaults to four times as much.
        spread: a width that is changed is multiplied by exp(spread * standard normal).
        elites: so many of the best are kept as they are.
    """

    selection: str = "tournament"
    crossover: float = 0.9
    crossover_by: str = "uniform"
    rate: float | None = None
    rates: str = "constant"
    spread: float = 0.3
    elites: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        probability("crossover", self.crossover)
        one_of("rates", self.rates, ("constant", "adaptive"))
        _check_operators(self.selection, self.crossover_by, self.rate, self.elites)
        number("spread", self.spread, 0, 10)

    def _children(
        self, limits: Limits, masks: Tensor, score: Tensor, count: int, generator: torch.Generator, out: Tensor
    ) -> None:
        """Writes `count` into the first rows of out [count + 1, genes]."""
        space, widths = limits.space, self.genome == "widths"
        pairs, adaptive = -(-count // 2), self.rates == "adaptive"
        first, second = operators.SELECTIONS[self.selection](score, 2 * pairs, generator).view(2, -1)
        chance: float | Tensor = self.crossover
        usual = 2 / len(space.groups) if widths else 1 / max(space.num_genes, 1)
        most = min(1.0, usual * (4 if adaptive else 1) if self.rate is None else self.rate)
        rate: float | Tensor = most
        if adaptive:
            chance = operators.adaptive_rates(score, torch.maximum(score[first], score[second]), self.crossover).cpu()
            parents = torch.stack((first, second), 1).flatten()[:count]
            rate = operators.adaptive_rates(score, score[parents], most)
        crossed = (torch.rand(pairs, generator=generator, dtype=torch.float64) < chance).to(masks.device)
        if widths:
            of = limits.counts(masks)
            bred = operators.exchanged(of[first], of[second], crossed, generator)[:count].double()
            out[:count] = self._of(limits, operators.scattered(bred, rate, self.spread, generator))
            return
        at = 2 * torch.arange(pairs, device=masks.device)
        alone = ~crossed
        out[at[alone]], out[at[alone] + 1] = masks[first[alone]], masks[second[alone]]
        pattern = operators.CROSSOVERS[self.crossover_by](int(crossed.sum()), space, generator, masks.device)
        operators.crossover(masks, first[crossed], second[crossed], pattern, out, at[crossed])
        operators.flip(out[:count], rate, generator)


@dataclass(frozen=True)
class GA(_Mating):
    __doc__ = f"A generational genetic algorithm. {_Mating.__doc__}"

    name: ClassVar[str] = "ga"

    def ask(self, limits: Limits, masks: Tensor, scores: Scores, generator: torch.Generator) -> Tensor:
        elites = min(self.elites, len(masks))
        out = torch.empty(len(masks) + 1, masks.shape[1], dtype=torch.bool, device=masks.device)
        out[:elites] = masks[scores.score.argsort(descending=True, stable=True)[:elites]]
        self._children(limits, masks, scores.score, len(masks) - elites, generator, out[elites:])
        return out[: len(masks)]


@dataclass(frozen=True)
class NSGA2(_Mating):
    """Several objectives at once: NSGA-II, Deb et al. 2002, doi:10.1109/4235.996017.

    Parents by binary tournament: the better front, then the larger crowding distance. Parents and children
    compete for the next population; of equal masks, all but one come last. Widths beyond a budget are scaled down to
    it, and those below it stay.

    Args:
        crossover, crossover_by, rate, rates, spread, density, genome: as for :class:`GA`; the others have no meaning
            here.
    """

    name: ClassVar[str] = "nsga2"
    fills: ClassVar[bool] = False

    def ask(self, limits: Limits, masks: Tensor, scores: Scores, generator: torch.Generator) -> Tensor:
        front = pareto.nondominated_sort(scores.objectives)
        distance = pareto.crowding_distance(scores.objectives, front)
        order = distance.argsort(descending=True, stable=True)
        order = order[front[order].argsort(stable=True)]
        place = torch.empty(len(masks), dtype=torch.float64, device=masks.device)
        place[order] = torch.arange(len(masks), 0, -1, dtype=torch.float64, device=masks.device)
        out = torch.empty(len(masks) + 1, masks.shape[1], dtype=torch.bool, device=masks.device)
        self._children(limits, masks, place, len(masks), generator, out)
        return out[: len(masks)]

    def tell(self, masks: Tensor, children: Tensor, scores: Scores) -> Tensor:
        return pareto.survivors(scores.objectives, len(children), duplicates(torch.cat((masks, children))))


@dataclass(frozen=True)
class Random(_Sized):
    """Random search, the control at an equal number of evaluations: every population is drawn anew.

    Args:
        density, genome: as for :class:`GA`.
    """

    name: ClassVar[str] = "random"

    def ask(self, limits: Limits, masks: Tensor, scores: Scores, generator: torch.Generator) -> Tensor:
        return self.initial(limits, len(masks), scores.objectives.shape[1], generator, masks.device)


ALGORITHMS: dict[str, Callable[..., Algorithm]] = {
    "ecs": ECS,
    "ga": GA,
    "ga-widths": partial(GA, genome="widths"),
    "nsga2": NSGA2,
    "nsga2-widths": partial(NSGA2, genome="widths"),
    "random": Random,
    "random-widths": partial(Random, genome="widths"),
}


def _check_operators(selection: str, crossover_by: str, rate: float | None, elites: int) -> None:
    one_of("selection", selection, operators.SELECTIONS)
    one_of("crossover_by", crossover_by, operators.CROSSOVERS)
    if rate is not None:
        probability("rate", rate)
    integer("elites", elites, 0)
