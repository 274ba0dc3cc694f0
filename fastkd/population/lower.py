"""From the operations of a traced network to the program of the native executor (``csrc/network.h``)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .operations import at_positions, expand_positions, function_name, reshape_positions
from .space import GeneSpace, Op, UnsupportedModelError

__all__ = ["Program", "feature_sizes", "feature_values", "lower", "lower_features"]

POOLED = 4  # positions of a side to which feature maps are averaged before they are compared

_PLAIN = {
    F.relu: "relu",
    F.relu6: "relu6",
    F.silu: "silu",
    F.hardswish: "hardswish",
    F.hardsigmoid: "hardsigmoid",
    torch.sigmoid: "sigmoid",
    torch.tanh: "tanh",
}


@dataclass
class Program:
    """Arguments of :class:`fastkd._ops.Network`, and what is left to do after it."""

    values: list[tuple[int, int, int, list[int]]]
    nodes: list[dict[str, Any]]
    name: dict[int, str]
    """Of the operation that makes a value."""
    batch_norms: dict[int, tuple[Tensor, Tensor, float]]
    """Weight, bias and eps, by value."""
    output: int
    shape: tuple[int, ...]
    softmax: list[Op]
    """At the end of the network; done by torch."""

    def affine(self, value: int, mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and shift of a batch norm with these statistics, float64 [..., channels]."""
        weight, bias, eps = self.batch_norms[value]
        scale = weight / torch.sqrt(variance + eps)
        return scale, bias - mean * scale

    def finish(self, y: Tensor) -> Tensor:
        """The executor's result [P, N, C, H, W] -> the model's [P, N, ...]."""
        y = y.reshape(*y.shape[:2], *self.shape)
        for op in self.softmax:
            y = op.run(y.flatten(0, 1)).reshape(y.shape)
        return y


def lower(space: GeneSpace) -> Program:
    """Raises UnsupportedModelError for operations that the executor lacks."""
    return _Lowering(space).program()


def lower_features(space: GeneSpace, layers: Sequence[int]) -> Program:
    """The network up to some values, whose feature maps, of at most POOLED x POOLED positions, are its one output
    [N, D]: one value after the other."""
    return _Lowering(space).features(layers)


def feature_values(space: GeneSpace, layers: Sequence[str] | None, last: bool = False) -> tuple[int, ...]:
    """Which values are the features of layers, by the names of convolutions or linear layers: what they give, with the
    batch norm and the activation that follow.

    Args:
        layers: None: all but the last; with `last`, the input of the last one.
    """
    makers = {op.name: op.output for op in space.ops if op.kind in ("conv", "linear")}
    if isinstance(layers, str) or (layers is not None and not layers):
        raise ValueError(f"layers must be names of one layer or more, got {layers!r}")
    for name in layers or ():
        if name not in makers:
            raise ValueError(f"layers must be of {', '.join(makers)}, got {name!r}")
    consumers: dict[int, list[Op]] = {}
    for op in space.ops:
        for i in op.inputs:
            consumers.setdefault(i, []).append(op)

    def activated(value: int) -> int:
        following = consumers.get(value, [])
        while len(following) == 1 and following[0].kind in ("batch_norm", "prelu", "elementwise"):
            value = following[0].output
            following = consumers.get(value, [])
        return value

    if layers is None:
        final = next(op for op in reversed(space.ops) if op.kind in ("conv", "linear"))
        inner = [activated(value) for name, value in makers.items() if name != final.name]
        values = [final.inputs[0]] if last else inner
    else:
        values = [activated(makers[name]) for name in layers]
    values = [value for value in values if value != 0]
    if not values:
        raise ValueError("the model has no layer before its last one, whose features could be compared")
    return tuple(values)


def feature_sizes(space: GeneSpace, layers: Sequence[int]) -> list[int]:
    """How many numbers each value has in the output of :func:`lower_features`."""
    out = []
    for value in layers:
        channels, height, width = _three(space.values[value].shape)
        out.append(channels * min(height, POOLED) * min(width, POOLED))
    return out


def _three(shape: tuple[int, ...]) -> tuple[int, int, int]:
    c, h, w = (*shape, 1, 1)[:3]
    return c, h, w


def _pair(value: Any) -> tuple[int, int]:
    a, b = (value, value) if isinstance(value, int) else tuple(value) * (2 // len(value))
    return a, b


def _refuse(op: Op, what: str) -> NoReturn:
    raise UnsupportedModelError(
        f"{what} has no kernel in the population evaluator, {op.name}"
        + (f" in {op.scope}" if op.scope else "")
        + (f" ({op.line})" if op.line else "")
    )


class _Lowering:
    def __init__(self, space: GeneSpace) -> None:
        self.space = space
        self.values: list[tuple[int, int, int, list[int]]] = []
        self.nodes: list[dict[str, Any]] = []
        self.name: dict[int, str] = {}
        self.batch_norms: dict[int, tuple[Tensor, Tensor, float]] = {}
        self.softmax: list[Op] = []
        self.at: dict[int, int] = {}

    def program(self) -> Program:
        first = self.space.values[0]
        if len(first.shape) > 3:
            raise UnsupportedModelError(
                f"the model's input must be [N, C, H, W], got [N, {', '.join(map(str, first.shape))}]"
            )
        self.values.append((*_three(first.shape), first.genes.tolist()))
        self.at[0] = 0
        for op in self.space.ops:
            shape = self.space.values[op.output].shape
            if len(shape) > 3:
                _refuse(op, f"a value [N, {', '.join(map(str, shape))}]")
            self.op = op
            self.at[op.output] = getattr(self, f"lower_{op.kind}")(op, *(self.at[i] for i in op.inputs))
        output = self.at[self.space.output]
        if output == 0:
            raise UnsupportedModelError("the model does nothing that has a kernel in the population evaluator")
        return Program(
            self.values,
            self.nodes,
            self.name,
            self.batch_norms,
            output,
            self.space.values[self.space.output].shape,
            self.softmax,
        )

    def features(self, layers: Sequence[int]) -> Program:
        self.program()
        flat: list[int] = []
        for value in layers:
            self.op = next(op for op in self.space.ops if op.output == value)
            v = self.at[value]
            _, height, width = self.values[v][:3]
            genes = torch.tensor(self.values[v][3])
            size = (min(height, POOLED), min(width, POOLED))
            if size != (height, width):
                v = self.adaptive(v, size)
            every = genes.repeat_interleave(size[0] * size[1])
            flat.append(self.node("flatten", v, size=(1, 1), genes=every) if size != (1, 1) else v)
        out, source = flat[0], [(k, c) for k, v in enumerate(flat) for c in range(self.values[v][0])]
        if len(flat) > 1:
            every = torch.tensor([gene for v in flat for gene in self.values[v][3]])
            out = self.node("select", *flat, size=(1, 1), genes=every, source=source)
        kept = self._needed(out)
        return Program(
            self.values,
            kept,
            self.name,
            {v: x for v, x in self.batch_norms.items() if any(n["output"] == v for n in kept)},
            out,
            (len(source),),
            [],
        )

    def _needed(self, out: int) -> list[dict[str, Any]]:
        wanted, nodes = {out}, []
        for n in reversed(self.nodes):
            if n["output"] in wanted:
                wanted.update(n["inputs"])
                nodes.append(n)
        return nodes[::-1]

    def node(
        self, kind: str, *inputs: int, size: tuple[int, int] | None = None, genes: Tensor | None = None, **rest: Any
    ) -> int:
        """Its value; of the size and genes of the operation's result if not stated."""
        result = self.space.values[self.op.output]
        of_channels = (result.genes if genes is None else genes).tolist()
        value = len(self.values)
        self.values.append((len(of_channels), *(size or _three(result.shape)[1:]), of_channels))
        self.nodes.append({"op": kind, "inputs": inputs, "output": value, **rest})
        self.name[value] = self.op.name
        return value

    def sized(self, v: int) -> tuple[int, int]:
        return self.values[v][1], self.values[v][2]

    # --- operations --------------------------------------------------------------------------------------

    def lower_conv(self, op: Op, a: int) -> int:
        m = op.module
        assert isinstance(m, nn.Conv2d)
        if m.padding_mode != "zeros":
            _refuse(op, f"padding_mode={m.padding_mode!r}")
        left, right, top, bottom = m._reversed_padding_repeated_twice
        if (left, top) != (right, bottom):
            _refuse(op, f"padding={m.padding!r} with a kernel of {m.kernel_size}")
        return self.node(
            "conv",
            a,
            weight=_copy(m.weight),
            bias=_copy(m.bias),
            stride=_pair(m.stride),
            padding=(top, left),
            dilation=_pair(m.dilation),
            groups=m.groups,
        )

    def lower_linear(self, op: Op, a: int) -> int:
        m = op.module
        assert isinstance(m, nn.Linear)
        return self.node("conv", a, weight=_copy(m.weight), bias=_copy(m.bias))

    def lower_batch_norm(self, op: Op, a: int) -> int:
        m: Any = op.module
        mean, variance = m.running_mean.double(), m.running_var.double()
        if not bool(mean.isfinite().all() and (variance >= 0).all() and variance.isfinite().all()):
            raise ValueError(f"{op.name} has running statistics that are not finite, or a negative variance")
        weight = torch.ones_like(mean) if m.weight is None else _copy(m.weight).double()
        bias = torch.zeros_like(mean) if m.bias is None else _copy(m.bias).double()
        scale = weight / torch.sqrt(variance + m.eps)
        value = self.node("norm", a, scale=scale, shift=bias - mean * scale, weight=weight, bias=bias, eps=m.eps)
        self.batch_norms[value] = weight, bias, m.eps
        return value

    def scaled(self, a: int, scale: float | Tensor, shift: float = 0.0) -> int:
        full = torch.zeros(self.values[a][0], dtype=torch.float64)
        return self.node("norm", a, scale=full + scale, shift=full + shift)

    def lower_prelu(self, op: Op, a: int) -> int:
        weight = op.module.weight.detach().double().cpu()  # type: ignore[union-attr, operator]
        if len(weight) == 1:
            return self.node("activation", a, name="leaky_relu", param=float(weight))
        negative = self.node("activation", self.scaled(a, -1.0), name="relu")
        return self.node("add", self.node("activation", a, name="relu"), self.scaled(negative, -weight))

    def lower_elementwise(self, op: Op, a: int) -> int:
        f, options = op.function, op.attributes
        if f in _PLAIN:
            return self.node("activation", a, name=_PLAIN[f])
        if f is F.leaky_relu:
            return self.node("activation", a, name="leaky_relu", param=options.get("negative_slope", 0.01))
        if f is F.gelu:
            return self.node("activation", a, name="gelu_tanh" if options.get("approximate") == "tanh" else "gelu")
        if f is torch.add:
            return self.scaled(a, 1.0, options["other"])
        if f is torch.mul:
            return self.scaled(a, options["other"])
        if f is torch.div:
            return self.scaled(a, 1 / options["other"])
        if f is torch.neg:
            return self.scaled(a, -1.0)
        limits = {F.hardtanh: ("min_val", "max_val"), torch.clamp: ("min", "max")}.get(f)  # type: ignore[arg-type]
        if limits is not None:
            defaults = (-1.0, 1.0) if f is F.hardtanh else (None, None)
            found = tuple(options.get(n, d) for n, d in zip(limits, defaults, strict=True))
            if found in ((0, None), (0, 6)):
                return self.node("activation", a, name="relu" if found[1] is None else "relu6")
        _refuse(op, f"{function_name(f)} with {options}" if options else function_name(f))

    def lower_spatial(self, op: Op, a: int) -> int:
        f, options = op.function, op.attributes
        shape, size = self.space.values[op.inputs[0]].shape, _three(self.space.values[op.output].shape)[1:]
        if f is reshape_positions:
            return self.reshaped(a, size)
        if f is F.max_pool2d:
            return self.node("max_pool", a, **self.window(), dilation=_pair(options.get("dilation", 1)))
        if f is F.avg_pool2d and options.get("divisor_override") is None:
            return self.node("avg_pool", a, **self.window(), count_include_pad=options.get("count_include_pad", True))
        if f is F.adaptive_avg_pool2d or (f is expand_positions and len(shape) == 3):
            return self.adaptive(a, size)  # each result the mean of one number, where it expands
        if f is F.interpolate and options.get("mode", "nearest") == "nearest":
            if len(shape) == 3 and not any(new % old for new, old in zip(size, shape[1:], strict=True)):
                return self.adaptive(a, size)
        if f is F.adaptive_max_pool2d and not any(old % new for new, old in zip(size, shape[1:], strict=True)):
            kernel = (shape[1] // size[0], shape[2] // size[1])
            return self.node("max_pool", a, kernel=kernel, stride=kernel)
        if f is torch.mean:
            left = [1 if d + 2 in options["dim"] else n for d, n in enumerate(shape[1:])]
            return self.reshaped(self.adaptive(a, _three((0, *left))[1:]), size)
        if f is at_positions:
            index = [
                slice(i % n, i % n + 1) if isinstance(i, int) else i
                for i, n in zip(options["index"], shape[1:], strict=False)
            ]
            index += [slice(None)] * (2 - len(index))
            cut = [i.indices(n) for i, n in zip(index, _three(shape)[1:], strict=True)]
            taken = self.node(
                "max_pool",
                a,
                size=(len(range(*cut[0])), len(range(*cut[1]))),
                kernel=(1, 1),
                padding=(-cut[0][0], -cut[1][0]),
                stride=(cut[0][2], cut[1][2]),
            )
            return self.reshaped(taken, size)
        if f is F.pad and len(shape) == 3 and options["mode"] == "constant" and not options["value"]:
            left, right, top, bottom = (*options["pad"], 0, 0)[:4]
            if min(left, right, top, bottom) >= 0:
                return self.node("avg_pool", a, kernel=(1, 1), padding=(top, left))
        _refuse(op, f"{function_name(f)} with {options}")

    def window(self) -> dict[str, Any]:
        options = self.op.attributes
        return {
            "kernel": _pair(options["kernel_size"]),
            "stride": _pair(options["stride"]),
            "padding": _pair(options.get("padding", 0)),
        }

    def adaptive(self, a: int, size: tuple[int, int]) -> int:
        return self.node("avg_pool", a, kernel=(0, 0), size=size, genes=torch.tensor(self.values[a][3]))

    def reshaped(self, a: int, size: tuple[int, int]) -> int:
        if self.sized(a) == size:
            return a
        return self.node("select", a, size=size, source=[(0, c) for c in range(self.values[a][0])])

    def lower_softmax(self, op: Op, a: int) -> int:
        later = {i for other in self.space.ops for i in other.inputs}
        if op.output in later and not all(o.kind == "softmax" for o in self.space.ops if op.output in o.inputs):
            _refuse(op, f"{function_name(op.function)} inside the network")
        if op.output not in later and op.output != self.space.output:
            return a
        self.softmax.append(op)
        return a

    def lower_flatten(self, op: Op, a: int) -> int:
        return self.node("flatten", a)

    def lower_pad(self, op: Op, a: int) -> int:
        before, after = op.attributes["before"], op.attributes["after"]
        middle: list[Any] = [(0, c) for c in range(self.values[a][0])]
        return self.node("select", a, source=[None] * before + middle + [None] * after)

    def lower_take(self, op: Op, a: int) -> int:
        return self.node("select", a, source=[(0, c) for c in op.attributes["index"]])

    def lower_add(self, op: Op, a: int, b: int) -> int:
        return self.node("add", a, b)

    def lower_mul(self, op: Op, a: int, b: int) -> int:
        size = _three(self.space.values[op.output].shape)[1:]
        if self.sized(a) != size:
            a, b = b, a
        x, gate = (
            v if self.sized(v) in allowed else self.adaptive(v, size)
            for v, allowed in ((a, (size,)), (b, (size, (1, 1))))
        )
        return self.node("multiply", x, gate)

    def lower_concat(self, op: Op, *inputs: int) -> int:
        return self.node(
            "select", *inputs, source=[(k, c) for k, v in enumerate(inputs) for c in range(self.values[v][0])]
        )


def _copy(x: Tensor | None) -> Any:
    return None if x is None else x.detach().clone()
