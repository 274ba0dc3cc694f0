"""The operations of a model by torch.fx, each with the line of the model that calls it."""

from __future__ import annotations

import inspect
import linecache
import os
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import fx, nn

from .operations import torch_class

__all__ = ["Tracer", "line_of", "of_torch"]


class _Proxy(fx.Proxy):
    def __len__(self) -> int:
        count = _pieces(self.node)
        return super().__len__() if count is None else count


def _pieces(node: fx.Node) -> int | None:
    """How many a chunk or split has, where the call says so: then it can be a list."""
    name, arguments = getattr(node.target, "__name__", node.target), (*node.args, *node.kwargs.values())
    if name not in ("chunk", "split") or len(arguments) < 2:
        return None
    if isinstance(arguments[1], Sequence):
        return len(arguments[1])
    return arguments[1] if name == "chunk" and isinstance(arguments[1], int) else None


class Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        c = torch_class(m)
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
        while frame is not None and of_torch(frame.f_code.co_filename):
            frame = frame.f_back
        # A model of torch's modules alone has no line: the next frame is of this package.
        if frame is not None and not frame.f_code.co_filename.startswith(_HERE):
            proxy.node.meta["line"] = frame.f_code.co_filename, frame.f_lineno
        return proxy


_TORCH, _HERE = (os.path.dirname(file) + os.sep for file in (torch.__file__, __file__))


def of_torch(filename: str) -> bool:
    return filename.startswith((_TORCH, "<"))


def line_of(node: fx.Node) -> str:
    """Where the model calls it: "file:line: source"."""
    if "line" not in node.meta:
        return ""
    file, number = node.meta["line"]
    return f"{file}:{number}: {linecache.getline(file, number).strip()}"
