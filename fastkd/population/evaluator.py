"""The quality of every individual of a population of masks, evaluated together."""

from __future__ import annotations

import bisect
import copy
import hashlib
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import _ops
from ..graph import Graph
from ..kernels import RBF
from ..lsp import lsp_loss
from .lower import Program, feature_sizes, lower, lower_features
from .space import Op
from .trace import trace

__all__ = ["PopulationEvaluator", "Stats"]

Batches = Iterable[Any]
Progress = Callable[[int, int], object]
_Done = Callable[[slice, "list[float]"], None]
PIECE = 768  # images of one native call, at most; a multiple of what its blocks and threads like
# Multiplications of one native call, about: some half second or less, after which Ctrl-C is heard.
WORK = {"cpu": 2e10, "cuda": 1e13}
RATE = 4e10  # multiplications per second and thread that `explain` predicts with


@dataclass
class Stats:
    """Counts of individuals since construction."""

    asked: int = 0
    computed: int = 0
    remembered: int = 0
    """Found in the memo."""
    duplicates: int = 0
    """Equal to another one of the same call."""


@dataclass
class _Call:
    individuals: int
    images: int
    macs: int
    seconds: float


class PopulationEvaluator:
    """Evaluates many individuals at once: one network, and for each a mask over its channels.

    An individual is the physically smaller network of its mask (see :func:`fastkd.compact`), with the weights of the
    full one. What its mask removes is neither read nor computed, and individuals that agree on their first layers
    share these. Results do not depend on the other individuals, on their order, on how the work is cut, or on the
    number of threads: bit for bit.

    It runs where the model is: on the CPU in float32 or float64, on a CUDA device also in float16 and bfloat16 (sums
    are in float32, the classes' scores are rounded to the model's dtype). There, float32 uses TF32 where torch's own
    convolutions may (``torch.backends.cudnn.allow_tf32``).

    Args:
        model: in evaluation mode. Its weights are copied: changing them later has no effect.
        example_input: [N, C, ...] of the dtype and on the device of the model, as for
            :func:`fastkd.population.trace`.
        bn: "inherit" takes the model's running statistics, "recalibrate" computes them anew for each individual;
            see :meth:`calibrate`.
        memo: remember qualities by mask, data, and batch-norm mode over calls.
        memory_limit: bytes that a call may take beyond its arguments, with its result; by default, a quarter of
            what is free (on the device) when it begins. `batches` that come one by one (a DataLoader) are held
            during a call, and count as arguments.

    Attributes:
        space: the :class:`fastkd.population.GeneSpace`; masks are bool [P, space.num_genes].
        stats: how many individuals were asked for, computed, remembered.
        weights: a fingerprint of the copied weights.

    Raises:
        TypeError, ValueError: as `trace`; arguments that are not as above.
        UnsupportedModelError: as `trace`, and for operations that have no kernel; they are named, with the line of the
            model.
        NotImplementedError: a model on a device that is neither a CPU nor CUDA.
        RuntimeError: a model on a CUDA device with a build of fastkd for the CPU alone.
    """

    def __init__(
        self,
        model: nn.Module,
        example_input: Tensor,
        *,
        bn: Literal["inherit", "recalibrate"] = "inherit",
        memo: bool = True,
        memory_limit: int | None = None,
    ) -> None:
        if bn not in ("inherit", "recalibrate"):
            raise ValueError(f'bn must be "inherit" or "recalibrate", got {bn!r}')
        if memory_limit is not None:
            if isinstance(memory_limit, bool) or not isinstance(memory_limit, int):
                raise TypeError(f"memory_limit must be an int or None, got {memory_limit!r}")
            if memory_limit < 1:
                raise ValueError(f"memory_limit must be at least 1, got {memory_limit}")
        if isinstance(example_input, Tensor):
            where, dtype = example_input.device, example_input.dtype
            if where.type not in ("cpu", "cuda"):
                raise NotImplementedError(
                    f"the population evaluator runs on CPUs and CUDA devices, but example_input is on {where}"
                )
            if example_input.is_floating_point() and not _ops.runs(where, dtype):
                raise TypeError(f"example_input and the model must be float32 or float64 on {where}, got {dtype}")
        self.space = trace(model, example_input)
        self.device = example_input.device
        self.bn, self.memo, self.memory_limit = bn, memo, memory_limit
        self.dtype, self.shape = example_input.dtype, self.space.values[0].shape
        self.stats = Stats()
        self.weights = _hash(*(x.detach().cpu() for _, x in sorted(model.state_dict().items()))).hex()[:16]
        self._program: Program = lower(self.space)
        self._network = _ops.Network(
            self._program.values,
            self._program.nodes,
            self.space.num_genes,
            self.dtype,
            self._program.output,
            self.device,
        )
        self._calibration: list[Tensor] = []
        self._calibrated_on = b""
        self._known: dict[tuple[str, str, bytes, bytes], dict[bytes, float]] = {}
        self._full: tuple[bytes, Tensor] | None = None
        self._values: tuple[int, ...] = ()  # whose features are the output, if they are
        self._upto: dict[tuple[int, ...], PopulationEvaluator] = {}
        self._last: _Call | None = None

    def calibrate(self, batches: Batches) -> None:
        """Sets the batches with which bn="recalibrate" computes statistics, once for all individuals.

        For every individual they are run as in training, and running means and (unbiased) variances are averaged over
        batches, as nn.BatchNorm2d does with momentum=None. They belong to the training data: never give those that
        choose between individuals (validation), nor those that report (test).

        Args:
            batches: of (x, ...) or x; copied. A batch is one: its size matters.

        Raises:
            ValueError: no batch, one without images, or one with a single value per channel.
        """
        if self.bn != "recalibrate":
            raise ValueError('calibrate is for bn="recalibrate", but this evaluator has bn="inherit"')
        held = [x.clone() for x in _images(batches, self._check)]
        if not held:
            raise ValueError("batches must have at least one batch, got none")
        for x in held:
            for v, shape in ((v, self._network.shapes[v]) for v in self._program.batch_norms):
                if len(x) * shape[1] * shape[2] < 2:
                    raise ValueError(
                        f"batches must have more than one value per channel at {self._program.name[v]}, "
                        f"got a batch of {len(x)} image"
                    )
        self._calibration, self._calibrated_on = held, _hash(*(t for x in held for t in (_size(x), x)))

    def identity(self) -> dict[str, Any]:
        """All that a quality depends on beside masks and data, for JSON: to be compared, not read."""
        return {
            "weights": self.weights,
            "genes": self.space.num_genes,
            "dtype": str(self.dtype),
            "bn": self.bn,
            "calibration": self._calibrated_on.hex()[:16],
        }

    # --- results -----------------------------------------------------------------------------------------

    def logits(self, masks: Tensor, x: Tensor, *, progress: Progress | None = None) -> Tensor:
        """masks bool [P, genes], x [N, C, ...] -> [P, N, classes], what the model returns for each.

        Args:
            progress: called with (done, total) from time to time, in forward passes of an image.
        """
        masks = self._masks(masks)
        data = _Data([self._check(x)])
        keys, first, inverse = _distinct(masks)
        self.stats.asked += len(masks)
        self.stats.duplicates += len(masks) - len(keys)
        out = torch.empty(
            len(masks), data.images, *self.space.values[self.space.output].shape, dtype=self.dtype, device=self.device
        )

        def take(rows: slice, at: slice, y: Tensor) -> None:
            out[rows, at] = y

        self._evaluate(masks[first], data, take, progress, held=out.nbytes)
        self.stats.computed += len(keys)
        if not np.array_equal(inverse, np.arange(len(masks))):
            out = out[torch.from_numpy(inverse).to(self.device)]
        return out

    def accuracy(self, masks: Tensor, batches: Batches, *, progress: Progress | None = None) -> Tensor:
        """float64 [P]: the fraction of images whose label has the largest output.

        Args:
            masks: bool [P, genes].
            batches: of (x, y) with labels int64 [N].
            progress: called with (done, total) from time to time, in forward passes of an image.
        """
        return self._quality("accuracy", masks, _Data.labelled(batches, self._check, self._classes()), progress)

    def loss(self, masks: Tensor, batches: Batches, *, progress: Progress | None = None) -> Tensor:
        """float64 [P]: the mean cross entropy over images, summed in their order in float64."""
        return self._quality("loss", masks, _Data.labelled(batches, self._check, self._classes()), progress)

    def agreement(self, masks: Tensor, batches: Batches, *, progress: Progress | None = None) -> Tensor:
        """float64 [P]: the fraction of images for which the model as given predicts the same class.

        The model's own predictions are with its own batch-norm statistics, whatever `bn` is.

        Args:
            batches: of x, or of (x, y), where y is not looked at.
        """
        self._classes()
        data = _Data(list(_images(batches, self._check)))
        self._masks(masks)
        fingerprint = data.fingerprint()
        if self._full is None or self._full[0] != fingerprint or not self.memo:
            y = torch.empty(data.images, dtype=torch.int64, device=self.device)

            def take(rows: slice, at: slice, logits: Tensor) -> None:
                y[at] = logits[0].argmax(1)

            self._evaluate(self.space.ones(1), data, take, None, inherit=True)
            self._full = fingerprint, y.cpu()
        data.y = self._full[1]
        return self._quality("agreement", masks, data, progress)

    def features(
        self, masks: Tensor, x: Tensor, layers: Sequence[str] | None = None, *, progress: Progress | None = None
    ) -> Tensor:
        """masks bool [P, genes], x [N, C, ...] -> [P, N, D]: what layers give, with the batch norm and the activation
        that follow them, one layer after the other; zeros where a channel is removed.

        Maps of more than 4 x 4 positions are averaged to so many.

        Args:
            layers: names of convolutions or linear layers; None: all but the last.
        """
        masks, data = self._masks(masks), _Data([self._check(x)])
        inner, sizes = self._inner(layers)
        out = torch.empty(len(masks), data.images, sum(sizes), dtype=self.dtype, device=self.device)

        def take(rows: slice, at: slice, y: Tensor) -> None:
            out[rows, at] = y

        inner._evaluate(masks, data, take, progress, held=out.nbytes)
        return out

    def reconstruction(
        self, masks: Tensor, batches: Batches, layers: Sequence[str] | None = None, *, progress: Progress | None = None
    ) -> Tensor:
        """float64 [P]: how far the features of layers are from the model's own, with its own statistics: the squared
        distance over the squared norm, of all images together, mean over layers. 0 for the full network without
        recalibration.

        Args:
            batches: of x, or of (x, y), where y is not looked at.
            layers: as for :meth:`features`.
        """
        inner, sizes = self._inner(layers)
        data = _Data(list(_images(batches, self._check)))
        full = self._own_features(inner, data)
        norms = np.array([float(f.double().square().sum()) for f in full.split(sizes, 1)])

        def compute(masks: Tensor, done: _Done) -> None:
            sums = np.zeros((len(masks), len(sizes)))

            def take(rows: slice, at: slice, y: Tensor) -> None:
                for k, (a, b) in enumerate(zip(y.split(sizes, 2), full[at].split(sizes, 1), strict=True)):
                    each = (a.double() - b.double()).square_().sum(2).cpu().numpy()
                    # One after the other, so that the sum does not depend on where the images are cut.
                    sums[rows, k] = np.add.accumulate(np.concatenate((sums[rows, k, None], each), 1), 1)[:, -1]
                if at.stop == data.images:
                    done(rows, (sums[rows] / np.maximum(norms, 1e-300)).mean(1).tolist())

            # float64 copies of one layer at a time, by the numbers of all of them
            inner._evaluate(masks, data, take, progress, extra=-(-24 * max(sizes) // sum(sizes)), held=full.nbytes)

        return self._remembered(f"reconstruction {inner._values}", masks, data, compute)

    def lsp(
        self,
        masks: Tensor,
        batches: Batches,
        layers: Sequence[str] | None = None,
        *,
        k: int = 10,
        progress: Progress | None = None,
    ) -> Tensor:
        """float64 [P]: the local structure preserving loss of features (:func:`fastkd.lsp_loss`), the model's own ones
        teaching. The graph joins every image to the k whose features are nearest in the model; the kernel is RBF, its
        sigma half the mean squared distance of neighbours.

        Args:
            batches: of x, or of (x, y), where y is not looked at; at least two images.
            layers: as for :meth:`features`; None: the input of the last layer.
        """
        inner, sizes = self._inner(layers, last=True)
        data = _Data(list(_images(batches, self._check)))
        n = data.images
        if n < 2:
            raise ValueError("batches must have at least two images, of which one is the other's neighbour, got 1")
        full = self._own_features(inner, data).float()
        graph = Graph.from_knn(full, min(k, n - 1))
        source, destination = graph.edge_index
        distance = (full[source].double() - full[destination].double()).square().mean(1).mean()
        kernel = RBF(sigma=max(float(distance) / 2, 1e-12), scale="mean")

        def compute(masks: Tensor, done: _Done) -> None:
            limit = _free_bytes(self.device) // 4 if self.memory_limit is None else self.memory_limit
            most = max(1, limit // max(24 * n * sum(sizes), 1))
            for start in range(0, len(masks), most):
                own = masks[start : start + most]
                y = torch.empty(len(own), n, sum(sizes), device=self.device)

                def take(rows: slice, at: slice, values: Tensor, y: Tensor = y) -> None:
                    y[rows, at] = values.float()

                inner._evaluate(own, data, take, progress, held=full.nbytes + y.nbytes)
                # One graph per individual, side by side.
                offset = (n * torch.arange(len(own), device=self.device))[:, None]
                edges = torch.stack([(offset + e).flatten() for e in (source, destination)])
                losses = lsp_loss(y.flatten(0, 1), full.repeat(len(own), 1), edges, kernel=kernel, reduction="none")
                each = losses.double().view(len(own), n).cpu().numpy()
                done(slice(start, start + len(own)), (np.add.accumulate(each, 1)[:, -1] / n).tolist())

        return self._remembered(f"lsp {k} {inner._values}", masks, data, compute)

    def _inner(self, layers: Sequence[str] | None, last: bool = False) -> tuple[PopulationEvaluator, list[int]]:
        """An evaluator whose output is the features of layers, and how many numbers each gives."""
        made = {op.name: op.output for op in self.space.ops if op.kind in ("conv", "linear")}
        consumers: dict[int, list[Op]] = {}
        for op in self.space.ops:
            for i in op.inputs:
                consumers.setdefault(i, []).append(op)

        def activated(v: int) -> int:
            while len(next_ones := consumers.get(v, [])) == 1 and next_ones[0].kind in (
                "batch_norm",
                "prelu",
                "elementwise",
            ):
                v = next_ones[0].output
            return v

        if isinstance(layers, str) or (layers is not None and not layers):
            raise ValueError(f"layers must be names of one layer or more, got {layers!r}")
        for name in layers or ():
            if name not in made:
                raise ValueError(f"layers must be of {', '.join(made)}, got {name!r}")
        if layers is None:
            final = next(op for op in reversed(self.space.ops) if op.kind in ("conv", "linear"))
            values = [final.inputs[0]] if last else [activated(v) for name, v in made.items() if name != final.name]
        else:
            values = [activated(made[name]) for name in layers]
        values = [v for v in values if v != 0]
        if not values:
            raise ValueError("the model has no layer before its last one, whose features could be compared")
        key = tuple(values)
        if key not in self._upto:
            inner = copy.copy(self)
            inner._values = key
            inner._program = lower_features(self.space, values)
            inner._network = _ops.Network(
                inner._program.values,
                inner._program.nodes,
                self.space.num_genes,
                self.dtype,
                inner._program.output,
                self.device,
            )
            self._upto[key] = inner
        inner = self._upto[key]
        inner._calibration, inner._calibrated_on, inner.memory_limit = (
            self._calibration,
            self._calibrated_on,
            self.memory_limit,
        )
        return inner, feature_sizes(self.space, values)

    def _own_features(self, inner: PopulationEvaluator, data: _Data) -> Tensor:
        """[N, D], of the model as given."""
        out = torch.empty(data.images, *inner._program.shape, dtype=self.dtype, device=self.device)

        def take(rows: slice, at: slice, y: Tensor) -> None:
            out[at] = y[0]

        inner._evaluate(self.space.ones(1), data, take, None, inherit=True, held=out.nbytes)
        return out

    def _remembered(self, name: str, masks: Tensor, data: _Data, compute: Callable[[Tensor, _Done], None]) -> Tensor:
        """float64 [P]. `compute` is given those masks that are not known yet, and tells the values of rows of them."""
        masks = self._masks(masks)
        keys, first, inverse = _distinct(masks)
        known: dict[bytes, float] = {}
        if self.memo:
            which = name, self.bn, self._calibrated_on, data.fingerprint()
            known = self._known.setdefault(which, known)
        new = [k for k, key in enumerate(keys) if key not in known]
        self.stats.asked += len(masks)
        self.stats.duplicates += len(masks) - len(keys)
        self.stats.remembered += len(keys) - len(new)
        if new:

            def done(rows: slice, values: list[float]) -> None:
                known.update(zip((keys[k] for k in new[rows]), values, strict=True))
                self.stats.computed += len(values)

            compute(masks[first[new]], done)
        return torch.tensor([known[key] for key in keys], dtype=torch.float64)[torch.from_numpy(inverse)]

    def _quality(self, name: str, masks: Tensor, data: _Data, progress: Progress | None) -> Tensor:
        def compute(masks: Tensor, done: _Done) -> None:
            sums = np.zeros(len(masks), np.float64 if name == "loss" else np.int64)

            def take(rows: slice, at: slice, logits: Tensor) -> None:
                assert data.y is not None
                y = data.y[at].to(self.device).expand(len(logits), -1)
                if name == "loss":
                    each = F.cross_entropy(logits.double().flatten(0, 1), y.flatten(), reduction="none")
                    # One after the other, so that the sum does not depend on where the images are cut.
                    terms = np.concatenate((sums[rows, None], each.reshape(y.shape).cpu().numpy()), 1)
                    sums[rows] = np.add.accumulate(terms, 1)[:, -1]
                else:
                    sums[rows] += (logits.argmax(2) == y).sum(1).cpu().numpy()
                if at.stop == data.images:
                    done(rows, (sums[rows] / data.images).tolist())

            # float64 copies of the logits, before and after the softmax
            self._evaluate(masks, data, take, progress, extra=16 if name == "loss" else 0)

        return self._remembered(name, masks, data, compute)

    # --- running -----------------------------------------------------------------------------------------

    def _evaluate(
        self,
        masks: Tensor,
        data: _Data,
        take: Callable[[slice, slice, Tensor], None],
        progress: Progress | None,
        *,
        extra: int = 0,
        held: int = 0,
        inherit: bool = False,
    ) -> None:
        """take(individuals, images, outputs), individuals in chunks, each with all images in order."""
        recalibrate = self.bn == "recalibrate" and not inherit and bool(self._program.batch_norms)
        if recalibrate and not self._calibration:
            raise ValueError('bn="recalibrate" needs calibrate(batches) first')
        start = time.perf_counter()
        macs = self.space.macs(masks).double()
        individuals, images = self._cut(len(masks), data.images, float(macs.mean()), recalibrate, extra, held)
        passes = data.images + sum(len(x) for x in self._calibration) * recalibrate
        done, total = 0, len(masks) * passes
        for first in range(0, len(masks), individuals):
            rows = slice(first, min(first + individuals, len(masks)))
            own = masks[rows]
            affines = self._recalibrated(own) if recalibrate else None
            done += len(own) * (passes - data.images)
            for at, x in data.pieces(images):
                take(rows, at, self._program.finish(self._network(own, self._maps(x), affines, agree=True)))
                done += len(own) * (at.stop - at.start)
                if progress is not None:
                    progress(done, total)
        self._last = _Call(len(masks), data.images, int(macs.sum()) * passes, time.perf_counter() - start)

    def _cut(
        self, individuals: int, images: int, macs: float, recalibrate: bool, extra: int, held: int
    ) -> tuple[int, int]:
        """How many individuals, and how many images, one native call has."""
        limit = _free_bytes(self.device) // 4 if self.memory_limit is None else self.memory_limit
        size = torch.finfo(self.dtype).bits // 8
        outputs = int(np.prod(self._network.shapes[self._network.output]))
        outputs *= size * (1 + bool(self._program.softmax)) + extra
        alone = 2 * self.space.num_genes + 64  # the mask, and its copy that is sorted
        batches = sorted({len(x) for x in self._calibration}) if recalibrate else []
        if recalibrate:
            channels = sum(self._network.shapes[v][0] for v in self._network.norms)
            alone += channels * (4 * 8 + 4 * 8 + 2 * 8)  # moments of a batch, their sums, what is made of them

        def need(n: int, p: int = 1) -> int:
            runs = [self._network.bytes(n, False, p), *(self._network.bytes(b, True, p) for b in batches)]
            return held + max(runs) + p * (alone + n * outputs)

        n = min(images, PIECE)
        while n > 1 and need(n) > limit:
            n = -(-n // 2)
        if need(n) > limit:
            what = f"one individual needs {need(n):,}"
            if held:
                what += f", of which the result takes {held:,}"
            which = "memory_limit" if self.memory_limit is not None else "memory_limit (a quarter of what is free)"
            raise ValueError(f"{which} = {limit:,} bytes is too small: {what}")
        most = min(individuals, max(16, int(WORK[self.device.type] / max(macs * n, 1))))
        return max(1, bisect.bisect_right(range(1, most + 1), limit, key=lambda p: need(n, p))), n

    def _recalibrated(self, masks: Tensor) -> list[tuple[Tensor, Tensor] | None]:
        """Scale and shift of every norm, each [P, channels], from the calibration batches."""
        norms = self._network.norms
        mean = {
            v: torch.zeros(len(masks), self._network.shapes[v][0], dtype=torch.float64, device=self.device)
            for v in norms
        }
        variance = {v: torch.zeros_like(m) for v, m in mean.items()}
        for x in self._calibration:
            for v, (m, s) in zip(norms, self._network.moments(masks, self._maps(x)), strict=True):
                n = len(x) * self._network.shapes[v][1] * self._network.shapes[v][2]
                mean[v] += m
                variance[v] += s * (n / max(n - 1, 1))
        out: list[tuple[Tensor, Tensor] | None] = []
        for v in norms:
            if v not in self._program.batch_norms:
                out.append(None)
                continue
            scale, shift = self._program.affine(
                v, mean[v] / len(self._calibration), variance[v] / len(self._calibration)
            )
            out.append((scale.to(self._network.acc), shift.to(self._network.acc)))
        return out

    def _maps(self, x: Tensor) -> Tensor:
        return x.reshape(len(x), *self._network.shapes[0])

    # --- checks ------------------------------------------------------------------------------------------

    def _masks(self, masks: Tensor) -> Tensor:
        return self.space.check(masks).cpu()

    def _classes(self) -> int:
        shape = self.space.values[self.space.output].shape
        if len(shape) != 1:
            raise ValueError(
                f"the model must return [N, classes] for this, but returns [N, {', '.join(map(str, shape))}]"
            )
        return shape[0]

    def _check(self, x: Any, name: str = "x") -> Tensor:
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
        if x.device != self.device:
            raise ValueError(f"{name} must be on {self.device} as the model is, got {x.device}")
        if x.dtype != self.dtype:
            raise TypeError(f"{name} must be {self.dtype} as the model is, got {x.dtype}")
        if x.shape[1:] != self.shape:
            raise ValueError(f"{name} must have shape [N, {', '.join(map(str, self.shape))}], got {list(x.shape)}")
        if len(x) == 0:
            raise ValueError(f"{name} must have at least one image, got N = 0")
        return x.detach()

    # --- printing ----------------------------------------------------------------------------------------

    def explain(self, masks: Tensor, *, rate: float = RATE) -> str:
        """How a population is evaluated, a line per step, with the multiplications for one image.

        The columns are the multiplications of all individuals as whole networks, after skipping what the masks remove,
        and after sharing what equal beginnings have in common (in one piece; where a call is cut, a little less).

        Args:
            rate: multiplications per second and thread, for the predicted time.
        """
        masks = torch.unique(self._masks(masks), dim=0)
        lines: list[tuple[str, ...]] = [("operation", "kernel", "result", "kept", "whole", "masked", "shared")]
        totals = np.zeros(3, np.int64)
        for step in self._program.steps(self._network, masks.numpy()):
            totals += step.macs
            numbers = [f"{n:,}" if n else "" for n in step.macs]
            lines.append((step.name, step.kernel, "x".join(map(str, step.shape)), f"{step.kept:.1f}", *numbers))
        lines.append(("total", "", "", "", *(f"{n:,}" for n in totals.tolist())))
        wide = [max(len(line[i]) for line in lines) for i in range(7)]
        text = [
            "  ".join(
                c.ljust(w) if i < 2 else c.rjust(w) for i, (c, w) in enumerate(zip(line, wide, strict=True))
            ).rstrip()
            for line in lines
        ]
        whole, masked, shared = (max(int(n), 1) for n in totals)
        threads = torch.get_num_threads()
        text += [
            f"{len(masks)} distinct individuals; saved by masks {whole / masked:.2f}x, by sharing "
            f"{masked / shared:.2f}x, together {whole / shared:.2f}x",
            f"predicted: {shared / (rate * threads) * 1e3:.3g} ms per image, at {rate / 1e9:g} G multiplications "
            f"per second on each of {threads} threads",
        ]
        if self._last is not None:
            c = self._last
            text.append(
                f"last call: {c.individuals} individuals, {c.images} images, {c.seconds:.3g} s, "
                f"{c.macs / max(c.seconds, 1e-9) / 1e9:.3g} G multiplications per second (masked)"
            )
        return "\n".join(text)


# --- data ------------------------------------------------------------------------------------------------


class _Data:
    """Batches as one row of images."""

    def __init__(self, x: Sequence[Tensor], y: Tensor | None = None) -> None:
        if not x:
            raise ValueError("batches must have at least one batch, got none")
        self.x, self.y = [t.contiguous() for t in x], y
        self.ends = list(itertools.accumulate(len(t) for t in x))
        self.images = self.ends[-1]

    @classmethod
    def labelled(cls, batches: Batches, check: Callable[..., Tensor], classes: int) -> _Data:
        xs, ys = [], []
        for k, batch in enumerate(_listed(batches)):
            if not isinstance(batch, (tuple, list)) or len(batch) != 2:
                raise TypeError(f"batches[{k}] must be a pair (x, y), got {type(batch).__name__}")
            x, y = check(batch[0], f"x of batches[{k}]"), batch[1]
            if not isinstance(y, Tensor) or y.dtype != torch.int64:
                raise TypeError(
                    f"y of batches[{k}] must be a torch.int64 tensor, got "
                    f"{y.dtype if isinstance(y, Tensor) else type(y).__name__}"
                )
            if y.shape != x.shape[:1]:
                raise ValueError(f"y of batches[{k}] must have shape [{len(x)}] as x has images, got {list(y.shape)}")
            low, high = y.min().item(), y.max().item()
            if low < 0 or high >= classes:
                raise ValueError(f"y of batches[{k}] must be in [0, {classes - 1}], got {low if low < 0 else high}")
            xs.append(x)
            ys.append(y.cpu())
        return cls(xs, torch.cat(ys) if ys else None)

    def pieces(self, most: int) -> Iterator[tuple[slice, Tensor]]:
        """(which images, the images), about equally many."""
        count = -(-self.images // most)
        for k in range(count):
            a, b = self.images * k // count, self.images * (k + 1) // count
            parts = []
            i, at = bisect.bisect_right(self.ends, a), a
            while at < b:
                start, end = self.ends[i] - len(self.x[i]), min(self.ends[i], b)
                parts.append(self.x[i][at - start : end - start])
                i, at = i + 1, end
            yield slice(a, b), parts[0] if len(parts) == 1 else torch.cat(parts)

    def fingerprint(self) -> bytes:
        return _hash(*self.x, *(() if self.y is None else (self.y,)))


def _listed(batches: Any) -> Iterable[Any]:
    """A tensor, or one pair of tensors, is one batch."""
    if isinstance(batches, Tensor) or (
        isinstance(batches, tuple)
        and len(batches) == 2
        and isinstance(batches[0], Tensor)
        and isinstance(batches[1], Tensor)
        and batches[1].dim() == 1
    ):
        return [batches]
    if not isinstance(batches, Iterable):
        raise TypeError(f"batches must be an iterable, got {type(batches).__name__}")
    return batches


def _images(batches: Batches, check: Callable[..., Tensor]) -> Iterator[Tensor]:
    for k, batch in enumerate(_listed(batches)):
        if isinstance(batch, (tuple, list)) and batch:
            batch = batch[0]
        yield check(batch, f"x of batches[{k}]")


def _size(x: Tensor) -> Tensor:
    return torch.tensor(x.shape)


def _hash(*tensors: Tensor) -> bytes:
    h = hashlib.sha256()
    for t in tensors:
        h.update(t.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return h.digest()


def _distinct(masks: Tensor) -> tuple[list[bytes], np.ndarray, np.ndarray]:
    """Different rows as bytes, in the order of their genes; where each is first; which one each row is.

    Rows that agree on their first genes are neighbours, so that they come into the same chunk.
    """
    rows = [row.tobytes() for row in np.packbits(masks.numpy(), axis=1)]
    first: dict[bytes, int] = {}
    for k, row in enumerate(rows):
        first.setdefault(row, k)
    keys = sorted(first)
    place = {key: k for k, key in enumerate(keys)}
    return keys, np.array([first[key] for key in keys]), np.array([place[row] for row in rows])


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":  # what torch has taken and does not use is free, too
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return 8 << 30  # unknown
