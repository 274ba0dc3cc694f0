"""Files of tensors: safetensors with a checksum, so that a damaged file is refused and never read as other numbers."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

__all__ = ["DamagedFile", "read", "write"]


class DamagedFile(ValueError):
    """The file is not what was written."""


def write(path: Path, tensors: Mapping[str, Tensor], text: str) -> None:
    """Writes tensors, and text that belongs to them (JSON, most often), into the file itself; for a file that is whole
    or absent, inside of :func:`fastkd.runtime.atomic.replace`.

    Raises:
        ImportError: safetensors is not installed.
        OSError: the disk is full, or whatever else the system says.
    """
    import safetensors.torch

    separate = {name: x.detach().contiguous().clone() for name, x in tensors.items()}  # without shared storage
    try:
        safetensors.torch.save_file(separate, path, {"fastkd": text, "crc32": _checksum(text, separate)})
    except safetensors.SafetensorError as error:  # what the system said is its text
        raise OSError(str(error)) from error


def read(path: Path) -> tuple[dict[str, Tensor], str | None]:
    """The tensors of a safetensors file, on the CPU, and the text that :func:`write` put there; None if it was written
    by something else.

    The checksum is compared where there is one: files of others, and of fastkd's first versions, have none.

    Raises:
        ImportError: safetensors is not installed.
        FileNotFoundError: there is no such file.
        DamagedFile: it is no whole safetensors file, or its checksum differs; one line, which names the file.
    """
    import safetensors

    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    try:
        with safetensors.safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (safetensors.SafetensorError, OSError) as error:
        said = " ".join(str(error).split())[:200]
        raise DamagedFile(f"{path} is no whole safetensors file ({said})") from None
    text = metadata.get("fastkd")
    if metadata.get("crc32", "") not in ("", _checksum(text or "", tensors)):
        raise DamagedFile(f"{path} is damaged (its checksum differs)")
    return tensors, text


def _checksum(text: str, tensors: Mapping[str, Tensor]) -> str:
    crc = zlib.crc32(text.encode())
    for name in sorted(tensors):
        data = tensors[name].cpu().reshape(-1).view(torch.uint8).numpy().data
        crc = zlib.crc32(data, zlib.crc32(name.encode(), crc))
    return f"{crc:08x}"
