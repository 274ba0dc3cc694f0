"""Peak memory of one step beyond inputs and gradient.

``python -m bench.memory CASE PEER full|cached`` prints the bytes as JSON, on the CPU.
"""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from .cases import Case, load
from .peers import PEERS, why_not

_ROOT = Path(__file__).resolve().parents[1]


class _Process:
    """The peak resident set of this process (Linux)."""

    @staticmethod
    def reset() -> int:
        """Forgets the peak so far; returns what is in use."""
        try:
            ctypes.CDLL(None).malloc_trim(0)  # what the heap merely keeps would hide allocations
        except AttributeError:
            pass  # not glibc
        Path("/proc/self/clear_refs").write_text("5")
        return _Process._read("VmRSS")

    @staticmethod
    def peak() -> int:
        return _Process._read("VmHWM")

    @staticmethod
    def _read(field: str) -> int:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024
        raise OSError(f"no {field}")


class _Cuda:
    @staticmethod
    def reset() -> int:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()

    @staticmethod
    def peak() -> int:
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()


def extra_peak(case: Case, loss: Callable[[], Tensor]) -> int:
    """Bytes. The gradient counts as present in backward alone, where it is made: a peak of the
    forward pass is not offset against it."""
    meter = _Cuda if case.student.is_cuda else _Process
    torch.autograd.grad(loss(), case.student)  # compiles, loads libraries, starts threads
    before = meter.reset()
    value = loss()
    forward = meter.peak() - before
    meter.reset()
    (gradient,) = torch.autograd.grad(value, case.student)
    backward = meter.peak() - before - gradient.nbytes
    return max(forward, backward, 0)


def measure(case: Case, peer: str, cached: bool, loss: Callable[[], Tensor]) -> int | None:
    """Bytes, or None where they cannot be measured."""
    if case.student.is_cuda:
        return extra_peak(case, loss)
    if not Path("/proc/self/clear_refs").exists():
        return None
    # A fresh process: here, memory that earlier peers left in the heap would be used again unseen.
    form = "cached" if cached else "full"
    command = [sys.executable, "-m", "bench.memory", case.name, peer, form]
    done = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True)
    if done.returncode != 0:
        print(f"memory of {peer} on {case.name}: {done.stderr[-500:]}", file=sys.stderr)
        return None
    return json.loads(done.stdout.splitlines()[-1])


def _main(name: str, peer: str, form: str) -> int | None:
    case, cached = load(name), form == "cached"
    if why_not(case, peer, cached):  # the process that asks holds the case, too
        return None
    return extra_peak(case, PEERS[peer](case, cached))


if __name__ == "__main__":
    print(json.dumps(_main(*sys.argv[1:])))
