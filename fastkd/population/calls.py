"""What calls of functions, and of the methods of tensors, do to channels: one method for each name that is known."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, fx

from .channels import Recorder, Ref, Split
from .operations import at_positions, concat_channels, expand_positions, pad_channels, reshape_positions
from .space import ZERO, Kind

__all__ = ["Calls"]


class Calls(Recorder):
    """``call_NAME(node, *args, **kwargs)`` for a call with these arguments: a :class:`Ref` among them is a value."""

    def call_getattr(self, node: fx.Node, a: Ref, name: str) -> Any:
        if name not in ("shape", "ndim", "dtype", "device"):
            self.refuse(node, f"the attribute {name} of a tensor")
        return getattr(self.tensors[a.value], name)

    def call_size(self, node: fx.Node, a: Ref, dim: int | None = None) -> Any:
        return self.tensors[a.value].size() if dim is None else self.tensors[a.value].size(dim)

    def call_dim(self, node: fx.Node, a: Ref) -> int:
        return self.tensors[a.value].dim()

    def call_contiguous(self, node: fx.Node, a: Ref, memory_format: Any = None) -> Ref:
        return a

    def call_dropout(self, node: fx.Node, a: Ref, p: float = 0.5, training: bool = True, inplace: bool = False) -> Ref:
        if training:
            self.refuse(node, "dropout that is active in evaluation mode (give it training=self.training)")
        return a

    call_dropout1d = call_dropout2d = call_alpha_dropout = call_feature_alpha_dropout = call_dropout

    def call_add(self, node: fx.Node, a: Any, b: Any, *, alpha: float = 1) -> Ref:
        if alpha != 1:
            self.refuse(node, f"add with alpha={alpha}")
        return self.together(node, "add", torch.add, a, b)

    def call_mul(self, node: fx.Node, a: Any, b: Any) -> Ref:
        return self.together(node, "mul", torch.mul, a, b)

    def together(self, node: fx.Node, kind: Kind, f: Callable[..., Tensor], a: Any, b: Any) -> Ref:
        """Add or mul of two values, or of a value and a number."""
        if not (isinstance(a, Ref) and isinstance(b, Ref)):
            x, other = (a, b) if isinstance(a, Ref) else (b, a)
            return self.each(node, "elementwise", f, x, other=other)
        x, y = (self.tensors[v.value].shape[1:] for v in (a, b))
        if len(x) != len(y) or x[0] != y[0] or (kind == "add" and x != y):
            self.refuse(node, f"{kind} of values [N, {', '.join(map(str, x))}] and [N, {', '.join(map(str, y))}]")
        p, q = self.channels[a.value], self.channels[b.value]
        both = (p != ZERO) & (q != ZERO)
        self.tie(p[both], q[both])
        out = np.where(p == ZERO, q, p) if kind == "add" else np.where(both, p, ZERO)
        return self.op(node, kind, [a.value, b.value], out, function=f)

    def call_div(self, node: fx.Node, a: Ref, b: Any) -> Ref:
        if isinstance(b, Ref) or not isinstance(a, Ref):
            self.refuse(node, "division by a tensor")
        return self.each(node, "elementwise", torch.div, a, other=b)

    call_truediv = call_div

    def call_cat(self, node: fx.Node, tensors: Any, dim: int = 0) -> Ref:
        if not all(isinstance(t, Ref) for t in tensors):
            self.refuse(node, "concatenation with a tensor made in forward")
        inputs = [t.value for t in tensors]
        if dim % self.tensors[inputs[0]].dim() != 1:
            self.refuse(node, f"concatenation along dimension {dim}")
        channels = np.concatenate([self.channels[i] for i in inputs])
        return self.op(node, "concat", inputs, channels, function=concat_channels)

    call_concat = call_concatenate = call_cat

    def call_flatten(self, node: fx.Node, a: Ref, start_dim: int = 0, end_dim: int = -1) -> Ref | Split:
        return self.reshape(node, a, torch.flatten(self.tensors[a.value], start_dim, end_dim).shape, False)

    def call_reshape(self, node: fx.Node, a: Ref, *shape: Any) -> Ref | Split:
        written = node.args[1:]
        if len(shape) == 1 and not isinstance(shape[0], int):
            shape, written = tuple(shape[0]), node.args[1]  # type: ignore[assignment]
        stated = (
            isinstance(written, tuple | list) and len(written) > 1 and isinstance(written[1], int) and written[1] > 0
        )
        return self.reshape(node, a, self.tensors[a.value].reshape(shape).shape, stated)

    call_view = call_reshape

    def call_squeeze(self, node: fx.Node, a: Ref, *dim: int) -> Ref | Split:
        dims = [d % self.tensors[a.value].dim() for d in dim]
        if not dims or min(dims) < 2:
            self.refuse(node, "squeeze of other dimensions than H and W")
        return self.reshape(node, a, self.tensors[a.value].squeeze(tuple(dims)).shape, False)

    def call_unsqueeze(self, node: fx.Node, a: Ref, dim: int) -> Ref | Split:
        return self.reshape(node, a, self.tensors[a.value].unsqueeze(dim).shape, False)

    def reshape(self, node: fx.Node, a: Ref, shape: torch.Size, fixed: bool) -> Ref | Split:
        x, channels = self.tensors[a.value], self.channels[a.value]
        if shape == x.shape:
            return a
        if shape[:2] == x.shape[:2]:
            return self.op(
                node, "spatial", [a.value], channels, function=reshape_positions, fixed=fixed, sizes=tuple(shape[2:])
            )
        if len(shape) == 2 and shape[0] == x.shape[0]:
            return self.op(
                node,
                "flatten",
                [a.value],
                np.repeat(channels, shape[1] // x.shape[1]),
                function=torch.flatten,
                fixed=fixed,
                start_dim=1,
            )
        dims = len(shape) - x.dim() + 1
        if dims > 1 and shape[0] == x.shape[0] and shape[dims + 1 :] == x.shape[2:]:
            return Split(a.value, np.arange(x.shape[1]).reshape(shape[1 : dims + 1]))
        self.refuse(node, f"{node.name} of {list(x.shape)} to {list(shape)}")

    def call_expand_as(self, node: fx.Node, a: Ref, other: Ref) -> Ref:
        x, y = self.tensors[a.value].shape, self.tensors[other.value].shape
        if len(x) != len(y) or x[:2] != y[:2]:
            self.refuse(node, f"expand_as from {list(x)} to {list(y)}")
        return self.each(node, "spatial", expand_positions, a, sizes=tuple(y[2:]))

    def call_mean(self, node: fx.Node, a: Ref, dim: Any = None, keepdim: bool = False) -> Ref:
        dims = tuple(d % self.tensors[a.value].dim() for d in ((dim,) if isinstance(dim, int) else dim or ()))
        if not dims or min(dims) < 2:
            self.refuse(node, f"mean over the dimensions {dim}, not H and W,")
        return self.each(node, "spatial", torch.mean, a, dim=dims, keepdim=keepdim)

    def call_chunk(self, node: fx.Node, a: Ref, chunks: int, dim: int = 0) -> tuple[Ref, ...]:
        out = self.cut(node, a, dim, lambda c: c.chunk(chunks))
        if len(out) != chunks:
            self.refuse(node, f"chunk of {self.tensors[a.value].shape[1]} channels into {chunks}")
        return out

    def call_split(
        self, node: fx.Node, a: Ref, split_size: Any = None, dim: int = 0, *, split_size_or_sections: Any = None
    ) -> tuple[Ref, ...]:
        return self.cut(
            node, a, dim, lambda c: torch.split(c, split_size_or_sections if split_size is None else split_size)
        )

    def cut(self, node: fx.Node, a: Ref, dim: int, pieces: Callable[[Tensor], Sequence[Tensor]]) -> tuple[Ref, ...]:
        x = self.tensors[a.value]
        if dim % x.dim() != 1:
            self.refuse(node, f"{node.name} along dimension {dim}")
        return tuple(self.take(node, a, index.numpy()) for index in pieces(torch.arange(x.shape[1])))

    def call_channel_shuffle(self, node: fx.Node, a: Ref, groups: int) -> Ref:
        return self.take(node, a, np.arange(self.tensors[a.value].shape[1]).reshape(groups, -1).T.reshape(-1))

    def regrouped(self, node: fx.Node, a: Any, *args: Any, name: str) -> Ref | Split:
        """What may be done to a Split: its dimensions put into another order, and made one again."""
        if not isinstance(a, Split):
            self.refuse(node, f"{name} of channels along several dimensions")
        positions, dims = self.tensors[a.value].shape[2:], a.index.ndim
        seen = torch.empty(1, *a.index.shape, *positions, device="meta")
        if name == "contiguous":
            return a
        if name in ("transpose", "swapaxes", "swapdims", "permute"):
            order = torch.arange(seen.dim())
            if name == "permute":
                order = order[list(args[0] if isinstance(args[0], Sequence) else args)]
            else:
                order[list(args)] = order[list(args[::-1])]
            where = order.tolist()
            if where[:1] == [0] and where[dims + 1 :] == list(range(dims + 1, seen.dim())):
                return Split(a.value, a.index.transpose([d - 1 for d in where[1 : dims + 1]]))
        elif name in ("view", "reshape", "flatten"):
            if getattr(seen, name)(*args).shape == (1, a.index.size, *positions):
                return self.take(node, Ref(a.value), a.index.reshape(-1))
        self.refuse(node, f"{name} of channels along several dimensions")

    def call_getitem(self, node: fx.Node, a: Any, index: Any) -> Ref:
        if isinstance(a, tuple):  # the pieces of what was cut
            piece: Ref = a[index]
            return piece
        index = list(index) if isinstance(index, tuple) else [index]
        if Ellipsis in index:
            at = index.index(Ellipsis)
            index[at : at + 1] = [slice(None)] * (self.tensors[a.value].dim() - len(index) + 1)
        if index[:1] == [slice(None)] and len(index) > 1 and isinstance(index[1], slice):
            taken = self.take(node, a, np.arange(self.tensors[a.value].shape[1])[index[1]])
            index[1] = slice(None)
            if all(i == slice(None) for i in index):
                return taken
            a = taken
        if index[:2] != [slice(None)] * 2 or not all(isinstance(i, int | slice) for i in index):
            self.refuse(node, f"an index of other dimensions than H and W, {node.args[1]},")
        return self.each(node, "spatial", at_positions, a, index=tuple(index[2:]))

    def call_pad(self, node: fx.Node, a: Ref, pad: Any, mode: str = "constant", value: float | None = None) -> Ref:
        dims = self.tensors[a.value].dim()
        ends = (*pad, *(0,) * (2 * dims - len(pad)))  # of the last dimension, the one before, ...
        before, after = ends[2 * dims - 4 : 2 * dims - 2]
        if any(ends[2 * dims - 2 :]):
            self.refuse(node, "padding of the batch")
        if not before and not after:
            return self.each(node, "spatial", F.pad, a, pad=tuple(pad), mode=mode, value=value)
        if any(ends[: 2 * dims - 4]) or mode != "constant" or value or min(before, after) < 0:
            self.refuse(node, f"padding of channels with {pad}, mode={mode!r}, value={value},")
        zeros = [np.full(n, ZERO) for n in (before, after)]
        return self.op(
            node,
            "pad",
            [a.value],
            np.concatenate((zeros[0], self.channels[a.value], zeros[1])),
            function=pad_channels,
            fixed=True,
            before=before,
            after=after,
        )

    def call_softmax(self, node: fx.Node, a: Ref, dim: int | None = None, **other: Any) -> Ref:
        return self.softmax(node, F.softmax, a, dim)

    def call_log_softmax(self, node: fx.Node, a: Ref, dim: int | None = None, **other: Any) -> Ref:
        return self.softmax(node, F.log_softmax, a, dim)

    def softmax(self, node: fx.Node, f: Callable[..., Tensor], a: Ref, dim: int | None) -> Ref:
        channels = self.channels[a.value]
        if dim is None or dim % self.tensors[a.value].dim() != 1 or (channels == ZERO).any():
            self.refuse(node, f"{f.__name__} over the dimension {dim}")
        self.tie(channels, 0 * channels)
        return self.op(node, "softmax", [a.value], channels, function=f, dim=1)
