"""The channels of a network's values: which of them must go together, and the operations between them, as they run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, fx, nn

from .operations import ELEMENTWISE, take_channels
from .space import ZERO, Kind, Op, UnsupportedModelError
from .tracer import line_of

__all__ = ["Channels", "Recorder", "Ref", "Split"]

Channels = NDArray[np.int64]
"""[C]: for each channel an element of the union-find, or ZERO."""


class Ref:
    """Stands for a value among the arguments of a call."""

    def __init__(self, value: int) -> None:
        self.value = value


class Split:
    """Stands for a value whose channels are seen along several dimensions, [N, *index.shape, ...]: the middle of a
    channel shuffle."""

    def __init__(self, value: int, index: NDArray[np.int64]) -> None:
        self.value, self.index = value, index


class Recorder:
    """The operations so far, their results for one image, and the channels of these.

    A channel is an element of a union-find, or ZERO; element 0 is KEPT, and the others are numbered as they
    appear. A set is named by its smallest element, so that KEPT wins and the order is the network's.
    """

    def __init__(self, model: nn.Module, x: Tensor) -> None:
        self.model, self.modules, self.example = model, dict(model.named_modules()), x
        self.parent = [0]
        self.names: list[str] = []
        self.tensors: list[Tensor] = []
        self.channels: list[Channels] = []
        self.ops: list[Op] = []
        self.env: dict[fx.Node, Any] = {}  # Ref, Split, or a Python object such as a size
        self.called: set[str] = set()
        self.output = -1

    def find(self, e: int) -> int:
        while self.parent[e] != e:
            self.parent[e] = e = self.parent[self.parent[e]]
        return e

    def tie(self, a: Channels, b: Channels) -> None:
        for i, j in zip(a.tolist(), b.tolist(), strict=True):
            i, j = self.find(i), self.find(j)
            self.parent[max(i, j)] = min(i, j)

    def new(self, count: int) -> Channels:
        start = len(self.parent)
        self.parent.extend(range(start, start + count))
        return np.arange(start, start + count)

    def value(self, name: str, x: Tensor, channels: Channels) -> Ref:
        self.names.append(name)
        self.tensors.append(x)
        self.channels.append(channels)
        return Ref(len(self.names) - 1)

    def refuse(self, node: fx.Node, what: str) -> NoReturn:
        scope, line = self.scope(node), line_of(node)
        raise UnsupportedModelError(
            f"{what} is not supported" + (f", in {scope}" if scope else "") + (f" ({line})" if line else "")
        )

    def scope(self, node: fx.Node) -> str:
        stack = [entry[0] for entry in node.meta.get("nn_module_stack", {}).values()]
        if node.op == "call_module":
            stack = [path for path in stack if path != node.target]
        return stack[-1] if stack else ""

    def op(
        self,
        node: fx.Node,
        kind: Kind,
        inputs: list[int],
        channels: Channels,
        *,
        module: nn.Module | None = None,
        function: Callable[..., Tensor] | None = None,
        fixed: bool = False,
        **attributes: Any,
    ) -> Ref:
        name = str(node.target) if node.op == "call_module" else node.name
        op = Op(
            kind,
            name,
            tuple(inputs),
            len(self.names),
            module,
            function,
            attributes,
            self.scope(node),
            line_of(node),
            fixed,
        )
        try:
            result = op.run(*(self.tensors[i] for i in inputs))
        except Exception as error:
            raise ValueError(
                f"example_input of shape {list(self.example.shape)} does not fit: {name} fails with {error}"
            ) from error
        self.ops.append(op)
        return self.value(name, result, channels)

    def known(self, node: fx.Node, f: Callable[..., Tensor], a: Ref, arguments: dict[str, Any]) -> Ref:
        """Of ELEMENTWISE or SPATIAL."""
        inplace = arguments.pop("inplace", False)
        if arguments.pop("return_indices", False):
            self.refuse(node, f"{f.__name__} with return_indices")
        if "stride" in arguments or f in (F.max_pool2d, F.avg_pool2d):
            stride = arguments.get("stride")
            arguments["stride"] = arguments["kernel_size"] if stride is None else stride
        return self.each(node, "elementwise" if f in ELEMENTWISE else "spatial", f, a, inplace, **arguments)

    def each(
        self, node: fx.Node, kind: Kind, f: Callable[..., Tensor], a: Ref, inplace: bool = False, **attributes: Any
    ) -> Ref:
        """Every channel by itself."""
        x, channels = self.tensors[a.value], self.channels[a.value]
        if kind == "spatial" and x.dim() < 3:
            self.refuse(node, f"{node.name} of a value without positions, [N, {x.shape[1]}],")
        if (channels == ZERO).any() and bool((f(torch.zeros_like(x), **attributes) != 0).any()):
            self.refuse(node, f"{node.name} of channels that are constantly zero")
        out = self.op(node, kind, [a.value], channels, function=f, **attributes)
        if inplace:
            self.rebind(a, out)
        return out

    def rebind(self, old: Ref, new: Ref) -> None:
        """Whoever refers to `old` sees what was written over it."""
        for key, ref in self.env.items():
            if isinstance(ref, Ref) and ref.value == old.value:
                self.env[key] = new

    def take(self, node: fx.Node, a: Ref, index: NDArray[np.int64]) -> Ref:
        """Some channels, in some order, none twice."""
        channels = self.channels[a.value]
        if np.array_equal(index, np.arange(len(channels))):
            return a
        return self.op(
            node, "take", [a.value], channels[index], function=take_channels, fixed=True, index=tuple(index.tolist())
        )
