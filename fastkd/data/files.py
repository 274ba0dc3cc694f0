"""Where the arrays of a data set come from: npz files with checksums, the cache, official downloads."""

from __future__ import annotations

import hashlib
import os
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from torch import Tensor

if TYPE_CHECKING:
    from torch_geometric.data import Data

__all__ = ["Arrays", "Task", "cache_folder", "find", "official", "write"]

Arrays = dict[str, np.ndarray]


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
    except ImportError:
        raise
    except Exception as error:  # urllib, fsspec, aiohttp and zipfile share no base class
        raise FileNotFoundError(
            f"{where}; the download into {cache_folder() / name.replace(':', '_')} failed: "
            f"{type(error).__name__}: {error}. Put the npz into a folder and set FASTKD_DATA to it, or the official "
            "raw files into that download folder (remove what an interrupted download left there)"
        ) from error
    path = cache_folder() / f"{stems[-1]}.npz"
    write(path, arrays)
    return arrays, str(path)


def read(path: Path, folder: Path) -> Arrays:
    """All arrays of an npz whose checksum is the stated one, if one is stated."""
    stated = _stated_sum(path, folder)
    if stated is not None:
        actual = _sha256(path)
        if actual != stated[0]:
            raise ValueError(
                f"{path} has the sha256 {actual}, but {stated[1]} states {stated[0]}: the file is damaged "
                "or another one. It was left as it is; replace it, or correct the sum"
            )
    try:
        with np.load(path, allow_pickle=False) as content:
            return {key: content[key] for key in content.files}
    except (zipfile.BadZipFile, EOFError, OSError, ValueError) as error:
        pickled = " (fastkd unpickles nothing)" if "pickle" in str(error) else ""
        raise ValueError(
            f"{path} is not a complete npz of plain arrays{pickled}: {error}. It was left as it is"
        ) from error


def _sha256(path: str | Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _stated_sum(path: Path, folder: Path) -> tuple[str, Path] | None:
    for sums in dict.fromkeys((path.parent / "SHA256SUMS", folder / "SHA256SUMS")):
        if sums.is_file():
            for line in sums.read_text().splitlines():
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
    missing = [key for key in keys if key not in arrays]
    if missing:
        raise ValueError(
            f"{source} has no {', '.join(missing)}: needed are {', '.join(keys)}; the file has "
            f"{', '.join(arrays) or 'nothing'}"
        )
