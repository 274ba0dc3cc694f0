"""The operators of a convolution of a masked population."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import native, structs
from .native import DTYPES, acc_dtype, address, backend_for
from .network import ALWAYS, Network


class Masked(NamedTuple):
    """Masks and geometry: what both operators take behind their tensors."""

    in_mask: Tensor | None
    out_mask: Tensor | None
    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]
    groups: int


class OutputShape(NamedTuple):
    """Of the result of a convolution."""

    individuals: int
    images: int
    channels: int
    height: int
    width: int


_MASKED = "Tensor? in_mask, Tensor? out_mask, SymInt[2] stride, SymInt[2] padding, SymInt[2] dilation, SymInt groups"
_MOST = 2**31  # pixels and steps: beyond, sums of their products wrap


def _check_channels(x: Tensor, weight: Tensor, bias: Tensor | None, m: Masked) -> None:
    channels, outputs = x.shape[-3], weight.shape[0]
    for name, t in (("weight", weight), ("bias", bias)):
        if t is not None and t.dtype != x.dtype:
            raise TypeError(f"{name} is {t.dtype}, but x is {x.dtype}")
    for name, t in (("weight", weight), ("bias", bias), ("in_mask", m.in_mask), ("out_mask", m.out_mask)):
        if t is not None and t.device != x.device:
            raise ValueError(f"{name} is on {t.device}, but x is on {x.device}")
    for name, pair, least in (("stride", m.stride, 1), ("padding", m.padding, 0), ("dilation", m.dilation, 1)):
        if len(pair) != 2 or pair[0] < least or pair[1] < least:
            raise ValueError(f"{name} must be two integers in [{least}, inf), got {tuple(pair)}")
        if pair[0] >= _MOST or pair[1] >= _MOST:
            raise ValueError(f"{name} must be two integers in [{least}, 2**31), got {tuple(pair)}")
    if m.groups < 1 or channels % m.groups or outputs % m.groups:
        raise ValueError(
            f"groups = {m.groups} must be in [1, inf) and divide the channels of x ({channels}) and of "
            f"the result ({outputs})"
        )
    if weight.shape[1] * m.groups != channels:
        raise ValueError(
            f"weight takes {weight.shape[1] * m.groups} channels ({weight.shape[1]} x {m.groups} groups), "
            f"but x has {channels}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must have shape [{outputs}], got {tuple(bias.shape)}")


def _check_individuals(x: Tensor, weight: Tensor, m: Masked) -> int:
    """Their number, which x or a mask says."""
    individuals, source = (x.shape[0], "x") if x.dim() == 5 else (None, "")
    for name, mask, size in (("in_mask", m.in_mask, x.shape[-3]), ("out_mask", m.out_mask, weight.shape[0])):
        if mask is None:
            continue
        if mask.dtype != torch.bool:
            raise TypeError(f"{name} must be bool, got {mask.dtype}")
        if mask.dim() != 2 or mask.shape[1] != size:
            raise ValueError(f"{name} must have shape [P, {size}], got {tuple(mask.shape)}")
        if individuals is not None and mask.shape[0] != individuals:
            raise ValueError(f"{name} has P = {mask.shape[0]} rows, but {source} has P = {individuals}")
        individuals, source = mask.shape[0], name
    if individuals is None:
        raise ValueError("the number of individuals is not known: pass in_mask, out_mask or x of shape [P, N, C, H, W]")
    return individuals


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, m: Masked) -> OutputShape:
    if x.dtype not in DTYPES:
        raise TypeError(f"x must be float16, bfloat16, float32 or float64, got {x.dtype}")
    if x.dim() not in (4, 5):
        raise ValueError(f"x must have shape [N, C, H, W] or [P, N, C, H, W], got {tuple(x.shape)}")
    if weight.dim() != 4:
        raise ValueError(f"weight must have shape [C_out, C_in / groups, kH, kW], got {tuple(weight.shape)}")
    _check_channels(x, weight, bias, m)
    individuals = _check_individuals(x, weight, m)
    out = []
    for axis, s in enumerate(x.shape[-2:]):
        extent = m.dilation[axis] * (weight.shape[2 + axis] - 1) + 1
        padded = s + 2 * m.padding[axis]
        if weight.shape[2 + axis] < 1 or padded < extent:
            raise ValueError(
                f"the kernel spans {extent} pixels, but x with its padding has {padded} on axis {'HW'[axis]}"
            )
        out.append((padded - extent) // m.stride[axis] + 1)
    return OutputShape(individuals, x.shape[-4], weight.shape[0], height=out[0], width=out[1])


# --- masked_conv2d --------------------------------------------------------------------------------


def _masked_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    in_mask: Tensor | None,
    out_mask: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    shape = _check(x, weight, bias, Masked(in_mask, out_mask, stride, padding, dilation, groups))
    channels = x.shape[-3]
    masks = [m for m in (in_mask, out_mask) if m is not None]
    genes_in = [ALWAYS] * channels if in_mask is None else range(channels)
    first = 0 if in_mask is None else channels
    genes_out = [ALWAYS] * shape.channels if out_mask is None else range(first, first + shape.channels)
    node = {
        "op": "conv",
        "inputs": (0,),
        "output": 1,
        "weight": weight,
        "bias": bias,
        "stride": stride,
        "padding": padding,
        "dilation": dilation,
        "groups": groups,
    }
    values = ((channels, *x.shape[-2:], genes_in), (shape.channels, shape.height, shape.width, genes_out))
    dtype = x.dtype if backend_for(x.device).uses_workspace else acc_dtype(x)
    network = Network(values, [node], sum(m.shape[1] for m in masks), dtype, device=x.device)
    mask = torch.cat(masks, 1) if masks else torch.empty(shape.individuals, 0, dtype=torch.bool)
    return network(mask, x, out_dtype=x.dtype)


def _masked_conv2d_fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    in_mask: Tensor | None,
    out_mask: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    return x.new_empty(_check(x, weight, bias, Masked(in_mask, out_mask, stride, padding, dilation, groups)))


masked_conv2d = native.register(
    f"masked_conv2d(Tensor x, Tensor weight, Tensor? bias, {_MASKED}) -> Tensor",
    fake=_masked_conv2d_fake,
    cpu=_masked_conv2d,
    cuda=_masked_conv2d,
    names=("x", "weight", "bias", *Masked._fields),
)


# --- masked_conv2d_backward -----------------------------------------------------------------------


class _Backward(NamedTuple):
    """The arguments of masked_conv2d_backward."""

    grad: Tensor
    x: Tensor
    weight: Tensor
    in_mask: Tensor | None
    out_mask: Tensor | None
    stride: list[int]
    padding: list[int]
    dilation: list[int]
    groups: int
    wanted: list[bool]  # the gradients of x, weight and bias

    def check(self) -> OutputShape:
        masked = Masked(self.in_mask, self.out_mask, self.stride, self.padding, self.dilation, self.groups)
        shape = _check(self.x, self.weight, None, masked)
        if tuple(self.grad.shape) != shape or self.grad.dtype != self.x.dtype:
            raise ValueError(
                f"grad must be {self.x.dtype} of shape {tuple(shape)}, got {self.grad.dtype} {tuple(self.grad.shape)}"
            )
        return shape


_Gradients = tuple[Tensor, Tensor, Tensor]


def _pair(values: list[int] | torch.Size) -> structs.Pair:
    rows, columns = values
    return rows, columns


def _backward_native(b: _Backward) -> _Gradients:
    shape = b.check()
    acc, dtype, shared = acc_dtype(b.x), b.x.dtype, b.x.dim() == 4
    want_x, want_weight, want_bias = b.wanted
    gx = b.x.new_zeros(b.x.shape if want_x else 0, dtype=acc if shared else dtype)
    gw = b.x.new_zeros(b.weight.shape if want_weight else 0, dtype=acc)
    gb = b.x.new_zeros(shape.channels if want_bias else 0, dtype=acc)
    grad, x, weight = b.grad.contiguous(), b.x.contiguous(), b.weight.to(acc).contiguous()
    in_mask, out_mask = (None if m is None else m.contiguous() for m in (b.in_mask, b.out_mask))
    op = structs.ConvBackward(
        acc=DTYPES[acc],
        dtype=DTYPES[dtype],
        individuals=shape.individuals,
        images=shape.images,
        channels=x.shape[-3],
        outputs=shape.channels,
        groups=b.groups,
        size=_pair(x.shape[-2:]),
        out_size=(shape.height, shape.width),
        kernel=_pair(weight.shape[2:]),
        stride=_pair(b.stride),
        padding=_pair(b.padding),
        dilation=_pair(b.dilation),
        in_mask=address(in_mask),
        out_mask=address(out_mask),
        grad=grad.data_ptr(),
        x=x.data_ptr(),
        shared=shared,
        weight=weight.data_ptr(),
        grad_x=gx.data_ptr() if want_x else 0,
        grad_weight=gw.data_ptr() if want_weight else 0,
        grad_bias=gb.data_ptr() if want_bias else 0,
    )
    if shape.individuals and shape.images:
        native.host.conv_backward(op, torch.get_num_threads())
    return gx.to(dtype), gw.to(dtype), gb.to(dtype)


def _indices(mask: Tensor | None, p: int) -> Tensor | slice:
    return slice(None) if mask is None else mask[p].nonzero()[:, 0]


def _clear(x: Tensor, mask: Tensor | None, p: int) -> Tensor:
    """x without the channels that individual p lacks, whatever they hold."""
    if mask is None:
        return x
    return x.masked_fill(~mask[p].reshape([-1] + [1] * (x.dim() - 2)), 0)


def _backward_torch(b: _Backward) -> _Gradients:
    """Individual after individual, each on what it keeps; sums over individuals in their order."""
    shape = b.check()
    x, weight, acc, shared = b.x, b.weight, acc_dtype(b.x), b.x.dim() == 4
    want_x, want_weight, want_bias = b.wanted
    gx = torch.zeros_like(x, dtype=acc if shared else x.dtype) if want_x else x.new_empty(0)
    gw = torch.zeros_like(weight, dtype=acc) if want_weight else x.new_empty(0)
    gb = weight.new_zeros(shape.channels, dtype=acc) if want_bias else x.new_empty(0)
    for p in range(shape.individuals if shape.images else 0):
        i = _indices(b.in_mask if b.groups == 1 else None, p)
        o = _indices(b.out_mask if b.groups == 1 else None, p)
        kept, g = (x if shared else x[p])[:, i], b.grad[p][:, o]
        if b.groups > 1:  # groups may keep unequal counts
            kept, g = _clear(kept, b.in_mask, p), _clear(g, b.out_mask, p)
        if want_bias:
            gb[o] += g.sum((0, 2, 3), dtype=acc)
        if not kept.numel() or not g.numel() or not (want_x or want_weight):
            continue
        mask = [want_x, want_weight, False]
        dx, dw, _ = torch.ops.aten.convolution_backward(
            g, kept, weight[o][:, i], None, b.stride, b.padding, b.dilation, False, [0, 0], b.groups, mask
        )
        if want_x:
            (gx if shared else gx[p])[:, i] += dx if b.groups == 1 else _clear(dx, b.in_mask, p)
        if want_weight:
            rows = gw[o]
            rows[:, i] += dw
            gw[o] = rows
    return gx.to(x.dtype), gw.to(x.dtype), gb.to(x.dtype)


def _masked_conv2d_backward_cpu(*args: Any) -> _Gradients:
    return _backward_native(_Backward._make(args))


def _masked_conv2d_backward_torch(*args: Any) -> _Gradients:
    return _backward_torch(_Backward._make(args))


def _masked_conv2d_backward_fake(*args: Any) -> _Gradients:
    b = _Backward._make(args)
    shape = b.check()
    want_x, want_weight, want_bias = b.wanted
    return (
        torch.empty_like(b.x) if want_x else b.x.new_empty(0),
        torch.empty_like(b.weight) if want_weight else b.x.new_empty(0),
        b.x.new_empty(shape.channels if want_bias else 0),
    )


masked_conv2d_backward = native.register(
    f"masked_conv2d_backward(Tensor grad, Tensor x, Tensor weight, {_MASKED}, bool[3] wanted)"
    " -> (Tensor, Tensor, Tensor)",
    fake=_masked_conv2d_backward_fake,
    cpu=_masked_conv2d_backward_cpu,
    cuda=_masked_conv2d_backward_torch,
    names=_Backward._fields,
)
