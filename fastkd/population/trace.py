"""From a PyTorch network to its genes: operations by torch.fx, then which channels must go together.

The network is run once on one image, operation by operation, and compared with the model's own result:
a trace that is not the model is refused.
"""

from __future__ import annotations

import contextlib
import inspect
import linecache
import operator
import os
import traceback
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NoReturn

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from .space import KEPT, ZERO, GeneSpace, Group, Kind, Op, UnsupportedModelError, Value, filter_norms

__all__ = ["UnsupportedModelError", "at_positions", "trace"]


# --- the functions of operations that torch has under no name of its own ------------------------------


def at_positions(x: Tensor, index: tuple[Any, ...]) -> Tensor:
    """x[:, :, *index]"""
    return x[(slice(None),) * 2 + index]


def reshape_positions(x: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """[N, C, ...] -> [N, C, *sizes]"""
    return x.reshape(*x.shape[:2], *sizes)


def expand_positions(x: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """[N, C, ...] -> [N, C, *sizes]"""
    return x.expand(*x.shape[:2], *sizes)


def pad_channels(x: Tensor, before: int, after: int) -> Tensor:
    return F.pad(x, (0, 0) * (x.dim() - 2) + (before, after))


def take_channels(x: Tensor, index: tuple[int, ...]) -> Tensor:
    """x[:, index]"""
    return x[:, list(index)]


def concat_channels(*xs: Tensor) -> Tensor:
    return torch.cat(xs, 1)


# --- what is known, by function: the names of its arguments after the input ----------------------------

ELEMENTWISE: dict[Callable[..., Tensor], tuple[str, ...]] = {
    F.relu: ("inplace",),
    F.relu6: ("inplace",),
    F.leaky_relu: ("negative_slope", "inplace"),
    F.elu: ("alpha", "inplace"),
    F.celu: ("alpha", "inplace"),
    F.selu: ("inplace",),
    F.gelu: ("approximate",),
    F.silu: ("inplace",),
    F.mish: ("inplace",),
    F.hardswish: ("inplace",),
    F.hardsigmoid: ("inplace",),
    F.hardtanh: ("min_val", "max_val", "inplace"),
    F.softplus: ("beta", "threshold"),
    F.softsign: (),
    torch.sigmoid: (),
    torch.tanh: (),
    torch.clamp: ("min", "max"),
    torch.neg: (),
    torch.abs: (),
}
SPATIAL: dict[Callable[..., Tensor], tuple[str, ...]] = {
    F.max_pool2d: ("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices"),
    F.avg_pool2d: ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override"),
    F.adaptive_avg_pool2d: ("output_size",),
    F.adaptive_max_pool2d: ("output_size", "return_indices"),
    F.interpolate: ("size", "scale_factor", "mode", "align_corners"),
}
MODULES: dict[type[nn.Module], Callable[..., Tensor]] = {
    nn.ReLU: F.relu,
    nn.ReLU6: F.relu6,
    nn.LeakyReLU: F.leaky_relu,
    nn.ELU: F.elu,
    nn.CELU: F.celu,
    nn.SELU: F.selu,
    nn.GELU: F.gelu,
    nn.SiLU: F.silu,
    nn.Mish: F.mish,
    nn.Hardswish: F.hardswish,
    nn.Hardsigmoid: F.hardsigmoid,
    nn.Hardtanh: F.hardtanh,
    nn.Softplus: F.softplus,
    nn.Softsign: F.softsign,
    nn.Sigmoid: torch.sigmoid,
    nn.Tanh: torch.tanh,
    nn.MaxPool2d: F.max_pool2d,
    nn.AvgPool2d: F.avg_pool2d,
    nn.AdaptiveAvgPool2d: F.adaptive_avg_pool2d,
    nn.AdaptiveMaxPool2d: F.adaptive_max_pool2d,
    nn.Upsample: F.interpolate,
}
_BY_NAME = {f.__name__: f for f in (*ELEMENTWISE, *SPATIAL)}
_ALONE = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.AlphaDropout, nn.FeatureAlphaDropout)


def trace(model: nn.Module, example_input: Tensor) -> GeneSpace:
    """The genes of a model.

    Channels that are added are one channel, a depthwise convolution's are its input's, those at the same
    position in the groups of a grouped convolution go together, and every channel of a convolution or
    linear layer that is not tied to the network's input or output is a gene. Channels may be concatenated, cut
    (slices, chunk, split) and shuffled; those that only some values hold are groups of their own.

    Args:
        model: in evaluation mode.
        example_input: [N, C, ...] of the dtype and on the device of the model; one image is looked at.

    Raises:
        ValueError, TypeError: training mode, a wrong input, weights that are not finite.
        UnsupportedModelError: control flow that depends on data, or an operation whose channels are not
            known; the message names it and the line of the model.
    """
    x = _checked(model, example_input)
    tracer = _Tracer()
    try:
        graph = tracer.trace(model)
    except Exception as error:
        frames = [f for f in traceback.extract_tb(error.__traceback__) if not _of_torch(f.filename)][1:]
        at = f"{frames[-1].filename}:{frames[-1].lineno}: {frames[-1].line}" if frames else "an unknown line"
        raise UnsupportedModelError(
            f"{type(model).__name__} cannot be traced: {error} (at {at}). Control flow must not depend on the data"
        ) from error
    builder = _Builder(model, x)
    with torch.no_grad():
        for node in graph.nodes:
            builder.step(node)
        expected = model(x.clone())
    result = builder.tensors[builder.output]
    near = 1e-4 * float(expected.abs().max())
    if result.shape != expected.shape or not torch.allclose(result, expected, 1e-3, near, equal_nan=True):
        raise UnsupportedModelError(
            f"{type(model).__name__} computes something else than its operations in a row: "
            "a tensor is changed in place while another name refers to it, or a hook acts"
        )
    return builder.finish()


def space_of(model: nn.Module, example_input: Tensor | GeneSpace) -> GeneSpace:
    """The trace of a model: what :func:`trace` gave for it, or gives now."""
    if not isinstance(example_input, GeneSpace):
        return trace(model, example_input)
    example_input.require(model)
    return example_input


def _checked(model: nn.Module, x: Tensor) -> Tensor:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    _check_mode(model)
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise TypeError(
            f"example_input must be a floating-point tensor, got "
            f"{x.dtype if isinstance(x, Tensor) else type(x).__name__}"
        )
    if x.dim() < 2 or x.shape[0] < 1:
        raise ValueError(f"example_input must have shape [N, C, ...] with N >= 1, got {list(x.shape)}")
    _check_weights(model, x)
    return x[:1].detach()


def check_model(model: nn.Module, x: Tensor) -> None:
    """Raises an error if a model that was traced before is in training mode, not of the dtype and on the device of x,
    holds values that are not finite, or shares weights."""
    _check_mode(model)
    _check_weights(model, x)


def _check_mode(model: nn.Module) -> None:
    for path, module in model.named_modules():
        if module.training:
            raise ValueError(
                f"model must be in evaluation mode, but {path or 'it'} is in training mode: call model.eval()"
            )


def _check_weights(model: nn.Module, x: Tensor) -> None:
    seen: dict[int, str] = {}
    for path, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.dtype != x.dtype or parameter.device != x.device:
            raise TypeError(
                f"example_input must be {parameter.dtype} on {parameter.device} as {path} is, got "
                f"{x.dtype} on {x.device}"
            )
        if parameter.numel() and not all(bool(v.isfinite()) for v in parameter.detach().aminmax()):
            raise ValueError(f"{path} holds values that are not finite")
        if seen.setdefault(id(parameter), path) != path:
            raise UnsupportedModelError(
                f"{path} and {seen[id(parameter)]} are the same tensor: shared weights are not supported"
            )


# --- torch.fx ------------------------------------------------------------------------------------------


def _torch_class(module: nn.Module) -> type[nn.Module]:
    """The class of torch whose forward the module has, or its own class."""
    own: Any = type(module)
    return next((c for c in own.__mro__ if c.__module__.startswith("torch.nn") and c.forward is own.forward), own)


class _Proxy(fx.Proxy):
    def __len__(self) -> int:
        count = _pieces(self.node)
        return super().__len__() if count is None else count


def _pieces(node: fx.Node) -> int | None:
    """How many a chunk or split has, where the call says so: then it can be a list."""
    name, given = getattr(node.target, "__name__", node.target), (*node.args, *node.kwargs.values())
    if name not in ("chunk", "split") or len(given) < 2:
        return None
    if isinstance(given[1], Sequence):
        return len(given[1])
    return given[1] if name == "chunk" and isinstance(given[1], int) else None


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        c = _torch_class(m)
        return c.__module__.startswith("torch.nn") and c is not nn.Sequential

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        count = _pieces(obj.node)
        return super().iter(obj) if count is None else iter([obj[i] for i in range(count)])  # type: ignore[index]

    def create_proxy(self, *args: Any, **kwargs: Any) -> fx.Proxy:
        # fx can record stack traces itself, but then imports half of torch's compiler: a second.
        proxy = super().create_proxy(*args, **kwargs)
        here = inspect.currentframe()
        assert here is not None
        frame = here.f_back
        while frame is not None and _of_torch(frame.f_code.co_filename):
            frame = frame.f_back
        # A model of torch's modules alone has no line: the next frame is `trace`.
        if frame is not None and frame.f_code.co_filename != here.f_code.co_filename:
            proxy.node.meta["line"] = frame.f_code.co_filename, frame.f_lineno
        return proxy


_TORCH = os.path.dirname(torch.__file__) + os.sep


def _of_torch(filename: str) -> bool:
    return filename.startswith((_TORCH, "<"))


def _line(node: fx.Node) -> str:
    """Where the model calls it: "file:line: source"."""
    if "line" not in node.meta:
        return ""
    file, number = node.meta["line"]
    return f"{file}:{number}: {linecache.getline(file, number).strip()}"


# --- channels --------------------------------------------------------------------------------------------


class _Ref:
    """Stands for a value among the arguments of a call."""

    def __init__(self, value: int) -> None:
        self.value = value


class _Split:
    """Stands for a value whose channels are seen along several dimensions, [N, *index.shape, ...]: the middle of a
    channel shuffle."""

    def __init__(self, value: int, index: np.ndarray) -> None:
        self.value, self.index = value, index


class _Builder:
    """Runs the graph's nodes and ties their channels.

    A channel is an element of a union-find, or ZERO; element 0 is KEPT, and the others are numbered as they
    appear. A set is named by its smallest element, so that KEPT wins and the order is the network's.
    """

    def __init__(self, model: nn.Module, x: Tensor) -> None:
        self.model, self.modules, self.example = model, dict(model.named_modules()), x
        self.parent = [0]
        self.names: list[str] = []
        self.tensors: list[Tensor] = []
        self.channels: list[np.ndarray] = []
        self.ops: list[Op] = []
        self.env: dict[fx.Node, Any] = {}  # _Ref, _Split, or a Python object such as a size
        self.called: set[str] = set()
        self.output = -1

    # union-find

    def find(self, e: int) -> int:
        while self.parent[e] != e:
            self.parent[e] = e = self.parent[self.parent[e]]
        return e

    def tie(self, a: np.ndarray, b: np.ndarray) -> None:
        for i, j in zip(a.tolist(), b.tolist(), strict=True):
            i, j = self.find(i), self.find(j)
            self.parent[max(i, j)] = min(i, j)

    def new(self, count: int) -> np.ndarray:
        start = len(self.parent)
        self.parent.extend(range(start, start + count))
        return np.arange(start, start + count)

    # nodes

    def step(self, node: fx.Node) -> None:
        if node.op == "placeholder":
            if self.names:
                if node.args:  # a default
                    self.env[node] = node.args[0]
                    return
                raise UnsupportedModelError(f"the model takes more than one input: {node.name}")
            self.env[node] = self.value(node.name, self.example, np.zeros(self.example.shape[1], np.int64))
        elif node.op == "output":
            out = self.resolved(node.args[0])
            if not isinstance(out, _Ref):
                raise UnsupportedModelError(f"the model must return one tensor, but returns {node.args[0]}")
            self.output = out.value
            c = self.channels[out.value]
            self.tie(c[c != ZERO], 0 * c[c != ZERO])
        elif node.op == "get_attr":
            self.refuse(node, f"the tensor {node.target} used outside a module of torch.nn")
        elif node.op == "call_module":
            self.env[node] = self.call_module(node)
        else:
            self.env[node] = self.call(node)

    def resolved(self, a: Any) -> Any:
        return fx.node.map_arg(a, lambda n: self.env[n])

    def value(self, name: str, x: Tensor, channels: np.ndarray) -> _Ref:
        self.names.append(name)
        self.tensors.append(x)
        self.channels.append(channels)
        return _Ref(len(self.names) - 1)

    def refuse(self, node: fx.Node, what: str) -> NoReturn:
        scope, line = self.scope(node), _line(node)
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
        channels: np.ndarray,
        *,
        module: nn.Module | None = None,
        function: Callable[..., Tensor] | None = None,
        fixed: bool = False,
        **attributes: Any,
    ) -> _Ref:
        name = str(node.target) if node.op == "call_module" else node.name
        made = Op(
            kind,
            name,
            tuple(inputs),
            len(self.names),
            module,
            function,
            attributes,
            self.scope(node),
            _line(node),
            fixed,
        )
        try:
            result = made.run(*(self.tensors[i] for i in inputs))
        except Exception as error:
            raise ValueError(
                f"example_input of shape {list(self.example.shape)} does not fit: {name} fails with {error}"
            ) from error
        self.ops.append(made)
        return self.value(name, result, channels)

    def call_module(self, node: fx.Node) -> _Ref:
        path = str(node.target)
        m = self.modules[path]
        c = _torch_class(m)
        a = self.resolved(node.args[0] if node.args else node.kwargs.get("input"))
        if not isinstance(a, _Ref) or len(node.args) + len(node.kwargs) != 1:
            self.refuse(node, f"{c.__name__} {path} called with {node.args}")
        if c in _ALONE:
            return a
        if c in MODULES:
            f = MODULES[c]
            names = ELEMENTWISE.get(f) or SPATIAL.get(f) or ()
            return self.known(node, f, a, {n: getattr(m, n) for n in names if hasattr(m, n)})
        if c is nn.ChannelShuffle:
            return self.call_channel_shuffle(node, a, m.groups)
        if c is nn.Flatten:
            return self.reshape(node, a, torch.flatten(self.tensors[a.value], m.start_dim, m.end_dim).shape, False)
        if c in (nn.Softmax, nn.LogSoftmax):
            return self.softmax(node, F.softmax if c is nn.Softmax else F.log_softmax, a, m.dim)
        if c not in (nn.Conv2d, nn.Linear, nn.BatchNorm1d, nn.BatchNorm2d, nn.PReLU):
            self.refuse(node, f"{c.__name__} {path}")
        if path in self.called:
            self.refuse(node, f"{path} called twice (shared weights)")
        if "weight" not in m._parameters:
            self.refuse(node, f"{c.__name__} {path} with a weight that is computed")
        self.called.add(path)
        i = a.value
        channels, shape = self.channels[i], self.tensors[i].shape[1:]
        wanted = {nn.Conv2d: (3,), nn.Linear: (1,), nn.BatchNorm1d: (1, 2), nn.BatchNorm2d: (3,)}
        if c in wanted and len(shape) not in wanted[c]:
            self.refuse(node, f"{c.__name__} {path} of a value [N, {', '.join(map(str, shape))}]")
        if isinstance(m, nn.Conv2d):
            return self.op(node, "conv", [i], self.conv(node, m, channels), module=m)
        if isinstance(m, nn.Linear):
            return self.op(node, "linear", [i], self.new(m.out_features), module=m)
        if isinstance(m, nn.PReLU):
            return self.op(node, "prelu", [i], channels, module=m)
        if m.running_mean is None:
            self.refuse(node, f"{c.__name__} {path} without running statistics")
        if (channels == ZERO).any():
            self.refuse(node, f"{c.__name__} {path} of channels that are constantly zero")
        return self.op(node, "batch_norm", [i], channels, module=m)

    def conv(self, node: fx.Node, m: nn.Conv2d, channels: np.ndarray) -> np.ndarray:
        if m.groups == 1:
            return self.new(m.out_channels)
        if m.groups == m.in_channels:
            if (channels == ZERO).any():
                self.refuse(node, f"depthwise convolution {node.target} of channels that are constantly zero")
            return np.repeat(channels, m.out_channels // m.groups)
        if (channels == ZERO).any():
            self.refuse(node, f"grouped convolution {node.target} of channels that are constantly zero")
        position = channels.reshape(m.groups, -1)
        for other in position[1:]:
            self.tie(position[0], other)
        return np.tile(self.new(m.out_channels // m.groups), m.groups)

    def known(self, node: fx.Node, f: Callable[..., Tensor], a: _Ref, arguments: dict[str, Any]) -> _Ref:
        """Of ELEMENTWISE or SPATIAL."""
        inplace = arguments.pop("inplace", False)
        if arguments.pop("return_indices", False):
            self.refuse(node, f"{f.__name__} with return_indices")
        if "stride" in arguments or f in (F.max_pool2d, F.avg_pool2d):
            stride = arguments.get("stride")
            arguments["stride"] = arguments["kernel_size"] if stride is None else stride
        return self.each(node, "elementwise" if f in ELEMENTWISE else "spatial", f, a, inplace, **arguments)

    def each(
        self, node: fx.Node, kind: Kind, f: Callable[..., Tensor], a: _Ref, inplace: bool = False, **attributes: Any
    ) -> _Ref:
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

    def rebind(self, old: _Ref, new: _Ref) -> None:
        """Whoever refers to `old` sees what was written over it."""
        for key, ref in self.env.items():
            if isinstance(ref, _Ref) and ref.value == old.value:
                self.env[key] = new

    def take(self, node: fx.Node, a: _Ref, index: np.ndarray) -> _Ref:
        """Some channels, in some order, none twice."""
        channels = self.channels[a.value]
        if np.array_equal(index, np.arange(len(channels))):
            return a
        return self.op(
            node, "take", [a.value], channels[index], function=take_channels, fixed=True, index=tuple(index.tolist())
        )

    # calls of functions and methods

    def call(self, node: fx.Node) -> Any:
        args, kwargs = list(self.resolved(node.args)), dict(self.resolved(node.kwargs))
        if not args and "input" in kwargs:
            args = [kwargs.pop("input")]
        refs: list[_Ref | _Split] = []
        fx.node.map_aggregate((args, kwargs), lambda v: refs.append(v) if isinstance(v, _Ref | _Split) else v)
        f = node.target
        name = f if isinstance(f, str) else getattr(f, "__name__", str(f))
        if not refs:  # arithmetic on sizes
            result = f(*args, **kwargs) if callable(f) else getattr(args[0], name)(*args[1:], **kwargs)
            if isinstance(result, Tensor):
                self.refuse(node, f"{name}, a tensor made in forward,")
            return result
        if callable(f) and f is not getattr and all(getattr(of, name, None) is not f for of in (F, torch, operator)):
            if len(refs) == 1 and isinstance(refs[0], _Ref) and self.gives_back(f, refs[0], args, kwargs):
                return refs[0]
            self.refuse(node, f"{getattr(f, '__module__', '')}.{name}")
        inplace = f in (operator.iadd, operator.imul) or (name.endswith("_") and not name.endswith("__"))
        if inplace:
            name = name[1:] if callable(f) and f.__module__ == "_operator" else name[:-1]
        handler = getattr(self, f"call_{name}", None)
        if any(isinstance(r, _Split) for r in refs):
            handler = partial(self.regrouped, name=name)
        if handler is not None:
            try:
                out = handler(node, *args, **kwargs)
            except TypeError as error:
                if "argument" not in str(error):
                    raise
                self.refuse(node, f"{name} with the arguments {node.args}, {node.kwargs}")
            if inplace and isinstance(out, _Ref):
                self.rebind(args[0], out)
            return out
        if name not in _BY_NAME or not isinstance(args[0], _Ref) or len(refs) > 1:
            self.refuse(node, name)
        known = _BY_NAME[name]
        names = ELEMENTWISE.get(known) or SPATIAL.get(known) or ()
        arguments = {**dict(zip(names, args[1:], strict=False)), **kwargs}
        if inplace:
            arguments["inplace"] = True
        return self.known(node, known, args[0], arguments)

    def gives_back(self, f: Callable[..., Any], a: _Ref, args: list[Any], kwargs: dict[str, Any]) -> bool:
        """Whether a function that is not torch's returns the very tensor it is given, such as stochastic depth in
        evaluation mode."""
        x = self.tensors[a.value]
        for given in (x, torch.zeros_like(x)):
            own = lambda v: given if v is a else v
            with contextlib.suppress(Exception):  # what it cannot do is refused by name
                if f(*fx.node.map_aggregate(tuple(args), own), **fx.node.map_aggregate(kwargs, own)) is given:
                    continue
            return False
        return True

    def call_getattr(self, node: fx.Node, a: _Ref, name: str) -> Any:
        if name not in ("shape", "ndim", "dtype", "device"):
            self.refuse(node, f"the attribute {name} of a tensor")
        return getattr(self.tensors[a.value], name)

    def call_size(self, node: fx.Node, a: _Ref, dim: int | None = None) -> Any:
        return self.tensors[a.value].size() if dim is None else self.tensors[a.value].size(dim)

    def call_dim(self, node: fx.Node, a: _Ref) -> int:
        return self.tensors[a.value].dim()

    def call_contiguous(self, node: fx.Node, a: _Ref, memory_format: Any = None) -> _Ref:
        return a

    def call_dropout(
        self, node: fx.Node, a: _Ref, p: float = 0.5, training: bool = True, inplace: bool = False
    ) -> _Ref:
        if training:
            self.refuse(node, "dropout that is active in evaluation mode (give it training=self.training)")
        return a

    call_dropout1d = call_dropout2d = call_alpha_dropout = call_feature_alpha_dropout = call_dropout

    def call_add(self, node: fx.Node, a: Any, b: Any, *, alpha: float = 1) -> _Ref:
        if alpha != 1:
            self.refuse(node, f"add with alpha={alpha}")
        return self.together(node, "add", torch.add, a, b)

    def call_mul(self, node: fx.Node, a: Any, b: Any) -> _Ref:
        return self.together(node, "mul", torch.mul, a, b)

    def together(self, node: fx.Node, kind: Kind, f: Callable[..., Tensor], a: Any, b: Any) -> _Ref:
        """Add or mul of two values, or of a value and a number."""
        if not (isinstance(a, _Ref) and isinstance(b, _Ref)):
            x, other = (a, b) if isinstance(a, _Ref) else (b, a)
            return self.each(node, "elementwise", f, x, other=other)
        x, y = (self.tensors[v.value].shape[1:] for v in (a, b))
        if len(x) != len(y) or x[0] != y[0] or (kind == "add" and x != y):
            self.refuse(node, f"{kind} of values [N, {', '.join(map(str, x))}] and [N, {', '.join(map(str, y))}]")
        p, q = self.channels[a.value], self.channels[b.value]
        both = (p != ZERO) & (q != ZERO)
        self.tie(p[both], q[both])
        out = np.where(p == ZERO, q, p) if kind == "add" else np.where(both, p, ZERO)
        return self.op(node, kind, [a.value, b.value], out, function=f)

    def call_div(self, node: fx.Node, a: _Ref, b: Any) -> _Ref:
        if isinstance(b, _Ref) or not isinstance(a, _Ref):
            self.refuse(node, "division by a tensor")
        return self.each(node, "elementwise", torch.div, a, other=b)

    call_truediv = call_div

    def call_cat(self, node: fx.Node, tensors: Any, dim: int = 0) -> _Ref:
        if not all(isinstance(t, _Ref) for t in tensors):
            self.refuse(node, "concatenation with a tensor made in forward")
        inputs = [t.value for t in tensors]
        if dim % self.tensors[inputs[0]].dim() != 1:
            self.refuse(node, f"concatenation along dimension {dim}")
        channels = np.concatenate([self.channels[i] for i in inputs])
        return self.op(node, "concat", inputs, channels, function=concat_channels)

    call_concat = call_concatenate = call_cat

    def call_flatten(self, node: fx.Node, a: _Ref, start_dim: int = 0, end_dim: int = -1) -> _Ref:
        return self.reshape(node, a, torch.flatten(self.tensors[a.value], start_dim, end_dim).shape, False)

    def call_reshape(self, node: fx.Node, a: _Ref, *shape: Any) -> _Ref:
        given = node.args[1:]
        if len(shape) == 1 and not isinstance(shape[0], int):
            shape, given = tuple(shape[0]), node.args[1]  # type: ignore[assignment]
        stated = isinstance(given, tuple | list) and len(given) > 1 and isinstance(given[1], int) and given[1] > 0
        return self.reshape(node, a, self.tensors[a.value].reshape(shape).shape, stated)

    call_view = call_reshape

    def call_squeeze(self, node: fx.Node, a: _Ref, *dim: int) -> _Ref:
        dims = [d % self.tensors[a.value].dim() for d in dim]
        if not dims or min(dims) < 2:
            self.refuse(node, "squeeze of other dimensions than H and W")
        return self.reshape(node, a, self.tensors[a.value].squeeze(tuple(dims)).shape, False)

    def call_unsqueeze(self, node: fx.Node, a: _Ref, dim: int) -> _Ref:
        return self.reshape(node, a, self.tensors[a.value].unsqueeze(dim).shape, False)

    def reshape(self, node: fx.Node, a: _Ref, shape: torch.Size, fixed: bool) -> Any:
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
            return _Split(a.value, np.arange(x.shape[1]).reshape(shape[1 : dims + 1]))
        self.refuse(node, f"{node.name} of {list(x.shape)} to {list(shape)}")

    def call_expand_as(self, node: fx.Node, a: _Ref, other: _Ref) -> _Ref:
        x, y = self.tensors[a.value].shape, self.tensors[other.value].shape
        if len(x) != len(y) or x[:2] != y[:2]:
            self.refuse(node, f"expand_as from {list(x)} to {list(y)}")
        return self.each(node, "spatial", expand_positions, a, sizes=tuple(y[2:]))

    def call_mean(self, node: fx.Node, a: _Ref, dim: Any = None, keepdim: bool = False) -> _Ref:
        dims = tuple(d % self.tensors[a.value].dim() for d in ((dim,) if isinstance(dim, int) else dim or ()))
        if not dims or min(dims) < 2:
            self.refuse(node, f"mean over the dimensions {dim}, not H and W,")
        return self.each(node, "spatial", torch.mean, a, dim=dims, keepdim=keepdim)

    def call_chunk(self, node: fx.Node, a: _Ref, chunks: int, dim: int = 0) -> tuple[_Ref, ...]:
        out = self.cut(node, a, dim, lambda c: c.chunk(chunks))
        if len(out) != chunks:
            self.refuse(node, f"chunk of {self.tensors[a.value].shape[1]} channels into {chunks}")
        return out

    def call_split(
        self, node: fx.Node, a: _Ref, split_size: Any = None, dim: int = 0, *, split_size_or_sections: Any = None
    ) -> tuple[_Ref, ...]:
        return self.cut(node, a, dim, lambda c: c.split(split_size_or_sections if split_size is None else split_size))

    def cut(self, node: fx.Node, a: _Ref, dim: int, pieces: Callable[[Tensor], Sequence[Tensor]]) -> tuple[_Ref, ...]:
        x = self.tensors[a.value]
        if dim % x.dim() != 1:
            self.refuse(node, f"{node.name} along dimension {dim}")
        return tuple(self.take(node, a, index.numpy()) for index in pieces(torch.arange(x.shape[1])))

    def call_channel_shuffle(self, node: fx.Node, a: _Ref, groups: int) -> _Ref:
        return self.take(node, a, np.arange(self.tensors[a.value].shape[1]).reshape(groups, -1).T.reshape(-1))

    def regrouped(self, node: fx.Node, a: Any, *args: Any, name: str) -> _Ref | _Split:
        """What may be done to a _Split: its dimensions put into another order, and made one again."""
        if not isinstance(a, _Split):
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
                return _Split(a.value, a.index.transpose([d - 1 for d in where[1 : dims + 1]]))
        elif name in ("view", "reshape", "flatten"):
            if getattr(seen, name)(*args).shape == (1, a.index.size, *positions):
                return self.take(node, _Ref(a.value), a.index.reshape(-1))
        self.refuse(node, f"{name} of channels along several dimensions")

    def call_getitem(self, node: fx.Node, a: Any, index: Any) -> _Ref:
        if isinstance(a, tuple):  # the pieces of what was cut
            return a[index]
        index = list(index) if isinstance(index, tuple) else [index]
        if Ellipsis in index:
            at = index.index(Ellipsis)
            index[at : at + 1] = [slice(None)] * (self.tensors[a.value].dim() - len(index) + 1)
        if index[:1] == [slice(None)] and len(index) > 1 and isinstance(index[1], slice):
            a = self.take(node, a, np.arange(self.tensors[a.value].shape[1])[index[1]])
            index[1] = slice(None)
            if all(i == slice(None) for i in index):
                return a
        if index[:2] != [slice(None)] * 2 or not all(isinstance(i, int | slice) for i in index):
            self.refuse(node, f"an index of other dimensions than H and W, {node.args[1]},")
        return self.each(node, "spatial", at_positions, a, index=tuple(index[2:]))

    def call_pad(self, node: fx.Node, a: _Ref, pad: Any, mode: str = "constant", value: float | None = None) -> _Ref:
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

    def call_softmax(self, node: fx.Node, a: _Ref, dim: int | None = None, **other: Any) -> _Ref:
        return self.softmax(node, F.softmax, a, dim)

    def call_log_softmax(self, node: fx.Node, a: _Ref, dim: int | None = None, **other: Any) -> _Ref:
        return self.softmax(node, F.log_softmax, a, dim)

    def softmax(self, node: fx.Node, f: Callable[..., Tensor], a: _Ref, dim: int | None) -> _Ref:
        channels = self.channels[a.value]
        if dim is None or dim % self.tensors[a.value].dim() != 1 or (channels == ZERO).any():
            self.refuse(node, f"{f.__name__} over the dimension {dim}")
        self.tie(channels, 0 * channels)
        return self.op(node, "softmax", [a.value], channels, function=f, dim=1)

    # --- the result ----------------------------------------------------------------------------------

    def finish(self) -> GeneSpace:
        root = np.array([self.find(e) for e in range(len(self.parent))])
        makers: dict[int, list[str]] = {}  # by set of channels
        producers = [op for op in self.ops if op.kind in ("conv", "linear") and not op.depthwise]
        for op in producers:
            for r in np.unique(root[self.channels[op.output]]):
                if r != 0:
                    makers.setdefault(int(r), []).append(op.name)
        # How many channels a value has must follow from how many genes of each group are on, so that those which only
        # some of the values hold are groups of their own.
        parts = [self.channels[op.output] for op in self.ops if op.kind in ("take", "mul")]
        often = np.array([np.bincount(root[c[c != ZERO]], minlength=len(root)) for c in parts]).T.tolist()
        of_group: dict[tuple[tuple[str, ...], tuple[int, ...]], list[int]] = {}
        for r in sorted(makers):
            of_group.setdefault((tuple(makers[r]), tuple(often[r]) if parts else ()), []).append(r)
        gene = np.full(len(root), KEPT)
        groups: list[Group] = []
        start = 0
        names: dict[str, int] = {}
        for (modules, _), roots in of_group.items():
            gene[roots] = np.arange(start, start + len(roots))
            names[modules[0]] = names.get(modules[0], 0) + 1
            again = f" ({names[modules[0]]})" if names[modules[0]] > 1 else ""
            groups.append(Group(modules[0] + again, modules, start, len(roots)))
            start += len(roots)
        genes = [torch.from_numpy(np.where(c == ZERO, ZERO, gene[root[c.clip(0)]])) for c in self.channels]
        values = [Value(n, tuple(x.shape[1:]), g) for n, x, g in zip(self.names, self.tensors, genes, strict=True)]
        l1 = filter_norms(self.ops, values, start)
        return GeneSpace(self.ops, values, self.output, groups, l1, sum(p.numel() for p in self.model.parameters()))
