"""The sets of images, and own files: their parts, what is wrong in them, official files made small."""

import gzip
import hashlib
import io
import os
import pathlib
import tarfile

import numpy as np
import pytest
import torch

from fastkd import data
from fastkd.data import images
from fastkd.data.files import DamagedFile
from fastkd.models import build_cnn, load_weights

HERE = os.environ.get("FASTKD_DATA")


def file(name):
    """Of FASTKD_DATA."""
    if HERE is None or not (pathlib.Path(HERE) / name).is_file():
        pytest.skip(f"{name} is not in FASTKD_DATA")
    return pathlib.Path(HERE) / name


def test_unknown_names():
    with pytest.raises(
        ValueError, match="name must be one of cifar10, digits, imagenet_sample, mnist, or a path to an npz, got 'svhn'"
    ):
        data.load_images("svhn")
    with pytest.raises(ValueError, match="did you mean 'digits'"):
        data.load_images("digit")


def test_parts_share_no_image():
    loaded = data.load_images("digits")
    assert {part: len(x) for part, x in loaded.images.items()} == {
        "train": 1076,
        "fitness": 135,
        "val": 136,
        "test": 450,
    }
    seen = [tuple(x.flatten().tolist()) for part in loaded.images.values() for x in part]
    assert len(set(seen)) == 1797
    for part, y in loaded.labels.items():
        assert int(y.bincount().max()) < 1.4 * int(y.bincount().min()), part
    small = loaded.images["test"][:, 0, 2:26:3, 2:26:3]  # every pixel is nine
    assert bool(
        (small.repeat_interleave(3, 1).repeat_interleave(3, 2) == loaded.images["test"][:, 0, 2:26, 2:26]).all()
    )
    x, y = loaded.part("fitness", 20)
    again, _ = loaded.part("fitness", 20)
    assert x.shape == (20, 1, 28, 28) and y.shape == (20,) and torch.equal(x, again)
    every, labels = loaded.part("fitness")
    assert labels is loaded.labels["fitness"]
    for image, label in zip(x, y, strict=True):
        assert any(torch.equal(image, other) and label == same for other, same in zip(every, labels, strict=True))
    with pytest.raises(ValueError, match="the part 'val' has 136 images, but 137 are asked for"):
        loaded.part("val", 137)


def test_a_sample_of_imagenet():
    file("images/imagenet_sample1000_224.npz")
    loaded = data.load_images("imagenet_sample")
    assert {part: len(x) for part, x in loaded.images.items()} == {
        "train": 200,
        "fitness": 300,
        "val": 200,
        "test": 300,
    }
    assert sorted(int(y) for labels in loaded.labels.values() for y in labels) == list(range(1000))
    model = build_cnn("mobilenet_v1").eval()
    load_weights(model, file("weights/imagenet_mobilenet_v1.npz"))
    x, y = loaded.part("test", 40)
    with torch.no_grad():
        assert int((model(x).argmax(1) == y).sum()) > 28  # labels are in the weights' order


def own(tmp_path, **changes):
    rng = np.random.default_rng(0)
    arrays = {}
    for part in images.PARTS:
        arrays |= {f"x_{part}": rng.integers(0, 256, (12, 5, 4, 3), np.uint8), f"y_{part}": rng.integers(0, 3, 12)}
    arrays = {key: x for key, x in {**arrays, **changes}.items() if x is not None}
    np.savez(tmp_path / "own.npz", **arrays)
    return arrays


def test_own_images(tmp_path):
    arrays = own(tmp_path)
    loaded = data.load_images(tmp_path / "own.npz")
    assert loaded.num_classes == 3 and loaded.images["val"].shape == (12, 3, 5, 4)
    assert np.array_equal(loaded.images["val"].permute(0, 2, 3, 1).numpy(), arrays["x_val"])
    x, _ = loaded.part("train")
    torch.testing.assert_close(x.mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(x.std((0, 2, 3), correction=0), torch.ones(3), atol=1e-5, rtol=0)
    own(tmp_path, mean=np.zeros(3), std=np.ones(3))
    assert float(data.load_images(tmp_path / "own.npz").part("train")[0].max()) <= 1
    own(tmp_path, **{f"y_{part}": None for part in images.PARTS})
    loaded = data.load_images(str(tmp_path / "own.npz"))
    assert loaded.labels == {} and loaded.part("test")[1] is None


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (dict(x_fitness=None), "has no fitness split: it needs x_fitness"),
        (dict(x_val=None), "has no x_val"),
        (dict(y_val=None), "has no y_val"),
        (
            dict(x_val=np.zeros((12, 5, 5, 3), np.uint8)),
            r"x_val must be uint8 \[n, 5, 4, 3\] with n > 0, got uint8 \[12, 5, 5, 3\]",
        ),
        (dict(x_val=np.zeros((0, 5, 4, 3), np.uint8)), "with n > 0"),
        (dict(x_val=np.zeros((12, 5, 4, 3), np.float32)), "got float32"),
        (dict(x_train=np.zeros((12, 5), np.uint8)), r"x_train must be uint8 \[n, H, W\] or"),
        (dict(y_test=np.zeros(11, np.int64)), r"y_test must be integers \[12\]"),
        (dict(y_test=np.zeros(12)), "got float64"),
        (dict(y_test=np.full(12, -1)), r"y_test must be in \[0, ...\], got -1"),
        (dict(std=np.zeros(3)), "std must be 3 finite numbers above 0"),
        (dict(mean=np.zeros(2)), "mean must be 3 finite numbers, one per channel"),
    ],
)
def test_wrong_images(tmp_path, changes, told):
    own(tmp_path, **changes)
    with pytest.raises(ValueError, match=told):
        data.load_images(tmp_path / "own.npz")
    with pytest.raises(FileNotFoundError, match="no file"):
        data.load_images(tmp_path / "other.npz")


def test_mnist():
    file("images/mnist.npz")
    loaded = data.load_images("mnist")
    assert {part: tuple(x.shape) for part, x in loaded.images.items()} == {
        "train": (48001, 1, 28, 28),
        "fitness": (6000, 1, 28, 28),
        "val": (5999, 1, 28, 28),
        "test": (10000, 1, 28, 28),
    }
    assert loaded.labels["test"][:5].tolist() == [7, 2, 1, 0, 4] and "images/mnist.npz" in loaded.source
    x = loaded.normalised(loaded.images["train"][:10000])
    assert x.dtype == torch.float32 and abs(float(x.mean())) < 0.05 and abs(float(x.std()) - 1) < 0.05


# --- official files, made small ----------------------------------------------------------------------------


@pytest.fixture
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("FASTKD_OFFLINE", "1")
    monkeypatch.setenv("FASTKD_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("FASTKD_DATA", raising=False)
    return tmp_path / "cache"


def test_official_cifar10(cache, monkeypatch):
    rng = np.random.default_rng(0)
    records = rng.integers(0, 256, (6, 40, 3073), np.uint8)
    records[:, :, 0] %= 10
    (cache / "cifar10").mkdir(parents=True)
    path = cache / "cifar10" / "cifar-10-binary.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        for i, name in enumerate([*(f"data_batch_{j}" for j in range(1, 6)), "test_batch"]):
            info = tarfile.TarInfo(f"cifar-10-batches-bin/{name}.bin")
            info.size = records[i].size
            archive.addfile(info, io.BytesIO(records[i].tobytes()))
    with pytest.raises(FileNotFoundError, match="but the official file has c32a1d4ab5d03f1284b67883e8d87530"):
        data.load_images("cifar10")
    monkeypatch.setattr(images, "CIFAR10", (images.CIFAR10[0], hashlib.md5(path.read_bytes()).hexdigest()))
    for _ in range(2):  # the second time from the cache's npz
        loaded = data.load_images("cifar10")
        assert np.array_equal(loaded.images["test"].numpy(), records[5, :, 1:].reshape(-1, 3, 32, 32))
        assert loaded.labels["test"].tolist() == records[5, :, 0].tolist()
        assert sum(len(loaded.images[part]) for part in ("train", "fitness", "val")) == 200
        path.unlink(missing_ok=True)


def test_official_mnist(cache, monkeypatch):
    rng = np.random.default_rng(0)
    (cache / "mnist").mkdir(parents=True)
    arrays, stated = {}, {}
    for key, (name, _) in images.MNIST.items():
        n = 60 if "train" in key else 20
        arrays[key] = (
            rng.integers(0, 256, (n, 28, 28), np.uint8) if key[0] == "x" else rng.integers(0, 10, n).astype(np.uint8)
        )
        header = bytes([0, 0, 8, arrays[key].ndim]) + np.array(arrays[key].shape, ">i4").tobytes()
        (cache / "mnist" / name).write_bytes(gzip.compress(header + arrays[key].tobytes()))
        stated[key] = name, hashlib.md5((cache / "mnist" / name).read_bytes()).hexdigest()
    monkeypatch.setattr(images, "MNIST", stated)
    loaded = data.load_images("mnist")
    assert np.array_equal(loaded.images["test"][:, 0].numpy(), arrays["x_test"])
    assert loaded.labels["test"].tolist() == arrays["y_test"].tolist()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(r_train=None), "has no r_train: needed are r_train, y_train, r_test, y_test"),
        (
            dict(r_test=np.zeros((3, 10, 16, 16), np.uint8)),
            r"r_test must be uint8 \[3, n, 32, 32\], got uint8 \[3, 10, 16",
        ),
        (dict(y_train=np.full(40, 10)), r"y_train must be in \[0, 10\), got 10"),
        (dict(y_test=np.zeros(9, int)), r"y_test must have shape \[10\]"),
    ],
)
def test_wrong_packed_cifar10_leaves_nothing_in_the_cache(cache, tmp_path, changes, words):
    arrays = {}
    for part, n in (("train", 40), ("test", 10)):
        arrays |= {f"r_{part}": np.zeros((3, n, 32, 32), np.uint8), f"y_{part}": np.arange(n) % 10}
    arrays = {key: x for key, x in {**arrays, **changes}.items() if x is not None}
    np.savez(tmp_path / "cifar10.packed.npz", **arrays)
    with pytest.raises(DamagedFile, match=rf"{tmp_path / 'cifar10.packed.npz'}.*{words}"):
        data.load_images("cifar10", root=tmp_path)
    assert not cache.exists()


def test_wrong_jpegs(tmp_path):
    pillow = pytest.importorskip("PIL.Image", reason="pillow is not installed")
    buffer = io.BytesIO()
    pillow.fromarray(np.zeros((224, 224, 3), np.uint8)).save(buffer, "JPEG")
    jpeg = np.frombuffer(buffer.getvalue(), np.uint8)
    right = dict(jpeg=np.tile(jpeg, 10), offset=np.arange(11) * len(jpeg), label=np.arange(10))
    for changes, words in (
        (dict(label=np.arange(10)[None]), r"label must have shape \[n\]"),
        (dict(label=np.full(10, 1000)), r"label must be in \[0, 1000\), got 1000"),
        (dict(offset=np.arange(11)[None]), "offset must be 11 rising integers"),
        (dict(jpeg=np.zeros(10 * len(jpeg), np.uint8)), r"jpeg\[0:\d+\], image 0, cannot be decoded"),
    ):
        np.savez(tmp_path / "imagenet_sample1000_224.npz", **{**right, **changes})
        with pytest.raises(ValueError, match=words):
            data.load_images("imagenet_sample", root=tmp_path)


@pytest.mark.parametrize("kind", [b"", b"PK", b"no zip", b"\x80\x04K\x01.", b"\x93NUMPY\x01\x00"])
def test_files_of_other_kinds(tmp_path, kind):
    (tmp_path / "own.npz").write_bytes(kind)
    with pytest.raises(DamagedFile, match=r"own\.npz is not a complete npz of plain arrays.*replace it by a whole one"):
        data.load_images(tmp_path / "own.npz")
    np.save(tmp_path / "array.npy", np.zeros(3))
    (tmp_path / "own.npz").write_bytes((tmp_path / "array.npy").read_bytes())
    with pytest.raises(DamagedFile, match="not a complete npz"):
        data.load_images(tmp_path / "own.npz")


def test_labels_that_would_need_a_million_outputs(tmp_path):
    own(tmp_path, y_val=np.full(12, 2**40))
    with pytest.raises(ValueError, match=r"y_val must be in \[0, 1048575\], got 1099511627776"):
        data.load_images(tmp_path / "own.npz")


def test_offline_says_where_it_looked(cache):
    for name in ("cifar10", "mnist"):
        with pytest.raises(FileNotFoundError, match=rf"no {name}.npz in .*FASTKD_OFFLINE is set"):
            data.load_images(name)
