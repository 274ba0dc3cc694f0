"""Training on several processes: the same losses, gradients and weights as on one, and what happens when one ends."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
from test_distill import LSP, assert_same, gcn, weights

from fastkd import Graph, data, models
from fastkd.distill import (
    CheckpointError,
    Distiller,
    LossConfig,
    Stopped,
    TrainConfig,
    World,
    load_config,
    losses,
    runs,
)
from fastkd.distill.batches import batches
from fastkd.distill.distributed import LSPPart
from fastkd.runtime import checkpoint

if not torch.distributed.is_available():
    pytest.skip("this build of torch has no torch.distributed", allow_module_level=True)

HINT = LossConfig(weight=1, student_layer="layers.0", teacher_layer="layers.0")
TOGETHER = {
    "lsp": LSP,
    "kd": LossConfig(weight=0.5),
    "fitnet": HINT,
    "rkd": HINT.model_copy(update={"weight": 0.1, "args": {"max_nodes": 200, "max_angle_nodes": 30}}),
    "at": HINT,
}
CASES = {  # name -> (task, losses, options of training)
    "graph": ("digits", TOGETHER, {"epochs": 5, "dropout": 0.0}),
    "dropout": ("digits", TOGETHER, {"epochs": 5, "dropout": 0.5, "eval_every": 2, "clip_norm": 1.0}),
    "wrong graph": (
        "digits",
        {"lsp": LSP.model_copy(update={"args": {"shuffle": True, "reduction": "mean_edges"}})},
        {"epochs": 3, "dropout": 0.5, "optimizer": "sgd"},
    ),
    "labels": ("digits", {}, {"epochs": 3, "dropout": 0.5}),
}


@pytest.fixture(scope="module")
def task():
    return data.load("digits")


def made(case, directory=None, world=None, **changes):
    name, terms, options = CASES[case]
    options = {"save_every": 0, **options, **changes}
    dropout = options.pop("dropout")
    task = data.load(name)
    torch.manual_seed(0)
    student = models.build("gcn", task.num_features, task.num_classes, hidden=8, dropout=dropout)
    return Distiller(
        student, gcn(task, 16, 1), task, losses=terms, train=TrainConfig(**options), directory=directory, world=world
    )


def ranks(size, code, *args, module="test_distributed", **environment):
    """Starts `code` on several ranks as torchrun would, but looks after each by itself."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    folders = [os.path.dirname(sys.modules[name].__file__) for name in dict.fromkeys((__name__, module))]
    head = f"import sys; sys.path[:0] = {folders!r}; from {module} import *\n"
    processes = []
    for rank in range(size):
        variables = {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": size,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "OMP_NUM_THREADS": 1,
            "FASTKD_TIMEOUT": 30,
            **environment,
        }
        processes.append(
            subprocess.Popen(
                [sys.executable, "-c", head + code, *map(str, args)],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                cwd=tempfile.gettempdir(),
                env={**os.environ, **{k: str(v) for k, v in variables.items()}},
            )
        )
    return processes


def ended(processes):
    """(exit status, stdout, stderr) by rank."""
    try:
        said = [p.communicate(timeout=100) for p in processes]
        return [(p.returncode, *out) for p, out in zip(processes, said, strict=True)]
    finally:
        for p in processes:
            p.kill()


def train_all(folder, world):
    for case in CASES:
        d = made(case, world=world)
        result = d.fit()
        torch.save(
            {
                "student": d.student.state_dict(),
                "losses": d.losses.state_dict(),
                "history": result.history,
                "val": result.val,
                "test": result.test,
            },
            f"{folder}/{case}-{world.rank}.pt",
        )


def train_shapes(folder, world):
    config = load_config("digits_points")
    task = data.load("digits_points")
    for split, n in (("train", 70), ("val", 50), ("test", 50)):
        task.points[split], task.labels[split] = task.points[split][:n], task.labels[split][:n]
    loss = config.losses["lsp"].model_copy(update={"teacher_layer": config.losses["lsp"].student_layer})
    net = lambda: runs.build(config.student, task, 0)
    terms = {"lsp": loss, "gsp": loss.model_copy(update={"args": {"max_nodes": 64}})}
    d = Distiller(net(), net(), task, losses=terms, train=TrainConfig(epochs=2, batch_size=16, lr=0.001), world=world)
    result = d.fit()
    torch.save(
        {
            "student": d.student.state_dict(),
            "val": result.val,
            "test": result.test,
            "losses": [h["loss"] for h in result.history],
            "generator": d.generator.get_state(),
        },
        f"{folder}/shapes-{world.rank}.pt",
    )


def refuse(folder, world):
    told = []
    other = made("graph", world=world)
    with torch.no_grad():
        next(other.student.parameters())[0] += world.rank
    for d in (made("graph", world=world, lr=0.01 * (1 + world.rank)), other):
        try:
            d.fit()
        except ValueError as error:
            told.append(str(error))
    Path(f"{folder}/refused-{world.rank}.json").write_text(json.dumps(told))


def stop_and_resume(folder, world):
    d = made("dropout", f"{folder}/stopped", world)
    try:
        d.fit(lambda epoch, latest: os.kill(os.getpid(), signal.SIGTERM) if epoch == 2 and world.rank == 1 else None)
    except Stopped as stop:
        Path(f"{folder}/stopped-{world.rank}.txt").write_text(str(stop))
    if world.rank == 0:
        shutil.copytree(f"{folder}/stopped", f"{folder}/resumed")
    world.any(True)
    d = made("dropout", f"{folder}/resumed", world)
    d.fit()
    torch.save({"student": d.student.state_dict()}, f"{folder}/resumed-{world.rank}.pt")


@pytest.fixture(scope="module", params=[2, 3])
def trained(request, tmp_path_factory):
    return start(request.param, tmp_path_factory, ["train_all"])


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return start(2, tmp_path_factory, ["train_shapes", "refuse", "stop_and_resume"])[1]


def start(size, tmp_path_factory, functions):
    folder = tmp_path_factory.mktemp("ranks")
    code = "world = World.from_environment()\n" + "".join(f"{f}(sys.argv[1], world)\n" for f in functions)
    for status, _, errors in ended(ranks(size, code + "world.close()\n", folder)):
        assert status == 0, errors
    return size, folder


@pytest.mark.parametrize("case", CASES)
def test_several_ranks_are_one_process(trained, case):
    size, folder = trained
    d = made(case)
    whole = d.fit()
    parts = [torch.load(folder / f"{case}-{rank}.pt", weights_only=False) for rank in range(size)]
    for part in parts:
        assert_same(part["student"], parts[0]["student"])  # bit for bit: they never drift apart
        assert_same(part["losses"], parts[0]["losses"])
        assert (part["val"], part["test"]) == (whole.val, whole.test)
        for own, record in zip(part["history"], whole.history, strict=True):
            assert own["terms"].keys() == record["terms"].keys()
            for name, value in {"loss": record["loss"], **record["terms"]}.items():
                found = own["loss"] if name == "loss" else own["terms"][name]
                assert found == pytest.approx(value, rel=1e-5, abs=1e-7), (record["epoch"], name)
    for name, value in {**weights(d.student), **weights(d.losses)}.items():
        own = {**parts[0]["student"], **parts[0]["losses"]}[name]
        torch.testing.assert_close(own, value, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", [1, 3, 2000])  # also more ranks than rows
@pytest.mark.parametrize("reduction", ["mean", "mean_active", "mean_edges", "sum"])
def test_parts_of_lsp_are_the_whole(task, size, reduction):
    graph = task.graphs["train"][0]
    keep = graph.edge_index[:, graph.edge_index[1] % 5 > 0]  # some destinations have no edges
    graph = Graph.from_edge_index(keep, 1797)
    student, teacher = torch.randn(1797, 6, generator=torch.Generator().manual_seed(0)), torch.randn(1797, 9)
    student.requires_grad_()
    loss = losses.LSP(reduction=reduction, kernel_args={"sigma": 1.0, "scale": "mean"})
    whole = loss(student, teacher, graph)
    (gradient,) = torch.autograd.grad(whole, student)
    some = range(size) if size < 10 else range(0, size, 401)
    parts = [LSPPart(loss, teacher, graph, World(r, size).range(1797), torch.Generator()) for r in some]
    if size > 10:
        assert all(p.rows.stop - p.rows.start <= 1 and torch.isfinite(p(student)) for p in parts)
        return
    total = sum(p(student) for p in parts)
    torch.testing.assert_close(total, whole, rtol=1e-5, atol=0)
    torch.testing.assert_close(torch.autograd.grad(total, student)[0], gradient, rtol=1e-4, atol=1e-8)


def test_parts_of_a_mean():
    x = torch.randn(7, 2)
    for size in (1, 2, 3, 7, 9):
        total = sum(World(rank, size).part_of_mean(lambda a: a.square().mean(), x) for rank in range(size))
        torch.testing.assert_close(total, x.square().mean())


def test_a_rank_takes_its_share_of_shapes(two):
    a, b = (torch.load(two / f"shapes-{rank}.pt") for rank in range(2))
    assert_same(a.pop("student"), b.pop("student"))  # also the statistics of batch normalisation
    assert torch.equal(a.pop("generator"), b.pop("generator"))
    assert a == b and a["losses"][1] < a["losses"][0]


def test_too_small_a_batch(task):
    shapes = data.load("digits_points")
    generator = torch.Generator().manual_seed(0)
    with pytest.raises(ValueError, match=r"train\.batch_size must be at least 8 for 4 ranks, got 6"):
        next(batches(shapes, "train", TrainConfig(batch_size=6), generator, torch.device("cpu"), {}, World(0, 4)))


# --- when something goes wrong ------------------------------------------------------------------


def test_nothing_outlives_the_world(tmp_path):
    """A thread that still holds a tensor when Python ends would abort the process, now and then."""
    code = (
        "world = World.from_environment()\nrefuse(sys.argv[1], world)\nworld.close()\n"
        "print(*(f.read_text().strip() for f in Path('/proc/self/task').glob('*/comm')))\n"
    )
    for status, said, errors in ended(ranks(2, code, tmp_path)):
        assert status == 0, errors
        assert "gloo" not in said and "tcpstore" not in said


def test_ranks_that_differ_are_refused(two):
    for rank in range(2):
        configuration, initial = json.loads((two / f"refused-{rank}.json").read_text())
        assert "rank 1 differs from rank 0: train.lr is 0.01 on rank 0 and 0.02 on rank 1" in configuration
        assert "student's weights is" in initial


def command(*args):
    return [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "fastkd",
        *args,
    ]


EPOCHS = 400
SETTINGS = [
    x
    for s in (
        "teacher.train.epochs=3",
        f"student.train.epochs={EPOCHS}",
        "teacher.model.args.hidden=16",
        "student.train.save_every=0.2",
    )
    for x in ("--set", s)
]


def children(pid):
    """rank -> process id"""
    found = {}
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        rank = re.search(rb"\0RANK=(\d+)", b"\0" + Path(f"/proc/{child}/environ").read_bytes())
        if rank:
            found[int(rank[1])] = int(child)
    return found


def begun(directory, process):
    file = directory / "seed0/checkpoint.safetensors"
    for _ in range(600):
        if file.exists():
            return file
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    raise AssertionError("no checkpoint")


@pytest.mark.skipif(not os.path.exists("/proc/self/environ"), reason="needs Linux's /proc")
@pytest.mark.parametrize("lost", [0, 1])
def test_a_killed_rank(tmp_path, lost):
    """The other one says so and ends; two processes, or one, go on."""
    folder = tmp_path / "run"
    process = subprocess.Popen(
        command("distill", "digits", *SETTINGS, "--out", str(folder)),
        cwd=tmp_path,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        file = begun(folder, process)
        os.kill(children(process.pid)[lost], signal.SIGKILL)
        _, errors = process.communicate(timeout=120)
    finally:
        process.terminate()
    assert process.returncode != 0
    assert f"rank {1 - lost} of 2: another rank is gone" in errors
    assert f"{file} is whole" in errors and "--resume" in errors
    epoch = checkpoint.load(file)[1]["epoch"]
    again = ["distill", "digits", "--resume", str(folder)]
    done = subprocess.run(
        command(*again) if lost == 0 else [sys.executable, "-m", "fastkd", *again],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("digits, test part") == 1  # said by one rank
    record = json.loads((folder / "seed0/result.json").read_text())
    assert record["environment"]["processes"] == 2 - lost
    assert record["student"]["epochs"] == EPOCHS > epoch > 0
    every = record["config"]["student"]["train"]["eval_every"]
    assert [h["epoch"] for h in record["student"]["history"]] == list(range(every - 1, EPOCHS, every))


def test_all_ranks_stop_with_one(two):
    """A signal to rank 1; then one process, or two, go on, and end with the weights of an unbroken run."""
    for rank in range(2):
        assert "stopped after epoch 2" in (two / f"stopped-{rank}.txt").read_text()
    with pytest.raises(CheckpointError, match=r"train.lr is 0.01 there and 0.5 here"):
        made("dropout", two / "stopped", lr=0.5).fit()
    unbroken, one = made("dropout"), made("dropout", two / "stopped")
    unbroken.fit()
    one.fit()
    both = torch.load(two / "resumed-0.pt")["student"]
    for name, value in weights(unbroken.student).items():
        torch.testing.assert_close(one.student.state_dict()[name], value, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(both[name], value, rtol=1e-4, atol=1e-4)


def test_a_wrong_environment(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("FASTKD_TIMEOUT", "soon")
    with pytest.raises(ValueError, match="FASTKD_TIMEOUT must be a whole number of seconds >= 1, got 'soon'"):
        World.from_environment()
    with pytest.raises(ValueError, match=r"device must be 'cuda' or 'cpu' for 2 processes.*'cuda:1'"):
        World.from_environment("cuda:1")
