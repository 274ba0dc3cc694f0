"""Point clouds with a class each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .files import MOST_CLASSES, Arrays, DamagedFile, Task, find, integers, labels, numbers, official, require, share

__all__ = ["SETS", "augment", "load"]

POINTS = 1024


def augment(
    points: Tensor,
    generator: torch.Generator | None = None,
    *,
    scale: float = 1.5,
    shift: float = 0.2,
    jitter: float = 0.0,
    drop: float = 0.0,
) -> Tensor:
    """Every shape at random scaled and moved along each axis, as DGCNN does.

    Args:
        points: [n, P, 3]; not changed.
        generator: on the CPU, whatever the device of points.
        scale: each axis by a factor from [1/scale, scale]; >= 1.
        shift: each axis by a summand from [-shift, shift].
        jitter: standard deviation of noise on every coordinate, cut at 5 deviations.
        drop: in every shape a share from [0, drop) of the points is put on its first point; drop in [0, 1).

    Returns:
        [n, P, 3], of the dtype and on the device of points.

    Raises:
        ValueError: an argument out of range, or points of another shape.

    >>> import torch
    >>> from fastkd import data
    >>> out = data.augment(torch.ones(2, 5, 3), torch.Generator().manual_seed(0), shift=0.0)
    >>> out.shape, bool((out >= 1 / 1.5).all()), bool((out <= 1.5).all())
    (torch.Size([2, 5, 3]), True, True)
    """
    if points.dim() != 3:
        raise ValueError(f"points must have shape [n, P, 3], got {tuple(points.shape)}")
    if not scale >= 1:
        raise ValueError(f"scale must be at least 1, got {scale!r}")
    if not 0 <= drop < 1:
        raise ValueError(f"drop must be in [0, 1), got {drop!r}")
    n, size, dims = points.shape

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator).to(points)

    factor = 1 / scale + (scale - 1 / scale) * uniform(n, 1, dims)
    out = points * factor + shift * (2 * uniform(n, 1, dims) - 1)
    if jitter:
        noise = torch.randn(n, size, dims, generator=generator).to(points)
        out = out + jitter * noise.clamp_(-5, 5)
    if drop:
        lost = uniform(n, size, 1) < drop * uniform(n, 1, 1)
        out = torch.where(lost, out[:, :1], out)
    return out


def _unit(points: Tensor) -> Tensor:
    """[n, P, 3], each shape's centre at 0 and its farthest point at distance 1."""
    points = points - points.mean(1, keepdim=True)
    radius: Tensor = points.norm(dim=2).amax(1)
    return points / radius.clamp(min=1e-12)[:, None, None]


def _from_voxels(arrays: Arrays, source: str) -> Arrays:
    """Surface voxels, every point at random in its voxel (seed 0); broken shapes are left out."""
    require(arrays, ("surface_ijk", "label", "split"), source)
    n = arrays["label"].size
    for key in ("label", "split"):
        integers(arrays, key, (n,), MOST_CLASSES, source)
    voxels = numbers(arrays, "surface_ijk", (n, "P", 3), source)
    keep = arrays.get("valid", np.ones(n, bool))
    if keep.shape != (n,) or keep.dtype != bool:
        raise DamagedFile(f"{source}: valid must be bool [{n}], got {keep.dtype} {list(keep.shape)}")
    points = voxels[torch.from_numpy(keep)]
    points += torch.rand(points.shape, generator=torch.Generator().manual_seed(0))
    return {"points": _unit(points).numpy(), "label": arrays["label"][keep], "split": arrays["split"][keep]}


def _modelnet(name: str, folder: Path) -> Arrays:
    """Points on the official meshes: shapes in the order of their file names, sampled with seed 0."""
    from torch_geometric.data import Data
    from torch_geometric.datasets import ModelNet
    from torch_geometric.io import read_off
    from torch_geometric.transforms import SamplePoints

    # The base class keeps all meshes (gigabytes), in the order in which the file system lists them.
    def process_set(self: Any, dataset: str) -> list[Data]:
        out = []
        categories = sorted(path for path in Path(self.raw_dir).iterdir() if path.is_dir())
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(0)
            for label, category in enumerate(categories):
                for path in sorted((category / dataset).glob(f"{category.name}_*.off")):
                    mesh = SamplePoints(POINTS)(read_off(str(path)))
                    out.append(Data(pos=_unit(mesh.pos[None]), y=torch.tensor([label])))
        if not out:
            raise FileNotFoundError(f"no {dataset} meshes (*/{dataset}/*.off) in {self.raw_dir}")
        return out

    dataset = official(type("Sampled", (ModelNet,), {"process_set": process_set}))
    parts = [dataset(str(folder), name, train=True, force_reload=True), dataset(str(folder), name, train=False)]
    return {
        "points": torch.cat([p._data.pos for p in parts]).numpy(),
        "label": torch.cat([p._data.y for p in parts]).numpy(),
        "split": np.repeat([0, 1], [len(p) for p in parts]),
    }


def _digits() -> Arrays:
    """The pixels that are not black, as (x, y, intensity): 64 points, each pixel about as often as the
    others and each time elsewhere in its square. A fifth of each class, drawn with seed 0, is for testing."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError("digits_points are scikit-learn's digits: pip install scikit-learn") from error
    digits = load_digits()
    generator = torch.Generator().manual_seed(0)
    points = torch.empty(len(digits.target), 64, 3)
    for out, image in zip(points, torch.from_numpy(digits.images).float() / 16, strict=True):
        row, col = image.nonzero().t()
        pixel = torch.arange(64) % len(row)
        place = torch.stack((col[pixel], 7 - row[pixel])) + torch.rand(2, 64, generator=generator)
        out[:, :2] = place.t() / 4 - 1
        out[:, 2] = image[row, col][pixel]
    label = torch.from_numpy(digits.target)
    test = share(label, 5, torch.Generator().manual_seed(0))
    return {"points": points.numpy(), "label": label.numpy(), "split": test.long().numpy()}


@dataclass(frozen=True)
class _Set:
    split: str
    stems: tuple[str, ...] = ()
    fetch: Callable[[Path], Arrays] | None = None


SETS: dict[str, _Set] = {
    "digits_points": _Set("20 % to test, seed 0"),
    "shapes69": _Set("80 / 20 %", ("shapes69_1024",)),
    "modelnet10": _Set("official", ("modelnet10_vox24", "modelnet10"), partial(_modelnet, "10")),
    "modelnet40": _Set("official", ("modelnet40",), partial(_modelnet, "40")),
}


def load(name: str, root: str | Path | None) -> Task:
    chosen = SETS[name]
    if name == "digits_points":
        arrays, source = _digits(), "scikit-learn"
    else:
        hint = (
            f"Make {(*chosen.stems, '')[0]}.npz with points [n, P, 3], label [n] and split [n] (0 train, 1 test), "
            "and set FASTKD_DATA to its folder"
        )
        arrays, source = find(name, chosen.stems, root, chosen.fetch, hint)
    if "surface_ijk" in arrays:
        arrays = _from_voxels(arrays, source)
    return to_task(name, chosen.split, arrays, source)


def to_task(name: str, split: str, arrays: Arrays, source: str) -> Task:
    require(arrays, ("points", "label", "split"), source)
    points = numbers(arrays, "points", ("n", "P", 3), source)
    label, test = (labels(arrays, key, len(points), source) for key in ("label", "split"))
    if not points.shape[1]:
        raise DamagedFile(f"{source}: points must have one point or more per shape, got shape {tuple(points.shape)}")
    if not bool(((test == 0) | (test == 1)).all()):
        raise DamagedFile(f"{source}: split must be 0 (train) or 1 (test)")
    train = (test == 0).nonzero()[:, 0]
    held = share(label[train], 10, torch.Generator().manual_seed(0))
    rows: dict[str, Any] = {"train": train[~held], "val": train[held], "test": (test == 1).nonzero()[:, 0]}
    return Task(
        name,
        "shapes",
        3,
        int(label.max()) + 1,
        False,
        True,
        {},
        f"{source}; split: {split}, a tenth of the training part to validate",
        {part: points[r] for part, r in rows.items()},
        {part: label[r] for part, r in rows.items()},
    )
