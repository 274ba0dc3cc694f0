"""What this installation is: versions, CUDA, instruction set, threads."""

from __future__ import annotations

import platform
from typing import Any

import torch

from . import _C

__all__ = ["environment", "show_config"]


def show_config() -> dict[str, Any]:
    """The configuration as a dictionary; ``fastkd info`` prints it.

    ``cuda_built`` says whether the native core has CUDA kernels, ``cuda_available`` whether torch
    sees a device to run them on. ``isa`` is the CPU instruction set in use (chosen at run time, or
    by the environment variable FASTKD_ISA); ``threads`` is torch's number of them.

    >>> import fastkd
    >>> config = fastkd.show_config()
    >>> config["fastkd"] == fastkd.__version__, config["isa"] in ("generic", "avx2", "avx512")
    (True, True)
    """
    return {
        "fastkd": _C.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "compiler": _C.compiler,
        "cuda_built": bool(_C.cuda_version),
        "cuda_toolkit": _C.cuda_version or None,
        "cuda_architectures": _C.cuda_architectures.split() if _C.cuda_version else [],
        "cuda_available": torch.cuda.is_available(),
        "cuda_device": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "isa": _C.isa(),
        "threads": torch.get_num_threads(),
    }


def environment(device: torch.device) -> dict[str, Any]:
    """Of a record: versions, threads and where it computed, without names of people or machines."""
    wanted = ("fastkd", "torch", "python", "isa", "threads", "cuda_available")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {**{k: v for k, v in show_config().items() if k in wanted}, "device": name}
