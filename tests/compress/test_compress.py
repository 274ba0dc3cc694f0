"""From a configuration to a smaller network: the whole path on tiny networks, ends in the middle, wrong input."""

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits
from torch import nn
from typer.testing import CliRunner

from fastkd import cli, models, report
from fastkd.compress import (
    CheckpointError,
    ConfigError,
    Stopped,
    compress,
    controls,
    load_config,
    recipes,
    run,
    tables,
    train,
)
from fastkd.compress import search as searching
from fastkd.compress.record import CompressRecord
from fastkd.evolve import Fitness, Limits, global_norm, mask_id
from fastkd.lab import plan as grid
from fastkd.population import load, trace
from fastkd.runtime import atomic

pytestmark = pytest.mark.usefixtures("one_thread")

NETS = """
import torch
from torch import nn


class Small(nn.Module):
    def __init__(self, width=8, norm=True):
        super().__init__()
        self.conv1 = nn.Conv2d(1, width, 3, padding=1)
        self.norm1 = nn.BatchNorm2d(width) if norm else nn.Identity()
        self.conv2 = nn.Conv2d(width, 2 * width, 3, stride=2)
        self.norm2 = nn.BatchNorm2d(2 * width) if norm else nn.Identity()
        self.fc = nn.Linear(2 * width, 10)

    def forward(self, x):
        x = torch.relu(self.norm1(self.conv1(x)))
        x = torch.relu(self.norm2(self.conv2(x)))
        return self.fc(x.mean((2, 3)))


def number(x=1):
    return x


class Branching(Small):
    def forward(self, x):
        return super().forward(x if x.sum() > 0 else -x)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """nets.py and digits.npz, real digits in four parts."""
    out = tmp_path_factory.mktemp("own")
    (out / "nets.py").write_text(NETS)
    digits = load_digits()
    x, y = (digits.images * 15).astype(np.uint8), digits.target
    order = np.random.default_rng(0).permutation(len(x))
    ends = dict(train=(0, 900), fitness=(900, 1100), val=(1100, 1300), test=(1300, 1797))
    arrays = {}
    for part, (a, b) in ends.items():
        arrays |= {f"x_{part}": x[order[a:b]], f"y_{part}": y[order[a:b]]}
    np.savez(out / "digits.npz", **arrays)
    np.savez(out / "unlabelled.npz", **{k: v for k, v in arrays.items() if k.startswith("x_")})
    np.savez(out / "no_fitness.npz", **{k: v for k, v in arrays.items() if not k.endswith("fitness")})
    return out


@pytest.fixture(autouse=True)
def there(folder, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))


def content(**changes):
    """Of a configuration that takes about a second."""
    out = {
        "data": "digits.npz",
        "model": {"name": "nets:Small"},
        "train": {"epochs": 3, "batch_size": 50},
        "budget": {"macs": 0.5},
        "fitness": {"images": 100, "calibration_images": 60, "calibration_batch": 30},
        "algorithm": {"name": "ecs", "population": 6, "generations": 3, "args": {"density": "random"}},
        "finetune": {"epochs": 2, "kd": 0.5},
        "export": {"onnx": False, "int8": False},
    }
    for key, value in changes.items():
        out[key] = {**out[key], **value} if isinstance(out.get(key), dict) and isinstance(value, dict) else value
    return out


def config(**changes):
    return load_config(content(**changes))


def same(a, b, path=""):
    """Records, but for what is measured."""
    measured = ("seconds", "latency_ms", "peak_memory_mb", "threads")
    if isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a:
            if key not in measured:
                same(a[key], b[key], f"{path}.{key}")
    elif isinstance(a, list):
        assert len(a) == len(b), path
        for k, (x, y) in enumerate(zip(a, b, strict=True)):
            same(x, y, f"{path}[{k}]")
    else:
        assert a == b, path


# --- the whole path --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def unbroken(folder, tmp_path_factory):
    """A run, its folder, and what it told."""
    torch.set_num_threads(1)
    before = os.getcwd()
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    out, told = tmp_path_factory.mktemp("unbroken"), []
    record = compress(config(export={"onnx": True, "int8": True}), 0, out, progress=lambda *a: told.append(a))
    sys.path.remove(str(folder))
    os.chdir(before)
    return out, record, told


def test_a_run(unbroken):
    out, record, told = unbroken
    assert record == json.loads((out / "result.json").read_text())
    assert record["kind"] == "compress" and record["score"] == "accuracy"
    dense, small = record["dense"], record["compact"]
    assert small["macs"] <= 0.5 * dense["macs"] and small["parameters"] < dense["parameters"]
    assert dense["test"] > 60, "the network did not learn"
    assert list(small["stages"]) == ["masked", "recalibrated", "finetuned"]
    assert small["test"] == small["stages"]["finetuned"]["test"] > 40
    assert len(small["history"]) == 2 and len(dense["history"]) == 3
    assert [layer["size"] for layer in record["layers"]] == [8, 16]
    search = record["search"]
    assert search["evaluations"] == len(search["individuals"]["id"]) <= 18
    assert search["chosen"] in search["individuals"]["id"]
    assert len(search["history"]) == 3 and len(search["l1"]["density"]) == 16
    assert search["full_cost"] == dense["macs"] and 0.6 < search["full_quality"] <= 1
    assert {what for what, *_ in told} == {"training the full network", "search, ecs", "fine-tuning"}
    assert sorted(p.name for p in out.iterdir() if p.is_file()) == [
        "model-int8.onnx",
        "model.onnx",
        "result.json",
        "weights.safetensors",
    ]


def test_the_files_are_the_network(unbroken):
    import onnxruntime

    from fastkd import data

    out, record, _ = unbroken
    x, y = data.load_images("digits.npz").part("test")
    import nets

    def build(name, args):
        assert name == "nets:Small"
        return nets.Small(**args)

    small = load(out / "weights.safetensors", build).eval()
    layers = [small.conv1.out_channels, small.conv2.out_channels]
    assert layers == [layer["kept"] for layer in record["layers"]]
    with torch.no_grad():
        logits = small(x)
    assert 100 * float((logits.argmax(1) == y).double().mean()) == pytest.approx(record["compact"]["test"])
    session = onnxruntime.InferenceSession(str(out / "model.onnx"), providers=["CPUExecutionProvider"])
    torch.testing.assert_close(
        torch.from_numpy(session.run(None, {"images": x.numpy()})[0]), logits, rtol=1e-3, atol=1e-3
    )
    assert record["int8"]["test"] > record["compact"]["test"] - 10
    assert record["onnx"]["bytes"] == (out / "model.onnx").stat().st_size


def test_a_finished_run_is_returned(unbroken, tmp_path):
    out, record, _ = unbroken
    changed = config(export={"onnx": True, "int8": True})
    assert compress(changed, 0, out) == record
    with pytest.raises(CheckpointError, match=r"budget\.macs is 0\.5 there and 0\.4 here"):
        compress(config(export={"onnx": True, "int8": True}, budget={"macs": 0.4}), 0, out)


def test_shared_between_runs(tmp_path, monkeypatch):
    """The same full network and the same search are not made twice."""
    first = compress(config(finetune={"epochs": 0}), 0, tmp_path / "a", shared=tmp_path)
    trained = []
    monkeypatch.setattr(searching, "evolve", lambda *_: pytest.fail("searched again"))
    monkeypatch.setattr(run, "fit", lambda model, data, parts, *a, **k: trained.append(parts) or [])
    second = compress(config(finetune={"epochs": 1}), 0, tmp_path / "b", shared=tmp_path)
    assert trained == [["train", "fitness"]]
    same(first["search"], second["search"])
    assert first["dense"]["test"] == second["dense"]["test"]


def test_recalibration_is_the_evaluators(folder):
    """What the search saw is what is taken: the compact network with the same statistics."""
    from fastkd import PopulationEvaluator, compact, data

    torch.manual_seed(0)
    images = data.load_images("digits.npz")
    model = run.build(config().model).eval()
    x = images.part("train", 100)[0]
    evaluator = PopulationEvaluator(model, x[:1], bn="recalibrate")
    evaluator.calibrate(list(train.pieces(x, 33)))
    assert [len(p) for p in train.pieces(x, 33)] == [33, 33, 33]  # one image alone has no statistics
    mask = evaluator.space.random(1, 0.5, torch.Generator().manual_seed(0))
    small = compact(model, mask[0], evaluator.space)
    train.recalibrate(small, train.pieces(x, 33))
    with torch.no_grad():
        expected = small(x)
    torch.testing.assert_close(evaluator.logits(mask, x)[0], expected, rtol=1e-4, atol=1e-4)


def test_agreement_without_labels(tmp_path):
    torch.manual_seed(0)
    model = run.build(config().model)
    save_file(model.state_dict(), tmp_path / "own.safetensors")
    own = config(
        data="unlabelled.npz",
        weights=str(tmp_path / "own.safetensors"),
        fitness={"quality": "agreement"},
        finetune={"epochs": 1, "kd": 1.0},
    )
    record = compress(own, 0, tmp_path / "run")
    assert record["score"] == "agreement" and record["dense"]["test"] == 100
    assert record["dense"]["seconds"] == 0 and record["compact"]["test"] < 100
    for wrong, told in (
        (dict(fitness={"quality": "accuracy"}), "fitness.quality = 'accuracy' needs labels"),
        (dict(finetune={"kd": 0.0}), "has no labels"),
        (dict(weights=None), "has no labels"),
    ):
        changed = {
            **own.model_dump(),
            **{k: {**own.model_dump()[k], **v} if isinstance(v, dict) else v for k, v in wrong.items()},
        }
        changed["train"]["epochs"] = 1
        with pytest.raises(ConfigError, match=told):
            compress(load_config(changed), 0, tmp_path / told[:5])


def test_measured_latency_as_the_cost(tmp_path, monkeypatch):
    real, taken = searching.latency, []

    def latency(model, example):
        taken.append(tuple(example.shape))
        return real(model, example, repeats=2)

    monkeypatch.setattr(searching, "latency", latency)
    record = compress(config(fitness={"cost": "latency", "weight": 0.1}, finetune={"epochs": 0}), 0, tmp_path)
    search = record["search"]
    assert set(taken) == {(1, 1, 8, 8)} and search["cost"] == "latency"
    for costs in (search["individuals"]["cost"], search["front"]["cost"], search["l1"]["cost"], [search["full_cost"]]):
        assert costs and all(0 < ms < 1000 for ms in costs)
    assert report.write(tmp_path).exists()


@pytest.mark.parametrize("device", ["cuda"])
def test_on_a_gpu(tmp_path, device):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    record = compress(config(), 0, tmp_path, device=device)
    assert record["compact"]["test"] > 40


# --- controls --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", controls.CONTROLS)
@pytest.mark.parametrize("network", ["lenet", "resnet20"])
def test_controls_keep_to_the_budget(name, network):
    torch.manual_seed(0)
    model = models.build_cnn(network).eval()
    example = torch.zeros(1, 1, 28, 28) if network == "lenet" else torch.zeros(1, 3, 32, 32)
    space = trace(model, example)
    limits = Limits(space, {"macs": 0.6}, k_min=2)
    mask = controls.control(name, model, example, limits)
    assert mask.dtype == torch.bool and mask.shape == (space.num_genes,)
    share = float(space.macs(mask[None])) / limits.full["macs"]
    assert 0.54 < share <= 0.6
    assert bool((limits.counts(mask[None]) >= 2).all())


def test_uniform_l1_keeps_the_largest_filters():
    torch.manual_seed(0)
    model = models.build_cnn("lenet").eval()
    space = trace(model, torch.zeros(1, 1, 28, 28))
    mask = controls.control("l1", model, torch.zeros(1, 1, 28, 28), Limits(space, {"macs": 0.5}))
    for group in space.groups:
        own, l1 = mask[group.start : group.start + group.size], space.l1[group.start : group.start + group.size]
        assert l1[own].min() >= l1[~own].max()


@pytest.mark.parametrize("ratio", [0.2, 0.5, 0.7])
def test_global_norm_ranks_as_torch_pruning_does(ratio):
    torch.manual_seed(0)
    model, example = models.build_cnn("lenet").eval(), torch.zeros(1, 1, 28, 28)
    space = trace(model, example)
    assert torch.equal(global_norm(space, 1 - ratio)[0], controls._depgraph(model, example, space, ratio))


def test_a_start_from_norms(tmp_path):
    """The search begins with the largest norms that hold the budget, and ends no worse."""
    own = dict(population=16, generations=1, start_norm=True)
    for start_l1 in (False, True):
        r = compress(config(algorithm={**own, "start_l1": start_l1}), 0, tmp_path / str(start_l1), shared=tmp_path)
        seen = dict(zip(*(r["search"]["individuals"][k] for k in ("id", "quality")), strict=True))
        model = run.build(config().model).eval()
        model.load_state_dict(load_file(next(tmp_path.glob("dense-*/weights.safetensors"))))
        space = trace(model, torch.zeros(1, 1, 8, 8))
        limits = Limits(space, {"macs": 0.5})
        for power in searching.COUPLED:
            ladder = partial(global_norm, space, coupled=power)
            density = max(k / 256 for k in range(257) if limits.within(limits.counts(ladder(k / 256))))
            mask = limits.repair(ladder(density))[0]
            assert mask_id(mask) in seen and r["search"]["history"][0]["quality"] >= seen[mask_id(mask)]
    masks = searching._of_norm(limits, 7)
    assert len(masks) == 7 == len(masks.unique(dim=0)) and bool(limits.within(limits.counts(masks)).all())
    assert int(masks[-1].sum()) < int(masks[0].sum()), "none below the budget"


def test_a_front_on_test_images(tmp_path):
    """Is that of the networks themselves: the share of right classes."""
    r = compress(
        config(fitness={"images": 170}, algorithm={"name": "nsga2", "population": 8}, finetune={"epochs": 0}),
        0,
        tmp_path,
    )
    search = r["search"]
    front = search["front"]
    assert 1 <= len(front["test"]) == len(front["mask"]) and len(search["l1"]["test"]) == 16
    assert search["l1"]["test"][-1] == pytest.approx(r["dense"]["test"] / 100, abs=0.03)  # its own statistics
    at = front["id"].index(search["chosen"])
    assert front["test"][at] == pytest.approx(r["compact"]["stages"]["recalibrated"]["test"] / 100, abs=0.003)
    best, volume = 0.0, 0.0
    for x in np.arange(0.0005, 1, 0.001):  # of MACs; for each the best that is no dearer
        best = max(
            [q for q, c in zip(front["test"], front["cost"], strict=True) if c <= x * search["full_cost"]], default=0.0
        )
        volume += best * 0.001
    found = tables._volume(CompressRecord.model_validate(r).search)
    assert found == pytest.approx(100 * volume, abs=0.2) and volume > 0.2


def test_depgraph_removes_what_torch_pruning_removes():
    """The mask is that package's own network."""
    import torch_pruning as tp

    torch.manual_seed(0)
    model, example = models.build_cnn("lenet").eval(), torch.zeros(1, 1, 28, 28)
    space = trace(model, example)
    mask = controls._depgraph(model, example, space, 0.5)
    theirs = models.build_cnn("lenet").eval()
    theirs.load_state_dict(model.state_dict())
    pruner = tp.pruner.MetaPruner(
        theirs,
        example,
        importance=tp.importance.GroupMagnitudeImportance(p=2),
        global_pruning=True,
        pruning_ratio=0.5,
        ignored_layers=[theirs.fc2],
    )
    pruner.step()
    from fastkd import compact

    ours = compact(model, mask, space)
    assert [x.shape for x in ours.parameters()] == [x.shape for x in theirs.parameters()]
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b)


def test_depgraph_leaves_padded_shortcuts():
    model, example = models.build_cnn("resnet20").eval(), torch.zeros(1, 3, 32, 32)
    space = trace(model, example)
    mask = controls._depgraph(model, example, space, 0.5)
    fixed = set(controls._fixed(space))
    assert "linear" in fixed and "conv1" in fixed and "layer1.0.conv1" not in fixed
    for group in space.groups:
        if set(group.modules) & fixed:
            assert bool(mask[group.start : group.start + group.size].all()), group.name
    assert 0.3 < float(mask.double().mean()) < 0.9


@pytest.mark.parametrize("name", controls.CONTROLS)
def test_a_run_of_a_control(tmp_path, name):
    record = compress(config(algorithm={"name": name}, finetune={"epochs": 0}), 0, tmp_path)
    search = record["search"]
    assert search["algorithm"] == name and search["evaluations"] == 1 and search["history"] == []
    assert search["individuals"]["id"] == search["front"]["id"] == [search["chosen"]]
    assert record["compact"]["macs"] <= 0.5 * record["dense"]["macs"]
    assert "finetuned" not in record["compact"]["stages"]


def test_without_torch_pruning(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    model, example = models.build_cnn("lenet").eval(), torch.zeros(1, 1, 28, 28)
    with pytest.raises(ImportError, match="pip install torch-pruning"):
        controls.control("torch-pruning", model, example, Limits(trace(model, example), {"macs": 0.5}))


# --- ends in the middle ----------------------------------------------------------------------------------


class Killed(BaseException):
    """No error that anything catches."""


@pytest.mark.parametrize(
    "when",
    [
        ("training the full network", 1),
        ("training the full network", 3),
        ("search, ecs", 1),
        ("search, ecs", 3),
        ("fine-tuning", 1),
        ("fine-tuning", 2),
    ],
)
def test_resumed_is_the_unbroken_run(folder, tmp_path, when, whole):
    def killed(what, done, *_):
        if (what, done) == when:
            raise Killed

    with pytest.raises(Killed):
        compress(config(), 0, tmp_path, progress=killed)
    assert not (tmp_path / "result.json").exists()
    same(compress(config(), 0, tmp_path), whole[0])
    theirs, ours = whole[1], load_file(tmp_path / "weights.safetensors")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.fixture(scope="module")
def whole(unbroken, folder, tmp_path_factory):
    before = os.getcwd()
    os.chdir(folder)
    out = tmp_path_factory.mktemp("whole")
    record = compress(config(), 0, out)
    os.chdir(before)
    return record, load_file(out / "weights.safetensors")


def test_killed_by_the_system(folder, tmp_path, whole):
    """SIGKILL at several moments; the same command goes on."""
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(content()))
    command = [sys.executable, "-m", "fastkd", "compress", str(tmp_path / "own.yaml"), "--out", str(tmp_path / "run")]
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(p for p in (str(folder), os.environ.get("PYTHONPATH")) if p),
        "OMP_NUM_THREADS": "1",
    }
    moments = ("search-*/checkpoint.safetensors", "seed0/finetuning.safetensors")
    for moment in moments:
        process = subprocess.Popen(command, cwd=folder, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and not list((tmp_path / "run").glob(moment)):
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.wait()
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    same(json.loads((tmp_path / "run" / "seed0" / "result.json").read_text()), whole[0])


@pytest.mark.parametrize("what", ["training the full network", "search, ecs", "fine-tuning"])
def test_ctrl_c(tmp_path, what):
    def interrupt(now, done, *_):
        if now == what and done == 1:
            os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(Stopped, match="the same command goes on from there"):
            compress(config(), 0, tmp_path, progress=interrupt)
    finally:
        signal.signal(signal.SIGINT, before)
    assert compress(config(), 0, tmp_path)["compact"]["macs"] > 0


@pytest.mark.parametrize(
    "name", ["training.safetensors", "checkpoint.safetensors", "finetuning.safetensors", "result.json"]
)
def test_a_full_disk(tmp_path, monkeypatch, name, whole):
    real = atomic.replace

    def full(path, write):
        if path.name == name and (name == "result.json" or path.exists()):  # the second checkpoint
            raise OSError(28, "No space left on device")
        real(path, write)

    monkeypatch.setattr(atomic, "replace", full)
    with pytest.raises(CheckpointError, match="No space left"):
        compress(config(), 0, tmp_path)
    monkeypatch.setattr(atomic, "replace", real)
    same(compress(config(), 0, tmp_path), whole[0])


def test_a_damaged_checkpoint_of_training(tmp_path):
    def killed(what, done, *_):
        if done == 2:
            raise Killed

    with pytest.raises(Killed):
        compress(config(), 0, tmp_path, progress=killed)
    [file] = tmp_path.glob("dense-*/training.safetensors")
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="is no whole safetensors file"):
        compress(config(), 0, tmp_path)


def test_a_loss_that_is_not_finite(tmp_path):
    with pytest.raises(FloatingPointError, match=r"the loss of epoch 0 is (nan|inf): lr = 1e\+20 may be too large"):
        compress(config(train={"lr": 1e20}), 0, tmp_path)


# --- wrong input -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "error", "told"),
    [
        (dict(budget={"macs": 0.0001}), ValueError, r"can be met by no mask.*the least possible is"),
        (dict(budget={"flops": 0.5}), ValueError, "budget must be of filters, parameters, macs, got 'flops'"),
        (
            dict(algorithm={"name": "nsga"}),
            ConfigError,
            "must be one of ecs, ga, ga-widths, nsga2, nsga2-widths, random, random-widths, l1, torch-pruning, got "
            r"'nsga' \(did you mean 'nsga2'\?\)",
        ),
        (dict(algorithm={"args": {"denisty": 1}}), ConfigError, "algorithm.args = .*denisty"),
        (
            dict(export={"int8": True, "calibration_images": 901}),
            ConfigError,
            "export.calibration_images = 901: .*'train' has 900 images, but 901 are asked for",
        ),
        (dict(algorithm={"name": "l1"}, budget=None), ConfigError, "'l1' needs a budget"),
        (dict(model={"name": "lenett"}), ConfigError, r"did you mean 'lenet'\?\); your own is module:function"),
        (dict(model={"name": "nets:Big"}), ConfigError, "'nets:Big' cannot be imported"),
        (dict(model={"name": "nowhere:Small"}), ConfigError, "cannot be imported: No module named 'nowhere'"),
        (dict(model={"name": "nets:number"}), ConfigError, "must return a torch.nn.Module, got int"),
        (dict(model={"args": {"depth": 1}}), ConfigError, "nets:Small says: .*depth"),
        (dict(model={"name": "nets:Branching"}), ValueError, "nets.py"),
        (dict(model={"name": "lenet"}), ValueError, r"example_input of shape \[1, 1, 8, 8\] does not fit: conv2 fails"),
        (dict(train={"epochs": 0}), ConfigError, "weights = None and train.epochs = 0"),
        (dict(weights="cifar10_resnet2"), FileNotFoundError, "no cifar10_resnet2.npz or .safetensors in .*--weights"),
        (dict(weights="gone.safetensors"), FileNotFoundError, "no weights file gone.safetensors"),
        (dict(data="no_fitness.npz"), ValueError, "no fitness split"),
        (dict(data="mnsit"), ValueError, r"did you mean 'mnist'\?"),
        (dict(fitness={"images": 201}), ValueError, "fitness. has 200 images, but 201 are asked for"),
        (dict(fitness={"calibration_images": 901}), ValueError, "train. has 900 images, but 901"),
        (dict(fitness={"quality": "beauty"}), ValueError, "quality must be one of accuracy"),
    ],
)
def test_wrong_configurations(tmp_path, changes, error, told):
    wrong = content(**{k: v for k, v in changes.items() if v is not None})
    for key in [k for k, v in changes.items() if v is None]:
        wrong.pop(key)
    if changes.get("budget"):
        wrong["budget"] = changes["budget"]
    with pytest.raises(error, match=told):
        compress(load_config(wrong), 0, tmp_path)
    assert not (tmp_path / "result.json").exists()


def test_weights_that_do_not_fit(tmp_path):
    state = run.build(config().model).state_dict()
    state["conv1.weight"] = torch.zeros(8, 1, 5, 5)
    state["other"] = state.pop("fc.bias")
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(
        ValueError,
        match=r"unknown: other; missing: fc\.bias; conv1\.weight is \[8, 1, 5, 5\] in "
        r"the file and \[8, 1, 3, 3\]",
    ):
        compress(config(weights=str(tmp_path / "w.safetensors")), 0, tmp_path)


def test_a_fitness_that_is_nan(tmp_path, monkeypatch):
    from fastkd.evolve import FitnessError

    real, calls = Fitness.measure, []

    def measure(self, evaluator, limits, masks):
        out = real(self, evaluator, limits, masks)
        calls.append(len(masks))
        if len(calls) == 2:
            out[0, 0] = float("nan")
        return out

    monkeypatch.setattr(Fitness, "measure", measure)
    with pytest.raises(
        FitnessError,
        match=r"individual \d+ of generation 3 \(mask .*checkpoint of generation 2 is "
        "whole",
    ):
        compress(config(), 0, tmp_path)
    monkeypatch.setattr(Fitness, "measure", real)
    assert compress(config(), 0, tmp_path)["search"]["evaluations"] > 6


def test_a_changed_configuration_under_a_checkpoint(tmp_path):
    """Searches of other configurations have folders of their own; fine-tuning has the run's."""

    def killed(what, done, *_):
        if what == "fine-tuning":
            raise Killed

    with pytest.raises(Killed):
        compress(config(), 0, tmp_path, progress=killed)
    with pytest.raises(CheckpointError, match=r"train\.lr is 0\.05 there and 0\.5 here"):
        compress(config(finetune={"lr": 0.5}), 0, tmp_path)


def test_recipes():
    assert {
        "digits",
        "lenet-mnist",
        "resnet20-cifar10",
        "resnet56-cifar10",
        "vgg16-cifar10",
        "mobilenet-imagenet",
    } <= set(recipes())
    for name in recipes():
        own = load_config(name)
        assert own.model.name in models.CNNS
        model = run.build(own.model).eval()
        shape = {"digits": (1, 28, 28), "mnist": (1, 28, 28), "cifar10": (3, 32, 32)}.get(own.data, (3, 224, 224))
        Limits(trace(model, torch.zeros(1, *shape)), own.budget, own.k_min)  # some mask meets it


# --- training --------------------------------------------------------------------------------------------


def test_augmentation():
    images = torch.arange(1, 2 * 16 * 16 + 1).remainder(251).add(1).to(torch.uint8).reshape(2, 1, 16, 16)
    images = images.repeat(40, 1, 1, 1)
    out = train._augmented(images, torch.Generator().manual_seed(0))
    assert out.shape == images.shape and out.dtype == torch.uint8
    seen = set()
    for x, y in zip(images, out, strict=True):
        padded = nn.functional.pad(x, (2, 2, 2, 2))
        found = [
            (i, j, flip)
            for i in range(5)
            for j in range(5)
            for flip in (False, True)
            if torch.equal(padded[:, i : i + 16, j : j + 16].flip(2) if flip else padded[:, i : i + 16, j : j + 16], y)
        ]
        assert len(found) == 1
        seen.add(found[0])
    assert len(seen) > 25


def test_cosine_ends_at_zero():
    own = config().train
    assert train._rate(own, 0, 10) == own.lr and train._rate(own, 10, 10) == pytest.approx(0)
    assert train._rate(own.model_copy(update={"schedule": "constant"}), 10, 10) == own.lr


@pytest.mark.parametrize(
    "changes",
    [{"optimizer": "sgd"}, {"optimizer": "adam"}, {"precision": "bfloat16"}, {"channels_last": True}],
    ids=lambda changes: "-".join(map(str, *changes.items())),
)
def test_training_resumes(tmp_path, changes):
    from fastkd import data

    images, own = data.load_images("digits.npz"), config(train={**changes, "lr": 0.01}).train

    def trained(file, until=None):
        def told(epoch, _):
            if epoch == until:
                raise Killed

        torch.manual_seed(0)
        model = run.build(config().model)
        try:
            history = train.fit(model, images, ["train"], own, 0, file, lambda m: 0.0, progress=told)
        except Killed:
            return trained(file)
        return history, model.state_dict()

    a, b = trained(tmp_path / "a"), trained(tmp_path / "b", 2)
    assert a[0] == b[0] and all(torch.equal(a[1][k], b[1][k]) for k in a[1])


def test_precision_of_training(tmp_path):
    """Convolutions of both networks in it; weights, losses and scores in float32."""
    from fastkd import data

    images, losses = data.load_images("digits.npz"), {}
    for precision in ("float32", "bfloat16"):
        own = config(finetune={"precision": precision, "kd": 1.0, "epochs": 2}).finetune
        torch.manual_seed(0)
        student, teacher = run.build(config().model), run.build(config().model).eval()
        seen: dict = {True: set(), False: set()}
        for net in (student, teacher):
            net.conv2.register_forward_hook(lambda m, _, out, net=net: seen[net.training].add(out.dtype))
        history = train.fit(
            student,
            images,
            ["train"],
            own,
            0,
            tmp_path / precision,
            lambda m: train.accuracy(train.predictions(m, images.part("val")[0]), images.labels["val"]),
            teacher=teacher,
        )
        assert seen[True] == {getattr(torch, precision)}
        assert seen[False] == {torch.float32} | seen[True]  # the teacher, and what is scored
        assert all(p.dtype == torch.float32 for p in student.state_dict().values() if p.is_floating_point())
        losses[precision] = [h["loss"] for h in history]
    assert losses["bfloat16"] != losses["float32"] and losses["bfloat16"] == pytest.approx(losses["float32"], rel=0.02)


def test_memory_order_of_training(tmp_path):
    """Of images and weights, while it lasts; what comes out differs by rounding alone."""
    from fastkd import data

    images, losses = data.load_images("digits.npz"), {}
    for last in (False, True):
        own = config(finetune={"channels_last": last, "kd": 1.0, "epochs": 2}).finetune
        torch.manual_seed(0)
        student, teacher = run.build(config().model), run.build(config().model).eval()
        seen: set = set()  # an image of one channel has both orders
        for net in (student, teacher):
            net.conv2.register_forward_hook(
                lambda m, x, out, last=last: seen.update(
                    t.is_contiguous(memory_format=torch.channels_last)
                    for t in ((*x, m.weight, out) if last else [m.weight])
                )
            )
        history = train.fit(student, images, ["train"], own, 0, tmp_path / str(last), lambda m: 0.0, teacher=teacher)
        assert seen == {last}
        assert all(w.is_contiguous() for net in (student, teacher) for w in net.state_dict().values())
        losses[last] = [h["loss"] for h in history]
    assert losses[True] == pytest.approx(losses[False], rel=1e-4)


# --- plans -----------------------------------------------------------------------------------------------


def plan_of(folder, **rows):
    (folder / "own.yaml").write_text(yaml.safe_dump(content(finetune={"epochs": 0})))
    experiment = {
        "title": "Small",
        "compress": "own.yaml",
        "seeds": 1,
        "note": "A note.",
        "rows": {"ECS": {}, **rows, "fine-tuned": {"finetune": {"epochs": 1}}},
    }
    (folder / "plan.yaml").write_text(yaml.safe_dump({"experiments": {"small": experiment}}, sort_keys=False))
    return grid.Plan(folder / "plan.yaml")


def test_a_plan(tmp_path, monkeypatch):
    plan = plan_of(tmp_path, l1={"algorithm": {"name": "l1"}})
    real, trained = run.fit, []
    monkeypatch.setattr(
        run, "fit", lambda model, data, parts, *a, **k: trained.append(parts) or real(model, data, parts, *a, **k)
    )
    assert grid.run(plan, tmp_path / "work", limit=2) == 2
    table = (tmp_path / "RESULTS.md").read_text()
    assert "## Small" in table and "A note." in table and "| fine-tuned | not yet run | | | 0 of 1" in table
    told = []
    assert grid.run(plan, tmp_path / "work", lambda cell, *a: told.append((cell.row, *a[:3]))) == 1
    assert trained == [["train"], ["train", "fitness"]], "the full network was trained more than once"
    assert told == [("fine-tuned", "fine-tuning", 1, 1)], "searched more than once"
    file = tmp_path / "cells/small.jsonl"
    records = {record.pop("row"): record for record in map(json.loads, file.read_text().splitlines())}
    assert list(records) == ["ECS", "l1", "fine-tuned"]
    assert records["ECS"]["search"]["mask"] == records["fine-tuned"]["search"]["mask"]
    lines = {
        cells[1].strip(): [c.strip() for c in cells[2:-1]]
        for line in (tmp_path / "RESULTS.md").read_text().splitlines()
        if len(cells := line.split("|")) > 3
    }
    assert lines[""][:2] == ["test recalibrated, %", "test fine-tuned, %"]
    assert lines["full network"][0] == f"{records['ECS']['dense']['test']:.2f}"
    for row, record in records.items():
        small, dense = record["compact"], record["dense"]
        assert lines[row][:2] == [f"{small['stages']['recalibrated']['test']:.2f}", f"{small['test']:.2f}"]
        assert lines[row][5:7] == [f"{100 * small[k] / dense[k]:.1f}" for k in ("macs", "parameters")]
        own = record["search"]["individuals"]
        chosen = own["quality"][own["id"].index(record["search"]["chosen"])]
        assert lines[row][2] == f"{100 * chosen:.2f}"
    assert lines["l1"][8] == "1" and int(lines["ECS"][8]) > 6
    assert grid.run(plan, tmp_path / "work") == 0

    told = []
    spoiled = json.loads(json.dumps(records["l1"]))
    for network in ("dense", "compact"):
        spoiled[network] |= {"latency_ms": {"1": 0.0, "64": 0.0}, "macs": -1}
    rows = {**records, "l1": spoiled}
    file.write_text("".join(json.dumps({"row": row, **record}) + "\n" for row, record in rows.items()))
    assert grid.measure(plan, lambda *done: told.append(done)) == 3 and told == [(1, 3), (2, 3), (3, 3)]
    again = {record.pop("row"): record for record in map(json.loads, file.read_text().splitlines())}["l1"]
    assert again.pop("measured").keys() == again["environment"].keys() - {"processes"}
    same(again, records["l1"])
    assert all(ms > 0 for network in ("dense", "compact") for ms in again[network]["latency_ms"].values())
    out = CliRunner().invoke(cli.app, ["grid", str(tmp_path / "plan.yaml"), "--measure", "--only", "smal"])
    assert out.exit_code == 2 and "no experiment 'smal': there are small" in out.output


def test_wrong_plans(tmp_path):
    with pytest.raises(ConfigError, match=r"plan.yaml: small, row 'l1': unknown key 'algorithm.nam'"):
        plan_of(tmp_path, l1={"algorithm": {"nam": "l1"}})
    for changes, told in (
        ({"compress": "digits", "recipe": "digits"}, "got both"),
        ({}, "got neither"),
        ({"compress": "digtis"}, "did you mean 'digits'"),
    ):
        (tmp_path / "plan.yaml").write_text(yaml.safe_dump({"experiments": {"a": {**changes, "rows": {"b": {}}}}}))
        with pytest.raises(ConfigError, match=told):
            grid.Plan(tmp_path / "plan.yaml")


# --- the command -----------------------------------------------------------------------------------------


def test_the_command(folder, tmp_path):
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(content(export={"onnx": True, "int8": True})))
    out = CliRunner().invoke(
        cli.app,
        [
            "compress",
            str(tmp_path / "own.yaml"),
            "--out",
            str(tmp_path / "run"),
            "--budget",
            "macs=0.4",
            "--algorithm",
            "random",
            "--seeds",
            "2",
            "--tensorboard",
        ],
    )
    assert out.exit_code == 0, out.output
    for word in ("full", "smaller", "recalibrated", "fine-tuned", "int8", "random", "40.0% of the macs"):
        assert word in out.output
    for seed in range(2):
        record = json.loads((tmp_path / "run" / f"seed{seed}" / "result.json").read_text())
        assert record["seed"] == seed and record["search"]["algorithm"] == "random"
        assert record["config"]["budget"] == {"macs": 0.4}
    assert list((tmp_path / "run" / "seed0" / "tensorboard").rglob("events*"))
    assert list((tmp_path / "run" / "tensorboard").rglob("events*"))
    other = CliRunner().invoke(
        cli.app,
        [
            "compress",
            str(tmp_path / "own.yaml"),
            "--out",
            str(tmp_path / "run"),
            "--algorithm",
            "random",
            "--budget",
            "macs=0.3",
        ],
    )
    assert other.exit_code == 2 and "budget.macs is 0.4 there and 0.3 here" in other.stderr
    assert json.loads((tmp_path / "run" / "config.json").read_text())["budget"] == {"macs": 0.4}
    again = CliRunner().invoke(
        cli.app, ["compress", str(tmp_path / "own.yaml"), "--resume", str(tmp_path / "run"), "--seeds", "2"]
    )
    assert again.exit_code == 0 and "int8" in again.output


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["digtis"], "did you mean 'digits'?"),
        (["digits", "--budget", "macs"], "KEY=VALUE"),
        (["digits", "--budget", "macs=2"], "must be in (0, 1]"),
        (["digits", "--algorithm", "ec"], "did you mean 'ecs'?"),
        (["digits", "--resume", "nowhere"], "holds no run"),
        (["digits", "--set", "finetune.epoch=1"], "did you mean 'epochs'?"),
    ],
)
def test_wrong_commands(tmp_path, arguments, told, monkeypatch):
    monkeypatch.chdir(tmp_path)
    out = CliRunner().invoke(cli.app, ["compress", *arguments])
    assert out.exit_code == 2 and told in out.output, out.output


# --- several processes -----------------------------------------------------------------------------------


def test_several_ranks(folder, tmp_path, whole, size=2):
    """The search of two and three is compared in test_evolve."""
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(content()))
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(p for p in (str(folder), os.environ.get("PYTHONPATH")) if p),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nproc-per-node",
            str(size),
            "--standalone",
            "-m",
            "fastkd",
            "compress",
            str(tmp_path / "own.yaml"),
            "--out",
            str(tmp_path / "run"),
        ],
        cwd=folder,
        env=env,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "run" / "seed0" / "result.json").read_text())
    assert record["environment"].pop("processes") == size
    expected = json.loads(json.dumps(whole[0]))
    assert expected["environment"].pop("processes") == 1
    same(record, expected)
