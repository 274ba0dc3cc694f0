"""What an individual is worth: a named quality, and a named cost."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .._checks import is_integer, number
from ..population import QUALITIES, GeneSpace, PopulationEvaluator, compact
from ..population.batches import listed
from ..population.space import COSTS
from ..runtime import fingerprint
from ..runtime.measure import latency_ms
from .algorithms import Scores
from .limits import Limits

__all__ = ["QUALITIES", "Fitness", "FitnessError", "MaskFunction", "latency"]

MaskFunction = Callable[[Tensor], Tensor]
"""masks bool [P, genes] -> [P]"""


class FitnessError(ValueError):
    """A fitness that is no number; the message names the individual."""


class Fitness:
    """Quality against cost, as one number or as two objectives.

    >>> batches = [(torch.randn(8, 1, 6, 6), torch.randint(3, (8,)))]
    >>> both = Fitness("accuracy", batches, cost="macs", weight=0.5)  # accuracy + 0.5 * removed fraction of MACs
    >>> front = Fitness("agreement", batches, cost="macs")  # for "nsga2": a front of both
    >>> best = Fitness("accuracy", batches, budget={"macs": 0.4})  # the best with at most 40 % of the MACs

    The batches choose between individuals: they must be neither the validation nor the test split, on which results
    are reported, and had better not be those of :meth:`fastkd.PopulationEvaluator.calibrate`. They are read once and
    held: all individuals of a run are measured on the same images, or, with `rotate`, all those of a generation.

    Args:
        quality: "accuracy", "agreement" (with the full network), or an error, whose negative counts: "loss",
            "reconstruction" (of layers' features), "lsp" (local structure preservation among the images' features), see
            the methods of :class:`fastkd.PopulationEvaluator`; all but accuracy and loss need no labels. Or a callable:
            masks bool [P, genes] -> [P], larger is better, each row for itself.
        batches: of the fitness split, as for the method of :class:`fastkd.PopulationEvaluator` of that name; none for
            a callable.
        cost: "filters", "parameters", "macs", or a callable: masks -> [P], such as :func:`latency`.
        weight: lambda in the score; with 0 the cost is only recorded, and an objective.
        form: "removed": quality + weight * (1 - cost / cost of the full network), as published (arXiv:1707.08005);
            "cost": quality - weight * cost / cost of the full network.
        budget, k_min: another place to state those of :func:`fastkd.evolve.evolve`, which go into its
            :class:`fastkd.evolve.Limits`; nothing else is done with them here.
        layers: of "reconstruction" and "lsp"; None: as there.
        rotate: every generation is measured on the next so many images of `batches`, in their order, the first ones
            following the last; see :class:`fastkd.evolve.Result`. None: on all of them.
        reference: (quality, cost) from which the hypervolume counts, the cost relative to the full network; default
            (0, 1) for accuracy and agreement, else the worst of the first generation.

    Raises:
        TypeError, ValueError: an unknown name, a quality without its batches, a weight without a cost, more images to
            rotate than there are.
    """

    def __init__(
        self,
        quality: str | MaskFunction = "accuracy",
        batches: Iterable[Any] | None = None,
        *,
        cost: str | MaskFunction | None = None,
        weight: float = 0.0,
        form: str = "removed",
        budget: Mapping[str, float] | None = None,
        k_min: int | None = None,
        layers: Sequence[str] | None = None,
        rotate: int | None = None,
        reference: tuple[float, float] | None = None,
    ) -> None:
        if not callable(quality) and quality not in QUALITIES:
            raise ValueError(f"quality must be one of {', '.join(QUALITIES)}, or a callable, got {quality!r}")
        if cost is not None and not callable(cost) and cost not in COSTS:
            raise ValueError(f"cost must be one of {', '.join(COSTS)}, a callable, or None, got {cost!r}")
        if form not in ("removed", "cost"):
            raise ValueError(f"form must be 'removed' or 'cost', got {form!r}")
        number("weight", weight, 0)
        if weight and cost is None:
            raise ValueError(f"weight = {weight} needs a cost: one of {', '.join(COSTS)}, or a callable")
        if callable(quality) and batches is not None:
            raise ValueError("batches are for a quality by name, but quality is a callable")
        if not callable(quality) and batches is None:
            raise ValueError(f"quality = {quality!r} needs batches: a fitness split, apart from the validation split")
        comparing = [name for name, q in QUALITIES.items() if q.layers]
        if layers is not None and quality not in comparing:
            names = " or ".join(f'"{name}"' for name in comparing)
            raise ValueError(f"layers are for quality {names}, got {_name(quality)!r}")
        self.layers = None if layers is None else list(layers)
        self.batches = None if batches is None else list(listed(batches))
        if self.batches == []:
            raise ValueError("batches must have at least one batch of the fitness split, got none")
        self.rotate, self.images = rotate, 0
        if rotate is not None:
            if not is_integer(rotate):
                raise TypeError(f"rotate must be an int or None, got {rotate!r}")
            if self.batches is None:
                raise ValueError(f"rotate = {rotate} is for a quality by name, but quality is a callable")
            self.images = sum(len(_images(batch)) for batch in self.batches)
            if not 1 <= rotate <= self.images:
                raise ValueError(f"rotate must be in [1, {self.images}], the images of batches, got {rotate}")
        self.quality, self.cost, self.weight, self.form = quality, cost, float(weight), form
        self.budget, self.k_min, self.reference = budget, k_min, reference
        if reference is None and isinstance(quality, str) and QUALITIES[quality].share:
            self.reference = (0.0, 1.0)

    @property
    def columns(self) -> tuple[str, ...]:
        """Of what `measure` gives."""
        return ("quality",) if self.cost is None else ("quality", "cost")

    def identity(self) -> dict[str, Any]:
        """For JSON; data by a fingerprint."""
        return {
            "quality": _name(self.quality),
            "cost": _name(self.cost),
            "weight": self.weight,
            "form": self.form,
            "reference": self.reference,
            "layers": self.layers,
            "rotate": self.rotate,
            "data": None if self.batches is None else _fingerprint(self.batches),
        }

    def part(self, generation: int) -> int | None:
        """The first of the images that a generation, counted from 1, is measured on; None: on all of them."""
        if self.rotate is None or self.rotate == self.images:
            return None
        return (generation - 1) * self.rotate % self.images

    def on(self, part: int | None) -> Fitness:
        """The same, on `rotate` images from this one on; None: on all of them."""
        if part is None or self.rotate is None or self.batches is None:
            return self
        out = copy.copy(self)
        out.batches, at, end = [], 0, part + self.rotate
        for batch in 2 * self.batches:  # the first ones follow the last
            size = len(_images(batch))
            cut = slice(max(part - at, 0), min(end - at, size))
            if cut.start < cut.stop:
                out.batches.append(batch[cut] if isinstance(batch, Tensor) else tuple(x[cut] for x in batch))
            at += size
        return out

    def measure(self, evaluator: PopulationEvaluator | GeneSpace, limits: Limits, masks: Tensor) -> Tensor:
        """float64 [P, columns], on the CPU: the quality, larger is better, and the cost in its own unit.

        Raises:
            TypeError, ValueError: a callable that returns something else than [P].
        """
        if callable(self.quality):
            quality = _called("quality", self.quality, masks)
        elif isinstance(evaluator, PopulationEvaluator):
            layers = () if self.layers is None else (self.layers,)
            quality = getattr(evaluator, self.quality)(masks, self.batches, *layers)
            quality = -quality if QUALITIES[self.quality].error else quality
        else:
            raise TypeError(f"quality = {self.quality!r} needs a PopulationEvaluator, got {type(evaluator).__name__}")
        if self.cost is None:
            return quality[:, None]
        cost = (
            _called("cost", self.cost, masks)
            if callable(self.cost)
            else limits.costs(limits.counts(masks), self.cost).cpu()
        )
        return torch.stack((quality, cost.double()), 1)

    def full_cost(self, limits: Limits) -> float:
        """Of the full network."""
        if self.cost is None:
            return 1.0
        if not callable(self.cost):
            return float(limits.full[self.cost])
        full = float(_called("cost", self.cost, limits.space.ones(1)))
        if not 0 < full < float("inf"):
            raise FitnessError(f"cost of the full network must be positive and finite, got {full}")
        return full

    def scores(self, values: Tensor, full_cost: float) -> Scores:
        """Of float64 [P, columns] from `measure`."""
        quality = values[:, 0]
        if self.cost is None:
            return Scores(quality, -quality[:, None])
        cost = values[:, 1] / full_cost
        score = quality + self.weight * (1 - cost) if self.form == "removed" else quality - self.weight * cost
        return Scores(score, torch.stack((-quality, cost), 1))


def latency(model: nn.Module, example_input: Tensor, *, repeats: int = 10) -> MaskFunction:
    """A cost: milliseconds of a forward pass of the compact network, the median of `repeats`.

    A measurement, and so not the same twice; a run remembers it with the individual. State the batch size
    of `example_input`, and the number of threads, with every figure.

    >>> model = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.Flatten(), torch.nn.Linear(64, 3)).eval()
    >>> cost = latency(model, torch.randn(1, 1, 6, 6), repeats=2)
    >>> bool((cost(torch.ones(2, 4, dtype=torch.bool)) > 0).all())
    True
    """

    def milliseconds(masks: Tensor) -> Tensor:
        # One network at a time is what is measured.
        return torch.tensor(
            [latency_ms(compact(model, mask, example_input), (example_input,), repeats) for mask in masks],
            dtype=torch.float64,
        )

    milliseconds.__qualname__ = f"latency(batch={len(example_input)}, repeats={repeats})"
    return milliseconds


def _called(what: str, function: MaskFunction, masks: Tensor) -> Tensor:
    out: object = function(masks)
    if not isinstance(out, Tensor):
        raise TypeError(f"{what} must return a tensor of shape [{len(masks)}], got {type(out).__name__}")
    if out.shape != masks.shape[:1]:
        raise ValueError(f"{what} must return a tensor of shape [{len(masks)}], got {list(out.shape)}")
    return out.detach().cpu().double()


def _name(function: str | MaskFunction | None) -> str | None:
    if function is None or isinstance(function, str):
        return function
    name = getattr(function, "__qualname__", type(function).__qualname__)
    return f"{getattr(function, '__module__', '')}.{name}"


def _images(batch: Any) -> Tensor:
    x = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
    if not isinstance(x, Tensor):
        raise TypeError(f"rotate needs batches of tensors x, or of (x, y), got {type(x).__name__}")
    return x


def _fingerprint(batches: list[Any]) -> str:
    tensors = [x for batch in batches for x in (batch if isinstance(batch, (tuple, list)) else (batch,))]
    return fingerprint.of_tensors(
        *(part for x in tensors if isinstance(x, Tensor) for part in (f"{list(x.shape)} {x.dtype}", x))
    )
