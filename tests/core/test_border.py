"""The border to the native core: names agree on both sides, raw calls are checked, and a signal is heard."""

import ast
import enum
import pathlib
import re
import signal
import subprocess
import sys
import time

import pytest
import torch

import fastkd
from fastkd import _C, _ops
from fastkd._ops import structs

STUB = ast.parse((pathlib.Path(fastkd.__file__).parent / "_C.pyi").read_text())
CLASSES = {node.name: node for node in STUB.body if isinstance(node, ast.ClassDef)}


def public(names):
    return {name for name in names if not name.startswith("_")}


def functions(body):
    return {node.name: node for node in body if isinstance(node, ast.FunctionDef)}


def arguments(node):
    return [a.arg for a in (*node.args.args, *node.args.kwonlyargs) if a.arg != "self"]


def native_arguments(function):
    """Of a function of pybind11, by the signature that its documentation begins with."""
    signature = re.match(r"\w+\((.*)\) -> ", function.__doc__)[1]
    return [a for a in re.findall(r"(?:^|, )(\w+): ", signature) if a != "self"]


def same_functions(body, native):
    for name, node in functions(body).items():
        assert arguments(node) == native_arguments(getattr(native, name)), name


def members(name):
    """Functions and attributes of a protocol of the stub, with those of the one that it extends."""
    node = CLASSES[name]
    inherited = [member for base in node.bases if base.id in CLASSES for member in members(base.id)]
    return inherited + node.body


def attributes(body):
    return {node.target.id for node in body if isinstance(node, ast.AnnAssign)}


@pytest.fixture(params=["_C", "_simt"])
def module(request):
    if request.param == "_C":
        return _C
    from conftest import simt_module

    return simt_module()


def test_stub_is_the_module(module):
    stub_only = {"Backend", "Host", "Network"}
    there = public(vars(module)) | {"cuda"}
    assert there == public(functions(STUB.body)) | public(attributes(STUB.body)) | CLASSES.keys() - stub_only
    same_functions(STUB.body, module)
    for name, backend in (("Host", module.cpu), ("Backend", getattr(module, "cuda", None))):
        if backend is None:
            continue
        body = members(name)
        # "taken" is what bench and tests of the native core alone may ask for.
        assert public(vars(backend)) == functions(body).keys() | attributes(body)
        same_functions(body, backend)
        network = CLASSES["Network"].body
        assert public(vars(backend.Network)) - {"taken"} == public(functions(network))
        for method, node in functions(network).items():
            assert arguments(node) == native_arguments(vars(backend.Network)[method]), method


def test_stub_has_the_enums(module):
    for name, node in CLASSES.items():
        if [base.id for base in node.bases] != ["IntEnum"]:
            continue
        native = getattr(module, name)
        assert issubclass(native, enum.IntEnum)
        assert {m.name: m.value for m in native} == {a.targets[0].id: a.value.value for a in node.body}
        assert [m.value for m in native] == list(range(len(native)))


def test_fields_agree(module):
    structs.compare(module.fields)
    moved = {**module.fields, "Csr": ("col", "rowptr", "rows", "cols", "edges", "wide")}
    with pytest.raises(ImportError, match=r"Csr has the fields \('col', 'rowptr'"):
        structs.compare(moved)
    with pytest.raises(ImportError, match="built for other sources"):
        structs.compare({k: v for k, v in module.fields.items() if k != "Node"})


def test_by_name_keeps_the_order():
    for name, names in structs.fields().items():
        cls = getattr(structs, name)
        made = structs.by_name(cls)(**{n: n for n in reversed(names)})
        assert type(made) is cls and tuple(made) == names
        with pytest.raises(TypeError):
            structs.by_name(cls)(**{n: n for n in names[1:]})


def test_tuples_are_checked():
    for op, message in (((1, 2), "KernelValues must be a tuple of 5"), ((0, (0,) * 5, 2, 0, 0), "Kernel must be")):
        with pytest.raises(ValueError, match=message):
            _C.cpu.kernel_values(op, 1)
    kernel = structs.Kernel(metric=4, shape=0, root=0, degree=1, scale=1.0, param=1.0)
    values = structs.KernelValues(edges=0, kernel=kernel, acc=_C.DType.f32, r=0, values=0)
    with pytest.raises(ValueError, match=r"metric must be in \[0, 3\], got 4"):
        _C.cpu.kernel_values(values, 1)
    wide = values._replace(kernel=kernel._replace(metric=0, degree=2**32 + 1))
    with pytest.raises(ValueError, match=r"degree must be in .*, got 4294967297"):
        _C.cpu.kernel_values(wide, 1)


INT64 = torch.int64


@pytest.mark.parametrize(
    "rowptr, col, error, message",
    [
        # Differences of the first wrap to something positive.
        ([0, 2**63 - 1, -2, 0], [], ValueError, r"rowptr\[1\] = 9223372036854775807 after rowptr\[0\] = 0"),
        ([0, 2, 1, 2], [0, 0], ValueError, r"rowptr must rise from 0 to E = 2, got rowptr\[2\] = 1 after rowptr\[1\]"),
        ([1, 1, 1, 2], [0, 0], ValueError, r"got rowptr\[0\] = 1"),
        ([0, 0, 0, 1], [0, 0], ValueError, r"got rowptr\[3\] = 1"),
        ([0, -(2**63), 0, 2], [0, 0], ValueError, r"got rowptr\[1\] = -9223372036854775808"),
        ([0, 1, 2, 2], [0, 3], IndexError, r"col\[1\] = 3 is out of range: valid indices are in \[0, 3\)"),
        ([0, 1, 2, 2], [-1, 0], IndexError, r"col\[0\] = -1 is out of range"),
    ],
)
def test_raw_graph_calls_are_checked(rowptr, col, error, message):
    bad = torch.tensor(rowptr), torch.tensor(col, dtype=INT64)
    good = torch.tensor([0, 0, 0, 0]), torch.empty(0, dtype=INT64)
    for call in (
        lambda: _ops.csr_transpose(*bad, 3),
        lambda: _ops.csr_union(*bad, *good, 3),
        lambda: _ops.csr_union(*good, *bad, 3),
    ):
        with pytest.raises(error, match=message):
            call()
    # What a device does instead finds the same position.
    k = _C.cpu.csr_first_wrong(_ops.native.csr(*bad, 3))
    assert k == _ops.graph._first_wrong(*bad, 3) >= 0
    assert _ops.graph._first_wrong(*good, 3) == _C.cpu.csr_first_wrong(_ops.native.csr(*good, 3)) == -1


def test_raw_sizes_are_checked():
    e = torch.zeros(1, dtype=INT64)
    for sizes, name in (((2**40, 1), "num_src"), ((1, 2**31), "num_dst"), ((-1, 1), "num_src")):
        with pytest.raises(ValueError, match=rf"{name} must be in \[0, 2\*\*31\), got"):
            _ops.csr_from_coo(e, e, *sizes, True)
    with pytest.raises(ValueError, match="num_src must be in"):
        _ops.csr_transpose(e, e[:0], 2**62)


def test_geometry_that_would_wrap():
    """A span of 2**63 + 1 pixels over as much padding."""
    x, weight, mask = torch.ones(1, 1, 4, 4), torch.ones(1, 1, 3, 3), torch.ones(1, 1, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"padding must be two integers in \[0, 2\*\*31\)"):
        fastkd.masked_conv2d(x, weight, in_mask=mask, padding=2**62, dilation=2**62)


# --- signals ------------------------------------------------------------------------------------------

LONG = """
import signal, sys, time, torch
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs are started deaf to it
import fastkd
from fastkd import Graph, lsp_loss, _ops
threads, what = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(threads)
g = torch.Generator().manual_seed(0)
small = torch.randint(0, 50, (2, 400), generator=g), torch.randn(50, 8, generator=g)
if what == "loss":
    x = torch.randn(2000, 2048, generator=g)
    graph = Graph.from_edge_index(torch.randint(0, 2000, (2, 3_000_000), generator=g), 2000)
    run = lambda: [lsp_loss(x, x, graph, kernel="laplacian") for _ in range(50)]
elif what == "network":
    w = torch.randn(256, 256, 3, 3, generator=g)
    x, mask = torch.randn(64, 256, 56, 56, generator=g), torch.ones(8, 256, dtype=torch.bool)
    run = lambda: fastkd.masked_conv2d(x, w, in_mask=mask.logical_and(torch.rand(8, 256, generator=g) > 0.1), padding=1)
else:
    w = torch.randn(256, 256, 3, 3, generator=g, requires_grad=True)
    x, mask = torch.randn(64, 256, 28, 28, generator=g), torch.ones(8, 256, dtype=torch.bool)
    cotangent = torch.ones(8, 64, 256, 28, 28)
    run = lambda: _ops.masked_conv2d_backward(cotangent, x, w, mask, None, [1, 1], [1, 1], [1, 1], 1, [True] * 3)
expected = lsp_loss(small[1], small[1] * 2, small[0])
print("ready", flush=True)
try:
    run()
except KeyboardInterrupt:
    print("interrupted", bool(torch.equal(lsp_loss(small[1], small[1] * 2, small[0]), expected)), flush=True)
else:
    print("ran to its end", flush=True)
"""


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("what", ["loss", "network", "backward"])
def test_ctrl_c_is_heard(what, threads):
    process = subprocess.Popen(
        [sys.executable, "-c", LONG, str(threads), what], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        assert process.stdout.readline() == "ready\n"
        time.sleep(1)  # inside the native call
        process.send_signal(signal.SIGINT)
        start = time.monotonic()
        assert process.stdout.readline() == "interrupted True\n"
        assert time.monotonic() - start < 20
        assert process.wait(60) == 0
    finally:
        process.kill()


def test_a_handler_that_returns_ends_nothing():
    code = """
import signal, torch
from fastkd import Graph, lsp_loss
heard = []
signal.signal(signal.SIGALRM, lambda *_: heard.append(1))
torch.set_num_threads(1)
x = torch.randn(1000, 512)
graph = Graph.from_edge_index(torch.randint(0, 1000, (2, 1_000_000)), 1000)
expected = lsp_loss(x, x.flip(0), graph)
signal.setitimer(signal.ITIMER_REAL, 0.05, 0.05)
got = lsp_loss(x, x.flip(0), graph)
signal.setitimer(signal.ITIMER_REAL, 0)
assert torch.equal(got, expected) and heard
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
