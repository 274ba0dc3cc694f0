"""What a network costs: parameters, multiply-adds, latency, memory."""

from __future__ import annotations

import statistics
import time
import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

__all__ = ["PeakMemory", "cost"]


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
        if self._before is None:
            return None
        now = torch.cuda.max_memory_allocated(self.device) >> 10 if self.device.type == "cuda" else _status("VmHWM")
        return (now - self._before) / 1024


def _status(key: str) -> int:
    """kB"""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(key + ":"))


class _LiveTensors(TorchDispatchMode):
    """The most bytes at once of tensors made under it, by torch's operations and fastkd's."""

    def __init__(self) -> None:
        super().__init__()
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


@torch.no_grad()
def cost(model: nn.Module, inputs: tuple[Any, ...], repeats: int = 10) -> dict[str, Any]:
    """Of one forward pass in eval mode.

    Returns:
        parameters; mmacs: millions of multiply-adds as counted by torch's FlopCounterMode (dense
        products and convolutions; sparse products are not counted by it); latency_ms: median of
        `repeats`; peak_memory_mb; threads.

    peak_memory_mb counts the results of all operations that are alive at once, temporary ones included,
    beyond inputs, parameters and what the model keeps from pass to pass; on the CPU not what an operation
    takes and gives back inside its kernel, on a GPU all that the device's allocator gave out.
    """
    from torch.utils.flop_counter import FlopCounterMode

    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    model(*inputs)
    memory = PeakMemory(device) if device.type == "cuda" else None
    times = []
    for _ in range(repeats):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        model(*inputs)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    if memory is not None:
        peak = memory.mb()
    else:
        with _LiveTensors() as live:
            model(*inputs)
        peak = live.peak / 2**20
    counter = FlopCounterMode(display=False)
    with counter:
        model(*inputs)
    model.train(was_training)
    return {"parameters": sum(p.numel() for p in model.parameters()), "mmacs": counter.get_total_flops() / 2e6,
            "latency_ms": 1e3 * statistics.median(times), "peak_memory_mb": peak,
            "threads": torch.get_num_threads()}
