"""What a network costs: parameters, multiply-adds, latency, memory."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from torch import nn

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


@torch.no_grad()
def cost(model: nn.Module, inputs: tuple[Any, ...], repeats: int = 10) -> dict[str, Any]:
    """Of one forward pass in eval mode.

    Returns:
        parameters; mmacs: millions of multiply-adds as counted by torch's FlopCounterMode (dense
        products and convolutions; sparse products are not counted by it); latency_ms: median of
        `repeats`; peak_memory_mb; threads.
    """
    from torch.utils.flop_counter import FlopCounterMode

    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    model(*inputs)
    memory = PeakMemory(device)
    times = []
    for _ in range(repeats):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        model(*inputs)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    peak = memory.mb()
    counter = FlopCounterMode(display=False)
    with counter:
        model(*inputs)
    model.train(was_training)
    return {"parameters": sum(p.numel() for p in model.parameters()), "mmacs": counter.get_total_flops() / 2e6,
            "latency_ms": 1e3 * statistics.median(times), "peak_memory_mb": peak,
            "threads": torch.get_num_threads()}
