"""The engine of studies: the training loop, stages, networks named in files, the folder of a command, and its errors."""

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import warnings

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from fastkd import cli
from fastkd.lab.imports import build_module
from fastkd.lab.loop import Loop, optimizer_of
from fastkd.lab.settings import ConfigError
from fastkd.lab.stage import finished, some, stage, trained_network
from fastkd.runtime import checkpoint
from fastkd.runtime.checkpoint import Busy, CheckpointError, alone, read_json
from fastkd.runtime.stopping import Stopped
from fastkd.runtime.world import World, usable

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = [
    part
    for change in ("teacher.train.epochs=1", "student.train.epochs=1", "teacher.model.args.hidden=8")
    for part in ("--set", change)
]


def run(*arguments):
    return CliRunner().invoke(cli.app, list(map(str, arguments)))


def assert_one_line(done, *words):
    """It ended with an error of one line that has these words."""
    assert done.exit_code == 2, done.output
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and "Traceback" not in done.output, done.output
    for word in words:
        assert word in lines[0], lines[0]
    return lines[0]


# --- the loop -------------------------------------------------------------------------------------------


class Settings:
    optimizer, lr, momentum, weight_decay = "sgd", 0.1, 0.9, 0.0


def loop_of(file=None, epochs=4, **options):
    torch.manual_seed(0)
    model, generator = nn.Linear(3, 1), torch.Generator().manual_seed(5)
    optimizer = optimizer_of(list(model.parameters()), Settings)
    loop = Loop(
        {"model": model}, optimizer, epochs=epochs, identity={"a": 1}, file=file, seed=7, generator=generator, **options
    )

    def train(epoch):
        x = torch.randn(8, 3, generator=generator) + torch.randn(8, 3)  # of both generators
        loss = (model(x) - x.sum(1, keepdim=True)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return {"loss": loss.item()}

    return loop, train, lambda: float(model.weight.detach().sum())


@pytest.mark.parametrize("when", [1, 2, 4])
@pytest.mark.parametrize("hook", ["progress", "saved"])
def test_a_stop_is_heard_in_every_epoch_and_the_loop_goes_on(tmp_path, when, hook):
    """Also in the last one, before and after its checkpoint is written."""
    unbroken, train, score = loop_of()
    unbroken.run(train, score)
    loop, train, score = loop_of(tmp_path / "a.safetensors")
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    interrupt = {hook: lambda epoch, _: os.kill(os.getpid(), signal.SIGINT) if epoch == when else None}
    try:
        with pytest.raises(Stopped, match=r"stopped after epoch \d+; the same command goes on from there"):
            loop.run(train, score, **interrupt)
    finally:
        signal.signal(signal.SIGINT, before)
    again, train, score = loop_of(tmp_path / "a.safetensors")
    again.run(train, score)
    assert again.history == unbroken.history and again.best_epoch == unbroken.best_epoch
    for name, x in unbroken.modules["model"].state_dict().items():
        assert torch.equal(again.modules["model"].state_dict()[name], x)
        assert torch.equal(again.best[name], unbroken.best[name])


def test_looks_patience_and_another_configuration(tmp_path):
    loop, train, _ = loop_of(epochs=9, eval_every=2, patience=3)
    scores = iter([1.0, 3.0, 2.0, 2.5, 9.0])
    loop.run(train, lambda: next(scores))
    assert [(look["epoch"], look["val"]) for look in loop.history] == [(1, 1.0), (3, 3.0), (5, 2.0)]
    assert (loop.best_epoch, loop.best_score, loop.epoch) == (3, 3.0, 7)  # three epochs without a better one
    loop, train, score = loop_of(tmp_path / "a.safetensors")
    loop.run(train, score)
    other, train, score = loop_of(tmp_path / "a.safetensors")
    other.identity = {"a": 2}
    with pytest.raises(CheckpointError, match="another configuration: a is 1 there and 2 here"):
        other.run(train, score)


# --- stages ---------------------------------------------------------------------------------------------


def test_a_stage_is_computed_once(tmp_path):
    calls, file = [], tmp_path / "stage" / "x.json"

    def compute():
        calls.append(1)
        assert file.parent.resolve() in checkpoint._held  # from other processes
        checkpoint.write_json(file, {"a": 1})
        return {"a": 1}

    find = lambda: read_json(file) if file.exists() else None
    assert stage(World(), file.parent, find, compute) == {"a": 1} == stage(World(), file.parent, find, compute)
    assert calls == [1]


def test_a_trained_network_is_trained_once(tmp_path):
    model, calls = nn.Linear(2, 1), []

    def train():
        calls.append(1)
        (tmp_path / "n" / "checkpoint.safetensors").write_text("")
        torch.nn.init.constant_(model.weight, 3)
        return {"seconds": 1.0}

    assert trained_network(tmp_path / "n", model, train, World()) == {"seconds": 1.0}
    torch.nn.init.constant_(model.weight, 0)
    assert trained_network(tmp_path / "n", model, train, World()) == {"seconds": 1.0}
    assert calls == [1] and bool((model.weight == 3).all())
    assert [p.name for p in (tmp_path / "n").iterdir()] == ["weights.safetensors"]


def test_some_differences():
    assert some(["a", "b"]) == "a; b" and some(list("abcde")) == "a; b; c; and 2 more"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "Expecting value"),
        (b'{"a": 1', "delimiter"),
        (b"\xff\xfe", "utf-8"),
        (b"[1]", "a list instead of a mapping"),
        (b"[" * 100_000, "nested too deep"),
        (b'{"a": Infinity}', "Infinity where a finite number should be"),
        (b'{"a": NaN}', "NaN where a finite number should be"),
    ],
)
def test_damaged_files_of_a_run(tmp_path, content, reason):
    """One reader says which file, what is wrong and what to do; the commands end in that line."""
    file = tmp_path / "result.json"
    file.write_bytes(content)
    with pytest.raises(
        CheckpointError, match=rf"result.json is damaged \(.*{reason}.*\): it is left as it is; delete it"
    ):
        finished(file, {}, 0)
    for name in ("seed0/result.json", "config.json"):
        folder = tmp_path / name.replace("/", "-")
        (folder / "seed0").mkdir(parents=True)
        (folder / "config.json").write_text("{}")
        (folder / "seed0" / "result.json").write_text("{}")
        (folder / name).write_bytes(content)
        assert_one_line(
            run("distill", "digits", *SMALL, "--resume", folder), "config.json" if name == "config.json" else ""
        )
        assert (folder / name).read_bytes() == content


# --- networks named in files ----------------------------------------------------------------------------


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_nets.py").write_text(
        "import os\nfrom os import system\nfrom torch import nn\n\n\ndef small(width=2):\n    return nn.Linear(width, 1)\n\n\n"
        "class Big(nn.Linear):\n    def __init__(self):\n        super().__init__(9, 1)\n"
    )
    yield tmp_path
    sys.modules.pop("my_nets", None)


def test_names_from_files_are_of_the_working_directory(here):
    assert build_module("my_nets:small", {"width": 5}, "model").in_features == 5
    assert build_module("my_nets:Big", {}, "model").in_features == 9
    for name in ("os:system", "subprocess:run", "my_nets:system", "torch.nn:Linear", "builtins:exec", "my_nets:os"):
        with pytest.raises(
            ConfigError, match=rf"model.name = '{name}' is no class or function of a module in the working"
        ):
            build_module(name, {}, "model")
    assert (
        build_module("torch.nn:Linear", {"in_features": 2, "out_features": 1}, "model", {"torch.nn:Linear"}).in_features
        == 2
    )


@pytest.mark.parametrize("where", ["config.json", "recipe", "plan"])
def test_nothing_in_a_file_is_run(here, where):
    name = {"name": "os:system", "args": {"command": "touch was_run"}}
    content = {"data": "digits", "model": name, "weights": None, "train": {"epochs": 1}}
    (here / "bad.yaml").write_text(json.dumps(content))
    if where == "config.json":
        (here / "run").mkdir()
        (here / "run" / "config.json").write_text(json.dumps(content))
        done = run("compress", "bad.yaml", "--resume", "run")
    elif where == "recipe":
        done = run("compress", "bad.yaml")
    else:
        (here / "plan.yaml").write_text(json.dumps({"experiments": {"a": {"compress": "bad.yaml", "rows": {"b": {}}}}}))
        done = run("grid", "plan.yaml")
    assert_one_line(done, "os:system", "working directory", "--set model.name=os:system")
    assert not (here / "was_run").exists()


# --- the folder of a command ----------------------------------------------------------------------------


def test_the_commands_have_folders_of_their_own(here):
    done = run("distill", "digits", *SMALL)
    assert done.exit_code == 0, done.output
    assert (here / "runs/distill/digits/seed0/result.json").exists()
    made_by = read_json(here / "runs/distill/digits/config.json")["made_by"]
    assert made_by == {"command": "distill", "recipe": "digits"}
    line = assert_one_line(run("compress", "digits", "--out", "runs/distill/digits"), "fastkd distill", "another --out")
    assert len(line) < 200
    assert_one_line(run("compress", "digits", "--resume", "runs/distill/digits"), "holds a run of fastkd distill")
    assert_one_line(run("distill", "cora", "--resume", "runs/distill/digits"), "begun with the recipe 'digits'")
    assert_one_line(run("distill", "digits", "--resume", "runs/distill/digits", "--out", "b"), "leave out --out")
    changes = [
        x for k in ("lr=1", "weight_decay=1", "momentum=0.5", "clip_norm=1") for x in ("--set", f"student.train.{k}")
    ]
    assert_one_line(run("distill", "digits", *SMALL, *changes), "student.train.lr is", "and 1 more")


def test_a_folder_of_the_version_before_goes_on(here):
    from fastkd.distill import load_config

    config = load_config("digits", SMALL[1::2]).model_dump(mode="json")
    (here / "runs/digits").mkdir(parents=True)
    (here / "runs/digits/config.json").write_text(json.dumps(config))
    assert run("distill", "digits", "--resume", "runs/digits").exit_code == 0
    assert_one_line(run("compress", "digits", "--resume", "runs/digits"), "holds a run of fastkd distill")


def test_a_second_run_is_refused_before_it_writes(here):
    code = (
        "import sys\nfrom pathlib import Path\nfrom fastkd.runtime.checkpoint import alone\n"
        "with alone(Path('out')):\n    print('held', flush=True)\n    sys.stdin.read()"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=here
    )
    assert other.stdout.readline() == "held\n"
    try:
        assert_one_line(run("distill", "digits", *SMALL, "--out", "out"), "another process is at work")
        assert not list((here / "out").iterdir())
    finally:
        other.kill()
        other.communicate()


def test_what_is_wrong_is_found_before_the_teacher_is_trained(here):
    for changes, words in (
        (["student.model.args.hidden=0"], ["hidden"]),
        (["losses.lsp.student_layer=layers.9"], ["layers.9", "layers.1"]),
        (["losses.gsp.weight=1"], ["losses.gsp.student_layer is missing"]),
        (["losses.lsp.args.kernel=rbff"], ["rbff"]),
    ):
        settings = [x for change in ["teacher.train.epochs=100000", *changes] for x in ("--set", change)]
        assert_one_line(run("distill", "digits", *settings), *words)
    assert not list(here.glob("runs/**/*.safetensors"))


def test_names_are_no_markup_and_commands_can_be_copied(here):
    folder = "a folder [/x] with a name that is longer than a line of the terminal has columns, to be sure"
    done = run("distill", "digits", *SMALL, "--out", folder)
    assert done.exit_code == 0, done.output
    assert f"`fastkd report '{folder}'`" in done.output
    assert_one_line(run("report", "br[/x]ket"), "br[/x]ket")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["distill", "digits", "--device", "mps"], ["device must be cpu, cuda or cuda:N, got 'mps'"]),
        (["compress", "digits", "--device", "meta"], ["device must be cpu, cuda or cuda:N, got 'meta'"]),
        (["grid", "empty.yaml"], ["empty.yaml", "no experiment"]),
        (["grid", "no_rows.yaml"], ["no_rows.yaml", "rows"]),
        (["distill", "digits", "--set", "data=nowhere"], ["nowhere"]),
        (["report", "nowhere"], ["nowhere"]),
        (["compress", "digits", "--weights", "empty.npz"], ["empty.npz"]),
    ],
)
def test_wrong_commands_end_in_one_line(here, arguments, words):
    (here / "empty.yaml").write_text("experiments: {}\n")
    (here / "no_rows.yaml").write_text("experiments: {a: {recipe: digits, rows: {}}}\n")
    (here / "empty.npz").write_bytes(b"")
    assert_one_line(run(*arguments), *words)


def test_errors_that_nobody_foresaw_are_one_line_too(here, monkeypatch):
    def broken(*_):
        raise KeyError("deep inside")

    monkeypatch.setattr("fastkd.report.write", broken)
    assert_one_line(run("report", "x"), "KeyError", "deep inside", "FASTKD_TRACEBACK=1")
    monkeypatch.setenv("FASTKD_TRACEBACK", "1")
    assert isinstance(run("report", "x").exception, KeyError)


def test_version_and_info():
    import fastkd

    assert run("--version").output.strip() == f"fastkd {fastkd.__version__}"
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        [line] = [line for line in run("info").output.splitlines() if "threads" in line]
    finally:
        torch.set_num_threads(before)
    assert "1" in line and "yes" not in line


# --- locks ----------------------------------------------------------------------------------------------


def test_where_a_folder_cannot_be_locked_a_file_is(tmp_path, monkeypatch):
    """NFS: EBADF for a folder that is opened for reading."""
    real = fcntl.flock

    def flock(handle, operation):
        if os.path.isdir(f"/proc/self/fd/{handle}"):
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        real(handle, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with alone(tmp_path / "run"):
            other = os.open(tmp_path / "run" / ".lock", os.O_RDWR)
            with pytest.raises(BlockingIOError):
                real(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
            real_held = checkpoint._held.copy()
            checkpoint._held.clear()  # as another process sees it
            with pytest.raises(Busy, match="another process is at work there"), alone(tmp_path / "run"):
                pass
            checkpoint._held.update(real_held)
            os.close(other)
        with alone(tmp_path / "run"):  # let go of
            pass


def test_where_nothing_can_be_locked_the_user_is_warned(tmp_path, monkeypatch):
    def none(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", none)
    with (
        pytest.warns(RuntimeWarning, match="run: its file system has no locks .*start only one"),
        alone(tmp_path / "run"),
    ):
        pass


def test_devices():
    for name in ("mps", "meta", "xpu", "gpu"):
        with pytest.raises(ValueError, match=f"device must be cpu, cuda or cuda:N, got '{name}'"):
            usable(name)
