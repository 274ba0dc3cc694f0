"""The folder of a run belongs to one process at a time, processes share a plan, and devices must be there."""

import errno
import fcntl
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_plan import DISTIL, plan_of
from torch import nn
from typer.testing import CliRunner

from fastkd import cli, compress, data, models
from fastkd.distill import Distiller, TrainConfig, runs
from fastkd.distill import load_config as distilling
from fastkd.evolve import evolve
from fastkd.lab import plan as grid
from fastkd.population import trace
from fastkd.runtime.checkpoint import Busy, CheckpointError, alone
from fastkd.runtime.world import World

pytestmark = pytest.mark.usefixtures("one_thread")

HOLDS = (
    "import sys\nfrom pathlib import Path\nfrom fastkd.runtime.checkpoint import alone\n"
    "with alone(Path(sys.argv[1])):\n    print('held', flush=True)\n    sys.stdin.read()"
)
SMALL = ["teacher.train.epochs=1", "student.train.epochs=1", "teacher.model.args.hidden=16"]


@pytest.fixture
def hold():
    """Starts another process, which holds a folder until it is ended."""
    started = []

    def start(folder):
        process = subprocess.Popen(
            [sys.executable, "-c", HOLDS, str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parent,
        )
        started.append(process)
        assert process.stdout.readline() == "held\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def searched(folder, **options):
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(16, 2)).eval()
    space = trace(model, torch.zeros(1, 1, 4, 4))
    return evolve(
        space, lambda masks: masks.double().mean(1), population=4, generations=2, checkpoint=folder, **options
    )


def trained(folder):
    task = data.load("digits")
    return Distiller(
        models.build("gcn", task.num_features, task.num_classes, hidden=8),
        None,
        task,
        train=TrainConfig(epochs=1),
        directory=folder,
    ).fit()


def distilled(folder):
    return runs.distil(distilling("digits", SMALL), 0, folder)


def compressed(folder):
    return compress.compress(
        compress.load_config(
            "digits",
            ["algorithm.name=l1", "train.epochs=1", "finetune.epochs=0", "export.onnx=false", "export.int8=false"],
        ),
        0,
        folder,
    )


@pytest.mark.parametrize("run", [searched, trained, distilled, compressed])
def test_a_second_process_is_refused(tmp_path, hold, run):
    folder = tmp_path / "run"
    other = hold(folder)
    with pytest.raises(Busy, match="run: another process is at work there"):
        run(folder)
    assert not list(folder.iterdir())  # nothing was written into the other one's folder
    other.send_signal(signal.SIGKILL)
    other.wait()
    run(folder)
    assert list(folder.iterdir())


def test_this_process_may_hold_it_twice_and_lets_go(tmp_path, hold):
    class Ended(Exception):
        pass

    with pytest.raises(Ended), alone(tmp_path / "a" / "b"), alone(tmp_path / "a" / ".." / "a" / "b"):
        raise Ended
    hold(tmp_path / "a" / "b")
    assert not list((tmp_path / "a" / "b").iterdir())


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    def none(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", none)
    assert searched(tmp_path).generation == 2


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(CheckpointError, match="run cannot be the folder of a run"), alone(tmp_path / "run"):
        pass


# --- several processes and one plan ----------------------------------------------------------------


@pytest.fixture
def plan(tmp_path, monkeypatch):
    monkeypatch.setattr(grid, "PAUSE", 0.01)
    return plan_of(tmp_path, DISTIL)


@pytest.mark.parametrize("what", ["a cell", "the teacher of all"])
def test_what_others_are_at_work_on_is_waited_for(tmp_path, hold, plan, what):
    work, order = tmp_path / "work", [("student alone", 0), ("LSP", 0), ("student alone", 1), ("LSP", 1)]
    assert [(c.row, c.seed) for c in plan.missing()] == order
    held = work / "small" / "lsp" / "0"
    if what != "a cell":  # its name is known from another folder
        grid.run(plan, tmp_path / "other", limit=1)
        del order[0]
        held = work / "teachers" / next((tmp_path / "other" / "teachers").iterdir()).name
    other, waited, ran = hold(held), [], []

    def progress(cell, told, *_):
        key = cell.row, cell.seed
        if told == grid.WAITS:
            waited.append(key)
            if len(waited) == len(order) + 5:  # it has come back several times
                other.kill()
                other.wait()
        elif key not in ran:
            ran.append(key)

    assert grid.run(plan, work, progress) == len(order)
    assert not plan.missing()
    if what == "a cell":
        assert set(waited) == {("LSP", 0)} and ran == [*(c for c in order if c != ("LSP", 0)), ("LSP", 0)]
    else:
        assert set(waited) == set(order) == set(ran)


def test_what_another_process_has_done_is_not_done_again(tmp_path, hold, plan):
    work = tmp_path / "work"
    other = hold(work / "small" / "student-alone" / "0")

    def progress(cell, told, *_):
        if told == grid.WAITS and other.poll() is None:
            other.kill()
            other.wait()
            grid.run(plan, tmp_path / "elsewhere", limit=1)

    assert grid.run(plan, work, progress) == 3
    assert not plan.missing() and not (work / "small" / "student-alone" / "0" / "result.json").exists()


def test_two_processes_share_a_plan(tmp_path, plan):
    command = [sys.executable, "-m", "fastkd", "grid", "plan.yaml", "--work", "work"]
    both = [
        subprocess.Popen(
            command,
            cwd=tmp_path,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for _ in range(2)
    ]
    told = [process.communicate(timeout=300)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], told
    assert not plan.missing()
    counts = [int(text.split(" cells run")[0].split()[-1]) for text in told]
    assert sum(counts) == 4, told


# --- devices ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "device", "told"),
    [
        (0, "gpu", "device must be cpu, cuda or cuda:N, got 'gpu'"),
        (0, "cuda", "device = 'cuda': this machine has none that torch can use; device can be cpu"),
        (
            2,
            "cuda:2",
            "device = 'cuda:2': this machine has 2, numbered from 0; device can be cpu, cuda, or cuda:0 to cuda:1",
        ),
    ],
)
def test_a_device_that_is_not_there(tmp_path, monkeypatch, count, device, told):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    task = data.load("digits")
    (tmp_path / "plan.yaml").write_text("experiments: {a: {recipe: digits, rows: {b: {}}}}")
    for call in (
        lambda: World(device=device),
        lambda: World.from_environment(device),
        lambda: Distiller(models.build("gcn", task.num_features, task.num_classes), None, task, device=device),
        lambda: searched(tmp_path / "out", device=device),
        lambda: grid.run(grid.Plan(tmp_path / "plan.yaml"), tmp_path / "work", device=device),
    ):
        with pytest.raises(ValueError, match=re.escape(told)):
            call()
    for command in (
        ["distill", "digits", "--out"],
        ["compress", "digits", "--out"],
        ["grid", str(tmp_path / "plan.yaml"), "--work"],
    ):
        done = CliRunner().invoke(cli.app, [*command, str(tmp_path / "out"), "--device", device])
        assert done.exit_code == 2 and told in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("device", ["cpu", torch.device("cuda", 1)])
def test_a_device_that_is_there(monkeypatch, device):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert World(device=device).device == torch.device(device)
