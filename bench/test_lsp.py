"""One step (loss and its gradient to the student) of every case, with every peer, with the
teacher's features and with a cached teacher. Asserts that all agree, and nothing about time."""

from __future__ import annotations

import gc
import math
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fastkd

from . import gather, memory
from .cases import SPECS, Absent, Case, load
from .peers import PEERS, Loss, step, why_not

FORMS = {"full": False, "cached": True}

# Of the loss, and of the gradient in the 2-norm. A bf16 gradient is rounded to 8 bits.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 1e-2}


def timer() -> float:
    """The clock, when all that was asked of the GPU is done."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


def seconds(function: Callable[[], object], repeats: int = 1) -> float:
    start = timer()
    for _ in range(repeats):
        function()
    return (timer() - start) / repeats


pytestmark = [
    pytest.mark.benchmark(timer=timer, disable_gc=True),
    pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning"),  # torch_scatter
]


@dataclass
class Prepared:
    """A case with what is known of it before any peer is timed."""

    case: Case
    info: dict[str, Any]
    absent: dict[str, dict[str, str]]  # form -> peer -> why it is not run
    reference: dict[str, tuple[Tensor, Tensor]]  # form -> fastkd's loss and gradient
    fused: dict[str, Loss]


def environment(device: torch.device) -> dict[str, Any]:
    config = fastkd.show_config()
    model = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.split(": ")[1] for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return {
        "device": device.type,
        "cpu": model,
        "gpu": config["cuda_device"],
        **{key: config[key] for key in ("fastkd", "torch", "python", "isa", "threads", "compiler")},
    }


def prepare(case: Case) -> Prepared:
    cold = {"student": gather.bandwidth(case.student), "teacher": gather.bandwidth(case.teacher)}
    own = {
        "student": gather.bandwidth(case.student, case.graph.col),
        "teacher": gather.bandwidth(case.teacher, case.graph.col),
    }
    builds = [seconds(lambda: fastkd.Graph.from_edge_index(case.edge_index, case.num_nodes)) for _ in range(5)]
    info = {
        "case": case.name,
        "N": case.num_nodes,
        "E": case.num_edges,
        "student_dim": case.student.shape[1],
        "teacher_dim": case.teacher.shape[1],
        "dtype": str(case.student.dtype).removeprefix("torch."),
        "symmetric": case.graph.is_symmetric,
        "max_degree": case.graph.max_degree,
        "gather_GBs": {key: speed / 1e9 for key, speed in cold.items()},
        "gather_own_order_GBs": {key: speed / 1e9 for key, speed in own.items()},
        "bound_ms": {form: 1e3 * gather.bound(case, cached, *cold.values()) for form, cached in FORMS.items()},
        "bound_own_order_ms": {form: 1e3 * gather.bound(case, cached, *own.values()) for form, cached in FORMS.items()},
        "build_ms": 1e3 * statistics.median(builds),
        "tolerance": TOLERANCE[case.student.dtype],
        **environment(case.student.device),
    }
    reasons = {form: {peer: why_not(case, peer, cached) for peer in PEERS} for form, cached in FORMS.items()}
    absent = {form: {peer: why for peer, why in of.items() if why} for form, of in reasons.items()}
    fused = {form: PEERS["fastkd"](case, cached) for form, cached in FORMS.items()}
    reference = {form: step(loss, case) for form, loss in fused.items()}
    return Prepared(case, info, absent, reference, fused)


@pytest.fixture(scope="module")
def prepared(request: pytest.FixtureRequest, device: torch.device):
    # One case at a time is in memory: pytest groups the tests by this fixture's parameter.
    try:
        made = prepare(load(request.param, device))
    except Absent as why:
        pytest.skip(str(why))
    yield made
    made.fused.clear()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def differences(got: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor]) -> tuple[float, float]:
    """Relative differences of loss and gradient."""
    loss = float((got[0] - want[0]).abs() / want[0].abs())
    gradient = torch.linalg.vector_norm(got[1].float() - want[1].float())
    return loss, float(gradient / torch.linalg.vector_norm(want[1].float()))


def pairwise_ratios(peer: Callable[[], object], fused: Callable[[], object], pairs: int, repeats: int) -> list[float]:
    """Peer's time over fastkd's, taken in turns: a change of the host's speed meets both."""
    return [seconds(peer, repeats) / seconds(fused, repeats) for _ in range(pairs)]


# The last one varies slowest, and one at a time lets pytest make each case once.
@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("prepared", SPECS, indirect=True)
def test_step(
    prepared: Prepared, form: str, peer: str, benchmark, device: torch.device, request: pytest.FixtureRequest
) -> None:
    case, absent = prepared.case, prepared.absent[form]
    if peer in absent:
        pytest.skip(f"{peer} on {case.name}: {absent[peer]}")
    loss = prepared.fused[form] if peer == "fastkd" else PEERS[peer](case, FORMS[form])

    def one() -> tuple[Tensor, Tensor]:
        return step(loss, case)

    def fused() -> tuple[Tensor, Tensor]:
        return step(prepared.fused[form], case)

    try:
        off = differences(one(), prepared.reference[form])
    except torch.cuda.OutOfMemoryError:
        absent[peer] = "out of memory"
        pytest.skip(f"{peer} on {case.name}: out of memory")
    assert max(off) <= prepared.info["tolerance"], f"{peer}: loss, gradient off by {off}"

    once = seconds(one)
    # Long enough for the clock, and on a GPU for the queue to be full; some 3 s in all.
    repeats = max(1, math.ceil(0.02 / once)) if device.type == "cuda" else 1
    rounds = min(50, max(5, math.ceil(3 / (once * repeats))))
    benchmark.group = f"{case.name}, {form}"
    # `absent` by reference: the file is written at the end, with what the later peers add.
    benchmark.extra_info.update(
        prepared.info,
        kind="step",
        form=form,
        peer=peer,
        repeats=repeats,
        variant=getattr(loss, "variant", None),
        difference=off,
        absent=absent,
    )
    if peer != "fastkd":
        pairs = min(25, max(3, math.ceil(3 / ((once + seconds(fused)) * repeats))))
        ratios = pairwise_ratios(one, fused, pairs, repeats)
        benchmark.extra_info["ratio"] = statistics.median(ratios)
        benchmark.extra_info["ratio_quartiles"] = statistics.quantiles(ratios, n=4)[::2]
    benchmark.pedantic(one, rounds=rounds, iterations=repeats, warmup_rounds=1)

    if not request.config.getoption("--no-memory"):
        extra = memory.measure(case, peer, FORMS[form], loss)
        benchmark.extra_info["extra_peak_bytes"] = extra
        if extra is not None:
            benchmark.extra_info["extra_peak_per_edge"] = extra / case.num_edges
            benchmark.extra_info["extra_peak_per_node"] = extra / case.num_nodes


@pytest.mark.parametrize("form", FORMS)
def test_overhead(form: str, benchmark, device: torch.device) -> None:
    """What a call costs before any work: a graph of two nodes and two edges, at Cora's widths."""
    spec = SPECS["cora"]
    edge_index = torch.tensor([[0, 1], [1, 0]], device=device)
    x = torch.randn(2, spec.student_dim, device=device, requires_grad=True)
    teacher = torch.randn(2, spec.teacher_dim, device=device)
    case = Case("two_nodes", edge_index, fastkd.Graph.from_edge_index(edge_index, 2), x, teacher)
    loss = PEERS["fastkd"](case, FORMS[form])
    benchmark.group = f"overhead, {form}"
    benchmark.extra_info.update(environment(device), kind="overhead", form=form)
    benchmark.pedantic(lambda: step(loss, case), rounds=50, iterations=100, warmup_rounds=3)
