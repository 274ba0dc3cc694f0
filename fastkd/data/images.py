"""Images to compress networks with: digits, MNIST, CIFAR-10, a sample of ImageNet, and files of a user."""

from __future__ import annotations

import gzip
import hashlib
import io
import itertools
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

from .._text import suggestion
from .files import MOST_CLASSES, Arrays, DamagedFile, find, integers, read, require, share

__all__ = ["PARTS", "SETS", "Images", "load", "unpack"]


PARTS = ("train", "fitness", "val", "test")


@dataclass
class Images:
    """A data set with its split: parts "train", "fitness" (chooses between the individuals of a search, and neither
    trains, validates nor tests), "val" and "test"."""

    name: str
    num_classes: int
    """0 where there are no labels."""
    source: str
    """The file it came from, and the split."""
    images: dict[str, Tensor]
    """By part: uint8 [n, C, H, W]."""
    labels: dict[str, Tensor]
    """By part: int64 [n]; empty where there are none."""
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def normalised(self, images: Tensor) -> Tensor:
        """uint8 [n, C, H, W] -> float32, (images / 255 - mean) / std per channel."""
        mean, std = (torch.tensor(v, device=images.device)[:, None, None] for v in (self.mean, self.std))
        return (images.float() / 255 - mean) / std

    def part(self, name: str, count: int | None = None) -> tuple[Tensor, Tensor | None]:
        """Normalised images float32 [n, C, H, W], and labels int64 [n] if there are any.

        Args:
            name: "train", "fitness", "val" or "test".
            count: so many, drawn with seed 0 (fewer are the first of more); None: all, in their order.

        Raises:
            ValueError: no such part, or it has fewer.
        """
        if name not in self.images:
            raise ValueError(f"{self.name}: name must be one of {', '.join(self.images)}, got {name!r}")
        images, labels = self.images[name], self.labels.get(name)
        if count is None:
            return self.normalised(images), labels
        if not 0 < count <= len(images):
            raise ValueError(f"{self.name}: the part {name!r} has {len(images)} images, but {count} are asked for")
        rows = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:count]
        return self.normalised(images[rows]), None if labels is None else labels[rows]


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
    images: np.ndarray = p.astype(np.uint8).transpose(1, 0, 2, 3).copy()
    return images


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
        packed, source = find("cifar10", ("cifar10.packed",), root, None, "")
    except FileNotFoundError:
        parts: dict[str, list[np.ndarray]] = {"train": [], "test": []}
        with tarfile.open(_download(*CIFAR10, folder)) as archive:
            for batch in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
                file = archive.extractfile(f"cifar-10-batches-bin/{batch}.bin")
                assert file is not None
                parts["test" if batch == "test_batch" else "train"].append(
                    np.frombuffer(file.read(), np.uint8).reshape(-1, 3073)
                )
        out = {}
        for part, batches in parts.items():
            records = np.concatenate(batches)
            out[f"y_{part}"] = records[:, 0]
            out[f"x_{part}"] = records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        return out
    require(packed, ("r_train", "y_train", "r_test", "y_test"), source)
    for part in ("train", "test"):
        residuals = packed[f"r_{part}"]
        if residuals.dtype != np.uint8 or residuals.shape != (3, residuals.size // 3072, 32, 32):
            raise DamagedFile(
                f"{source}: r_{part} must be uint8 [3, n, 32, 32], got {residuals.dtype} {list(residuals.shape)}"
            )
        integers(packed, f"y_{part}", (residuals.shape[1],), 10, source)
    return {
        **{f"x_{part}": unpack(packed[f"r_{part}"]).transpose(0, 2, 3, 1) for part in ("train", "test")},
        **{f"y_{part}": packed[f"y_{part}"] for part in ("train", "test")},
    }


def _mnist(root: str | Path | None, folder: Path) -> Arrays:
    out = {}
    for key, (name, md5) in MNIST.items():
        path = _download(f"https://ossci-datasets.s3.amazonaws.com/mnist/{name}", md5, folder)
        content = gzip.decompress(path.read_bytes())
        dims = content[3]  # magic number: 0, 0, type, number of dimensions; then their sizes
        shape = np.frombuffer(content, ">i4", dims, 4)
        out[key] = np.frombuffer(content, np.uint8, offset=4 + 4 * dims).reshape(shape)
    return out


def _found(
    name: str, fetch: Callable[[str | Path | None, Path], Arrays], root: str | Path | None
) -> tuple[Arrays, str]:
    return find(name, (name,), root, partial(fetch, root), "")


def _digits(root: str | Path | None) -> tuple[Arrays, str]:
    """Every pixel becomes nine, with a border of two: 28 x 28, as MNIST's."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError("digits are scikit-learn's: pip install scikit-learn") from error
    digits = load_digits()
    x = (digits.images * (255 / 16)).round().astype(np.uint8)
    x = np.pad(x.repeat(3, 1).repeat(3, 2), ((0, 0), (2, 2), (2, 2)))
    test = share(torch.from_numpy(digits.target.astype(np.int64)), 4, torch.Generator().manual_seed(0)).numpy()
    return {
        "x_train": x[~test],
        "y_train": digits.target[~test],
        "x_test": x[test],
        "y_test": digits.target[test],
    }, "scikit-learn's load_digits"


def _imagenet_sample(root: str | Path | None) -> tuple[Arrays, str]:
    """A thousand JPEGs of 224 x 224, one of each class."""
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError("imagenet_sample needs the package pillow: pip install pillow") from error
    packed, source = find(
        "imagenet_sample",
        ("imagenet_sample1000_224",),
        root,
        None,
        "Put the npz with arrays jpeg (uint8, the files one after the other), offset [n + 1] and label [n] there",
    )
    require(packed, ("jpeg", "offset", "label"), source)
    n = len(integers(packed, "label", ("n",), 1000, source))
    content, ends = packed["jpeg"].tobytes(), packed["offset"]
    if (
        ends.dtype.kind not in "iu"
        or ends.shape != (n + 1,)
        or ends[0] != 0
        or ends[-1] != len(content)
        or (ends[1:] <= ends[:-1]).any()
    ):
        raise DamagedFile(
            f"{source}: offset must be {n + 1} rising integers from 0 to {len(content)}, as there are "
            f"{n} labels and so many bytes of jpeg, got {ends.dtype} {list(ends.shape)}: {' '.join(str(ends).split())}"
        )
    x = np.empty((n, 224, 224, 3), np.uint8)
    for k, (start, end) in enumerate(itertools.pairwise(ends.tolist())):
        try:
            image = Image.open(io.BytesIO(content[start:end])).convert("RGB")
        except Exception as error:  # PIL's decoders share no base class
            raise DamagedFile(f"{source}: jpeg[{start}:{end}], image {k}, cannot be decoded: {error}") from error
        if image.size != (224, 224):
            raise DamagedFile(f"{source}: image {k} must be 224 x 224, got {image.width} x {image.height}")
        x[k] = np.asarray(image)
    order = np.random.default_rng(0).permutation(len(x))
    parts = dict(zip(PARTS, np.split(order, [len(x) * k // 10 for k in (2, 5, 7)]), strict=True))
    return {
        **{f"x_{part}": x[rows] for part, rows in parts.items()},
        **{f"y_{part}": packed["label"][rows] for part, rows in parts.items()},
    }, source


@dataclass(frozen=True)
class _Set:
    arrays: Callable[[str | Path | None], tuple[Arrays, str]]
    """From the folder to look in first, or None: the arrays and where they are from."""
    split: str
    shape: tuple[int, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    classes: int = 10


MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet
HELD = ", a tenth of the training part to validate, another one for fitness"
SETS = {
    "cifar10": _Set(partial(_found, "cifar10", _cifar10), "official split" + HELD, (32, 32, 3), MEAN, STD),
    "digits": _Set(_digits, "a quarter to test" + HELD, (28, 28), (0.1307,), (0.3081,)),
    "imagenet_sample": _Set(_imagenet_sample, "2 / 3 / 2 / 3 tenths", (224, 224, 3), MEAN, STD, classes=1000),
    "mnist": _Set(partial(_found, "mnist", _mnist), "official split" + HELD, (28, 28), (0.1307,), (0.3081,)),
}


def load(name: str | Path, root: str | Path | None = None) -> Images:
    """A data set of images, by name or from a file of your own.

    ===================  ==================================================================================
    name                 what
    ===================  ==================================================================================
    ``digits``           scikit-learn's 1,797 digits, enlarged to 28 x 28; a quarter of each class is the test part
    ``mnist``            official split
    ``cifar10``          official split; ImageNet's mean and deviation, for which the published networks are made
    ``imagenet_sample``  one image of each class of ImageNet, 224 x 224: 200 / 300 / 200 / 300, drawn with seed 0
    a path to an npz     x_train, x_fitness, x_val, x_test: uint8 [n, H, W] or [n, H, W, C]; y_train, ...: integers from
                         0 on, for all parts or for none; mean and std, [C], of images / 255: default those of x_train
    ===================  ==================================================================================

    Of the official training parts, a tenth of each class, drawn with seed 0, is to validate, and another one is the
    fitness part.

    A set by name is looked for as ``<name>.npz`` with x_train, x_test (uint8 [n, H, W, 3] or [n, H, W]), y_train and
    y_test where :func:`fastkd.data.load` looks, also in ``images/``; else ``cifar10.packed.npz`` is unpacked into the
    cache; else the official files are downloaded and their md5 is checked.

    Raises:
        ValueError: unknown name, or a file that is damaged, has another checksum, lacks an array (x_fitness, too), or
            has one of another shape, dtype or range.
        FileNotFoundError: not found and not to be downloaded; the message says where was looked and why.
        ImportError: a package is needed (scikit-learn, pillow).

    >>> from fastkd import data
    >>> digits = data.load_images("digits")
    >>> digits.images["train"].shape, digits.num_classes
    (torch.Size([1076, 1, 28, 28]), 10)
    >>> x, y = digits.part("fitness", 8)
    >>> x.dtype, x.shape, y.shape
    (torch.float32, torch.Size([8, 1, 28, 28]), torch.Size([8]))
    """
    if str(name).endswith(".npz"):
        return _from_file(Path(name))
    name = str(name)
    if name not in SETS:
        raise ValueError(
            f"name must be one of {', '.join(SETS)}, or a path to an npz, got {name!r}{suggestion(name, SETS)}"
        )
    chosen = SETS[name]
    arrays, source = chosen.arrays(root)
    parts = PARTS if "x_val" in arrays else ("train", "test")
    require(arrays, tuple(f"{a}_{part}" for part in parts for a in "xy"), source)
    x = {part: _images(arrays, part, chosen.shape, source) for part in parts}
    y = {part: _labels(arrays, part, chosen.classes, source) for part in parts}
    if "val" not in x:
        held = share(y["train"], 10, torch.Generator().manual_seed(0))
        rest = (~held).nonzero()[:, 0]
        fitness = share(y["train"][rest], 9, torch.Generator().manual_seed(1))
        rows: dict[str, Any] = {"train": rest[~fitness], "fitness": rest[fitness], "val": held}
        x = {**{part: x["train"][r] for part, r in rows.items()}, "test": x["test"]}
        y = {**{part: y["train"][r] for part, r in rows.items()}, "test": y["test"]}
    return Images(name, chosen.classes, f"{source}; {chosen.split}", x, y, chosen.mean, chosen.std)


def _images(arrays: Arrays, part: str, shape: tuple[int, ...], source: str) -> Tensor:
    """uint8 [n, C, H, W]."""
    images = arrays[f"x_{part}"]
    if images.dtype != np.uint8 or images.shape[1:] != shape or not images.size:
        raise DamagedFile(
            f"{source}: x_{part} must be uint8 [n, {', '.join(map(str, shape))}] with n > 0, "
            f"got {images.dtype} {list(images.shape)}"
        )
    return torch.from_numpy(images.copy()).reshape(*images.shape[:3], -1).permute(0, 3, 1, 2).contiguous()


def _labels(arrays: Arrays, part: str, classes: int | None, source: str) -> Tensor:
    """int64 [n]."""
    labels, n = arrays[f"y_{part}"], len(arrays[f"x_{part}"])
    if labels.dtype.kind not in "iu" or labels.shape != (n,):
        raise DamagedFile(
            f"{source}: y_{part} must be integers [{n}] as x_{part} has images, got {labels.dtype} {list(labels.shape)}"
        )
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= (classes or MOST_CLASSES):
        last = (classes or MOST_CLASSES) - 1 if classes or low >= 0 else "..."
        raise DamagedFile(f"{source}: y_{part} must be in [0, {last}], got {low if low < 0 else high}")
    return torch.from_numpy(labels.astype(np.int64))


def _from_file(path: Path) -> Images:
    """A set from a user's npz, whose parts are those of the file."""
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    arrays = read(path, path.parent)
    if "x_fitness" not in arrays:
        raise DamagedFile(
            f"{path} has no fitness split: it needs x_fitness (and y_fitness), images that choose between "
            "individuals, apart from those that train, validate and test"
        )
    require(arrays, tuple(f"x_{part}" for part in PARTS), str(path))
    labelled = any(key.startswith("y_") for key in arrays)
    if labelled:
        require(arrays, tuple(f"y_{part}" for part in PARTS), str(path))
    shape = arrays["x_train"].shape[1:]
    if len(shape) not in (2, 3) or 0 in shape:
        raise DamagedFile(
            f"{path}: x_train must be uint8 [n, H, W] or [n, H, W, C] with H, W, C > 0, got "
            f"{list(arrays['x_train'].shape)}"
        )
    x = {part: _images(arrays, part, shape, str(path)) for part in PARTS}
    y = {part: _labels(arrays, part, None, str(path)) for part in PARTS if labelled}
    classes = max((int(labels.max()) + 1 for labels in y.values()), default=0)
    mean, std = _statistics(x["train"])
    return Images(
        path.stem,
        classes,
        f"{path}; its own split",
        x,
        y,
        _per_channel(arrays, "mean", mean, path),
        _per_channel(arrays, "std", std, path),
    )


def _statistics(images: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Mean and deviation [C] of uint8 [n, C, H, W] / 255, from histograms: as float64 they would take eight times
    their memory."""
    counts = torch.stack([c.flatten().bincount(minlength=256) for c in images.unbind(1)]).double()
    share_of, level = counts / counts.sum(1, keepdim=True), torch.arange(256, dtype=torch.float64) / 255
    mean = share_of @ level
    std = (share_of * (level - mean[:, None]) ** 2).sum(1).sqrt().clamp(min=1e-6)
    return mean.numpy(), std.numpy()


def _per_channel(arrays: Arrays, key: str, default: np.ndarray, path: Path) -> tuple[float, ...]:
    values = arrays.get(key, default)
    fits = values.dtype.kind in "iuf" and values.shape == default.shape and bool(np.isfinite(values).all())
    if not fits or (key == "std" and bool((values <= 0).any())):
        raise DamagedFile(
            f"{path}: {key} must be {len(default)} finite numbers{' above 0' if key == 'std' else ''}, "
            f"one per channel, got {' '.join(str(values).split())}"
        )
    return tuple(float(v) for v in values)
