"""The ways to compute one step: loss, and its gradient to the student.

All compute the same thing: RBF of sigma 100, KL(student||teacher), mean over nodes. Every peer is
a function (case, cached) -> loss, where loss() is a scalar to differentiate. What depends on the
graph alone is made beforehand and not timed. ``cached`` gives the teacher's side beforehand, too.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import fastkd

from .cases import SIGMA, Case
from .composite import composite, composite_pairs

Loss = Callable[[], Tensor]
_C = -0.5 / SIGMA


def step(loss: Loss, case: Case) -> tuple[Tensor, Tensor]:
    """What is timed."""
    value = loss()
    return value.detach(), torch.autograd.grad(value, case.student)[0]


def fused(case: Case, cached: bool) -> Loss:
    student, teacher, graph = case.student, case.teacher, case.graph
    if cached:
        teacher = fastkd.teacher_structure(teacher, graph)
    return lambda: fastkd.lsp_loss(student, teacher, graph)


def _ends(case: Case) -> tuple[Tensor, Tensor]:
    """(src, dst) [E] int64, sorted by destination, which the peers' caches like best."""
    graph = case.graph
    nodes = torch.arange(case.num_nodes, device=graph.device)
    degree = (graph.rowptr[1:] - graph.rowptr[:-1]).long()
    return graph.col.long(), torch.repeat_interleave(nodes, degree, output_size=case.num_edges)


def _teacher_log_prob(case: Case) -> Tensor:
    """[E] in the order of _ends. By fastkd: made by a peer it would take E x D memory."""
    log_prob = fastkd.teacher_structure(case.teacher, case.graph).log_prob
    return log_prob if case.graph.perm is None else log_prob[case.graph.perm.long()]


# --- gather and scatter, as with PyG --------------------------------------------------------------


def _gather_log_prob(x: Tensor, src: Tensor, dst: Tensor) -> Tensor:
    """[E] log-probability of every edge among those of its destination."""
    x = x.float()
    difference = x.index_select(0, dst) - x.index_select(0, src)
    value = torch.exp(_C * difference.pow(2).sum(1))
    high = value.new_zeros(x.shape[0]).scatter_reduce(0, dst, value.detach(), "amax")
    shifted = value - high.index_select(0, dst)
    total = value.new_zeros(x.shape[0]).index_add(0, dst, shifted.exp())
    # A node without edges has the total 0; no edge reads it.
    return shifted - total.log().index_select(0, dst)


def _gather_divergence(student: Tensor, teacher_log_prob: Tensor, src: Tensor, dst: Tensor) -> Tensor:
    log_prob = _gather_log_prob(student, src, dst)
    return (log_prob.exp() * (log_prob - teacher_log_prob)).sum() / student.shape[0]


def _gather_loss(student: Tensor, teacher: Tensor, src: Tensor, dst: Tensor) -> Tensor:
    with torch.no_grad():
        teacher_log_prob = _gather_log_prob(teacher, src, dst)
    return _gather_divergence(student, teacher_log_prob, src, dst)


def gather(case: Case, cached: bool, wrap: Callable = lambda f: f) -> Loss:
    student, teacher = case.student, case.teacher
    src, dst = _ends(case)
    if not cached:
        function = wrap(_gather_loss)
        return lambda: function(student, teacher, src, dst)
    log_prob = _teacher_log_prob(case)
    function = wrap(_gather_divergence)
    return lambda: function(student, log_prob, src, dst)


def compiled(case: Case, cached: bool) -> Loss:
    torch.compiler.reset()  # each case has shapes of its own
    return gather(case, cached, lambda f: torch.compile(f, dynamic=False, fullgraph=True))


# --- the same with torch_scatter's kernels for compressed rows ------------------------------------


def scatter(case: Case, cached: bool) -> Loss:
    from torch_scatter import gather_csr, segment_csr

    student, teacher = case.student, case.teacher
    src, rowptr = case.graph.col.long(), case.graph.rowptr.long()
    nodes = case.num_nodes

    def log_prob(x: Tensor) -> Tensor:
        x = x.float()
        difference = gather_csr(x, rowptr) - x.index_select(0, src)
        value = torch.exp(_C * difference.pow(2).sum(1))
        high = segment_csr(value.detach(), rowptr, reduce="max")
        shifted = value - gather_csr(high, rowptr)
        total = segment_csr(shifted.exp(), rowptr, reduce="sum")
        return shifted - gather_csr(total.log(), rowptr)

    def divergence(teacher_log_prob: Tensor) -> Tensor:
        student_log_prob = log_prob(student)
        return (student_log_prob.exp() * (student_log_prob - teacher_log_prob)).sum() / nodes

    def full() -> Tensor:
        with torch.no_grad():
            teacher_log_prob = log_prob(teacher)
        return divergence(teacher_log_prob)

    if cached:
        cached_log_prob = _teacher_log_prob(case)
        return lambda: divergence(cached_log_prob)
    return full


PEERS: dict[str, Callable[[Case, bool], Loss]] = {
    "fastkd": fused,
    "gather": gather,
    "torch_scatter": scatter,
    "compile": compiled,
    "composite": composite,
    "composite_pairs": composite_pairs,
}

# --- what can be run ------------------------------------------------------------------------------

# E x D temporaries alive at the peak, as measured: for the student (with autograd) and the teacher.
_TEMPORARIES = {"gather": (4, 3), "torch_scatter": (4, 3)}
_PER_EDGE = 64  # bytes, an upper limit on the vectors of length E of any peer


def predicted_peak(case: Case, peer: str, cached: bool) -> int:
    """Bytes beyond the inputs: max(student's, teacher's count x E x D x 4) + 64 E + 2 gradients."""
    student, teacher = _TEMPORARIES.get(peer, (0, 0))
    wide = max(student * case.student.shape[1], 0 if cached else teacher * case.teacher.shape[1])
    return case.num_edges * (4 * wide + _PER_EDGE) + 2 * 4 * case.student.numel()


def available(device: torch.device) -> int:
    """Bytes that could be allocated now."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return 1 << 62  # unknown: run it
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))


def why_not(case: Case, peer: str, cached: bool) -> str | None:
    """Why a peer is not run on a case; None if it is."""
    if peer == "torch_scatter" and importlib.util.find_spec("torch_scatter") is None:
        return "not installed"
    need = predicted_peak(case, peer, cached)
    if need > 0.9 * available(case.student.device):
        return f"needs {need / 1e9:.0f} GB"
    return None
