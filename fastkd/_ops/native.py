"""What every operator stands on: the native core, its back ends, memory, and where a call runs."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch  # before _C: both then share one OpenMP runtime
from torch import Tensor

from .. import _C
from .structs import Address, Csr, Features, by_name

if TYPE_CHECKING:
    from .._C import Backend, Host

_library = torch.library.Library("fastkd", "DEF")

# Device type -> native functions. The tests put the host build of the CUDA sources in place of "cpu".
backends: dict[str, Backend | None] = {"cpu": _C.cpu, "cuda": getattr(_C, "cuda", None)}
# What is computed on the CPU alone. The tests put a module with sanitizers in its place.
host: Host = _C.cpu

DType = _C.DType
DTYPES = {torch.float16: DType.f16, torch.bfloat16: DType.bf16, torch.float32: DType.f32, torch.float64: DType.f64}


def backend_for(device: torch.device) -> Backend:
    backend = backends.get(device.type)
    if backend is None:
        built = "this build of fastkd has no CUDA kernels (see fastkd.show_config())"
        reason = built if device.type == "cuda" else "supported devices are cpu and cuda"
        raise RuntimeError(f"no fastkd kernels for device {device}: {reason}")
    return backend


class Launch:
    """The native functions for a device, and where they run: a thread count or a stream."""

    def __init__(self, device: torch.device) -> None:
        self.native = backend_for(device)
        self.device = device
        self.where = torch.get_num_threads()
        self.guard: torch.cuda.device | None = None
        if device.type == "cuda":
            self.guard = torch.cuda.device(device)
            self.where = torch.cuda.current_stream(device).cuda_stream

    def __enter__(self) -> Launch:
        if self.guard is not None:
            self.guard.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        if self.guard is not None:
            self.guard.__exit__(*error)

    def workspace(self, size: int) -> Tensor:
        """Scratch memory of so many bytes."""
        return torch.empty(size, dtype=torch.uint8, device=self.device)


class Memory:
    """Memory of a device for native code that takes it and gives it back as it goes."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.held: dict[Address, Tensor] = {}
        self.most = self._now = 0  # bytes

    def take(self, size: int) -> Address:
        return self._hold(torch.empty(size, dtype=torch.uint8, device=self.device))

    def put(self, data: memoryview) -> Address:
        x = torch.frombuffer(data, dtype=torch.uint8)
        # Pinned, the copy waits for nothing, and torch keeps the memory until it is done.
        return self._hold(x.clone() if self.device.type == "cpu" else x.pin_memory().to(self.device, non_blocking=True))

    def give(self, address: Address) -> None:
        self._now -= self.held.pop(address).numel()

    def _hold(self, x: Tensor) -> Address:
        self.held[x.data_ptr()] = x
        self._now += x.numel()
        self.most = max(self.most, self._now)
        return x.data_ptr()


_HUGE = 4 << 20  # bytes from which numpy asks for huge pages, too


def empty(like: Tensor, shape: torch.Size | tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """like.new_empty; large ones on the CPU in huge pages.

    The first touch of 4 KB of new memory costs about a microsecond, and large tensors are new memory in
    every step: in pages of 4 KB that was a fifth of a step with 87 MB of gradient.
    """
    out = like.new_empty(shape, dtype=dtype)
    size = math.prod(shape) * dtype.itemsize
    if size >= _HUGE and out.device.type == "cpu":
        host.advise_huge_pages(out.data_ptr(), size)
    return out


def address(x: Tensor | None) -> Address:
    return 0 if x is None else x.data_ptr()


_features, _csr = by_name(Features), by_name(Csr)


def features(x: Tensor) -> Features:
    rows, cols = x.shape
    return _features(data=x.data_ptr(), rows=rows, cols=cols, stride=x.stride(0), dtype=DTYPES[x.dtype])


def csr(rowptr: Tensor, col: Tensor, num_src: int) -> Csr:
    return _csr(
        rowptr=rowptr.data_ptr(),
        col=col.data_ptr(),
        rows=rowptr.shape[0] - 1,
        cols=num_src,
        edges=col.shape[0],
        wide=col.dtype == torch.int64,
    )


def unit_columns(x: Tensor) -> Tensor:
    """x with unit column stride; other layouts are copied."""
    return x if x.stride(1) == 1 and x.stride(0) >= x.shape[1] else x.contiguous()


def acc_dtype(x: Tensor) -> torch.dtype:
    """The dtype of sums, coefficients and the loss: float64 for float64, else float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def check_graph(rowptr: Tensor, col: Tensor, reverse: Tensor | None) -> None:
    index = rowptr.dtype
    for name, x in (("rowptr", rowptr), ("col", col), ("reverse", reverse)):
        if x is None:
            continue
        if x.dim() != 1 or x.dtype is not index or index not in (torch.int32, torch.int64):
            raise TypeError(f"{name} must be a vector of int32 or int64 like rowptr, got {x.dtype}")
        if not x.is_contiguous():
            raise ValueError(f"{name} must be contiguous")
    if rowptr.shape[0] < 1:
        raise ValueError("rowptr must have num_dst + 1 >= 1 elements")


def register(
    schema: str,
    *,
    fake: Callable[..., Any],
    cpu: Callable[..., Any],
    cuda: Callable[..., Any],
    names: tuple[str, ...] = (),
) -> torch._ops.OpOverload:
    """Defines an operator. ``names`` are what the code calls its arguments, where it passes them by position."""
    name = schema.partition("(")[0]
    _library.define(schema)
    _library.impl(name, cpu, "CPU")
    _library.impl(name, cuda, "CUDA")
    torch.library.register_fake(f"fastkd::{name}", fake, lib=_library)
    op: torch._ops.OpOverload = getattr(torch.ops.fastkd, name).default
    defined = tuple(argument.name for argument in op._schema.arguments)
    if names and names != defined:
        raise ImportError(f"{name} has the arguments {defined}, but the code calls them {names}")
    return op


class NoSecondDerivative(torch.autograd.Function):
    """Marks a gradient of the operator `name`, so that differentiating it is an error and not a silent 0."""

    @staticmethod
    def forward(ctx: Any, name: str, gradient: Tensor, *inputs: Tensor) -> Tensor:
        ctx.name = name
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise NotImplementedError(
            f"{ctx.name} has no second derivative: use fastkd.reference.{ctx.name}, which has, "
            "or leave it out of what is differentiated twice"
        )


def no_second_derivative(name: str, gradient: Tensor, *inputs: Tensor) -> Tensor:
    """The gradient of the operator `name` with respect to one of the inputs, marked."""
    out: Tensor = NoSecondDerivative.apply(name, gradient, *inputs)  # type: ignore[no-untyped-call]
    return out
