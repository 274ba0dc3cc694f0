"""The bound: random rows read per second from the very matrices of a case, in the same run."""

from __future__ import annotations

import ctypes
import functools
import subprocess
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor

from .cases import SEED, Case

_BYTES = 1 << 28  # read per trial: beyond any cache
_AHEAD = (0, 2, 4, 8, 16, 32)
_TRIALS = 5


@functools.cache
def _native() -> ctypes.CDLL:
    """gather.cpp, compiled for this host."""
    source = Path(__file__).with_name("gather.cpp")
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder) / "gather.so"
        subprocess.run(
            ["c++", "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC", str(source), "-o", str(binary)], check=True
        )
        library = ctypes.CDLL(str(binary))  # stays mapped when the file goes
    library.gather_sum.restype = ctypes.c_float
    library.gather_sum.argtypes = [
        ctypes.c_void_p,
        ctypes.c_void_p,
        ctypes.c_int64,
        ctypes.c_int64,
        ctypes.c_int64,
        ctypes.c_int,
    ]
    return library


def _seconds_cpu(x: Tensor, index: Tensor) -> float:
    native, threads = _native(), torch.get_num_threads()
    best = float("inf")
    for ahead in _AHEAD:
        for _ in range(_TRIALS):
            start = time.perf_counter()
            native.gather_sum(x.data_ptr(), index.data_ptr(), index.numel(), x.shape[1], ahead, threads)
            best = min(best, time.perf_counter() - start)
    return best


def _seconds_cuda(x: Tensor, index: Tensor) -> float:
    # An embedding bag sums rows and writes one per bag: with long bags, reading is all it does.
    best = float("inf")
    for bag in (32, 128, 512):
        rows = index[: index.numel() // bag * bag].view(-1, bag)
        if rows.numel() == 0:
            continue
        for _ in range(_TRIALS):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            torch.nn.functional.embedding_bag(rows, x, mode="sum")
            end.record()
            end.synchronize()
            seconds = start.elapsed_time(end) / 1e3
            best = min(best, seconds * index.numel() / rows.numel())
    return best


def bandwidth(x: Tensor, index: Tensor | None = None) -> float:
    """Bytes per second at which rows of x [N, D] can be read in random order (or that of index)."""
    x = x.detach()
    row = x.shape[1] * x.element_size()
    count = max(_BYTES // row, 1024)
    if index is None:
        generator = torch.Generator().manual_seed(SEED)
        index = torch.randint(x.shape[0], (count,), generator=generator, dtype=torch.int32)
    index = index.to(x.device, torch.int32)
    # A small graph's rows are read several times over, for a time that can be measured.
    index = index.repeat(-(-count // index.numel()))[:count].contiguous()
    seconds = (_seconds_cuda if x.is_cuda else _seconds_cpu)(x, index)
    return count * row / seconds


def bound(case: Case, cached: bool, student_speed: float, teacher_speed: float) -> float:
    """Seconds that a step needs just to read feature rows, at the given speeds in bytes per second.

    A symmetric graph needs each pair's similarity once (E / 2 rows of student and teacher) and one
    product with both directions' coefficients (E rows of the student); a directed one E and 2 E.
    """
    edges = case.num_edges
    forward = edges // 2 if case.graph.is_symmetric else edges
    backward = edges if case.graph.is_symmetric else 2 * edges
    student_row = case.student.shape[1] * case.student.element_size()
    teacher_row = case.teacher.shape[1] * case.teacher.element_size()
    seconds = (forward + backward) * student_row / student_speed
    return seconds if cached else seconds + forward * teacher_row / teacher_speed
