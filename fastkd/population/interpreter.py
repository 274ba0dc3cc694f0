"""Runs the nodes of a traced graph, one after the other, and records what each does to channels."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from .calls import Calls
from .channels import Channels, Ref, Split
from .operations import BY_NAME, ELEMENTWISE, MODULES, PASSED, SPATIAL, function_name, torch_class
from .space import ZERO, UnsupportedModelError

__all__ = ["Interpreter"]


class Interpreter(Calls):
    """A node is an input, the output, a module of torch.nn, or a call of a function or method."""

    def run(self, node: fx.Node) -> None:
        if node.op == "placeholder":
            if self.names:
                if node.args:  # a default
                    self.env[node] = node.args[0]
                    return
                raise UnsupportedModelError(f"the model takes more than one input: {node.name}")
            self.env[node] = self.value(node.name, self.example, np.zeros(self.example.shape[1], np.int64))
        elif node.op == "output":
            out = self.resolved(node.args[0])
            if not isinstance(out, Ref):
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

    def call_module(self, node: fx.Node) -> Ref | Split:
        path = str(node.target)
        m = self.modules[path]
        c = torch_class(m)
        a = self.resolved(node.args[0] if node.args else node.kwargs.get("input"))
        if not isinstance(a, Ref) or len(node.args) + len(node.kwargs) != 1:
            self.refuse(node, f"{c.__name__} {path} called with {node.args}")
        if c in PASSED:
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

    def conv(self, node: fx.Node, m: nn.Conv2d, channels: Channels) -> Channels:
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

    def call(self, node: fx.Node) -> Any:
        args, kwargs = list(self.resolved(node.args)), dict(self.resolved(node.kwargs))
        if not args and "input" in kwargs:
            args = [kwargs.pop("input")]
        refs: list[Ref | Split] = []
        fx.node.map_aggregate((args, kwargs), lambda v: refs.append(v) if isinstance(v, Ref | Split) else v)
        f = node.target
        name = f if isinstance(f, str) else function_name(f)
        if not refs:  # arithmetic on sizes
            result = f(*args, **kwargs) if callable(f) else getattr(args[0], name)(*args[1:], **kwargs)
            if isinstance(result, Tensor):
                self.refuse(node, f"{name}, a tensor made in forward,")
            return result
        if callable(f) and f is not getattr and all(getattr(of, name, None) is not f for of in (F, torch, operator)):
            if len(refs) == 1 and isinstance(refs[0], Ref) and self.gives_back(f, refs[0], args, kwargs):
                return refs[0]
            self.refuse(node, f"{getattr(f, '__module__', '')}.{name}")
        inplace = f in (operator.iadd, operator.imul) or (name.endswith("_") and not name.endswith("__"))
        if inplace:
            name = name[1:] if callable(f) and f.__module__ == "_operator" else name[:-1]
        handler = getattr(self, f"call_{name}", None)
        if any(isinstance(r, Split) for r in refs):
            handler = partial(self.regrouped, name=name)
        if handler is not None:
            try:
                out = handler(node, *args, **kwargs)
            except TypeError as error:
                if "argument" not in str(error):
                    raise
                self.refuse(node, f"{name} with the arguments {node.args}, {node.kwargs}")
            if inplace and isinstance(out, Ref):
                self.rebind(args[0], out)
            return out
        if name not in BY_NAME or not isinstance(args[0], Ref) or len(refs) > 1:
            self.refuse(node, name)
        known = BY_NAME[name]
        names = ELEMENTWISE.get(known) or SPATIAL.get(known) or ()
        arguments = {**dict(zip(names, args[1:], strict=False)), **kwargs}
        if inplace:
            arguments["inplace"] = True
        return self.known(node, known, args[0], arguments)

    def gives_back(self, f: Callable[..., Any], a: Ref, args: list[Any], kwargs: dict[str, Any]) -> bool:
        """Whether a function that is not torch's returns the very tensor it is given, such as stochastic depth in
        evaluation mode."""
        x = self.tensors[a.value]
        for argument in (x, torch.zeros_like(x)):
            with_it = lambda v: argument if v is a else v
            with contextlib.suppress(Exception):  # what it cannot do is refused by name
                if (
                    f(*fx.node.map_aggregate(tuple(args), with_it), **fx.node.map_aggregate(kwargs, with_it))
                    is argument
                ):
                    continue
            return False
        return True
