"""What is known of torch's functions and modules, which work on each number or on each channel by itself; and functions
for operations that torch has under no name of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = [
    "BY_NAME",
    "ELEMENTWISE",
    "MODULES",
    "PASSED",
    "SPATIAL",
    "at_positions",
    "concat_channels",
    "expand_positions",
    "function_name",
    "pad_channels",
    "reshape_positions",
    "take_channels",
    "torch_class",
]


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


def function_name(f: object) -> str:
    """How messages call a function."""
    name: str = getattr(f, "__name__", str(f))
    return name


def torch_class(module: nn.Module) -> type[nn.Module]:
    """The class of torch whose forward the module has, or its own class."""
    kind: Any = type(module)
    found: type[nn.Module] = next(
        (c for c in kind.__mro__ if c.__module__.startswith("torch.nn") and c.forward is kind.forward), kind
    )
    return found


# The names of the arguments after the input, by function.
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
BY_NAME: dict[str, Callable[..., Tensor]] = {function_name(f): f for f in (*ELEMENTWISE, *SPATIAL)}
# In evaluation mode these give back what they are given.
PASSED: tuple[type[nn.Module], ...] = (
    nn.Identity,
    nn.Dropout,
    nn.Dropout1d,
    nn.Dropout2d,
    nn.AlphaDropout,
    nn.FeatureAlphaDropout,
)
