"""The Distiller, its configuration and checkpoints."""

import copy
import dataclasses
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import safetensors.torch
import torch
from torch import nn
from typer.testing import CliRunner

import fastkd
from fastkd import cli, data, models
from fastkd.distill import (
    CheckpointError,
    ConfigError,
    Distiller,
    LossConfig,
    Stopped,
    Taps,
    TensorBoard,
    TrainConfig,
    load_config,
    runs,
)
from fastkd.distill.config import recipes
from fastkd.lab.settings import merged
from fastkd.runtime import checkpoint

LSP = LossConfig(
    weight=10,
    student_layer="layers.0",
    teacher_layer="layers.0",
    args={"kernel": "rbf", "kernel_args": {"sigma": 1.0, "scale": "mean"}},
)
SHORT = ["teacher.train.epochs=3", "student.train.epochs=3", "teacher.model.args.hidden=16"]


@pytest.fixture(scope="module")
def task():
    return data.load("digits")


def gcn(task, hidden, seed=0):
    torch.manual_seed(seed)
    return models.build("gcn", task.num_features, task.num_classes, hidden=hidden)


def distiller(task, directory=None, epochs=6, losses=None, **options):
    options = {"save_every": 0, **options}
    return Distiller(
        gcn(task, 8),
        gcn(task, 16, 1),
        task,
        losses={"lsp": LSP} if losses is None else losses,
        train=TrainConfig(epochs=epochs, **options),
        directory=directory,
    )


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


@pytest.mark.parametrize(
    "override, told",
    [
        ("losses.lsp.wieght=1", ["losses.lsp.wieght", "did you mean 'weight'", "student_layer"]),
        ("student.train.epoch=1", ["student.train.epoch", "did you mean 'epochs'", "weight_decay"]),
        ("studnet.model.name=gcn", ["studnet", "did you mean 'student'", "teacher"]),
        ("student.train.epochs=0", ["student.train.epochs = 0", "greater than or equal to 1"]),
        ("student.train.optimizer=lion", ["'lion'", "adamw"]),
        ("losses.lsp.weight", ["KEY=VALUE", "losses.lsp.weight"]),
        ("data.name=3", ["'data' is a value"]),
    ],
)
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


class Fewer(nn.Module):
    """A network whose features, and with them the logits if so wished, are of one node less."""

    def __init__(self, task, logits):
        super().__init__()
        self.part, self.whole = (nn.Linear(task.num_features, task.num_classes) for _ in range(2))
        self.logits = logits

    def forward(self, x, adj):
        part = self.part(x[1:])
        return part if self.logits else self.whole(x)


def test_networks_on_different_nodes(task):
    hint = LossConfig(weight=1, student_layer="part", teacher_layer="layers.0")
    n = task.graphs["train"][0].num_nodes
    for name in ("fitnet", "lsp"):
        with pytest.raises(
            ValueError,
            match=rf"losses.{name}: the student's 'part' has {n - 1} rows, the teacher's "
            rf"'layers.0' {n}: both must be on the same nodes",
        ):
            Distiller(Fewer(task, False), gcn(task, 16), task, losses={name: hint})
    for who, networks in (
        ("student", (Fewer(task, True), gcn(task, 16))),
        ("teacher", (gcn(task, 16), Fewer(task, True))),
    ):
        with pytest.raises(ValueError, match=f"the {who} gives {n - 1} rows of logits, but the task has {n} nodes"):
            Distiller(*networks, task, losses={"kd": LossConfig(weight=1)}).fit()


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
    d.teacher.register_forward_pre_hook(lambda *a: calls.append(1))
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


# --- sampled neighbourhoods ---------------------------------------------------------------------


def sample(self, seed, seed_time=None, **options):
    """Stands for the compiled part of PyG's NeighborSampler: per hop at most k in-edges of every new node."""
    from torch_geometric.sampler import SamplerOutput

    node, row, col, edge = seed.tolist(), [], [], []
    place, begin = {v: i for i, v in enumerate(node)}, 0
    for k in self.num_neighbors.get_mapped_values():
        begin, hop = len(node), range(begin, len(node))
        for i in hop:
            slots = torch.arange(self.colptr[node[i]], self.colptr[node[i] + 1])
            for slot in slots[torch.randperm(len(slots))][: None if k < 0 else k].tolist():
                source = int(self.row[slot])
                if source not in place:
                    place[source] = len(node)
                    node.append(source)
                row, col, edge = [*row, place[source]], [*col, i], [*edge, slot]
    node, row, col, edge = (torch.tensor(x, dtype=torch.int64) for x in (node, row, col, edge))
    return SamplerOutput(node, row, col, edge)


@pytest.fixture(params=["in Python", "PyG's own"])
def sampler(request, monkeypatch):
    from torch_geometric import typing
    from torch_geometric.sampler import NeighborSampler

    if request.param == "in Python":
        monkeypatch.setattr(typing, "WITH_TORCH_SPARSE", True)
        monkeypatch.setattr(NeighborSampler, "_sample", sample)
    elif not (typing.WITH_PYG_LIB or typing.WITH_TORCH_SPARSE):
        pytest.skip("neither pyg-lib nor torch-sparse is installed")


def sage(task, hidden, seed=0):
    torch.manual_seed(seed)
    return models.build("graphsage", task.num_features, task.num_classes, hidden=hidden, dropout=0.0)


def sampled(task, neighbors, directory=None, epochs=1, **losses):
    train = TrainConfig(epochs=epochs, neighbors=neighbors, batch_size=64, save_every=0)
    return Distiller(
        sage(task, 8), sage(task, 16, 1), task, losses={"lsp": LSP, **losses}, train=train, directory=directory
    )


@pytest.mark.filterwarnings("ignore:Using 'NeighborSampler' without")
def test_seed_rows_are_what_the_whole_graph_gives(task, sampler):
    """With all neighbours of two hops and layers that need no degree of a source, every batch gives for its
    seeds what the whole graph does: over all batches the mean over the training nodes."""
    d = sampled(task, [-1, -1], kd=LossConfig(weight=1))
    d.student.eval()
    (graph,) = task.graphs["train"]
    batches = list(d._batches("train", True))
    assert [b.seeds for b in batches] == [64, 64, 64, 8]
    sums = {}
    for batch in batches:
        for name, term in d.loss(batch, 0)[1].items():
            sums[name] = sums.get(name, 0) + batch.seeds * term.item()
    layers = Taps(d.student, ["layers.0"]), Taps(d.teacher, ["layers.0"])
    logits, told = d.student(graph.x, graph.adj_t), d.teacher(graph.x, graph.adj_t)
    train = graph.train_mask
    each = fastkd.lsp_loss(
        layers[0]["layers.0"],
        layers[1]["layers.0"],
        graph.edge_index,
        reduction="none",
        kernel=fastkd.kernels.RBF(sigma=1.0, scale="mean"),
    )
    kd = fastkd.distill.losses.build("kd")
    expected = {
        "task": nn.functional.cross_entropy(logits[train], graph.y[train]),
        "lsp": each[train].mean(),
        "kd": kd(logits[train], told[train]),
    }
    assert {k: v / 200 for k, v in sums.items()} == {k: pytest.approx(v.item(), rel=1e-4) for k, v in expected.items()}


@pytest.mark.filterwarnings("ignore:Using 'NeighborSampler' without")
@pytest.mark.parametrize("sparse", [False, True])
def test_sampled_batches(task, sampler, sparse):
    """Each training node is a seed once; the edges are some of the graph's, at most 3 into a node of the first hop."""
    (graph,) = task.graphs["train"]
    marked = copy.copy(graph)
    marked.x = torch.cat((torch.arange(1, 1 + graph.num_nodes)[:, None].float(), graph.x), 1)  # who is who
    if sparse:
        marked.x = marked.x.to_sparse_csr()
    d = sampled(dataclasses.replace(task, num_features=65, graphs={part: [marked] for part in task.graphs}), [3, 2])
    known = set(map(tuple, graph.edge_index.t().tolist()))
    seen = []
    for batch in d._batches("train", True):
        x, edges = batch.inputs
        assert x.layout == (torch.sparse_csr if sparse else torch.strided)
        node = (x.to_dense() if sparse else x)[:, 0].long() - 1
        seen += node[: batch.seeds].tolist()
        assert torch.equal(batch.y, graph.y[node]) and set(map(tuple, node[edges].t().tolist())) <= known
        assert batch.graph.num_dst == batch.seeds and batch.graph.num_src == len(node)
        full = torch.bincount(graph.edge_index[1], minlength=graph.num_nodes)[node[: batch.seeds]]
        assert torch.equal(batch.graph.in_degree().long(), full.clamp(max=3))
        assert int(torch.bincount(edges[1]).max()) <= 3 and batch.graph.num_edges < edges.shape[1]
    assert sorted(seen) == graph.train_mask.nonzero()[:, 0].tolist()
    d.step(0)


@pytest.mark.filterwarnings("ignore:Using 'NeighborSampler' without")
def test_sampled_training_resumes_bit_for_bit(task, tmp_path, sampler):
    whole, part = sampled(task, [4, 2], epochs=4), sampled(task, [4, 2], tmp_path, epochs=4)
    result = whole.fit()
    with pytest.raises(Stopped):
        part.fit(lambda epoch, latest: os.kill(os.getpid(), signal.SIGINT) if epoch == 2 else None)
    again = sampled(task, [4, 2], tmp_path, epochs=4)
    assert again.fit().test == result.test
    assert_same(weights(whole.student), weights(again.student))


def test_no_sampler_is_told_before_training(task, tmp_path, monkeypatch):
    from torch_geometric import typing

    monkeypatch.setattr(typing, "WITH_PYG_LIB", False)
    monkeypatch.setattr(typing, "WITH_TORCH_SPARSE", False)
    with pytest.raises(
        ImportError, match=r"train.neighbors = \[3, 2\] needs pyg-lib.*pip install pyg-lib.*whole graphs"
    ):
        sampled(task, [3, 2])
    with pytest.raises(ImportError, match="pyg-lib"):
        runs.distil(load_config("digits", [*SHORT, "student.train.neighbors=[3, 2]"]), 0, tmp_path / "seed0")
    assert not list(tmp_path.iterdir()), "the teacher was not trained either"


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
import sys
sys.path.insert(0, sys.argv[2])
from test_distill import *
distiller(data.load("digits"), sys.argv[1], 150).fit(lambda epoch, latest: print(epoch, flush=True))
"""
    epoch = 0
    for wait in (0.05, 0.15):
        process = subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path), os.path.dirname(__file__)],
            stdout=subprocess.PIPE,
            text=True,
            cwd=tmp_path,
        )
        first = process.stdout.readline()
        assert first and int(first) >= epoch
        time.sleep(wait)
        process.send_signal(signal.SIGKILL)
        lines = [first, *process.stdout.read().split()]
        process.wait()
        epoch = int(lines[-1]) - 1
    broken, unbroken, run = distiller(task, tmp_path, 150), distiller(task, None, 150), []
    broken.fit(lambda epoch, latest: run.append(epoch))
    unbroken.fit()
    assert epoch <= run[0] <= run[-1] == 150
    assert_same(broken.student.state_dict(), unbroken.student.state_dict())


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


def full(tensors, path, metadata=None):
    """As safetensors.torch.save_file on a full disk."""
    path.write_bytes(b"half")
    raise safetensors.SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


def test_a_full_disk_leaves_the_last_checkpoint(task, tmp_path, monkeypatch):
    file = tmp_path / "b/checkpoint.safetensors"
    kept = []

    def progress(epoch, latest):
        if epoch == 4:
            kept.append(file.read_bytes())
            monkeypatch.setattr(safetensors.torch, "save_file", full)

    with pytest.raises(
        CheckpointError,
        match=r"b/checkpoint.safetensors could not be written .*No space left.* is "
        "whole.*the same command goes on from the last checkpoint",
    ):
        distiller(task, tmp_path / "b", 6).fit(progress)
    monkeypatch.undo()
    assert [file.read_bytes()] == kept and list(file.parent.iterdir()) == [file]
    assert checkpoint.load(file)[1]["epoch"] == 3
    whole, again = distiller(task, tmp_path / "a", 6), distiller(task, tmp_path / "b", 6)
    assert whole.fit().test == again.fit().test
    assert_same(weights(whole.student), weights(again.student))


@pytest.mark.parametrize("lost", ["weights.safetensors", "result.json"])
def test_a_full_disk_at_the_end_loses_nothing(tmp_path, monkeypatch, lost):
    config = load_config("digits", SHORT)
    replace = os.replace

    def refuse(old, new):
        if new == tmp_path / "seed0" / lost:
            raise OSError(28, "No space left on device")
        replace(old, new)

    runs.teacher_of(config, data.load("digits"), tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", refuse)
        with pytest.raises(CheckpointError, match=f"seed0/{lost} could not be written .*No space left.*none before"):
            runs.distil(config, 0, tmp_path / "seed0")
    assert {p.name for p in (tmp_path / "seed0").iterdir()} == (
        {"checkpoint.safetensors"} | ({"weights.safetensors"} if lost == "result.json" else set())
    )
    trained = []
    record = runs.distil(config, 0, tmp_path / "seed0", progress=lambda *latest: trained.append(latest))
    assert not trained and record["student"]["epochs"] == 3
    assert {p.name for p in (tmp_path / "seed0").iterdir()} == {"result.json", "weights.safetensors"}


def test_a_file_that_becomes_too_large(tmp_path, monkeypatch):
    """The system itself refuses, here by a limit of 100 KB per file: the teacher fits, the student does not."""
    resource = pytest.importorskip("resource", reason="no resource limits on this system")
    command = [
        "distill",
        "digits",
        "--set",
        "teacher.model.args.hidden=8",
        "--set",
        "student.model.args.hidden=256",
        "--set",
        "teacher.train.epochs=2",
        "--set",
        "student.train.epochs=2",
    ]
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    done = fastkd_command(*command, cwd=tmp_path, preexec_fn=limit)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert "seed0/checkpoint.safetensors could not be written" in done.stderr and "too large" in done.stderr
    left = [p for p in (tmp_path / "runs/distill/digits").rglob("*") if p.is_file()]
    assert {p.name for p in left} == {"config.json", "weights.safetensors"}
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(cli.app, command)
    assert done.exit_code == 0, done.output


def test_foreign_files_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint"):
        checkpoint.load(tmp_path / "none.safetensors")
    safetensors.torch.save_file({"x": torch.zeros(1)}, tmp_path / "b.safetensors")
    with pytest.raises(CheckpointError, match="not written by fastkd"):
        checkpoint.load(tmp_path / "b.safetensors")


# --- TensorBoard --------------------------------------------------------------------------------


def curves_of(folder):
    """tag -> [(step, value)] of all event files in a folder."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def curves_of_history(history):
    rows = [
        {"loss/total": h["loss"], "val": h["val"], "lr": h["lr"], **{f"loss/{k}": v for k, v in h["terms"].items()}}
        | {"epoch": h["epoch"]}
        for h in history
    ]
    return {
        tag: [(row["epoch"], pytest.approx(row[tag], rel=1e-6)) for row in rows] for tag in rows[0] if tag != "epoch"
    }


def test_curves_are_the_history(tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    config = load_config(
        "digits", [*SHORT, "student.train.epochs=5", "student.train.schedule=cosine", "student.train.eval_every=2"]
    )
    record = runs.distil(config, 0, tmp_path / "seed0", progress=TensorBoard(tmp_path / "tensorboard"))
    assert {p.name for p in (tmp_path / "tensorboard").iterdir()} == {"teacher", "student-seed-0"}
    assert curves_of(tmp_path / "tensorboard/teacher") == curves_of_history(record["teacher"]["history"])
    student = curves_of(tmp_path / "tensorboard/student-seed-0")
    assert student == curves_of_history(record["student"]["history"])
    assert [step for step, _ in student["loss/lsp"]] == [1, 3, 4]
    assert student["lr"][0][1] > student["lr"][1][1] > student["lr"][2][1] > 0


def test_resumed_curves_go_on_without_a_step_twice(task, tmp_path):
    """Stopped after epoch 3; lost after epoch 5 without another checkpoint; so epochs 3 and 4 are told twice."""
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")

    def start(act):
        time.sleep(1.1)  # its reader orders files of one second by a counter, as text: 10 before 9
        curves = TensorBoard(tmp_path / "tensorboard")

        def progress(epoch, latest):
            curves("student", epoch, 8, latest)
            act(epoch)

        return distiller(task, tmp_path / "run", 8, save_every=1000, schedule="cosine").fit(progress)

    with pytest.raises(Stopped):
        start(lambda epoch: os.kill(os.getpid(), signal.SIGINT) if epoch == 3 else None)
    with pytest.raises(ZeroDivisionError):
        start(lambda epoch: 1 / (5 - epoch))
    assert [step for step, _ in curves_of(tmp_path / "tensorboard/student")["val"]] == list(range(5))
    result = start(lambda epoch: None)
    assert curves_of(tmp_path / "tensorboard/student") == curves_of_history(result.history)
    assert len(result.history) == 8


def test_no_tensorboard_is_told_before_training(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(ImportError, match="pip install tensorboard"):
        TensorBoard(tmp_path)
    (tmp_path / "tensorboard.py").write_text("raise ImportError('none here')\n")
    done = fastkd_command("distill", "digits", "--tensorboard", cwd=tmp_path)
    assert done.returncode == 2 and "pip install tensorboard" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "runs").exists()


# --- runs ---------------------------------------------------------------------------------------


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


# --- the command line ---------------------------------------------------------------------------


def fastkd_command(*args, cwd, **options):
    return subprocess.run(
        [sys.executable, "-m", "fastkd", *args],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "COLUMNS": "160"},
        **options,
    )


def test_command_line(tmp_path, monkeypatch):
    settings = [x for s in SHORT for x in ("--set", s)]
    curves = ["--tensorboard"] if importlib.util.find_spec("tensorboard") else []
    done = fastkd_command("distill", "digits", *settings, "--seeds", "2", *curves, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    if curves:
        folders = (tmp_path / "runs/distill/digits/tensorboard").iterdir()
        assert {p.name for p in folders} == {"teacher", "student-seed-0", "student-seed-1"}
    assert "student (lsp)" in done.stdout and "±" in done.stdout
    monkeypatch.chdir(tmp_path)
    again = CliRunner().invoke(cli.app, ["distill", "digits", "--resume", "runs/distill/digits", "--seeds", "2"])
    assert again.exit_code == 0, again.output
    for wrong, told in (
        (["distill", "digitz"], "did you mean 'digits'"),
        (
            ["distill", "digits", *settings, "--set", "losses.lsp.weight=1"],
            "losses.lsp.weight is 100.0 there and 1.0 here. Take another --out",
        ),
        (["distill", "digits", "--set", "losses.lsp.wieght=1"], "did you mean 'weight'"),
        (["distill", "digits", "--set", "losses.lsp.student_layer=layers.9", "--out", "x"], "layers.1"),
        (["distill", "digits", "--resume", "nowhere"], "nowhere"),
        (["grid", "nowhere.yaml"], "nowhere.yaml"),
    ):
        out = CliRunner().invoke(cli.app, wrong)
        assert out.exit_code == 2 and told in out.stderr and "Traceback" not in out.stderr, out.output


def test_peak_memory_of_a_forward_pass():
    from fastkd.runtime.measure import cost

    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10))
    once = 1000 * 256 * 4 / 2**20
    assert cost(model, (torch.randn(1000, 64),), 1)["peak_memory_mb"] == 2 * once  # both sides of the ReLU
    model[1] = nn.ReLU(inplace=True)
    assert cost(model, (torch.randn(1000, 64),), 1)["peak_memory_mb"] == once + 1000 * 10 * 4 / 2**20

    class Similarities(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(()))

        def forward(self, x, graph):
            return torch.ops.fastkd.kernel_values(
                x, x, graph.rowptr, graph.col, None, graph.num_src, *fastkd.kernels.Linear().spec(x.shape[1])
            ).sum()

    x = torch.randn(500, 8)
    graph = fastkd.Graph.from_knn(x, 20)
    assert cost(Similarities(), (x, graph), 1)["peak_memory_mb"] * 2**20 == pytest.approx(4 * graph.num_edges, rel=0.01)


def test_known_counts():
    from fastkd.distill.trainer import _predicted_labels as _told

    logits = torch.tensor([[3.0, -1.0, 2.0], [-3.0, -1.0, -2.0], [1.0, 2.0, 3.0]])
    y = torch.tensor([[1.0, 0.0, 0.0], [1.0, 0.0, 1.0], [0.0, 0.0, 0.0]])
    assert _told(logits, y, True).int().tolist() == [[1, 0, 0], [0, 1, 1], [0, 0, 0]]
    assert _told(logits, y, False).int().tolist() == [[1, 0, 1], [0, 0, 0], [1, 1, 1]]
