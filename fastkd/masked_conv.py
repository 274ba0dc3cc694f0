"""Convolutions of a whole population of channel-masked networks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _ops

__all__ = ["masked_conv2d"]


def masked_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    in_mask: Tensor | None = None,
    out_mask: Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
) -> Tensor:
    """``conv2d`` for P individuals that share their weights and each keep some of the channels.

    Individual p computes ``out_mask[p] * conv2d(in_mask[p] * x, weight, bias)``, but channels that it
    lacks are neither read nor computed: whatever they hold, even NaN, they count as 0, and their
    outputs are exactly 0.

    Args:
        x: [N, C_in, H, W], shared by all, or [P, N, C_in, H, W].
        weight: [C_out, C_in / groups, kH, kW].
        bias: [C_out].
        in_mask: bool [P, C_in]; all channels if absent.
        out_mask: bool [P, C_out]; all channels if absent.
        stride, padding, dilation, groups: as for :func:`torch.nn.functional.conv2d`.

    Returns:
        [P, N, C_out, H', W'], in the dtype of x. Sums are in float32, or in float64 for float64. A
        result does not depend on the other individuals or on the number of threads; on the CPU, neither do
        gradients depend on the number of threads. Images fill the vector registers of the CPU: with fewer
        than 8 of float32 (4 of float64) most of a register is idle, and a loop over individuals may be faster.
    """
    for name, t, optional in (
        ("x", x, False),
        ("weight", weight, False),
        ("bias", bias, True),
        ("in_mask", in_mask, True),
        ("out_mask", out_mask, True),
    ):
        if not (isinstance(t, Tensor) or (optional and t is None)):
            raise TypeError(f"{name} must be a tensor{' or None' if optional else ''}, got {type(t).__name__}")
    geometry = _pair("stride", stride), _pair("padding", padding), _pair("dilation", dilation)
    if isinstance(groups, bool) or not isinstance(groups, (int, torch.SymInt)):
        raise TypeError(f"groups must be an integer in [1, inf), got {groups!r}")
    device = x.device.type
    if device in ("cpu", "cuda") and torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        low = torch.get_autocast_dtype(device)
        x, weight, bias = x.to(low), weight.to(low), None if bias is None else bias.to(low)
    stride, padding, dilation = geometry
    masked = _ops.Masked(
        in_mask=in_mask, out_mask=out_mask, stride=stride, padding=padding, dilation=dilation, groups=groups
    )
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias)):
        out: Tensor = _MaskedConv2d.apply(x, weight, bias, masked)  # type: ignore[no-untyped-call]
    else:
        out = _ops.masked_conv2d(x, weight, bias, *masked)
    return out


def _pair(name: str, value: Any) -> tuple[int, int]:
    pair = tuple(value) if isinstance(value, (tuple, list)) else (value, value)
    if len(pair) != 2 or any(isinstance(v, bool) or not isinstance(v, (int, torch.SymInt)) for v in pair):
        raise TypeError(f"{name} must be an integer or a pair of integers, got {value!r}")
    return pair


class _MaskedConv2d(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, masked: _ops.Masked) -> Tensor:
        ctx.save_for_backward(x, weight, masked.in_mask, masked.out_mask)
        ctx.geometry = (masked.stride, masked.padding, masked.dilation, masked.groups)
        out: Tensor = _ops.masked_conv2d(x, weight, bias, *masked)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        x, weight, in_mask, out_mask = ctx.saved_tensors
        wanted = list(ctx.needs_input_grad[:3])
        masked = _ops.Masked(in_mask, out_mask, *ctx.geometry)
        grads = _ops.masked_conv2d_backward(grad, x, weight, *masked, wanted)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            grads = [_ops.no_second_derivative("masked_conv2d", g, grad, x, weight) for g in grads]
        gx, gw, gb = (g if w else None for g, w in zip(grads, wanted, strict=True))
        return gx, gw, gb, None
