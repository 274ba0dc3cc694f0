"""Genetic operators over whole populations: bool [P, genes], on any device.

Everything random is drawn from one generator on the CPU and then moved, so that a seed gives the same
population on every device. Work on [P, genes] is done in blocks of rows that stay in the cache; nothing
loops over individuals.

The operators of the paper (Wang et al., "Towards Evolutionary Compression", arXiv:1707.08005) are
:func:`roulette`, the crossover ``two_point`` and the mutation ``segment``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from ..population import GeneSpace

__all__ = [
    "CROSSOVERS",
    "MUTATIONS",
    "SELECTIONS",
    "Pattern",
    "adaptive_rates",
    "bits",
    "crossover",
    "exchanged",
    "fair",
    "flip",
    "groupwise",
    "initial",
    "mutate",
    "occurrences",
    "rank",
    "roulette",
    "scattered",
    "segment",
    "tournament",
]

Pattern = Callable[[slice], Tensor]
"""Which genes an operator touches: called once for each block of rows, in order; gives bool [rows, genes]."""

BLOCK = 1 << 20  # genes worked on at once


def blocks(rows: int, genes: int) -> Iterator[slice]:
    step = max(1, BLOCK // max(genes, 1))
    for first in range(0, rows, step):
        yield slice(first, min(first + step, rows))


# --- who has children ----------------------------------------------------------------------------------


def roulette(score: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Individuals, each with probability f / sum f.

    Args:
        score: float64 [P], larger is better. Where one is negative, all are taken relative to the smallest;
            where all are zero, all are equally likely.

    Returns:
        int64 [count], into the population.
    """
    f = score.double() - score.min().clamp(max=0).double()
    return _spin(f if bool((f > 0).any()) else torch.ones_like(f), count, generator)


def rank(score: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """As :func:`roulette`, on places in place of scores: 1 for the worst, equal ones share a place."""
    return _spin(torch.unique(score, return_inverse=True)[1].double() + 1, count, generator)


def tournament(score: Tensor, count: int, generator: torch.Generator, size: int = 2) -> Tensor:
    """The better one of `size` that are drawn; of equal ones the first drawn."""
    drawn = torch.randint(len(score), (count, size), generator=generator).to(score.device)
    return drawn.gather(1, score[drawn].argmax(1, keepdim=True))[:, 0]


SELECTIONS: dict[str, Callable[[Tensor, int, torch.Generator], Tensor]] = {
    "roulette": roulette,
    "rank": rank,
    "tournament": tournament,
}


def _spin(weight: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """int64 [count], with probabilities in proportion; summed on the CPU, in order."""
    wheel = weight.cpu().cumsum(0)
    at = torch.rand(count, generator=generator, dtype=torch.float64) * wheel[-1]
    # right: who has no share is never drawn. At the very end rounding could point past it.
    return torch.searchsorted(wheel, at, right=True).clamp(max=int(weight.nonzero()[-1])).to(weight.device)


# --- which genes ----------------------------------------------------------------------------------------


def segment(rows: int, space: GeneSpace, generator: torch.Generator, device: torch.device) -> Pattern:
    """One random segment of the flat string per row, never empty: two different cuts, all pairs equally likely."""
    a = torch.randint(space.num_genes + 1, (rows,), generator=generator)
    b = torch.randint(max(space.num_genes, 1), (rows,), generator=generator)
    b += b >= a
    low, high = torch.minimum(a, b).to(device)[:, None], torch.maximum(a, b).to(device)[:, None]
    first, word = _FIRST.to(device), torch.arange(0, space.num_genes, 8, device=device)

    def until(end: Tensor) -> Tensor:
        return first[(end - word).clamp_(0, 8)]

    def pattern(which: slice) -> Tensor:
        return _genes(until(low[which]).bitwise_xor_(until(high[which])), space.num_genes)

    return pattern


def fair(rows: int, space: GeneSpace, generator: torch.Generator, device: torch.device) -> Pattern:
    """Every gene with probability 1/2."""
    return lambda which: _coins(which.stop - which.start, space.num_genes, generator).to(device)


def groupwise(rows: int, space: GeneSpace, generator: torch.Generator, device: torch.device) -> Pattern:
    """Whole groups (filters that the same layers make), each with probability 1/2."""
    chosen = _coins(rows, len(space.groups), generator).to(device)
    group = torch.repeat_interleave(torch.tensor([g.size for g in space.groups], dtype=torch.int64)).to(device)
    return lambda which: chosen[which][:, group]


def bits(rows: int, genes: int, rate: float | Tensor, generator: torch.Generator) -> Tensor:
    """Every gene with probability `rate`: ascending int64 positions into the flat [rows * genes], on the CPU.

    Draws the distances between hits, so that the work is in proportion to these.

    Args:
        rate: in [0, 1], or float [rows].
    """
    r = torch.as_tensor(rate, dtype=torch.float64).cpu()
    most = float(r.max()) if r.numel() else 0.0
    if not 0 <= most <= 1 or not bool((r >= 0).all()):
        raise ValueError(f"rate must be in [0, 1], got {rate}")
    found, end, total = [torch.empty(0, dtype=torch.int64)], -1, rows * genes
    scale = torch.log1p(torch.tensor(-most, dtype=torch.float64))  # of the geometric distribution
    while most > 0 and end < total - 1:
        expected = (total - 1 - end) * most
        u = torch.rand(int(min(expected + 5 * expected**0.5 + 16, BLOCK)), generator=generator, dtype=torch.float64)
        gaps = (torch.log1p(-u) / scale).floor_().clamp_(max=total).long() + 1
        found.append(gaps.cumsum(0) + end)
        end = int(found[-1][-1])
    at = torch.cat(found)
    at = at[at < total]
    if r.dim():  # drawn with the largest rate, accepted with each row's own
        at = at[torch.rand(len(at), generator=generator, dtype=torch.float64) * most < r[at // genes]]
    return at


def _coins(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """bool [rows, columns]: eight from one random byte."""
    drawn = torch.randint(256, (rows, -(-columns // 8)), generator=generator, dtype=torch.int32)
    return _genes(_BYTE[drawn], columns)


# Patterns are made eight genes at a time, as words of eight bools.
_FIRST = (torch.arange(8) < torch.arange(9)[:, None]).view(torch.int64)[:, 0]  # the first 0 .. 8 of them
_BYTE = (torch.arange(256)[:, None] >> torch.arange(8) & 1).bool().view(torch.int64)[:, 0]


def _genes(words: Tensor, genes: int) -> Tensor:
    return words.view(torch.bool)[:, :genes]


CROSSOVERS: dict[str, Callable[[int, GeneSpace, torch.Generator, torch.device], Pattern]] = {
    "two_point": segment,
    "uniform": fair,
    "group": groupwise,
}
MUTATIONS = ("segment", "bit")


# --- children -------------------------------------------------------------------------------------------


def crossover(masks: Tensor, first: Tensor, second: Tensor, pattern: Pattern, out: Tensor, at: Tensor) -> None:
    """Both children of every pair: one parent, with the other's genes where the pattern is.

    Args:
        masks: bool [P, genes].
        first, second: int64 [n], the parents.
        pattern: for n rows.
        out: bool [Q, genes], written at the rows `at` (the first parent's child) and `at` + 1.
        at: int64 [n].
    """
    for which in blocks(len(first), masks.shape[1]):
        a, b = masks[first[which]], masks[second[which]]
        differ = (a ^ b).bitwise_and_(pattern(which))
        out[at[which]] = a.bitwise_xor_(differ)
        out[at[which] + 1] = b.bitwise_xor_(differ)


def mutate(masks: Tensor, parents: Tensor, pattern: Pattern, out: Tensor, at: Tensor) -> None:
    """Parents int64 [n] with every gene of the pattern flipped, written into the rows `at` of `out`."""
    for which in blocks(len(parents), masks.shape[1]):
        out[at[which]] = masks[parents[which]].bitwise_xor_(pattern(which))


def flip(masks: Tensor, rate: float | Tensor, generator: torch.Generator) -> None:
    """Per-bit mutation, in place, of a contiguous bool [n, genes]."""
    flat, at = masks.view(-1), bits(len(masks), masks.shape[1], rate, generator).to(masks.device)
    flat[at] = ~flat[at]


def exchanged(first: Tensor, second: Tensor, crossed: Tensor, generator: torch.Generator) -> Tensor:
    """Both children [2 n, columns] of every pair of rows [n, columns], in turn: where bool [n] says so, each column is
    exchanged with probability 1/2."""
    swap = _coins(len(first), first.shape[1], generator).to(first.device) & crossed[:, None]
    return torch.stack((torch.where(swap, second, first), torch.where(swap, first, second)), 1).flatten(0, 1)


def scattered(widths: Tensor, rate: float | Tensor, spread: float, generator: torch.Generator) -> Tensor:
    """float64 [n, columns], each with probability `rate` multiplied by exp(spread * standard normal)."""
    out, at = widths.flatten().clone(), bits(len(widths), widths.shape[1], rate, generator)
    by = (spread * torch.randn(len(at), generator=generator, dtype=torch.float64)).exp()
    out[at.to(out.device)] *= by.to(out.device)
    return out.view(widths.shape)


def adaptive_rates(score: Tensor, chosen: Tensor, most: float) -> Tensor:
    """Less change for those that are good already: most * (f_max - f) / (f_max - f_mean), and at most `most`.

    Srinivas & Patnaik, "Adaptive probabilities of crossover and mutation in genetic algorithms", 1994.

    Args:
        score: float64 [P] of the population.
        chosen: float64 [n], the scores of those that are to change.

    Returns:
        float64 [n]; `most` where all of the population are equal.
    """
    best, mean = float(score.max()), float(score.cpu().cumsum(0)[-1]) / len(score)
    if not best > mean:
        return torch.full_like(chosen, most)
    return most * ((best - chosen) / (best - mean)).clamp(0, 1)


def initial(
    population: int, genes: int, density: float | str, generator: torch.Generator, device: torch.device | str = "cpu"
) -> Tensor:
    """bool [population, genes]: Bernoulli(density), or with density="random" one density in [0, 1) per individual."""
    out = torch.empty(population, genes, dtype=torch.bool, device=device)
    each = (
        torch.rand(population, 1, generator=generator)
        if isinstance(density, str)
        else torch.full((population, 1), density)
    )
    for which in blocks(population, genes):
        rows = which.stop - which.start
        if density == 0.5:
            out[which] = _coins(rows, genes, generator).to(device)
        else:
            out[which] = (torch.rand(rows, genes, generator=generator) < each[which]).to(device)
    return out


# --- whole populations ----------------------------------------------------------------------------------


def occurrences(masks: Tensor) -> Tensor:
    """int64 [genes], on the CPU: in how many individuals each gene is on."""
    if masks.device.type != "cpu":
        return masks.sum(0).cpu()
    out, rows = np.zeros(masks.shape[1], np.int64), masks.contiguous().view(torch.uint8).numpy()
    for first in range(0, len(rows), 255):  # sums that fit a byte are many times as fast
        out += np.add.reduce(rows[first : first + 255], 0, dtype=np.uint8)
    return torch.from_numpy(out)
