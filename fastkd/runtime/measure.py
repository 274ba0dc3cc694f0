"""What a network costs: parameters, multiply-adds, latency, memory."""

from __future__ import annotations

import contextlib
import statistics
import time
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

__all__ = ["PeakMemory", "cost", "evaluating", "latency_ms", "multiply_adds", "peak_memory"]

NOISE = 256  # kB: Linux brings a process's counts of pages up to date after 64 pages of 4 kB


class PeakMemory:
    """The most memory taken since this was made: of the process on the CPU (Linux alone), else of the
    device's allocator."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._before: int | None = None
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self._before = torch.cuda.memory_allocated(device) >> 10
            return
        try:
            with open("/proc/self/clear_refs", "w") as file:
                file.write("5")  # forgets the process's peak
            self._before = _status("VmRSS")
        except OSError:
            pass

    def mb(self) -> float | None:
        """None where it cannot be measured, as on the CPU less than the system's error."""
        if self._before is None:
            return None
        if self.device.type == "cuda":
            return ((torch.cuda.max_memory_allocated(self.device) >> 10) - self._before) / 1024
        taken = _status("VmHWM") - self._before
        return taken / 1024 if taken > NOISE else None


def _status(key: str) -> int:
    """kB"""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(key + ":"))


class _LiveTensors(TorchDispatchMode):
    """The most bytes at once of tensors made under it, by torch's operations and fastkd's."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.held = self.peak = 0
        self._known = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for storage in _storages((args, kwargs)):
            self._known.setdefault(storage, True)  # was there before
        out = func(*args, **(kwargs or {}))
        for storage in _storages(out):
            if storage not in self._known:
                self._known[storage] = True
                self._add(storage.nbytes())
                weakref.finalize(storage, self._add, -storage.nbytes())
        return out

    def _add(self, count: int) -> None:
        self.held += count
        self.peak = max(self.peak, self.held)


def _storages(tree: Any) -> list[Any]:
    return [x.untyped_storage() for x in tree_leaves(tree) if isinstance(x, Tensor) and x.layout == torch.strided]


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """In eval mode and without gradients; afterwards each module is in the mode that it was in."""
    training = [m for m in model.modules() if m.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for m in training:
            m.training = True


def multiply_adds(model: nn.Module, inputs: tuple[Any, ...]) -> int:
    """Of one forward pass in eval mode, as counted by torch's FlopCounterMode (dense products and
    convolutions; sparse products are not counted by it)."""
    from torch.utils.flop_counter import FlopCounterMode

    counter = FlopCounterMode(display=False)
    with evaluating(model), counter:
        model(*inputs)
    return counter.get_total_flops() // 2


def peak_memory(model: nn.Module, inputs: tuple[Any, ...]) -> float | None:
    """MB of one forward pass in eval mode: the results of all operations that are alive at once, temporary
    ones included, beyond inputs, parameters and what the model keeps from earlier passes; on the CPU not
    what an operation takes and gives back inside its kernel, on a GPU all that the device's allocator gave
    out."""
    device = next(model.parameters()).device
    with evaluating(model):
        if device.type == "cuda":
            memory = PeakMemory(device)
            model(*inputs)
            return memory.mb()
        with _LiveTensors() as live:
            model(*inputs)
    peak: int = live.peak
    return peak / 2**20


def cost(model: nn.Module, inputs: tuple[Any, ...], repeats: int = 10) -> dict[str, Any]:
    """Of one forward pass in eval mode.

    Returns:
        parameters; mmacs: millions of multiply-adds (see :func:`multiply_adds`); latency_ms: median of
        `repeats`; peak_memory_mb (see :func:`peak_memory`); threads.
    """
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "mmacs": multiply_adds(model, inputs) / 1e6,
        "latency_ms": latency_ms(model, inputs, repeats),
        "peak_memory_mb": peak_memory(model, inputs),
        "threads": torch.get_num_threads(),
    }


def latency_ms(model: nn.Module, inputs: tuple[Any, ...], repeats: int = 10) -> float:
    """Of a forward pass in eval mode: the median of `repeats`, after one that does not count."""
    device = next(model.parameters()).device
    times = []
    with evaluating(model):
        for _ in range(repeats + 1):
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            start = time.perf_counter()
            model(*inputs)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times[1:])
