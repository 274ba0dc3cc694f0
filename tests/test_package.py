"""What comes with the package: configuration, commands, packaging rules, the shim's own test."""

import os
import pathlib
import shutil
import subprocess
import sys

import pytest

import fastkd

ROOT = pathlib.Path(__file__).resolve().parent.parent


def run(*args, cwd, **env):
    return subprocess.run(
        [sys.executable, "-m", "fastkd", *args],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "COLUMNS": "100", **env},
    )


@pytest.mark.parametrize("args", [(), ("info",)])
def test_info(tmp_path, args):
    done = run(*args, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for key in fastkd.show_config():
        assert key in done.stdout
    assert fastkd.__version__ in done.stdout


def test_isa_can_be_chosen(tmp_path):
    assert "generic" in run("info", cwd=tmp_path, FASTKD_ISA="generic").stdout


def test_unknown_command_is_an_error(tmp_path):
    done = run("fly", cwd=tmp_path)
    assert done.returncode == 2 and "No such command 'fly'" in done.stderr


def test_demo_runs(tmp_path):
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    done = run("demo", "--epochs", "1", "--seeds", "1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for row in ("teacher", "student alone", "KD + LSP", "runs/demo/report.html"):
        assert row in done.stdout
    assert "Warning" not in done.stderr
    assert (tmp_path / "runs/demo/report.html").stat().st_size > 50_000


def test_every_isa_gives_the_same_loss(tmp_path):
    """The generic code is what machines without AVX2 run."""
    code = """
import torch, fastkd
torch.manual_seed(0)
e = torch.randint(0, 300, (2, 3000)); e = torch.cat((e, e.flip(0)), 1)
for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
    x = torch.randn(300, 21).to(dtype).requires_grad_(); t = torch.randn(300, 40).to(dtype)
    for kernel in ("rbf", "laplacian", "cosine"):
        loss = fastkd.lsp_loss(x, t, e, kernel=kernel)
        print(float(loss), float(torch.autograd.grad(loss, x)[0].double().norm()))
"""
    outputs = {}
    for isa in ("generic", "avx2", "avx512"):
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=300,
            env={**os.environ, "FASTKD_ISA": isa},
        )
        assert done.returncode == 0, done.stderr
        outputs[isa] = [float(v) for v in done.stdout.split()]
    for values in outputs.values():
        assert values == pytest.approx(outputs["generic"], rel=2e-3)  # gradients in half precision
        assert values[:6] == pytest.approx(outputs["generic"][:6], rel=2e-5)


def test_core_knows_no_torch():
    for path in (ROOT / "csrc").rglob("*.*"):
        text = path.read_text()
        assert "torch/" not in text and "ATen" not in text and "c10::" not in text, path
    assert "torch" not in (ROOT / "pyproject.toml").read_text().split("[project]")[0]


def test_public_names():
    for name in fastkd.__all__:
        assert getattr(fastkd, name) is not None
    assert (pathlib.Path(fastkd.__file__).parent / "py.typed").exists()


SUBPACKAGES = ["compress", "data", "distill", "evolve", "models", "population"]


def test_dir_is_the_api():
    assert dir(fastkd) == [
        "Graph",
        "LSPLoss",
        "PopulationEvaluator",
        "TeacherStructure",
        "__version__",
        "compact",
        "compress",
        "data",
        "distill",
        "evolve",
        "kernels",
        "lsp_loss",
        "masked_conv2d",
        "models",
        "population",
        "reference",
        "show_config",
        "teacher_structure",
    ]
    assert dir(fastkd) == sorted([*fastkd.__all__, *SUBPACKAGES])
    with pytest.raises(AttributeError, match="module 'fastkd' has no attribute 'evaluate'"):
        _ = fastkd.evaluate


def python(code, cwd, **env):
    return subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, timeout=300, env={**os.environ, **env}
    )


def test_subpackages_are_loaded_when_they_are_touched(tmp_path):
    """And name their own extra where it is not installed. Nobody waits for what the name `fastkd` does not need."""
    code = f"""
import sys, types
import fastkd
early = {{"fastkd.evolve", "fastkd.population", "fastkd.runtime", "pydantic", "rich", "typer"}} & set(sys.modules)
assert not early, early
sys.modules["pydantic"] = None
for name in {SUBPACKAGES}:
    try:
        assert isinstance(getattr(fastkd, name), types.ModuleType)
    except ImportError as error:
        print(error)
import fastkd.evolve as package
assert isinstance(package, types.ModuleType) and callable(package.evolve) and fastkd.evolve is package
from fastkd import compact, population, PopulationEvaluator
assert compact is population.compact is fastkd.compact and PopulationEvaluator is population.PopulationEvaluator
"""
    done = python(code, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        f'fastkd.{name} needs pydantic: pip install "fastkd[{name}]", or from a clone of fastkd pip install ".[{name}]"'
        for name in ("compress", "distill")
    ]


@pytest.mark.large
def test_type_checkers_see_the_subpackages(tmp_path):
    pytest.importorskip("mypy", reason="mypy is not installed")
    names = [f"fastkd.{name}" for name in (*SUBPACKAGES, "compact", "PopulationEvaluator")]
    (tmp_path / "use.py").write_text("import fastkd\n" + "".join(f"reveal_type({name})\n" for name in names))
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--follow-imports=silent", "--ignore-missing-imports", "use.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=600,
    )
    revealed = [line for line in done.stdout.splitlines() if "Revealed type" in line]
    assert len(revealed) == len(names), done.stdout + done.stderr
    assert all("ModuleType" in line for line in revealed[: len(SUBPACKAGES)]), done.stdout
    assert not any("Any" in line.split("is", 1)[1][:8] for line in revealed), done.stdout


@pytest.mark.parametrize("source", [True, False])
@pytest.mark.parametrize("statement", ["import fastkd", "from fastkd import data", "import fastkd.cli"])
def test_without_a_built_core(tmp_path, source, statement):
    """In a source folder that was never built, or with a wheel for another Python: one sentence, and what to do."""
    package = pathlib.Path(fastkd.__file__).parent
    shutil.copytree(package, tmp_path / "fastkd", ignore=shutil.ignore_patterns("_C*.so", "__pycache__"))
    if source:
        (tmp_path / "CMakeLists.txt").touch()
    done = python(statement, tmp_path, PYTHONPATH=str(tmp_path))
    assert done.returncode == 1 and "circular import" not in done.stderr
    line = done.stderr.strip().splitlines()[-1]
    if source:
        wanted = (
            f"ImportError: {tmp_path / 'fastkd'} is fastkd's source folder, whose native core is not built: install"
        )
        assert line.startswith(wanted) and f"`pip install {tmp_path}`" in line and "`make setup`" in line
    else:
        assert line.startswith(f"ImportError: {tmp_path / 'fastkd'} has no native core for this Python (fastkd._C)")


def test_simt_selftest(tmp_path):
    """The shim itself: collectives, shared memory, deadlocks, the order of threads."""
    import shutil

    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    simt = ROOT / "tests" / "simt"
    binary = tmp_path / "selftest"
    subprocess.run(
        [compiler, "-std=c++20", "-O2", f"-I{simt}", simt / "simt.cpp", simt / "selftest.cpp", "-o", binary],
        check=True,
        timeout=300,
    )
    done = subprocess.run([binary], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


def test_convolutional_networks_do_without_torch_geometric(tmp_path):
    """Engineers who compress CNNs do not install it."""
    code = """
import sys
sys.modules["torch_geometric"] = None
import fastkd, torch
from fastkd import data, models
from fastkd.models import build_cnn
fastkd.PopulationEvaluator(build_cnn("lenet").eval(), torch.zeros(1, 1, 28, 28))
for f in (lambda: models.GAT, lambda: data.load("cora")):
    try:
        f()
    except ImportError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count('needs torch-geometric: pip install "fastkd[distill]"') == 2
