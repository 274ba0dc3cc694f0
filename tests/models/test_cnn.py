"""The convolutional networks, and their weights."""

import hashlib
import os
import pathlib

import numpy as np
import pytest
import torch
from torch import nn

from fastkd import data
from fastkd.data import images
from fastkd.models import CNNS, build_cnn, load_weights
from fastkd.runtime import checkpoint

HERE = os.environ.get("FASTKD_DATA")


def file(name):
    """Of FASTKD_DATA."""
    if HERE is None or not (pathlib.Path(HERE) / name).is_file():
        pytest.skip(f"{name} is not in FASTKD_DATA")
    return pathlib.Path(HERE) / name


@pytest.mark.parametrize(
    "name, parameters",
    [
        ("lenet", 431_080),
        ("alexnet", 61_100_840),
        ("vgg16", 138_357_544),
        ("vgg16_cifar", 14_728_266),
        ("resnet20", 269_722),
        ("resnet56", 853_018),
        ("resnet50", 25_557_032),
        ("mobilenet_v1", 4_231_976),
    ],
)
def test_parameters(name, parameters):
    with torch.device("meta"):
        assert sum(p.numel() for p in build_cnn(name).parameters()) == parameters
        x = torch.empty(
            2,
            1 if name == "lenet" else 3,
            *(28, 28) if name == "lenet" else (224, 224) if parameters > 2e7 else (32, 32),
        )
        classes = 1000 if name in ("alexnet", "vgg16", "resnet50", "mobilenet_v1") else 10
        assert build_cnn(name)(x).shape == (2, classes)
        assert build_cnn(name, num_classes=7)(x).shape == (2, 7)


def test_the_names_are_torchvisions():
    with torch.device("meta"):
        keys = {name: set(CNNS[name]().state_dict()) for name in CNNS}
    assert {"features.0.weight", "features.10.bias", "classifier.1.weight", "classifier.6.bias"} <= keys["alexnet"]
    assert {
        "features.0.weight",
        "features.28.bias",
        "classifier.0.weight",
        "classifier.3.weight",
        "classifier.6.bias",
    } <= keys["vgg16"]
    assert {
        "conv1.weight",
        "layer1.0.downsample.0.weight",
        "layer1.0.downsample.1.running_mean",
        "layer4.2.conv3.weight",
        "fc.bias",
    } <= keys["resnet50"]
    assert len(keys["resnet50"]) == 320


@pytest.mark.parametrize(
    "name, stem",
    [("resnet20", "cifar10_resnet20"), ("resnet56", "cifar10_resnet56"), ("mobilenet_v1", "imagenet_mobilenet_v1")],
)
def test_published_weights_load(name, stem):
    path, model = file(f"weights/{stem}.npz"), build_cnn(name)
    load_weights(model, path)
    with np.load(path) as given:
        state = model.state_dict()
        assert all(np.array_equal(state[key].numpy(), given[key]) for key in given.files)


def accuracy(x):
    """How many of the images x uint8 [n, 3, 32, 32], the first of the test set, ResNet-20 has right."""
    model = build_cnn("resnet20").eval()
    load_weights(model, file("weights/cifar10_resnet20.npz"))
    with np.load(file("images/cifar10.packed.npz")) as packed:
        y = torch.from_numpy(packed["y_test"][: len(x)].astype(np.int64))
    normalised = data.Images("", 10, "", {}, {}, images.SETS["cifar10"].mean, images.SETS["cifar10"].std).normalised
    with torch.no_grad():
        return sum(
            int((model(normalised(a)).argmax(1) == b).sum()) for a, b in zip(x.split(250), y.split(250), strict=True)
        )


def test_resnet20_on_a_thousand_images():
    file("weights/cifar10_resnet20.npz")
    with np.load(file("images/cifar10.packed.npz")) as packed:
        x = torch.from_numpy(images.unpack(packed["r_test"][:, :1000]))
    assert accuracy(x) == 923


@pytest.mark.large
def test_resnet20_has_its_published_accuracy(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTKD_CACHE", str(tmp_path))
    file("images/cifar10.packed.npz")
    loaded = data.load_images("cifar10")
    assert {part: tuple(x.shape) for part, x in loaded.images.items()} == {
        "train": (40000, 3, 32, 32),
        "fitness": (5000, 3, 32, 32),
        "val": (5000, 3, 32, 32),
        "test": (10000, 3, 32, 32),
    }
    with np.load(tmp_path / "cifar10.npz") as unpacked:
        digest = hashlib.sha256(unpacked["x_train"].tobytes() + unpacked["x_test"].tobytes()).hexdigest()
    assert digest == "13bcb13f80357093c4eb92a9826c633ea2caa9e8117ff220ce13bfc29d4b1d87"
    assert accuracy(loaded.images["test"]) == 9173


def test_weights_that_do_not_fit(tmp_path):
    model = build_cnn("lenet")
    before = {key: x.clone() for key, x in model.state_dict().items()}
    state = {key: x.numpy() + 1 for key, x in before.items()}
    state["extra"] = state.pop("fc2.bias")
    state["conv1.bias"] = state["conv1.bias"][:3]
    np.savez(tmp_path / "w.npz", **state)
    with pytest.raises(
        ValueError,
        match=r"does not fit LeNet: unknown: extra; missing: fc2.bias; conv1.bias is \[3\] in the file and \[20\]",
    ):
        load_weights(model, tmp_path / "w.npz")
    assert all(torch.equal(x, before[key]) for key, x in model.state_dict().items())
    with pytest.raises(FileNotFoundError):
        load_weights(model, tmp_path / "none.npz")
    with pytest.raises(ValueError, match="must end in"):
        load_weights(model, tmp_path / "w.pth")


def test_weights_from_safetensors(tmp_path):
    save_file = pytest.importorskip("safetensors.torch", reason="safetensors is not installed").save_file
    model, other = build_cnn("lenet"), build_cnn("lenet")
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    load_weights(other, tmp_path / "w.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True))


def test_unknown_names():
    with pytest.raises(ValueError, match="did you mean 'resnet20'"):
        build_cnn("resnet2")
    with pytest.raises(ValueError, match="lenet has no hyperparameter 'width': it has num_classes"):
        build_cnn("lenet", width=2)


# --- damaged files -----------------------------------------------------------------------------------


def small_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(3 * 16, 2)).eval()


def flips(content, step):
    """The file with one bit changed, at many places."""
    for bit in range(0, 8 * len(content), step):
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        yield bytes(damaged)


def same_state(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def written(model, path):
    if path.suffix == ".npz":
        np.savez(path, **{key: x.numpy() for key, x in model.state_dict().items()})
    else:
        pytest.importorskip("safetensors", reason="safetensors is not installed")
        checkpoint.save(path, model.state_dict(), {"of": "a teacher"})


@pytest.mark.parametrize("name", ["w.safetensors", "w.npz"])
def test_no_flipped_bit_loads_as_other_weights(tmp_path, name):
    """A file that fastkd wrote, or an npz, is refused in one line that names it; or what was changed has no meaning."""
    path, model = tmp_path / name, small_model()
    written(model, path)
    content, other, loaded = path.read_bytes(), small_model(), 0
    load_weights(other, path)
    assert same_state(model, other)
    for damaged in flips(content, 3 if name == "w.safetensors" else 5):
        path.write_bytes(damaged)
        try:
            load_weights(other, path)
            loaded += 1
        except ValueError as error:
            assert str(path) in str(error) and "\n" not in str(error)
        assert same_state(model, other)
    assert loaded < 0.3 * len(content) * 8 / 3


@pytest.mark.parametrize("name", ["w.safetensors", "w.npz"])
@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[:7],
        lambda content: content[: len(content) // 2],
        lambda content: content[:-1],
        lambda content: b"<html>not found</html>" * 100,
        lambda content: b"\x00" * 4096,
        lambda content: (10**5 * 6).to_bytes(8, "little") + b'{"a":' * 10**5 + b"}" * 10**5,
    ],
)
def test_damaged_weights(tmp_path, name, damage):
    path, model = tmp_path / name, small_model()
    written(model, path)
    path.write_bytes(damage(path.read_bytes()))
    before = {key: x.clone() for key, x in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"w\.(npz|safetensors) is no whole .*: put a copy in its place") as caught:
        load_weights(model, path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
    assert all(torch.equal(x, before[key]) for key, x in model.state_dict().items())


def test_weights_of_another_kind(tmp_path):
    model = small_model()
    state = {key: x.numpy() for key, x in model.state_dict().items()}
    for other, message in (
        (state["0.bias"].astype(object), "is no whole .npz file of numbers .*allow_pickle"),
        (state["0.bias"].astype("U8"), "is no whole .npz file of numbers"),
        (
            state["0.bias"].astype(np.int32),
            "does not fit Sequential: 0.bias is torch.int32 in the file and torch.float32",
        ),
        (state["0.bias"].astype(np.complex64), "does not fit Sequential: 0.bias is torch.complex64 in the file"),
    ):
        np.savez(tmp_path / "w.npz", **{**state, "0.bias": other}, allow_pickle=True)
        with pytest.raises(ValueError, match=message):
            load_weights(model, tmp_path / "w.npz")
    np.save(tmp_path / "w.npy", state["0.bias"])
    (tmp_path / "w.npy").rename(tmp_path / "w.npz")
    with pytest.raises(ValueError, match=r"is no whole \.npz file of numbers"):
        load_weights(model, tmp_path / "w.npz")
    np.savez(
        tmp_path / "w.npz", **{key: x.astype(np.float64) if x.dtype.kind == "f" else x for key, x in state.items()}
    )
    other = small_model()
    load_weights(other, tmp_path / "w.npz")
    assert same_state(model, other)


def test_weights_without_a_checksum(tmp_path):
    """As others write them, and fastkd's first versions."""
    save_file = pytest.importorskip("safetensors.torch", reason="safetensors is not installed").save_file
    model, other = small_model(), small_model()
    for metadata in (None, {"format": "pt"}, {"fastkd": "{}"}):
        save_file(model.state_dict(), tmp_path / "w.safetensors", metadata)
        load_weights(other, tmp_path / "w.safetensors")
        assert same_state(model, other)
