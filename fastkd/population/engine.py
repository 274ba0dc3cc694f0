"""A network that runs for populations of masks, in pieces that fit into memory."""

from __future__ import annotations

import bisect
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .. import _ops
from .batches import Data
from .lower import Program
from .space import GeneSpace

__all__ = ["Call", "Engine", "Progress", "Take", "memory_allowed"]

Progress = Callable[[int, int], object]
"""(done, total), in forward passes of an image."""
Take = Callable[[slice, slice, Tensor], None]
"""(which individuals, which images, their outputs [p, n, ...])"""

PIECE = 768  # images of one native call, at most; a multiple of what its blocks and threads like
# Multiplications of one native call, about: some half second or less, after which Ctrl-C is heard.
WORK = {"cpu": 2e10, "cuda": 1e13}


@dataclass
class Call:
    """What a run of the engine was: of how many, and how long it took."""

    individuals: int
    images: int
    macs: int
    seconds: float


class Engine:
    """A lowered network and the native executor that runs it.

    Attributes:
        program, network: what is run, and what runs it.
        last: the latest run.
    """

    def __init__(self, space: GeneSpace, program: Program, dtype: torch.dtype, device: torch.device) -> None:
        self.space, self.program, self.dtype, self.device = space, program, dtype, device
        self.network = _ops.Network(program.values, program.nodes, space.num_genes, dtype, program.output, device)
        self.last: Call | None = None

    def run(
        self,
        masks: Tensor,
        data: Data,
        take: Take,
        *,
        calibration: Sequence[Tensor] | None = None,
        progress: Progress | None = None,
        memory_limit: int | None = None,
        extra: int = 0,
        held: int = 0,
    ) -> None:
        """take(individuals, images, outputs), individuals in chunks, each with all images in order.

        Args:
            masks: bool [P, genes], on the CPU.
            calibration: batches from which each individual's batch norms take their statistics; None: the model's own.
            memory_limit: bytes; see :func:`memory_allowed`.
            extra: bytes that `take` needs for each image of an individual, beside the outputs.
            held: bytes that the caller holds, which count.

        Raises:
            ValueError: there are no calibration batches, or the limit is too small for one image of one individual.
        """
        if not self.program.batch_norms:
            calibration = None
        if calibration is not None and not calibration:
            raise ValueError('bn="recalibrate" needs calibrate(batches) first')
        start = time.perf_counter()
        macs = self.space.macs(masks).double()
        individuals, images = self._cut(
            len(masks), data.images, float(macs.mean()), calibration, memory_limit, extra, held
        )
        before = 0 if calibration is None else sum(len(x) for x in calibration)
        passes = data.images + before
        done, total = 0, len(masks) * passes
        for first in range(0, len(masks), individuals):
            rows = slice(first, min(first + individuals, len(masks)))
            chunk = masks[rows]
            affines = None if calibration is None else self._recalibrated(chunk, calibration)
            done += len(chunk) * before
            for at, x in data.pieces(images):
                take(rows, at, self.program.finish(self.network(chunk, self._maps(x), affines, agree=True)))
                done += len(chunk) * (at.stop - at.start)
                if progress is not None:
                    progress(done, total)
        self.last = Call(len(masks), data.images, int(macs.sum()) * passes, time.perf_counter() - start)

    def _cut(
        self,
        individuals: int,
        images: int,
        macs: float,
        calibration: Sequence[Tensor] | None,
        memory_limit: int | None,
        extra: int,
        held: int,
    ) -> tuple[int, int]:
        """How many individuals, and how many images, one native call has."""
        network, limit = self.network, memory_allowed(memory_limit, self.device)
        size = torch.finfo(self.dtype).bits // 8
        outputs = math.prod(network.shapes[network.output])
        outputs *= size * (1 + bool(self.program.softmax)) + extra
        alone = 2 * self.space.num_genes + 64  # the mask, and its copy that is sorted
        batches = sorted({len(x) for x in calibration or ()})
        if calibration is not None:
            channels = sum(network.shapes[v][0] for v in network.norms)
            alone += channels * (4 * 8 + 4 * 8 + 2 * 8)  # moments of a batch, their sums, what is made of them

        def need(n: int, p: int = 1) -> int:
            runs = [network.bytes(n, False, p), *(network.bytes(b, True, p) for b in batches)]
            return int(held + max(runs) + p * (alone + n * outputs))

        n = min(images, PIECE)
        while n > 1 and need(n) > limit:
            n = -(-n // 2)
        if need(n) > limit:
            what = f"one individual needs {need(n):,}"
            if held:
                what += f", of which the result takes {held:,}"
            which = "memory_limit" if memory_limit is not None else "memory_limit (a quarter of what is free)"
            raise ValueError(f"{which} = {limit:,} bytes is too small: {what}")
        most = min(individuals, max(16, int(WORK[self.device.type] / max(macs * n, 1))))
        return max(1, bisect.bisect_right(range(1, most + 1), limit, key=lambda p: need(n, p))), n

    def _recalibrated(self, masks: Tensor, calibration: Sequence[Tensor]) -> list[tuple[Tensor, Tensor] | None]:
        """Scale and shift of every norm, each [P, channels]; None for what is no batch norm of the model."""
        network, count = self.network, len(calibration)
        mean = {
            v: torch.zeros(len(masks), network.shapes[v][0], dtype=torch.float64, device=self.device)
            for v in network.norms
        }
        variance = {v: torch.zeros_like(m) for v, m in mean.items()}
        for x in calibration:
            for v, (m, s) in zip(network.norms, network.moments(masks, self._maps(x)), strict=True):
                n = len(x) * network.shapes[v][1] * network.shapes[v][2]
                mean[v] += m
                variance[v] += s * (n / max(n - 1, 1))
        out: list[tuple[Tensor, Tensor] | None] = []
        for v in network.norms:
            if v not in self.program.batch_norms:
                out.append(None)
                continue
            scale, shift = self.program.affine(v, mean[v] / count, variance[v] / count)
            out.append((scale.to(network.acc), shift.to(network.acc)))
        return out

    def _maps(self, x: Tensor) -> Tensor:
        return x.reshape(len(x), *self.network.shapes[0])


def memory_allowed(limit: int | None, device: torch.device) -> int:
    """Bytes: the limit, or a quarter of what is free (on the device)."""
    if limit is not None:
        return limit
    if device.type == "cuda":  # what torch has taken and does not use is free, too
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0] + unused) // 4
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")) // 4
    except (OSError, StopIteration):
        return (8 << 30) // 4  # unknown
