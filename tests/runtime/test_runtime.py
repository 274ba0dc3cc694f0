"""Files that are whole or absent, whoever is killed; checksums; fingerprints."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from torch import nn

from fastkd.runtime import atomic, fingerprint

WRITER = """
import sys, time
from pathlib import Path
from fastkd.runtime import atomic

def write(part):
    part.write_text("half")
    (part.parent / "beside").write_text("more")
    print("begun", flush=True)
    time.sleep(float(sys.argv[2]))
    part.write_text("of " + sys.argv[3])

atomic.replace(Path(sys.argv[1]), write)
"""


def writer(path, seconds, name):
    """A process in the middle of a write."""
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path), str(seconds), name], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "begun\n"
    return process


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def test_a_killed_writer_leaves_nothing_behind(tmp_path):
    """What it left is removed by the next writer of the same file, and by no other."""
    path, other = tmp_path / "a[1].json", tmp_path / "b.json"
    path.write_text("before")
    process = writer(path, 60, "the killed one")
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert path.read_text() == "before"
    (left,) = (name for name in names(tmp_path) if name != path.name)
    assert left.startswith(".a[1].json.")
    atomic.replace(other, lambda part: part.write_text("other"))
    assert names(tmp_path) == sorted([left, path.name, other.name])
    atomic.replace(path, lambda part: part.write_text("after"))
    assert path.read_text() == "after" and names(tmp_path) == [path.name, other.name]


def test_a_living_writer_is_left_alone(tmp_path):
    path = tmp_path / "a.json"
    process = writer(path, 2, "the slow one")
    atomic.replace(path, lambda part: part.write_text("quick"))
    assert path.read_text() == "quick" and len(names(tmp_path)) == 2
    assert process.wait() == 0
    assert path.read_text() == "of the slow one" and names(tmp_path) == ["a.json"]


def test_a_failed_write_leaves_what_was_there(tmp_path):
    path = tmp_path / "sub" / "a.json"
    atomic.replace(path, lambda part: part.write_text("before"))

    def fails(part):
        part.write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        atomic.replace(path, fails)
    assert path.read_text() == "before" and names(path.parent) == ["a.json"]


def test_folders_that_only_look_abandoned(tmp_path):
    """A file, a link and a folder of another name stay."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / ".a.json.abcdefgh.part").symlink_to(tmp_path / "elsewhere")
    (tmp_path / ".a.json.abcdefgi.part").write_text("a file")
    (tmp_path / ".a.json.settings").mkdir()
    atomic.replace(tmp_path / "a.json", lambda part: part.write_text("x"))
    assert len(names(tmp_path)) == 5


def test_many_writers_at_once(tmp_path):
    """None takes the folder of another for an abandoned one."""
    path, processes = tmp_path / "a.json", []
    for k in range(4):
        if (pid := os.fork()) == 0:
            try:
                until = time.monotonic() + 0.3
                while time.monotonic() < until:
                    atomic.replace(path, lambda part: part.write_text(json.dumps([k] * 100)))
                os._exit(0)
            finally:
                os._exit(1)
        processes.append(pid)
    assert [os.waitpid(pid, 0)[1] for pid in processes] == [0] * 4
    assert len(set(json.loads(path.read_text()))) == 1 and names(tmp_path) == ["a.json"]


def test_fingerprints_stay_what_they_are():
    """Checkpoints, records and names of folders hold them."""
    x = torch.arange(6, dtype=torch.float32).view(2, 3)
    assert fingerprint.of_tensors(x) == "e2c0a71510b5394d"
    assert fingerprint.of_tensors(x.t()) != fingerprint.of_tensors(x) == fingerprint.of_tensors(x.flatten())
    assert fingerprint.of_tensors("a", x, "b") == "1e28d85f393c49c5"
    layer = nn.Linear(3, 2, dtype=torch.bfloat16)
    with torch.no_grad():
        layer.weight.copy_(x)
        layer.bias.zero_()
    assert fingerprint.of_weights(layer) == "25909426959d93de"
    config = {"seed": 0, "data": "cora", "network": {"model": {"name": "gat"}, "lr": 0.005}}
    assert fingerprint.of_config(config) == fingerprint.of_config(dict(reversed(config.items()))) == "bd9f0e7ee226"
