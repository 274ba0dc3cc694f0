"""What compression writes and measures: costs of two networks, ONNX, int8, and what is refused."""

import builtins

import onnx
import pytest
import torch
from torch import nn

from fastkd.compress import export
from fastkd.runtime import measure

pytestmark = pytest.mark.usefixtures("one_thread")


class Net(nn.Module):
    def __init__(self, width=6):
        super().__init__()
        self.conv = nn.Conv2d(2, width, 3)
        self.norm = nn.BatchNorm2d(width)
        self.drop = nn.Dropout(0.5)
        self.fc = nn.Linear(width, 4)

    def forward(self, x):
        return self.fc(self.drop(torch.relu(self.norm(self.conv(x))).mean((2, 3))))


@pytest.fixture
def net(monkeypatch):
    monkeypatch.setattr(export, "SECONDS", 0.01)
    torch.manual_seed(0)
    out = Net()
    out.norm.running_mean.uniform_(-1, 1)
    out.norm.running_var.uniform_(0.5, 2)
    return out.eval()


X = torch.randn(3, 2, 8, 10, generator=torch.Generator().manual_seed(1))


def test_costs_are_those_of_one_image(net):
    small = Net(3)
    small.train()  # measured in eval mode all the same, and left in its own
    before = small.norm.running_mean.clone()
    full, less = export.costs([net, small], X, batches=(1, 5))
    # 6 x 8 positions, 9 taps of 2 channels, then the linear layer
    assert (full["macs"], less["macs"]) == (48 * 18 * 6 + 6 * 4, 48 * 18 * 3 + 3 * 4)
    assert (full["parameters"], less["parameters"]) == (6 * 18 + 6 + 12 + 6 * 4 + 4, 3 * 18 + 3 + 6 + 3 * 4 + 4)
    assert less["bytes"] == 4 * (less["parameters"] + 6) + 8  # running statistics, and the number of batches
    for own in (full, less):
        assert set(own["latency_ms"]) == set(own["peak_memory_mb"]) == {"1", "5"}
        assert all(v > 0 for v in own["latency_ms"].values()) and own["threads"] == 1
        assert own["peak_memory_mb"]["5"] == pytest.approx(5 * own["peak_memory_mb"]["1"], rel=0.1)
    assert full["peak_memory_mb"]["5"] == pytest.approx(2 * less["peak_memory_mb"]["5"], rel=0.1)
    assert small.training and small.drop.training and not net.training
    assert torch.equal(small.norm.running_mean, before)
    assert export.costs([net], X, (1,))[0]["macs"] == full["macs"]


def test_modes_come_back_after_an_error(net):
    net.train()
    net.norm.eval()
    with pytest.raises(RuntimeError, match="of it"), measure.evaluating(net):
        assert not net.drop.training and not torch.is_grad_enabled()
        raise RuntimeError("of it")
    assert net.training and net.drop.training and not net.norm.training and torch.is_grad_enabled()


def test_onnx_is_of_eval_mode_and_any_number_of_images(net, tmp_path):
    with torch.no_grad():
        expected = net(X)
    net.train()
    record = export.to_onnx(net, tmp_path / "net.onnx", X[:1])
    assert net.training and record["max_difference"] < 1e-5
    assert record["bytes"] == (tmp_path / "net.onnx").stat().st_size and set(record["latency_ms"]) == {"1", "64"}
    for n in (1, 2, 3):
        torch.testing.assert_close(export.predict(tmp_path / "net.onnx", X[:n], batch=2), expected[:n])
    assert [p.name for p in tmp_path.iterdir()] == ["net.onnx"]


@pytest.mark.parametrize("wrong", [float("nan"), 0.5])
def test_an_onnx_file_of_other_logits_is_not_kept(net, tmp_path, monkeypatch, wrong):
    true = export.predict
    (tmp_path / "net.onnx").write_text("an older one")
    # of the first number of images only: Python's max would lose a NaN before a number
    monkeypatch.setattr(export, "predict", lambda path, x: true(path, x) + (wrong if len(x) == 1 else 0))
    with pytest.raises(ArithmeticError, match=r"ONNX file of Net gives logits that differ by .* at most 0\.001"):
        export.to_onnx(net, tmp_path / "net.onnx", X[:1])
    assert [p.name for p in tmp_path.iterdir()] == ["net.onnx"]
    assert (tmp_path / "net.onnx").read_text() == "an older one"


def test_int8(net, tmp_path):
    export.to_onnx(net, tmp_path / "net.onnx", X)
    record = export.to_int8(tmp_path / "net.onnx", tmp_path / "net-int8.onnx", X)
    assert record["bytes"] == (tmp_path / "net-int8.onnx").stat().st_size
    with torch.no_grad():
        expected = net(X)
    found = export.predict(tmp_path / "net-int8.onnx", X)
    assert 0 < float((found - expected).abs().max()) < 0.05 * float(expected.abs().max())
    weights = onnx.load(tmp_path / "net-int8.onnx").graph.initializer
    assert any(w.data_type == onnx.TensorProto.INT8 and tuple(w.dims) == (6, 2, 3, 3) for w in weights)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["net-int8.onnx", "net.onnx"]


@pytest.mark.parametrize(
    ("calibration", "told"),
    [(X[:0], r"got float32 \[0, 2, 8, 10\]"), (X[0], r"got float32 \[2, 8, 10\]"), (X.double(), "got float64")],
)
def test_calibration_that_is_none(net, tmp_path, calibration, told):
    with pytest.raises(
        ValueError, match=rf"calibration must be float32 \[n, C, H, W\] with at least one image, {told}"
    ):
        export.to_int8(tmp_path / "net.onnx", tmp_path / "int8.onnx", calibration)


def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no file .*none.onnx"):
        export.predict(tmp_path / "none.onnx", X)


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_a_package_that_is_not_installed(net, tmp_path, monkeypatch, package):
    true = builtins.__import__

    def without(name, *args, **kwargs):
        if name == package:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return true(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=rf"needs the package {package}: pip install \"fastkd\[compress\]\""):
        export.to_onnx(net, tmp_path / "net.onnx", X)
    assert not list(tmp_path.iterdir())
