"""What a search found, and how it came there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

__all__ = ["Callback", "Individuals", "Result", "Seen"]


@dataclass
class Individuals:
    masks: Tensor
    """bool [n, genes]"""
    score: Tensor
    """float64 [n], larger is better."""
    quality: Tensor
    """float64 [n], larger is better: minus the loss, for a loss."""
    cost: Tensor | None
    """float64 [n], in its own unit; None if the fitness names none."""


@dataclass
class Seen:
    """Every individual that was evaluated, once each, in the order of evaluation; with Fitness(rotate=...) once for
    each part of the images that it met."""

    ids: list[str]
    """:func:`mask_id`"""
    quality: Tensor
    """float64 [n]"""
    cost: Tensor | None
    """float64 [n], in its own unit; None if the fitness names none."""


@dataclass
class Result:
    """Where a search is: after the last generation, or in a callback after the latest one.

    With Fitness(rotate=...), every generation has images of its own, on which the best and the front so far are
    measured anew, as are those of the old population that may stay. What a callback and the history show is of
    these images, so that neither the best nor the hypervolume only grows. After the last generation the population,
    the best and the front are measured on all images, and the best and the front are chosen anew among them.
    """

    best: Tensor
    """bool [genes]: the first one of the largest score, of all generations."""
    best_score: float
    best_quality: float
    best_cost: float | None
    population: Individuals
    front: Individuals
    """Of all that were evaluated, those that no other beats in both quality and cost, by ascending cost, one of each
    that are equal; without a cost the best alone."""
    seen: Seen
    history: list[dict[str, Any]]
    """One record per generation: generation (from 1), best (score so far) with its quality and cost, mean (score),
    diversity (how likely two different individuals differ in a gene), hypervolume (of the front; None without a cost),
    evaluations (different individuals so far), seconds (so far), mask (of the best so far, in hexadecimal digits: see
    :func:`fastkd.population.masks.from_hex`)."""
    generation: int
    generations: int
    evaluations: int
    full_cost: float | None
    """Of the full network, in the cost's own unit."""


Callback = Callable[[Result], object]
