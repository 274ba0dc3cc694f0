"""The quality of every individual of a population of masks, evaluated together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import _ops
from .._checks import integer
from ..graph import Graph
from ..kernels import RBF
from ..lsp import lsp_loss
from ..runtime import fingerprint
from .batches import Batches, Data, images_of
from .engine import Engine, Progress, Take, memory_allowed
from .explain import explanation
from .lower import feature_sizes, feature_values, lower, lower_features
from .masks import distinct
from .memo import Memo, Stats
from .quality import QUALITIES
from .space import GeneSpace
from .trace import check_model, space_of

__all__ = ["PopulationEvaluator"]

_Done = Callable[[slice, "list[float]"], None]
RATE = 4e10  # multiplications per second and thread that `explain` predicts with


class PopulationEvaluator:
    """Evaluates many individuals at once: one network, and for each a mask over its channels.

    An individual is the physically smaller network of its mask (see :func:`fastkd.compact`), with the weights of the
    full one. What its mask removes is neither read nor computed, and individuals that agree on their first layers
    share these. Results do not depend on the other individuals, on their order, on how the work is cut, or on the
    number of threads: bit for bit.

    It runs where the model is: on the CPU in float32 or float64, on a CUDA device also in float16 and bfloat16 (sums
    are in float32, the classes' scores are rounded to the model's dtype). There, float32 uses TF32 where torch's own
    convolutions may (``torch.backends.cudnn.allow_tf32``).

    >>> import fastkd, torch
    >>> model = torch.nn.Sequential(
    ...     torch.nn.Conv2d(1, 4, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(64, 3)
    ... ).eval()
    >>> images, labels = torch.randn(10, 1, 6, 6), torch.randint(3, (10,))
    >>> evaluator = fastkd.PopulationEvaluator(model, images)
    >>> masks = evaluator.space.repair(evaluator.space.random(5, 0.5))
    >>> evaluator.logits(masks, images).shape
    torch.Size([5, 10, 3])
    >>> evaluator.accuracy(masks, (images, labels)).shape
    torch.Size([5])

    Args:
        model: in evaluation mode. Its weights are copied: changing them later has no effect.
        example_input: [N, C, ...] of the dtype and on the device of the model, as for
            :func:`fastkd.population.trace`; or what that gave for this model, whose `l1` is read anew.
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
        example_input: Tensor | GeneSpace,
        *,
        bn: Literal["inherit", "recalibrate"] = "inherit",
        memo: bool = True,
        memory_limit: int | None = None,
    ) -> None:
        if bn not in ("inherit", "recalibrate"):
            raise ValueError(f'bn must be "inherit" or "recalibrate", got {bn!r}')
        if memory_limit is not None:
            integer("memory_limit", memory_limit, 1)
        example: Any = example_input
        if isinstance(example_input, GeneSpace):
            example = next(model.parameters(), torch.empty(0))
        if isinstance(example, Tensor):
            where, dtype = example.device, example.dtype
            if where.type not in ("cpu", "cuda"):
                raise NotImplementedError(
                    f"the population evaluator runs on CPUs and CUDA devices, but example_input is on {where}"
                )
            if example.is_floating_point() and not _ops.runs(where, dtype):
                raise TypeError(f"example_input and the model must be float32 or float64 on {where}, got {dtype}")
        self.space = space_of(model, example_input)
        if isinstance(example_input, GeneSpace):
            check_model(model, example)
            self.space.refresh()
        self.device, self.dtype, self.shape = example.device, example.dtype, self.space.values[0].shape
        self.bn, self.memo, self.memory_limit = bn, memo, memory_limit
        self.stats = Stats()
        self.weights = fingerprint.of_tensors(*(x for _, x in sorted(model.state_dict().items())))
        self._engine = Engine(self.space, lower(self.space), self.dtype, self.device)
        self._inner: dict[tuple[int, ...], Engine] = {}  # up to some values
        self._calibration: list[Tensor] = []
        self._calibrated_on = ""
        self._known = Memo(1, self.stats)
        self._full: tuple[str, Tensor] | None = None  # the data's fingerprint, and the model's own classes

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
        held = [x.clone() for x in images_of(batches, self._check)]
        if not held:
            raise ValueError("batches must have at least one batch, got none")
        program, shapes = self._engine.program, self._engine.network.shapes
        for x in held:
            for v, shape in ((v, shapes[v]) for v in program.batch_norms):
                if len(x) * shape[1] * shape[2] < 2:
                    raise ValueError(
                        f"batches must have more than one value per channel at {program.name[v]}, "
                        f"got a batch of {len(x)} image"
                    )
        self._calibration = held
        self._calibrated_on = fingerprint.of_tensors(*(part for x in held for part in (torch.tensor(x.shape), x)))

    def identity(self) -> dict[str, Any]:
        """All that a quality depends on beside masks and data, for JSON: to be compared, not read."""
        return {
            "weights": self.weights,
            "genes": self.space.num_genes,
            "dtype": str(self.dtype),
            "bn": self.bn,
            "calibration": self._calibrated_on,
        }

    # --- results -----------------------------------------------------------------------------------------

    def logits(self, masks: Tensor, x: Tensor, *, progress: Progress | None = None) -> Tensor:
        """masks bool [P, genes], x [N, C, ...] -> [P, N, classes], what the model returns for each.

        Args:
            progress: called with (done, total) from time to time, in forward passes of an image.
        """
        masks = self._masks(masks)
        data = Data([self._check(x)])
        _, first, inverse = distinct(masks)
        self.stats.asked += len(masks)
        self.stats.duplicates += len(masks) - len(first)
        out = torch.empty(
            len(masks), data.images, *self.space.values[self.space.output].shape, dtype=self.dtype, device=self.device
        )

        def take(rows: slice, at: slice, y: Tensor) -> None:
            out[rows, at] = y

        self._run(self._engine, masks[first], data, take, progress, held=out.nbytes)
        self.stats.computed += len(first)
        if not torch.equal(inverse, torch.arange(len(masks))):
            out = out[inverse.to(self.device)]
        return out

    def accuracy(self, masks: Tensor, batches: Batches, *, progress: Progress | None = None) -> Tensor:
        """float64 [P]: the fraction of images whose label has the largest output.

        Args:
            masks: bool [P, genes].
            batches: of (x, y) with labels int64 [N].
            progress: called with (done, total) from time to time, in forward passes of an image.
        """
        return self._of_logits("accuracy", masks, batches, progress)

    def loss(self, masks: Tensor, batches: Batches, *, progress: Progress | None = None) -> Tensor:
        """float64 [P]: the mean cross entropy over images, summed in their order in float64."""
        return self._of_logits("loss", masks, batches, progress)

    def agreement(self, masks: Tensor, batches: Batches, *, progress: Progress | None = None) -> Tensor:
        """float64 [P]: the fraction of images for which the model as given predicts the same class.

        The model's own predictions are with its own batch-norm statistics, whatever `bn` is.

        Args:
            batches: of x, or of (x, y), where y is not looked at.
        """
        return self._of_logits("agreement", masks, batches, progress)

    def features(
        self, masks: Tensor, x: Tensor, layers: Sequence[str] | None = None, *, progress: Progress | None = None
    ) -> Tensor:
        """masks bool [P, genes], x [N, C, ...] -> [P, N, D]: what layers give, with the batch norm and the activation
        that follow them, one layer after the other; zeros where a channel is removed.

        Maps of more than 4 x 4 positions are averaged to so many.

        Args:
            layers: names of convolutions or linear layers; None: all but the last.
        """
        masks, data = self._masks(masks), Data([self._check(x)])
        inner, sizes, _ = self._up_to(layers)
        out = torch.empty(len(masks), data.images, sum(sizes), dtype=self.dtype, device=self.device)

        def take(rows: slice, at: slice, y: Tensor) -> None:
            out[rows, at] = y

        self._run(inner, masks, data, take, progress, held=out.nbytes)
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
        inner, sizes, values = self._up_to(layers)
        data = Data(list(images_of(batches, self._check)))
        full = self._full_features(inner, data)
        norms = np.array([float(f.double().square().sum()) for f in torch.split(full, sizes, 1)])

        def compute(masks: Tensor, done: _Done) -> None:
            sums = np.zeros((len(masks), len(sizes)))

            def take(rows: slice, at: slice, y: Tensor) -> None:
                for k, (a, b) in enumerate(zip(torch.split(y, sizes, 2), torch.split(full[at], sizes, 1), strict=True)):
                    each = (a.double() - b.double()).square_().sum(2).cpu().numpy()
                    # One after the other, so that the sum does not depend on where the images are cut.
                    sums[rows, k] = np.add.accumulate(np.concatenate((sums[rows, k, None], each), 1), 1)[:, -1]
                if at.stop == data.images:
                    done(rows, (sums[rows] / np.maximum(norms, 1e-300)).mean(1).tolist())

            # float64 copies of one layer at a time, by the numbers of all of them
            extra = -(-24 * max(sizes) // sum(sizes))
            self._run(inner, masks, data, take, progress, extra=extra, held=full.nbytes)

        return self._remembered(f"reconstruction {values}", masks, data, compute)

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
        inner, sizes, values = self._up_to(layers, last=True)
        data = Data(list(images_of(batches, self._check)))
        n = data.images
        if n < 2:
            raise ValueError("batches must have at least two images, of which one is the other's neighbour, got 1")
        full = self._full_features(inner, data).float()
        graph = Graph.from_knn(full, min(k, n - 1))
        source, destination = graph.edge_index
        distance = (full[source].double() - full[destination].double()).square().mean(1).mean()
        kernel = RBF(sigma=max(float(distance) / 2, 1e-12), scale="mean")

        def compute(masks: Tensor, done: _Done) -> None:
            limit = memory_allowed(self.memory_limit, self.device)
            most = max(1, limit // max(24 * n * sum(sizes), 1))
            for start in range(0, len(masks), most):
                chunk = masks[start : start + most]
                y = torch.empty(len(chunk), n, sum(sizes), device=self.device)

                def take(rows: slice, at: slice, values: Tensor, y: Tensor = y) -> None:
                    y[rows, at] = values.float()

                self._run(inner, chunk, data, take, progress, held=full.nbytes + y.nbytes)
                several = graph.repeat(len(chunk))  # one per individual, side by side
                losses = lsp_loss(y.flatten(0, 1), full.repeat(len(chunk), 1), several, kernel=kernel, reduction="none")
                each = losses.double().view(len(chunk), n).cpu().numpy()
                done(slice(start, start + len(chunk)), (np.add.accumulate(each, 1)[:, -1] / n).tolist())

        return self._remembered(f"lsp {k} {values}", masks, data, compute)

    def explain(self, masks: Tensor, *, rate: float = RATE) -> str:
        """How a population is evaluated, a line per step, with the multiplications for one image.

        The columns are the multiplications of all individuals as whole networks, after skipping what the masks remove,
        and after sharing what equal beginnings have in common (in one piece; where a call is cut, a little less).

        Args:
            rate: multiplications per second and thread, for the predicted time.
        """
        return explanation(self._engine, self._masks(masks), rate)

    # --- how they are computed ---------------------------------------------------------------------------

    def _up_to(self, layers: Sequence[str] | None, last: bool = False) -> tuple[Engine, list[int], tuple[int, ...]]:
        """What computes the features of layers, how many numbers each gives, and which values they are."""
        values = feature_values(self.space, layers, last)
        if values not in self._inner:
            self._inner[values] = Engine(self.space, lower_features(self.space, values), self.dtype, self.device)
        return self._inner[values], feature_sizes(self.space, values), values

    def _full_features(self, inner: Engine, data: Data) -> Tensor:
        """[N, D], of the model as given."""
        out = torch.empty(data.images, *inner.program.shape, dtype=self.dtype, device=self.device)

        def take(rows: slice, at: slice, y: Tensor) -> None:
            out[at] = y[0]

        self._run(inner, self.space.ones(1), data, take, inherit=True, held=out.nbytes)
        return out

    def _full_classes(self, data: Data) -> Tensor:
        """int64 [N], on the CPU, of the model as given."""
        name = data.fingerprint()
        if self._full is None or self._full[0] != name or not self.memo:
            y = torch.empty(data.images, dtype=torch.int64, device=self.device)

            def take(rows: slice, at: slice, logits: Tensor) -> None:
                y[at] = logits[0].argmax(1)

            self._run(self._engine, self.space.ones(1), data, take, inherit=True)
            self._full = name, y.cpu()
        return self._full[1]

    def _of_logits(self, name: str, masks: Tensor, batches: Batches, progress: Progress | None) -> Tensor:
        """A quality by its name in QUALITIES."""
        classes = self._classes()
        if QUALITIES[name].labels:
            data = Data.labelled(batches, self._check, classes)
        else:
            data = Data(list(images_of(batches, self._check)))
            self._masks(masks)
            data.y = self._full_classes(data)
        share = QUALITIES[name].share
        labels = data.y
        assert labels is not None

        def compute(masks: Tensor, done: _Done) -> None:
            sums = np.zeros(len(masks), np.int64 if share else np.float64)

            def take(rows: slice, at: slice, logits: Tensor) -> None:
                y = labels[at].to(self.device).expand(len(logits), -1)
                if share:
                    sums[rows] += (logits.argmax(2) == y).sum(1).cpu().numpy()
                else:
                    each = F.cross_entropy(logits.double().flatten(0, 1), y.flatten(), reduction="none")
                    # One after the other, so that the sum does not depend on where the images are cut.
                    terms = np.concatenate((sums[rows, None], each.reshape(y.shape).cpu().numpy()), 1)
                    sums[rows] = np.add.accumulate(terms, 1)[:, -1]
                if at.stop == data.images:
                    done(rows, (sums[rows] / data.images).tolist())

            # Cross entropy takes float64 copies of the logits, before and after the softmax.
            self._run(self._engine, masks, data, take, progress, extra=0 if share else 16)

        return self._remembered(name, masks, data, compute)

    def _remembered(self, name: str, masks: Tensor, data: Data, compute: Callable[[Tensor, _Done], None]) -> Tensor:
        """float64 [P]. `compute` is called with those masks that are not known yet, and hands over the values of some
        of these rows after the other."""
        masks = self._masks(masks)
        memo, context = Memo(1, self.stats), b""
        if self.memo:
            memo = self._known
            context = fingerprint.of_tensors(f"{name} {self.bn} {self._calibrated_on} {data.fingerprint()}").encode()

        def measure(masks: Tensor, remember: Callable[[slice, Tensor], None]) -> None:
            compute(masks, lambda rows, values: remember(rows, torch.tensor(values, dtype=torch.float64)[:, None]))

        return memo.recall(masks, measure, context)[:, 0]

    def _run(
        self,
        engine: Engine,
        masks: Tensor,
        data: Data,
        take: Take,
        progress: Progress | None = None,
        *,
        extra: int = 0,
        held: int = 0,
        inherit: bool = False,
    ) -> None:
        """:meth:`Engine.run`, with the statistics and the memory limit of this evaluator."""
        engine.run(
            masks,
            data,
            take,
            calibration=None if inherit or self.bn == "inherit" else self._calibration,
            progress=progress,
            memory_limit=self.memory_limit,
            extra=extra,
            held=held,
        )

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
