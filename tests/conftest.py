"""Where the kernels run: the installed package on the CPU, the CUDA sources on the host (SIMT), or a GPU.

FASTKD_SIMT_DIR names the folder of the module that ``make simt`` builds; it holds both back ends,
so that one build with sanitizers (``make sanitize``) covers both.
"""

import importlib
import os
import sys

if processes := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):
    # Before torch is loaded: tests in several processes at a time have two threads each, which do not spin as they wait.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(2, (os.cpu_count() or 1) // processes)))
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch

from fastkd import _ops

# Processes that tests start import the tests' modules, too.
FOLDERS = [path for path in sys.path if path.startswith(os.path.dirname(__file__))]
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [*FOLDERS, os.environ.get("PYTHONPATH")]))
SIMT_DIR = os.environ.get("FASTKD_SIMT_DIR")
SANITIZED = os.environ.get("FASTKD_SANITIZED") == "1"


def simt_module():
    if SIMT_DIR is None:
        pytest.skip("FASTKD_SIMT_DIR is not set: `make test` builds the CUDA sources for the host")
    if SIMT_DIR not in sys.path:
        sys.path.insert(0, SIMT_DIR)
    module = importlib.import_module("_simt")
    _ops.structs.compare(module.fields)  # it must be of the same sources
    return module


@pytest.fixture(scope="session", autouse=True)
def elsewhere(tmp_path_factory):
    """Not the source folder, from which a process that a test starts would import fastkd without its core."""
    before = os.getcwd()
    os.chdir(tmp_path_factory.mktemp("elsewhere"))
    yield
    os.chdir(before)


@pytest.fixture(scope="module")
def one_thread():
    """For tiny tensors: more threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=["cpu", "simt", "cuda"])
def device(request, monkeypatch):
    """A torch device; for "simt" the CPU, with the CUDA sources in place of the CPU kernels."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    if request.param == "cuda":
        if not torch.cuda.is_available() or _ops.backends["cuda"] is None:
            pytest.skip("no CUDA device, or a build without CUDA")
        return torch.device("cuda")
    if request.param == "simt":
        monkeypatch.setitem(_ops.backends, "cpu", simt_module().cuda)
    elif SANITIZED:
        monkeypatch.setitem(_ops.backends, "cpu", simt_module().cpu)
        monkeypatch.setattr(_ops.native, "host", simt_module().cpu)
    return torch.device("cpu")


@pytest.fixture
def poisoned():
    """Memory from torch.empty holds NaN (or the largest integer): what is not written is seen."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def fresh_warnings(monkeypatch):
    from fastkd import lsp

    monkeypatch.setattr(lsp, "_warned", {"student", "teacher"})
