"""Images with a class each: CIFAR-10 and MNIST."""

from __future__ import annotations

import gzip
import hashlib
import os
import tarfile
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .files import Arrays, find, require
from .shapes import _share

__all__ = ["SETS", "Images", "load", "unpack"]


@dataclass
class Images:
    """A data set with its split: parts "train", "val" (a tenth of each class of the official training part,
    drawn with seed 0) and "test"."""

    name: str
    num_classes: int
    source: str
    """The file it came from, and the split."""
    images: dict[str, Tensor]
    """By part: uint8 [n, C, H, W]."""
    labels: dict[str, Tensor]
    """By part: int64 [n]."""
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def normalised(self, images: Tensor) -> Tensor:
        """uint8 [n, C, H, W] -> float32, (images / 255 - mean) / std per channel."""
        mean, std = (torch.tensor(v, device=images.device)[:, None, None] for v in (self.mean, self.std))
        return (images.float() / 255 - mean) / std


def unpack(residuals: np.ndarray) -> np.ndarray:
    """The residuals [3, n, H, W] of a lossless predictor (the median of left, above and their sum less the
    corner; green subtracted from red and blue) -> images [n, 3, H, W]; both uint8."""
    colours, n, height, width = residuals.shape
    p = np.zeros((colours, n, height + 1, width + 1), np.int16)  # a row and a column of zeros in front
    for i in range(height):
        for j in range(width):
            left, above, corner = p[:, :, i + 1, j], p[:, :, i, j + 1], p[:, :, i, j]
            guess = np.clip(left + above - corner, np.minimum(left, above), np.maximum(left, above))
            p[:, :, i + 1, j + 1] = (guess + residuals[:, :, i, j]) & 255
    p = p[:, :, 1:, 1:]
    p[0] = (p[0] + p[1]) & 255
    p[2] = (p[2] + p[1]) & 255
    return p.astype(np.uint8).transpose(1, 0, 2, 3).copy()


def _download(url: str, md5: str, folder: Path) -> Path:
    """The file of that checksum, from `folder` if it is there."""
    path = folder / url.rsplit("/", 1)[1]
    if not path.is_file():
        if os.environ.get("FASTKD_OFFLINE", "0") not in ("", "0"):
            raise ConnectionError(f"{url} would be downloaded, but FASTKD_OFFLINE is set")
        folder.mkdir(parents=True, exist_ok=True)
        part = path.with_name(path.name + ".part")
        urllib.request.urlretrieve(url, part)
        os.replace(part, path)
    actual = hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()
    if actual != md5:
        raise ValueError(f"{path} has the md5 {actual}, but the official file has {md5}")
    return path


CIFAR10 = ("https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz", "c32a1d4ab5d03f1284b67883e8d87530")
MNIST = {
    "x_train": ("train-images-idx3-ubyte.gz", "f68b3c2dcbeaaa9fbdd348bbdeb94873"),
    "y_train": ("train-labels-idx1-ubyte.gz", "d53e105ee54ea40749a09fcbcd1e9432"),
    "x_test": ("t10k-images-idx3-ubyte.gz", "9fb629c4189551a2d022fa330f9573f3"),
    "y_test": ("t10k-labels-idx1-ubyte.gz", "ec29112dd5afa0611ce80d1b7f02629c"),
}


def _cifar10(root: str | Path | None, folder: Path) -> Arrays:
    """From the packed file, or else the official binary archive: records of a label and 3 x 32 x 32 bytes."""
    try:
        packed, _ = find("cifar10", ("cifar10.packed",), root, None, "")
    except FileNotFoundError:
        parts: dict[str, list[np.ndarray]] = {"train": [], "test": []}
        with tarfile.open(_download(*CIFAR10, folder)) as archive:
            for batch in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
                file = archive.extractfile(f"cifar-10-batches-bin/{batch}.bin")
                assert file is not None
                parts["test" if batch == "test_batch" else "train"].append(
                    np.frombuffer(file.read(), np.uint8).reshape(-1, 3073))
        out = {}
        for part, batches in parts.items():
            records = np.concatenate(batches)
            out[f"y_{part}"] = records[:, 0]
            out[f"x_{part}"] = records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        return out
    return {**{f"x_{part}": unpack(packed[f"r_{part}"]).transpose(0, 2, 3, 1) for part in ("train", "test")},
            **{f"y_{part}": packed[f"y_{part}"] for part in ("train", "test")}}


def _mnist(root: str | Path | None, folder: Path) -> Arrays:
    out = {}
    for key, (name, md5) in MNIST.items():
        path = _download(f"https://ossci-datasets.s3.amazonaws.com/mnist/{name}", md5, folder)
        content = gzip.decompress(path.read_bytes())
        dims = content[3]  # magic number: 0, 0, type, number of dimensions; then their sizes
        shape = np.frombuffer(content, ">i4", dims, 4)
        out[key] = np.frombuffer(content, np.uint8, offset=4 + 4 * dims).reshape(shape)
    return out


@dataclass(frozen=True)
class _Set:
    fetch: Callable[[str | Path | None, Path], Arrays]
    shape: tuple[int, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]


SETS = {
    "cifar10": _Set(_cifar10, (32, 32, 3), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "mnist": _Set(_mnist, (28, 28), (0.1307,), (0.3081,)),
}


def load(name: str, root: str | Path | None = None) -> Images:
    """CIFAR-10 (with ImageNet's mean and deviation, for which the published networks are made) or MNIST.

    Looked for as ``<name>.npz`` with x_train, x_test (uint8 [n, H, W, 3] or [n, H, W]), y_train and y_test
    where :func:`fastkd.data.load` looks, also in ``images/``; else ``cifar10.packed.npz`` is unpacked into
    the cache; else the official files are downloaded and their md5 is checked.

    Raises:
        ValueError: unknown name, or a file that is damaged, has another checksum, or lacks an array.
        FileNotFoundError: not found and not to be downloaded; the message says where was looked and why.
    """
    if name not in SETS:
        raise ValueError(f"name must be one of {', '.join(SETS)}, got {name!r}")
    chosen = SETS[name]
    arrays, source = find(name, (name,), root, partial(chosen.fetch, root), "")
    require(arrays, ("x_train", "y_train", "x_test", "y_test"), source)
    x: dict[str, Tensor] = {}
    y: dict[str, Tensor] = {}
    for part in ("train", "test"):
        images, labels = arrays[f"x_{part}"], arrays[f"y_{part}"]
        if images.dtype != np.uint8 or images.shape != (len(labels), *chosen.shape):
            raise ValueError(f"{source}: x_{part} must be uint8 [{len(labels)}, {', '.join(map(str, chosen.shape))}], "
                             f"got {images.dtype} {list(images.shape)}")
        x[part] = torch.from_numpy(images.copy()).reshape(len(labels), *chosen.shape[:2], -1)
        x[part] = x[part].permute(0, 3, 1, 2).contiguous()
        y[part] = torch.from_numpy(labels.astype(np.int64))
    held = _share(y["train"], 10, torch.Generator().manual_seed(0))
    rows: dict[str, Any] = {"train": ~held, "val": held}
    return Images(name, 10, f"{source}; official split, a tenth of the training part to validate",
                  {**{part: x["train"][r] for part, r in rows.items()}, "test": x["test"]},
                  {**{part: y["train"][r] for part, r in rows.items()}, "test": y["test"]}, chosen.mean, chosen.std)
