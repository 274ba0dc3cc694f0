"""The native executor of masked networks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _C
from . import native, structs
from .native import DTYPES, Launch, Memory, address, backend_for

ALWAYS, NEVER = _C.ALWAYS, _C.NEVER  # genes of a channel that always, that never exists
Operation, Activation = _C.Operation, _C.Activation

Layer = Mapping[str, Any]


def runs(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a device has a :class:`Network` of this dtype."""
    return dtype in DTYPES and (backend_for(device).uses_workspace or dtype in (torch.float32, torch.float64))


def _tf32() -> bool:
    """Whether torch's own convolutions may use it."""
    try:
        return torch.backends.cudnn.allow_tf32
    except RuntimeError:  # set by torch's newer switches, which this one does not know
        return bool(torch.backends.cudnn.conv.fp32_precision == "tf32")  # type: ignore[attr-defined]


def _pair(values: Sequence[int]) -> structs.Pair:
    rows, columns = values
    return rows, columns


class Network:
    """A network for ``csrc/network/network.h``, made of plain data.

    ``values`` are tuples (channels, height, width, genes), value 0 the input; ``genes`` gives for every
    channel its index in a mask, ALWAYS or NEVER. ``nodes`` are dictionaries in topological order, with
    "op" (the name of an Operation), "inputs" (indices of values), "output" (an index) and

    * conv: weight [out, in / groups, kh, kw], bias; stride, padding, dilation (pairs), groups. A linear
      layer is one too: its weight [out, features] is taken for a kernel of the size of its input.
    * norm: scale, shift [channels]; for a batch norm weight, bias (or None) and eps as well.
    * activation: name (of an Activation), param.
    * max_pool, avg_pool: kernel, stride, padding, dilation (pairs), count_include_pad; a kernel (0, 0) is
      adaptive. x[:, :, ::2, ::2] is a max_pool with kernel (1, 1) and stride (2, 2).
    * add: two inputs or more. multiply: two, the second perhaps 1 x 1.
    * select: source, for every channel (input, channel) or None for zeros. flatten: nothing.

    ``dtype`` is that of the weights and, on a GPU, of what passes between layers; sums, biases, scales and shifts
    are float32, or float64 for float64. The CPU takes float32 and float64 only.
    """

    def __init__(
        self,
        values: Sequence[tuple[int, int, int, Sequence[int]]],
        nodes: Sequence[Layer],
        num_genes: int,
        dtype: torch.dtype,
        output: int | None = None,
        device: torch.device | None = None,
    ) -> None:
        self.dtype, self.num_genes, self.device = dtype, num_genes, device or torch.device("cpu")
        self.acc = torch.float64 if dtype == torch.float64 else torch.float32
        self._taken = 0
        self.shapes = [(channels, height, width) for channels, height, width, _ in values]
        self.output: int = nodes[-1]["output"] if output is None else output
        self.norms: list[int] = [n["output"] for n in nodes if n["op"] == "norm"]
        self._tensors: list[Tensor] = []  # what the native network points to
        self._native = backend_for(self.device).Network(
            dtype=DTYPES[dtype],
            genes=num_genes,
            values=tuple(
                structs.Value(channels=channels, height=height, width=width, genes=tuple(genes))
                for channels, height, width, genes in values
            ),
            nodes=tuple(self._node(n) for n in nodes),
            output=self.output,
        )

    def _keep(self, x: Tensor | None, dtype: torch.dtype | None = None) -> structs.Address:
        if x is None:
            return 0
        x = x.detach().to(self.device, dtype or self.acc).contiguous()
        self._tensors.append(x)
        return x.data_ptr()

    def _node(self, n: Layer) -> structs.Node:
        kind = Operation[n["op"]]
        kernel = n.get("kernel", (1, 1))
        if kind == Operation.conv:
            weight = n["weight"]
            kernel = self.shapes[n["inputs"][0]][1:] if weight.dim() == 2 else weight.shape[2:]
        sources = ((-1, 0) if source is None else source for source in n.get("source", ()))
        return structs.Node(
            kind=kind,
            inputs=tuple(n["inputs"]),
            output=n["output"],
            kernel=_pair(kernel),
            stride=_pair(n.get("stride", (1, 1))),
            padding=_pair(n.get("padding", (0, 0))),
            dilation=_pair(n.get("dilation", (1, 1))),
            groups=n.get("groups", 1),
            count_padding=n.get("count_include_pad", True),
            batch="eps" in n,
            activation=Activation[n.get("name", "none")],
            param=float(n.get("eps", n.get("param", 0.0))),
            weight=self._keep(n.get("weight"), self.dtype if kind == Operation.conv else None),
            bias=self._keep(n.get("bias")),
            scale=self._keep(n.get("scale")),
            shift=self._keep(n.get("shift")),
            select=tuple(index for source in sources for index in source),
        )

    def bytes(self, images: int, recalibrate: bool = False, individuals: int = 1) -> int:
        """At most what a run takes beyond its arguments."""
        return self._native.bytes(images, recalibrate, individuals, torch.get_num_threads())

    def taken(self) -> int:
        """What the last run took, on the CPU that of values alone."""
        return self._taken

    def outline(self) -> tuple[list[int], list[int], list[int]]:
        """Genes in the order in which they are met; of each value the step that makes it (steps are nodes that are
        done at once), or -1; for each step how many of the genes individuals must agree on to share it."""
        return self._native.outline()

    def _run(
        self,
        masks: Tensor,
        x: Tensor,
        out: Tensor | None,
        affines: tuple[structs.Affine, ...] = (),
        agree: bool = False,
        moments: tuple[structs.Moments, ...] = (),
    ) -> None:
        shared = x.dim() == 4
        x, masks = x.contiguous(), masks.cpu().contiguous()
        op = structs.NetworkRun(
            masks=masks.data_ptr(),
            individuals=masks.shape[0],
            x=x.data_ptr(),
            x_dtype=DTYPES[x.dtype],
            x_stride=0 if shared else x.numel() // max(x.shape[0], 1),
            images=x.shape[0 if shared else 1],
            out=address(out),
            out_dtype=DTYPES[self.dtype if out is None else out.dtype],
            affines=affines,
            moments=moments,
            affines_agree=agree,
        )
        with Launch(self.device) as launch:
            self._taken = self._native.run(op, launch.where, tf32=_tf32(), memory=Memory(self.device))

    def __call__(
        self,
        masks: Tensor,
        x: Tensor,
        affines: Sequence[tuple[Tensor, Tensor] | None] | None = None,
        out_dtype: torch.dtype | None = None,
        agree: bool = False,
    ) -> Tensor:
        """masks bool [P, genes], x [N, C, H, W] or [P, N, C, H, W] -> [P, N, C', H', W'].

        ``affines`` gives for every norm its (scale, shift), each [channels] or [P, channels], or None for
        its own. ``agree`` says that their rows come from the masks: a GPU, which does not compare them, then
        shares what individuals with equal beginnings have in common.
        """
        shape = (masks.shape[0], x.shape[-4], *self.shapes[self.output])
        out = native.empty(x, shape, out_dtype or self.dtype)
        rows, kept = [], []
        for pair in affines or ():
            if pair is None:
                rows.append(structs.Affine(scale=0, shift=0, stride=0))
                continue
            scale, shift = (t.to(self.device, self.acc).contiguous() for t in pair)
            kept += [scale, shift]
            stride = scale.shape[1] if scale.dim() == 2 else 0
            rows.append(structs.Affine(scale=scale.data_ptr(), shift=shift.data_ptr(), stride=stride))
        self._run(masks, x, out, tuple(rows), agree)
        return out

    def moments(self, masks: Tensor, x: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Mean and biased variance [P, channels], float64, of the batch x at every norm.

        Batch norms use these while they are computed. 0 and 1 where a channel does not exist.
        """
        shapes = [(masks.shape[0], self.shapes[v][0]) for v in self.norms]
        zeros = [torch.zeros(shape, dtype=torch.float64, device=self.device) for shape in shapes]
        pairs = [(zero, torch.ones_like(zero)) for zero in zeros]
        into = tuple(structs.Moments(mean=m.data_ptr(), variance=v.data_ptr()) for m, v in pairs)
        self._run(masks, x, None, moments=into)
        return pairs
