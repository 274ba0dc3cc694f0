"""Where the arrays of a data set come from: npz files with checksums, the cache, official downloads."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch_geometric.data import Data

__all__ = [
    "Arrays",
    "DamagedFile",
    "Task",
    "cache_folder",
    "find",
    "integers",
    "numbers",
    "official",
    "read",
    "require",
]

Arrays = dict[str, np.ndarray]

MOST_CLASSES = 2**20  # a larger label is a damaged one: networks have an output for every class


class DamagedFile(ValueError):
    """A file that is there but does not hold what it should; another download would not be tried in its place."""


@dataclass
class Task:
    """A data set with its split.

    Every graph is a PyG ``Data`` with x [N, F] (float32, dense or torch.sparse_csr), y ([N] int64, or
    [N, L] float32 for several labels), edge_index int64 [2, E], adj_t (torch.sparse_csr, row =
    destination, float32 ones), and train_mask, val_mask, test_mask (bool [N]; in an inductive task
    all true for the graph's own part and all false for the others).
    """

    name: str
    kind: Literal["nodes", "shapes"]
    num_features: int
    num_classes: int
    multilabel: bool
    inductive: bool
    graphs: dict[str, list[Data]]
    """By part ("train", "val", "test"); in a transductive task the same one graph under all three."""
    source: str
    """The file or download it came from, and the split."""
    points: dict[str, Tensor] = field(default_factory=dict)
    """Of shapes, by part: float32 [n, P, 3]."""
    labels: dict[str, Tensor] = field(default_factory=dict)
    """Of shapes, by part: int64 [n]."""
    known_counts: bool = False
    """Of several labels: the score is of as many labels per node as it has, those of the highest logits
    (the protocol of node2vec), instead of those above 0."""

    def __post_init__(self) -> None:
        """Raises ValueError where labels or splits are missing."""
        for part in ("train", "val", "test"):
            if self.kind == "shapes":
                shapes, labels = len(self.points.get(part, ())), len(self.labels.get(part, ()))
                if shapes == 0 or shapes != labels:
                    raise ValueError(
                        f"{self.name}: each of train, val and test needs shapes, and as many labels, got "
                        f"{shapes} shapes and {labels} labels for {part!r}"
                    )
                continue
            if not self.graphs.get(part):
                raise ValueError(
                    f"{self.name}: graphs must have one or more under each of train, val and test, got "
                    f"none under {part!r}"
                )
            mask = f"{part}_mask"
            for graph in self.graphs[part]:
                needed = ("x", "y", "edge_index", "adj_t", *(() if self.inductive else (mask,)))
                missing = [key for key in needed if getattr(graph, key, None) is None]
                if missing:
                    raise ValueError(
                        f"{self.name}: a graph of the part {part!r} has no {', '.join(missing)}: needed "
                        f"are {', '.join(needed)}"
                    )
                if not self.inductive and not bool(graph[mask].any()):
                    raise ValueError(f"{self.name}: {mask} holds no node")


def cache_folder() -> Path:
    return Path(os.environ.get("FASTKD_CACHE") or Path.home() / ".cache" / "fastkd")


def find(
    name: str, stems: tuple[str, ...], root: str | Path | None, fetch: Callable[[Path], Arrays] | None, hint: str
) -> tuple[Arrays, str]:
    """The arrays of a data set, and where they are from.

    Args:
        stems: file names without ".npz"; the first one found is read.
        fetch: downloads into a folder, and returns the arrays, which are then kept in the cache.
        hint: what a person can do where there is no download.
    """
    folders = [cache_folder()]
    if root is not None:
        if not Path(root).is_dir():
            raise FileNotFoundError(f"root must be a folder, got {str(root)!r}")
        folders.insert(0, Path(root))
    elif os.environ.get("FASTKD_DATA"):
        folders.insert(0, Path(os.environ["FASTKD_DATA"]))
    looked = []
    for folder in folders:
        for path in (folder / sub / f"{stem}.npz" for stem in stems for sub in ("", "graphs", "shapes", "images")):
            if path.is_file():
                return read(path, folder), str(path)
        looked.append(f"{folder} (or its graphs/, shapes/ or images/)")
    where = f"{name}: no {' or '.join(f'{s}.npz' for s in stems)} in {' or in '.join(looked)}"
    if fetch is None:
        raise FileNotFoundError(f"{where}, and there is no download. {hint}")
    try:
        arrays = fetch(cache_folder() / name.replace(":", "_"))
    except (ImportError, DamagedFile):
        raise
    except Exception as error:  # urllib, fsspec, aiohttp and zipfile share no base class
        raise FileNotFoundError(
            f"{where}; the download into {cache_folder() / name.replace(':', '_')} failed: "
            f"{type(error).__name__}: {_one_line(error)}. Put the npz into a folder and set FASTKD_DATA to it, "
            "or the official raw files into that download folder (remove what an interrupted download left there)"
        ) from error
    path = cache_folder() / f"{stems[-1]}.npz"
    write(path, arrays)
    return arrays, str(path)


def read(path: Path, folder: Path) -> Arrays:
    """All arrays of an npz, whose checksum is the stated one where one is stated.

    Args:
        path: the file.
        folder: where a SHA256SUMS is looked for besides the file's own folder.

    Raises:
        DamagedFile: another checksum, or no npz that can be read to its end without unpickling.
    """
    stated = _stated_sum(path, folder)
    if stated is not None:
        actual = _sha256(path)
        if actual != stated[0]:
            raise DamagedFile(
                f"{path} has the sha256 {actual}, but {stated[1]} states {stated[0]}: the file is damaged "
                "or another one. It was left as it is; replace it, or correct the sum"
            )
    try:
        with (
            open(path, "rb") as file,
            np.load(file, allow_pickle=False) as content,
        ):  # np.load leaves what it opens open
            arrays = {key: content[key] for key in content.files}
        if strange := [key for key, array in arrays.items() if not isinstance(array, np.ndarray)]:
            raise ValueError(f"{strange[0]!r} is no array")
        return arrays
    except Exception as error:  # zipfile, zlib, struct, tokenize and numpy share no base class
        pickled = " (fastkd unpickles nothing)" if "pickle" in str(error) else ""
        raise DamagedFile(
            f"{path} is not a complete npz of plain arrays{pickled}: {_one_line(error)}. It was left as it is; "
            "replace it by a whole one, or remove it and load it anew"
        ) from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def _sha256(path: str | Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _stated_sum(path: Path, folder: Path) -> tuple[str, Path] | None:
    for sums in dict.fromkeys((path.parent / "SHA256SUMS", folder / "SHA256SUMS")):
        if sums.is_file():
            for line in sums.read_text(errors="replace").splitlines():
                stated, _, named = line.strip().partition(" ")
                if named and sums.parent / named.strip().lstrip("*") == path:
                    return stated.lower(), sums
    return None


def write(path: Path, arrays: Arrays) -> None:
    """Writes an npz, and its checksum into SHA256SUMS beside it; each appears whole or not at all."""
    sums = path.parent / "SHA256SUMS"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, suffix=".part") as folder:
            new, listed = Path(folder) / path.name, Path(folder) / sums.name
            np.savez_compressed(new, **arrays)  # type: ignore[arg-type]
            kept = [
                line
                for line in (sums.read_text().splitlines() if sums.exists() else ())
                if line.split()[-1:] != [path.name]
            ]
            listed.write_text("\n".join([*kept, f"{_sha256(new)}  {path.name}"]) + "\n")
            os.replace(listed, sums)
            os.replace(new, path)
    except OSError as error:
        raise OSError(
            error.errno,
            f"{path} could not be written ({error.strerror}): make room there, or set FASTKD_CACHE to another folder",
        ) from error


def official(dataset: Any) -> Any:
    """A PyG data set class that respects FASTKD_OFFLINE: it then processes raw files that are there,
    but refuses to download."""
    if os.environ.get("FASTKD_OFFLINE", "0") in ("", "0"):
        return dataset

    def download(self: Any) -> None:
        raise ConnectionError(f"{dataset.__name__} would download, but FASTKD_OFFLINE is set")

    return type(dataset.__name__, (dataset,), {"download": download})


def require(arrays: Arrays, keys: tuple[str, ...], source: str) -> None:
    """Raises DamagedFile where an array is missing."""
    missing = [key for key in keys if key not in arrays]
    if missing:
        raise DamagedFile(
            f"{source} has no {', '.join(missing)}: needed are {', '.join(keys)}; the file has "
            f"{', '.join(arrays) or 'nothing'}"
        )


def _shaped(arrays: Arrays, key: str, shape: tuple[int | str, ...], kinds: str, words: str, source: str) -> np.ndarray:
    require(arrays, (key,), source)
    array = arrays[key]
    fits = array.ndim == len(shape) and all(
        a == b for a, b in zip(array.shape, shape, strict=True) if isinstance(b, int)
    )
    if not fits or array.dtype.kind not in kinds:
        raise DamagedFile(
            f"{source}: {key} must have shape [{', '.join(map(str, shape))}] of {words}, got {array.shape} of "
            f"{array.dtype}"
        )
    return array


def integers(arrays: Arrays, key: str, shape: tuple[int | str, ...], below: int, source: str, least: int = 0) -> Tensor:
    """An array of integers as int64.

    Args:
        shape: the size of each dimension, or a letter where any will do.
        below, least: entries are in [least, below).

    Raises:
        DamagedFile: another dtype or shape, or an entry out of range.
    """
    array = _shaped(arrays, key, shape, "iu", f"integers in [{least}, {below})", source)
    if array.size and not least <= int(array.min()) <= int(array.max()) < below:
        wrong = int(array.min()) if int(array.min()) < least else int(array.max())
        raise DamagedFile(f"{source}: {key} must be in [{least}, {below}), got {wrong}")
    return torch.from_numpy(array.astype(np.int64))


def numbers(arrays: Arrays, key: str, shape: tuple[int | str, ...], source: str) -> Tensor:
    """An array of finite numbers as float32; arguments and errors as for :func:`integers`."""
    array = _shaped(arrays, key, shape, "fiub", "numbers", source)
    with np.errstate(over="ignore"):
        values = torch.from_numpy(array.astype(np.float32))
    if not bool(values.isfinite().all()):
        where = [int(i) for i in (~values.isfinite()).nonzero()[0]]
        raise DamagedFile(f"{source}: {key}{where} must be finite in float32, got {array[tuple(where)]}")
    return values


def pointers(arrays: Arrays, key: str, count: int | str, last: int, source: str) -> Tensor:
    """int64 [count] from 0 to `last`, never decreasing: where each of several rows begins, and the last one ends."""
    ends = integers(arrays, key, (count,), last + 1, source)
    if not len(ends) or int(ends[0]) != 0 or int(ends[-1]) != last or bool((ends[1:] < ends[:-1]).any()):
        raise DamagedFile(f"{source}: {key} must run from 0 to {last} and never decrease")
    return ends


def labels(arrays: Arrays, key: str, count: int | str, source: str) -> Tensor:
    """int64 [count] of classes, one or more."""
    y = integers(arrays, key, (count,), MOST_CLASSES, source)
    if not len(y):
        raise DamagedFile(f"{source}: {key} must have one class or more, got none")
    return y


def share(label: Tensor, part: int, generator: torch.Generator) -> Tensor:
    """[n] bool, true for one in `part` of each class of label [n], at least one where a class has two."""
    chosen = torch.zeros(len(label), dtype=torch.bool)
    for c in np.unique(label.numpy()).tolist():
        members = (label == c).nonzero()[:, 0]
        if len(members) > 1:
            order = members[torch.randperm(len(members), generator=generator)]
            chosen[order[: max(1, round(len(members) / part))]] = True
    return chosen
