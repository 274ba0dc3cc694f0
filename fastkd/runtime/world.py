"""Several processes, started by torchrun, that compute together: what they tell each other.

Only rank 0 looks at files and writes them.
"""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Callable, Iterator
from datetime import timedelta
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .checkpoint import alone, differences

__all__ = ["RankLost", "World", "usable"]

T = TypeVar("T")


class RankLost(RuntimeError):
    """Another rank has ended, or did not answer in time."""


def usable(device: torch.device | str) -> torch.device:
    """A device that is there.

    Raises:
        ValueError: no such device, or none that can be used here.
    """
    try:
        out = torch.device(device)
    except RuntimeError:
        out = None
    if out is None or out.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be cpu, cuda or cuda:N, got {str(device)!r}")
    if out.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (out.index or 0) >= count:
            there = f"has {count}, numbered from 0" if count else "has none that torch can use"
            raise ValueError(
                f"device = {str(device)!r}: this machine {there}; device can be cpu"
                + (f", cuda, or cuda:0 to cuda:{count - 1}" if count else "")
            )
    return out


class World:
    """The processes that work together, seen from one of them. ``World()`` is a process alone, for which
    every method is free and every part the whole.

    Attributes:
        rank, size: this process among all.
        device: where it computes.
    """

    def __init__(self, rank: int = 0, size: int = 1, device: torch.device | str = "cpu") -> None:
        self.rank = rank
        self.size = size
        self.device = usable(device)

    @classmethod
    def from_environment(cls, device: torch.device | str = "cpu") -> World:
        """As torchrun's variables say; without them, or for one process, a process alone.

        Args:
            device: "cpu" (gloo) or "cuda" (NCCL; the rank takes the device of its LOCAL_RANK).

        A rank that does not answer for FASTKD_TIMEOUT seconds (default 300) counts as lost.
        """
        size = int(os.environ.get("WORLD_SIZE", "1"))
        if size == 1:
            return cls(device=device)
        if not dist.is_available():
            raise ImportError(f"WORLD_SIZE is {size}, but this build of torch has no torch.distributed")
        if str(device).startswith("cuda:"):
            raise ValueError(
                f"device must be 'cuda' or 'cpu' for {size} processes, which take one device each, got {str(device)!r}"
            )
        device = usable(device)
        if device.type == "cuda":
            device = usable(f"cuda:{os.environ.get('LOCAL_RANK', '0')}")
            torch.cuda.set_device(device)
            os.environ.setdefault("TORCH_NCCL_BLOCKING_WAIT", "1")  # or a lost rank would abort the process
        if not dist.is_initialized():
            seconds = os.environ.get("FASTKD_TIMEOUT", "300")
            if not seconds.isdecimal() or int(seconds) < 1:
                raise ValueError(f"FASTKD_TIMEOUT must be a whole number of seconds >= 1, got {seconds!r}")
            # Its functions have the group of the moment as default: imported after init_process_group, as torch._dynamo
            # does, they would keep it, and its threads, beyond `close`; and a thread that lets go of a tensor while
            # Python ends aborts the process.
            import_module("torch.distributed.nn.functional")

            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=timedelta(seconds=int(seconds))
            )
        return cls(dist.get_rank(), dist.get_world_size(), device)

    def close(self) -> None:
        if self.size > 1 and dist.is_initialized():
            dist.destroy_process_group()
            gc.collect()  # a cycle, such as an exception's, may hold the group still

    # --- what ranks tell each other -------------------------------------------------------------

    @contextlib.contextmanager
    def _talking(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise RankLost(
                f"rank {self.rank} of {self.size}: another rank is gone or does not answer ({reason})"
            ) from None

    def sum_gradients(self, parameters: list[nn.Parameter], values: dict[str, Tensor]) -> dict[str, Tensor]:
        """Gradients become their sums over all ranks; returns the sums of the values. One flat buffer.

        A parameter without a gradient on every rank is left without one, since optimizers skip it.
        """
        if self.size == 1:
            return values
        has = torch.tensor([p.grad is not None for p in parameters], device=self.device)
        pieces = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        pieces += [has, *(v.detach() for v in values.values())]
        dtype = torch.float64 if any(x.dtype == torch.float64 for x in pieces) else torch.float32
        flat = torch.cat([x.reshape(-1).to(dtype) for x in pieces])
        with self._talking():
            dist.all_reduce(flat)
        *gradients, has = flat[: len(flat) - len(values)].split([p.numel() for p in parameters] + [len(parameters)])
        for p, gradient, given in zip(parameters, gradients, has, strict=True):
            if p.grad is not None or given > 0:
                p.grad = gradient.view_as(p).to(p.dtype)
        return dict(zip(values, flat[len(flat) - len(values) :], strict=True))

    def broadcast(self, tensors: list[Tensor]) -> None:
        """Floating-point tensors become those of rank 0."""
        if self.size == 1 or not tensors:
            return
        flat = torch.cat([x.detach().reshape(-1).double() for x in tensors])
        with self._talking():
            dist.broadcast(flat, 0)
        for x, values in zip(tensors, flat.split([x.numel() for x in tensors]), strict=True):
            x.detach().copy_(values.view_as(x))

    def sum(self, counts: Tensor) -> Tensor:
        """Of integers on the CPU."""
        if self.size > 1:
            with self._talking():
                dist.all_reduce(counts)
        return counts

    def any(self, flag: bool) -> bool:
        """Whether any rank says so. Every rank waits for all."""
        return bool(self.sum(torch.tensor([int(flag)])))

    def first(self, make: Callable[[], T]) -> T:
        """What rank 0 makes, and raises, for all ranks."""
        return self.first_at_length(lambda heartbeat: make())

    def first_at_length(self, make: Callable[[Callable[[], object]], T]) -> T:
        """As `first`, for what takes longer than a rank may be silent: make(heartbeat) calls heartbeat now and then."""
        if self.size == 1:
            return make(lambda: None)
        out: list[Any] = [None, None]
        if self.rank == 0:
            try:
                out[0] = make(lambda: self.any(False))
            except (Exception, KeyboardInterrupt) as error:  # all ranks must learn of it, or they would wait
                out[1] = error
            self.any(True)
        else:
            while not self.any(False):
                pass
        with self._talking():
            dist.broadcast_object_list(out, 0)
        if out[1] is not None:
            raise out[1]
        made: T = out[0]
        return made

    @contextlib.contextmanager
    def alone(self, folder: Path | None) -> Iterator[None]:
        """:func:`fastkd.runtime.checkpoint.alone`, for all ranks; without a folder nothing."""
        with contextlib.ExitStack() as stack:
            if folder is not None:
                self.first(lambda: stack.enter_context(alone(folder)))
            yield

    def same(self, what: str, identity: dict[str, Any]) -> None:
        """Raises ValueError on every rank if any has something else than rank 0."""
        if self.size == 1:
            return
        every: list[Any] = [None] * self.size
        with self._talking():
            dist.all_gather_object(every, identity)
        for rank, theirs in enumerate(every):
            if theirs != every[0]:
                raise ValueError(
                    f"all ranks must have the same {what}, but rank {rank} differs from rank 0: "
                    + "; ".join(differences(every[0], theirs, there="on rank 0", here=f"on rank {rank}"))
                )

    # --- what one rank computes -----------------------------------------------------------------

    def range(self, n: int) -> slice:
        """The own ones of n rows."""
        return slice(self.rank * n // self.size, (self.rank + 1) * n // self.size)

    def part_of_mean(self, mean: Callable[..., Tensor], *rows: Tensor) -> Tensor:
        """The own rows' part in a mean over all rows; the sum over ranks is the mean."""
        if self.size == 1:
            return mean(*rows)
        part = self.range(len(rows[0]))
        if part.start == part.stop:  # fewer rows than ranks
            return rows[0].sum() * 0
        share: float = (part.stop - part.start) / len(rows[0])
        return mean(*(x[part] for x in rows)) * share

    def own_generator(self, generator: torch.Generator) -> torch.Generator:
        """For what ranks draw differently, from one that stays the same on all."""
        seed = int(torch.randint(2**62, (), generator=generator))
        return torch.Generator().manual_seed(seed + self.rank)
