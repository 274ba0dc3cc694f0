"""The qualities of an individual by name, and what each of them is: stated here, and nowhere else."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["QUALITIES", "Quality"]


class Quality(NamedTuple):
    """What a method of :class:`fastkd.PopulationEvaluator` gives.

    >>> [name for name, quality in QUALITIES.items() if quality.labels]
    ['accuracy', 'loss']
    """

    error: bool
    """Whether smaller is better. A fitness takes its negative."""
    share: bool
    """Whether it is a fraction of the images, in [0, 1], which is shown as a percentage."""
    labels: bool
    """Whether it needs the images' labels."""
    layers: bool
    """Whether it compares features of layers, which may be chosen."""


QUALITIES: dict[str, Quality] = {
    "accuracy": Quality(error=False, share=True, labels=True, layers=False),
    "loss": Quality(error=True, share=False, labels=True, layers=False),
    "agreement": Quality(error=False, share=True, labels=False, layers=False),
    "reconstruction": Quality(error=True, share=False, labels=False, layers=True),
    "lsp": Quality(error=True, share=False, labels=False, layers=True),
}
