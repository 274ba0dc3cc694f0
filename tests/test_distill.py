"""The Distiller, its configuration, checkpoints and grid."""

import copy
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from torch import nn

import fastkd
from fastkd import data, models
from fastkd.distill import (
    CheckpointError,
    ConfigError,
    Distiller,
    LossConfig,
    Stopped,
    Taps,
    TrainConfig,
    checkpoint,
    grid,
    load_config,
    runs,
)
from fastkd.distill import batches as batching
from fastkd.distill.config import merged, recipes

LSP = LossConfig(weight=10, student_layer="layers.0", teacher_layer="layers.0",
                 args={"kernel": "rbf", "kernel_args": {"sigma": 1.0, "scale": "mean"}})


@pytest.fixture(scope="module")
def task():
    return data.load("digits")


def gcn(task, hidden, seed=0):
    torch.manual_seed(seed)
    return models.build("gcn", task.num_features, task.num_classes, hidden=hidden)


def distiller(task, directory=None, epochs=6, losses=None, **options):
    options = {"save_every": 0, **options}
    return Distiller(gcn(task, 8), gcn(task, 16, 1), task, losses={"lsp": LSP} if losses is None else losses,
                     train=TrainConfig(epochs=epochs, **options), directory=directory)


def weights(model):
    return {k: v.clone() for k, v in model.state_dict().items()}


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


# --- configuration ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", recipes())
def test_every_recipe_is_valid(name):
    config = load_config(name)
    assert config.losses["lsp"].student_layer


def test_override():
    config = load_config("digits", ["losses.lsp.weight=7", "student.train.epochs=3", "losses.kd.weight=1e-1"])
    assert config.losses["lsp"].weight == 7 and config.student.train.epochs == 3
    assert config.losses["kd"].weight == 0.1


@pytest.mark.parametrize("override, told", [
    ("losses.lsp.wieght=1", ["losses.lsp.wieght", "did you mean 'weight'", "student_layer"]),
    ("student.train.epoch=1", ["student.train.epoch", "did you mean 'epochs'", "weight_decay"]),
    ("studnet.model.name=gcn", ["studnet", "did you mean 'student'", "teacher"]),
    ("student.train.epochs=0", ["student.train.epochs = 0", "greater than or equal to 1"]),
    ("student.train.optimizer=lion", ["'lion'", "adamw"]),
    ("losses.lsp.weight", ["KEY=VALUE", "losses.lsp.weight"]),
    ("data.name=3", ["'data' is a value"]),
])
def test_a_wrong_override_lists_what_is_valid(override, told):
    with pytest.raises(ConfigError) as caught:
        load_config("digits", [override])
    for part in told:
        assert part in str(caught.value)


def test_unknown_recipe():
    with pytest.raises(ConfigError, match=r"digitz.*digits.*did you mean 'digits'"):
        load_config("digitz")


def test_a_file_that_is_no_configuration(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("- 1\n")
    with pytest.raises(ConfigError, match="must hold a mapping, got list"):
        load_config(path)
    path.write_text("a: [1\n")
    with pytest.raises(ConfigError, match="is not YAML"):
        load_config(path)


def test_merged():
    base = {"a": {"b": 1, "c": 2}, "d": 3}
    assert merged(base, {"a": {"b": None, "e": 4}}) == {"a": {"c": 2, "e": 4}, "d": 3}
    assert base == {"a": {"b": 1, "c": 2}, "d": 3}


# --- taps ---------------------------------------------------------------------------------------


def test_taps():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    taps = Taps(model, ["1"])
    assert str(taps) == "1: ReLU -> not called yet"
    with pytest.raises(RuntimeError, match="'1' of the model was not called"):
        taps["1"]
    x = torch.randn(5, 3)
    model(x)
    assert torch.equal(taps["1"], model[0](x).relu())
    assert taps["1"].requires_grad
    assert str(taps) == "1: ReLU -> [5, 4] float32"
    calls = []
    model[2].register_forward_hook(lambda *_: calls.append(1))
    taps.clear()
    with taps.stopping():
        model(-x)
    assert torch.equal(taps["1"], model[0](-x).relu()) and not calls
    model(x)
    assert calls == [1]
    twice = nn.Sequential(model[0], model[1], nn.Linear(4, 3), model[0])
    again = Taps(twice, ["0"])
    expected = twice(x)
    again.clear()
    with again.stopping():  # the last output counts
        twice(x)
    assert torch.equal(again["0"], expected)
    taps.remove()
    taps.clear()
    model(x)
    with pytest.raises(RuntimeError):
        taps["1"]


def test_a_wrong_layer_lists_the_layers(task):
    with pytest.raises(ValueError, match=r"student has no layer 'layer.0' \(did you mean 'layers.0'\?\).*layers.1"):
        distiller(task, losses={"lsp": LSP.model_copy(update={"student_layer": "layer.0"})})
    with pytest.raises(ValueError, match=r"losses.lsp.teacher_layer is missing.*layers.0"):
        distiller(task, losses={"lsp": LSP.model_copy(update={"teacher_layer": None})})
    with pytest.raises(ValueError, match="lspp"):
        distiller(task, losses={"lspp": LSP})
    with pytest.raises(ValueError, match="need a teacher"):
        Distiller(gcn(task, 8), None, task, losses={"lsp": LSP})


# --- training -----------------------------------------------------------------------------------


def test_the_loss_is_the_sum_of_its_terms(task):
    d = distiller(task, losses={"lsp": LSP, "kd": LossConfig(weight=2, args={"temperature": 3.0})})
    d.student.eval()
    batch = next(d._batches("train", False))
    total, terms = d.loss(batch, 0)
    x, adj = batch.inputs
    layer = {}
    for name, model in (("s", d.student), ("t", d.teacher)):
        handle = model.layers[0].register_forward_hook(lambda m, a, out, name=name: layer.__setitem__(name, out))
        layer[name + "logits"] = model(x, adj)
        handle.remove()
    kernel = fastkd.kernels.RBF(sigma=1.0, scale="mean")
    lsp = fastkd.reference.lsp_loss(layer["s"].double(), layer["t"].double(), batch.graph, kernel=kernel)
    t = layer["tlogits"] / 3
    kd = 9 * nn.functional.kl_div((layer["slogits"] / 3).log_softmax(1), t.softmax(1), reduction="batchmean")
    mask = batch.masks["train"]
    ce = nn.functional.cross_entropy(layer["slogits"][mask], batch.y[mask])
    assert terms["lsp"].item() == pytest.approx(lsp.item(), rel=1e-4)
    assert terms["kd"].item() == pytest.approx(kd.item(), rel=1e-4)
    assert terms["task"].item() == pytest.approx(ce.item(), rel=1e-5)
    assert total.item() == pytest.approx((ce + 10 * lsp + 2 * kd).item(), rel=1e-4)


def test_schedule(task):
    config = LSP.model_copy(update={"start": 2, "stop": 6, "ramp": 2})
    d = distiller(task, losses={"lsp": config})
    assert [d.weight("lsp", e) for e in range(7)] == [0, 0, 5, 10, 10, 10, 0]


def test_the_teacher_runs_once_on_a_static_graph(task):
    d = distiller(task)
    calls = []
    d.teacher.register_forward_hook(lambda *a: calls.append(1))
    before = weights(d.teacher)
    d.fit()
    assert len(calls) == 1
    assert_same(before, weights(d.teacher))


def test_learning(task):
    result = Distiller(gcn(task, 32), None, task, train=TrainConfig(epochs=40, eval_every=5)).fit()
    assert result.test > 90 and result.val > 90
    assert result.history[0]["loss"] > 5 * result.history[-1]["loss"]
    assert [h["epoch"] for h in result.history] == list(range(4, 40, 5))


def test_selection_sees_the_validation_part_alone(task):
    """Labels of the test part may be anything: the same weights are chosen."""
    graph = copy.copy(task.graphs["train"][0])
    graph.y = graph.y.clone()
    graph.y[graph.test_mask] = 0
    other = dataclasses.replace(task, graphs={part: [graph] for part in task.graphs})
    a, b = distiller(task, epochs=10), distiller(other, epochs=10)
    ra, rb = a.fit(), b.fit()
    assert (ra.val, ra.best_epoch) == (rb.val, rb.best_epoch) and ra.test != rb.test
    assert_same(a.best, b.best)


def test_patience(task):
    result = distiller(task, epochs=200, patience=3, lr=1e-9).fit()
    assert result.epochs == result.best_epoch + 4


def test_seed_rows_are_what_the_whole_graph_gives(task):
    """With all neighbours sampled, the first rows' loss is the whole graph's over these rows."""
    from torch_geometric.data import Data

    whole = task.graphs["train"][0]
    order = torch.randperm(whole.num_nodes, generator=torch.Generator().manual_seed(3))
    position = torch.empty_like(order)
    position[order] = torch.arange(len(order))
    part = Data(x=whole.x[order], y=whole.y[order], edge_index=position[whole.edge_index])
    part.batch_size, part.num_nodes = 100, whole.num_nodes
    batch = batching.of_neighbours(part, "train")
    assert (batch.graph.num_src, batch.graph.num_dst) == (whole.num_nodes, 100)
    d = distiller(task)
    d.student.eval()
    _, terms = d.loss(batch, 0)
    _, rows = d.loss(next(d._batches("train", False)), 0)
    layers = Taps(d.student, ["layers.0"]), Taps(d.teacher, ["layers.0"])
    d.student(whole.x, whole.adj_t)
    d.teacher(whole.x, whole.adj_t)
    each = fastkd.lsp_loss(layers[0]["layers.0"], layers[1]["layers.0"], whole.edge_index, reduction="none",
                           kernel=fastkd.kernels.RBF(sigma=1.0, scale="mean"))
    assert terms["lsp"].item() == pytest.approx(each[order[:100]].mean().item(), rel=1e-4)
    assert rows["lsp"].item() == pytest.approx(each.mean().item(), rel=1e-4)


def test_a_loss_that_is_no_number_is_an_error(task):
    d = distiller(task, epochs=3)
    with torch.no_grad():
        next(d.student.parameters()).fill_(float("nan"))
    with pytest.raises(FloatingPointError, match=r"epoch 0.*lower train.lr"):
        d.fit()


# --- checkpoints --------------------------------------------------------------------------------


def interrupted(task, directory, after, epochs=8, **options):
    """Runs until a signal comes in an epoch, then goes on in a new Distiller."""
    d = distiller(task, directory, epochs, **options)
    with pytest.raises(Stopped, match=f"epoch {after}"):
        d.fit(lambda epoch, latest: os.kill(os.getpid(), signal.SIGINT) if epoch == after else None)
    e = distiller(task, directory, epochs, **options)
    return e, e.fit()


@pytest.mark.parametrize("after", [1, 4, 7])
@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_resumed_is_bit_for_bit_the_unbroken_run(task, tmp_path, after, optimizer):
    options = {"optimizer": optimizer, "schedule": "cosine", "eval_every": 3}
    fit = LossConfig(weight=1, student_layer="layers.0", teacher_layer="layers.0")
    losses = {"lsp": LSP, "fitnet": fit}  # fitnet has weights of its own
    whole = distiller(task, tmp_path / "a", 8, losses, **options)
    result = whole.fit()
    other, again = interrupted(task, tmp_path / "b", after, losses=losses, **options)
    assert_same(weights(whole.student), weights(other.student))
    assert_same(weights(whole.losses), weights(other.losses))
    assert (result.test, result.val, result.best_epoch) == (again.test, again.val, again.best_epoch)
    drop = lambda history: [{k: v for k, v in h.items() if k != "seconds"} for h in history]
    assert drop(result.history) == drop(again.history)


def test_killed_at_any_moment(task, tmp_path):
    """SIGKILL in a process of its own, at several moments; each time the next process goes on."""
    code = """
import sys, torch
sys.path.insert(0, sys.argv[2])
from test_distill import *
task = data.load("digits")
d = distiller(task, sys.argv[1], 150)
d.fit(lambda epoch, latest: print(epoch, flush=True))
torch.save(d.student.state_dict(), sys.argv[1] + "/final.pt")
"""
    def start(folder):
        return subprocess.Popen([sys.executable, "-c", code, str(folder), os.path.dirname(__file__)],
                                stdout=subprocess.PIPE, text=True, cwd=tmp_path)
    done = start(tmp_path / "a")
    assert done.wait(120) == 0
    epoch = 0
    for wait in (0.05, 0.15):
        process = start(tmp_path / "b")
        first = process.stdout.readline()
        assert first and int(first) >= epoch
        time.sleep(wait)
        process.send_signal(signal.SIGKILL)
        lines = [first, *process.stdout.read().split()]
        process.wait()
        epoch = int(lines[-1]) - 1
    assert start(tmp_path / "b").wait(120) == 0
    assert_same(torch.load(tmp_path / "a/final.pt"), torch.load(tmp_path / "b/final.pt"))


def test_a_checkpoint_of_another_configuration_is_refused(task, tmp_path):
    with pytest.raises(Stopped):
        distiller(task, tmp_path).fit(lambda epoch, latest: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(CheckpointError, match=r"train.lr is 0.01 there and 0.5 here"):
        distiller(task, tmp_path, lr=0.5).fit()
    with pytest.raises(CheckpointError, match=r"losses.lsp.weight is 10.0 there and 3.0 here"):
        distiller(task, tmp_path, losses={"lsp": LSP.model_copy(update={"weight": 3.0})}).fit()


def test_a_truncated_checkpoint_is_refused_and_kept(task, tmp_path):
    with pytest.raises(Stopped):
        distiller(task, tmp_path).fit(lambda epoch, latest: os.kill(os.getpid(), signal.SIGTERM))
    file = tmp_path / "checkpoint.safetensors"
    content = file.read_bytes()[:-100]
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match="no whole safetensors file"):
        distiller(task, tmp_path).fit()
    assert file.read_bytes() == content


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    import safetensors.torch

    file = tmp_path / "a.safetensors"
    checkpoint.save(file, {"x": torch.arange(3)}, {"epoch": 1})

    def full(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.save(file, {"x": torch.arange(4)}, {"epoch": 2})
    tensors, state = checkpoint.load(file)
    assert state == {"epoch": 1} and torch.equal(tensors["x"], torch.arange(3))
    assert list(tmp_path.iterdir()) == [file]


def test_foreign_files_are_refused(tmp_path):
    import safetensors.torch

    with pytest.raises(CheckpointError, match="no checkpoint"):
        checkpoint.load(tmp_path / "none.safetensors")
    safetensors.torch.save_file({"x": torch.zeros(1)}, tmp_path / "b.safetensors")
    with pytest.raises(CheckpointError, match="not written by fastkd"):
        checkpoint.load(tmp_path / "b.safetensors")


# --- runs and the grid --------------------------------------------------------------------------

SHORT = ["teacher.train.epochs=3", "student.train.epochs=3", "teacher.model.args.hidden=16"]


def test_distil(tmp_path):
    config = load_config("digits", SHORT)
    record = runs.distil(config, 0, tmp_path / "seed0")
    assert record == json.loads((tmp_path / "seed0/result.json").read_text())
    assert record["student"]["parameters"] == 64 * 8 + 8 + 8 * 10 + 10
    assert not (tmp_path / "seed0/checkpoint.safetensors").exists()
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    assert runs.distil(config, 0, tmp_path / "seed0") == record
    assert before == {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    with pytest.raises(CheckpointError, match="another configuration"):
        runs.distil(load_config("digits", [*SHORT, "losses.lsp.weight=1"]), 0, tmp_path / "seed0")


PLAN = """
experiments:
  small:
    title: A small one
    recipe: digits
    seeds: 2
    base: {teacher: {model: {args: {hidden: 16}}, train: {epochs: 2}}, student: {train: {epochs: 2}}}
    rows:
      student alone: {losses: {lsp: null}}
      LSP: {}
"""


def test_grid(tmp_path):
    path = tmp_path / "plan.yaml"
    path.write_text(PLAN)
    plan = grid.Plan(path)
    order = [(c.row, c.seed) for c in plan.cells()]
    assert order == [("student alone", 0), ("LSP", 0), ("student alone", 1), ("LSP", 1)]
    assert grid.run(plan, tmp_path / "work", limit=3) == 3
    table = (tmp_path / "RESULTS.md").read_text()
    assert "| 2 of 2 |" in table and "| 1 of 2 |" in table
    cells = {p: p.stat().st_mtime_ns for p in (tmp_path / "cells").rglob("*.json")}
    assert len(cells) == 3
    assert grid.run(plan, tmp_path / "work") == 1
    assert {p: p.stat().st_mtime_ns for p in cells} == cells
    path.write_text(PLAN.replace("seeds: 2", "seeds: 3"))
    assert sum(not c.done for c in grid.Plan(path).cells()) == 2
    tests = [json.loads((tmp_path / f"cells/small/lsp/{s}.json").read_text())["student"]["test"] for s in (0, 1)]
    half = 12.706 * abs(tests[0] - tests[1]) / 2
    assert f"{sum(tests) / 2:.2f} ± {half:.2f}" in (tmp_path / "RESULTS.md").read_text()


def test_a_row_not_yet_run_is_shown(tmp_path):
    path = tmp_path / "plan.yaml"
    path.write_text(PLAN)
    grid.write_table(grid.Plan(path))
    assert (tmp_path / "RESULTS.md").read_text().count("not yet run") == 2


def test_a_wrong_plan(tmp_path):
    path = tmp_path / "plan.yaml"
    path.write_text(PLAN.replace("LSP: {}", "LSP: {losses: {lsp: {wieght: 1}}}"))
    with pytest.raises(ConfigError, match=r"small, row 'LSP'.*wieght.*did you mean 'weight'"):
        grid.Plan(path)
    with pytest.raises(ConfigError, match="no plan"):
        grid.Plan(tmp_path / "none.yaml")


# --- the command line ---------------------------------------------------------------------------


def fastkd_command(*args, cwd):
    return subprocess.run([sys.executable, "-m", "fastkd", *args], cwd=cwd, capture_output=True, text=True,
                          timeout=300, env={**os.environ, "COLUMNS": "160"})


def test_command_line(tmp_path):
    settings = [x for s in SHORT for x in ("--set", s)]
    done = fastkd_command("distill", "digits", *settings, "--seeds", "2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "student (lsp)" in done.stdout and "±" in done.stdout
    done = fastkd_command("distill", "digits", "--resume", "runs/digits", "--seeds", "2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for wrong, told in ((["distill", "digitz"], "did you mean 'digits'"),
                        (["distill", "digits", "--set", "losses.lsp.wieght=1"], "did you mean 'weight'"),
                        (["distill", "digits", "--set", "losses.lsp.student_layer=layers.9", "--out", "x"], "layers.1"),
                        (["distill", "digits", "--resume", "nowhere"], "nowhere"),
                        (["grid", "nowhere.yaml"], "nowhere.yaml")):
        done = fastkd_command(*wrong, cwd=tmp_path)
        assert done.returncode == 2 and told in done.stderr and "Traceback" not in done.stderr, done.stderr


def test_known_counts():
    from fastkd.distill.trainer import _told

    logits = torch.tensor([[3.0, -1.0, 2.0], [-3.0, -1.0, -2.0], [1.0, 2.0, 3.0]])
    y = torch.tensor([[1.0, 0.0, 0.0], [1.0, 0.0, 1.0], [0.0, 0.0, 0.0]])
    assert _told(logits, y, True).int().tolist() == [[1, 0, 0], [0, 1, 1], [0, 0, 0]]
    assert _told(logits, y, False).int().tolist() == [[1, 0, 1], [0, 0, 0], [1, 1, 1]]
