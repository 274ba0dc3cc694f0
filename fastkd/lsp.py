"""The local structure preserving loss (arXiv:2003.10477), fused over sparse graphs."""

from __future__ import annotations

import warnings
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from . import _ops, kernels
from ._adjacency import GraphLike, as_graph
from ._features import check_finite_features, pair_of, sizes_of, weights_of
from .graph import Graph
from .kernels import Kernel

__all__ = ["LSPLoss", "TeacherStructure", "lsp_loss", "teacher_structure"]

Features = Tensor | tuple[Tensor, Tensor]
Divergence = Literal["student||teacher", "teacher||student"]
Reduction = Literal["none", "sum", "mean", "mean_active", "mean_edges"]

_DIVERGENCES = {
    "student||teacher": _ops.Divergence.student_teacher.value,
    "teacher||student": _ops.Divergence.teacher_student.value,
}
_REDUCTIONS = {reduction.name: reduction.value for reduction in _ops.Reduction}
_warned: set[str] = set()


class TeacherStructure:
    """A teacher's local structure on one graph, computed once by :func:`teacher_structure`.

    Holds the teacher's kernel values, one number per edge, from which the loss gets the
    log-probabilities under any ``edge_weight``.

    Attributes:
        values: [E] float32 (float64 for a float64 teacher), in the order of the graph's slots.
        graph: the :class:`~fastkd.Graph` it belongs to.
        kernel: the teacher's kernel.
    """

    def __init__(self, values: Tensor, graph: Graph, kernel: Kernel) -> None:
        self.values = values
        self.graph = graph
        self.kernel = kernel

    @property
    def log_prob(self) -> Tensor:
        """[E] log-probability of every edge among the in-edges of its destination, in the order of
        the graph's ``edge_index``."""
        row = _ops.expand_rows(self.graph.rowptr, self.graph.num_edges)
        high = self.values.new_full((self.graph.num_dst,), -torch.inf)
        high.scatter_reduce_(0, row, self.values, "amax")
        shifted = self.values - high[row]
        total = torch.zeros_like(high).index_add_(0, row, shifted.exp())
        slots = shifted - total.log()[row]
        if self.graph.perm is None:
            return slots
        out = torch.empty_like(slots)
        out[self.graph.perm.long()] = slots
        return out

    def to(self, device: torch.device | str) -> TeacherStructure:
        """The same on another device."""
        return TeacherStructure(self.values.to(device), self.graph.to(device), self.kernel)

    def __repr__(self) -> str:
        return f"TeacherStructure({self.kernel}, {self.graph})"


def teacher_structure(teacher: Features, graph: GraphLike, kernel: str | Kernel = "rbf") -> TeacherStructure:
    """The teacher's side of :func:`lsp_loss`, for reuse while teacher and graph stay the same.

    Args:
        teacher: features [N, D], or ``(x_src, x_dst)`` for a bipartite graph. No gradient is kept.
        graph: as in :func:`lsp_loss`. Pass a :class:`~fastkd.Graph` and reuse it in the loss.
        kernel: name or :class:`fastkd.kernels.Kernel`.

    Raises:
        IndexError, TypeError, ValueError: name the argument, its value and what is valid.

    >>> import torch
    >>> from fastkd import Graph, lsp_loss, teacher_structure
    >>> graph = Graph.from_edge_index(torch.tensor([[1, 2, 0], [0, 0, 1]]))
    >>> student, teacher = torch.randn(3, 4), torch.randn(3, 8)
    >>> structure = teacher_structure(teacher, graph)
    >>> structure.values.shape, bool(lsp_loss(student, structure, graph) == lsp_loss(student, teacher, graph))
    (torch.Size([3]), True)
    """
    kernel = kernels.resolve(kernel)
    src, dst = pair_of("teacher", teacher)
    graph = as_graph(graph, *sizes_of(src, dst))
    with torch.no_grad():
        reverse = graph.reverse if dst is None else None
        values = _ops.kernel_values(
            src.detach(),
            None if dst is None else dst.detach(),
            graph.rowptr,
            graph.col,
            reverse,
            graph.num_src,
            *kernel.spec(src.shape[1]),
        )
    return TeacherStructure(values, graph, kernel)


def lsp_loss(
    student: Features,
    teacher: Features | TeacherStructure,
    graph: GraphLike,
    *,
    kernel: str | Kernel = "rbf",
    teacher_kernel: str | Kernel | None = None,
    divergence: Divergence = "student||teacher",
    reduction: Reduction = "mean",
    edge_weight: Tensor | None = None,
    teacher_graph: GraphLike | None = None,
    norm_by: Literal["dst", "src"] = "dst",
    check_finite: bool = False,
) -> Tensor:
    """Local structure preserving loss: how far the student's neighbourhoods are from the teacher's.

    For every destination i with in-edges j -> i, the similarities ``SIM(z_i, z_j)`` go through a
    softmax over j, for student and teacher; ``S_i`` is the divergence of the two distributions:

        KL(student||teacher)_i = sum_j p^s_ij (log p^s_ij - log p^t_ij)

    Rows without edges or with a single one contribute exactly 0. Sums are in float32 (float64 for
    float64 features), in log space, with each row's maximum subtracted. The result and the gradient
    are bitwise the same from run to run and for any number of threads. No tensor has the size E x D:
    beyond inputs and gradient it takes 8 bytes per edge and up to 12 per node, and partial
    sums for nodes of more than 512 edges. The loss is that of arXiv:2003.10477.

    Args:
        student: [N, D_s] float16, bfloat16, float32 or float64, or ``(x_src [num_src, D_s],
            x_dst [num_dst, D_s])`` for a bipartite block. The gradient flows to it.
        teacher: [N, D_t], or a pair; D_t and dtype may differ from the student's. Detached. Or a
            :class:`TeacherStructure`, which saves its half of the work.
        graph: a :class:`~fastkd.Graph` (build it once, reuse it), an ``edge_index`` [2, E] (source,
            destination), PyG's ``EdgeIndex`` or ``SparseTensor`` (as ``adj_t``), or a torch sparse
            matrix whose entry (i, j) is the edge j -> i and whose values are 1.
        kernel: a name ("rbf", "euclidean", "linear", "poly", "laplacian", "cosine") or a
            :class:`fastkd.kernels.Kernel`.
        teacher_kernel: the teacher's; None means ``kernel``.
        divergence: "student||teacher" (the paper) or "teacher||student".
        reduction: "mean" over destinations, "mean_active" over destinations with an edge,
            "mean_edges" over edges, "sum", or "none" for S [num_dst].
        edge_weight: [E] >= 0 in the order of ``edge_index``; ``log w`` is added to the similarity,
            so that 0 removes the edge.
        teacher_graph: the graph of the teacher where it differs (dynamic graphs): both
            distributions are then taken over the union of the two neighbourhoods.
        norm_by: "dst" for a softmax over the in-edges of a destination, "src" for one over the
            out-edges of a source.
        check_finite: raise ValueError on NaN or infinity in the features, and on CUDA look for a
            saturated kernel. Waits for the device.

    Returns:
        A scalar, or [num_dst] for "none"; float32, or float64 for float64 features. In nats.

    Raises:
        IndexError, TypeError, ValueError: name the argument, its value and what is valid.

    >>> import torch
    >>> from fastkd import lsp_loss
    >>> edge_index = torch.tensor([[1, 2, 3], [0, 0, 0]])
    >>> student, teacher = torch.arange(1.0, 5.0).view(4, 1), torch.arange(8.0).view(4, 2)
    >>> round(float(lsp_loss(student, teacher, edge_index, kernel="linear")), 4)
    0.04
    """
    kernel = kernels.resolve(kernel)
    structure = teacher if isinstance(teacher, TeacherStructure) else None
    teacher_kernel = kernel if teacher_kernel is None else kernels.resolve(teacher_kernel, "teacher_kernel")
    divergence_code = _choice("divergence", divergence, _DIVERGENCES)
    reduction_code = _choice("reduction", reduction, _REDUCTIONS)
    if norm_by not in ("dst", "src"):
        raise ValueError(f"norm_by must be 'dst' or 'src', got {norm_by!r}")
    student_src, student_dst = pair_of("student", student)
    sizes = sizes_of(student_src, student_dst)
    graph = as_graph(graph, *sizes)
    if teacher_graph is not None:
        if structure is not None:
            raise ValueError("teacher_graph cannot go with a TeacherStructure, which has its own graph")
        if edge_weight is not None:
            raise ValueError("edge_weight cannot go with teacher_graph: the union has edges of its own")
        graph = graph.union(as_graph(teacher_graph, *sizes))

    teacher_src = teacher_dst = values = None
    if structure is not None:
        if structure.graph is not graph and (
            structure.graph.num_edges != graph.num_edges or structure.graph.fingerprint != graph.fingerprint
        ):
            raise ValueError(f"teacher is a TeacherStructure of another graph: {structure.graph}, but graph is {graph}")
        values, teacher_kernel = structure.values, structure.kernel
        teacher_dim = 1
    else:
        teacher_src, teacher_dst = pair_of("teacher", teacher)
        teacher_src = teacher_src.detach()
        teacher_dst = None if teacher_dst is None else teacher_dst.detach()
        teacher_dim = teacher_src.shape[1]

    if norm_by == "src":
        if structure is not None:
            raise ValueError("norm_by='src' cannot go with a TeacherStructure: pass graph.reversed() to both")
        graph = graph.reversed()
        if student_dst is not None:
            student_src, student_dst = student_dst, student_src
        if teacher_dst is not None:
            teacher_src, teacher_dst = teacher_dst, teacher_src

    weight = None if edge_weight is None else weights_of(edge_weight, graph, _ops.acc_dtype(student_src))
    if check_finite:
        check_finite_features(student=(student_src, student_dst), teacher=(teacher_src, teacher_dst))

    needs_grad = torch.is_grad_enabled() and (
        student_src.requires_grad or (student_dst is not None and student_dst.requires_grad)
    )
    # SIM(i, j) = SIM(j, i) saves half the work, but not where the two ends have features of their own.
    reverse = graph.reverse if student_dst is None and teacher_dst is None else None
    student_kernel, student_param = kernel.spec(student_src.shape[1])
    teacher_spec, teacher_param = teacher_kernel.spec(teacher_dim)
    problem = _ops.problem(
        teacher=teacher_src,
        teacher_dst=teacher_dst,
        teacher_values=values,
        weight=weight,
        rowptr=graph.rowptr,
        col=graph.col,
        reverse=reverse,
        num_src=graph.num_src,
        student_kernel=student_kernel,
        student_param=student_param,
        teacher_kernel=teacher_spec,
        teacher_param=teacher_param,
        divergence=divergence_code,
        reduction=reduction_code,
        max_degree=graph.max_degree,
    )
    loss: Tensor
    if needs_grad:
        # One tuple for all that gets no gradient: autograd.Function looks at each of its arguments.
        transpose = _Transpose.of(graph, reverse)
        loss, diagnostics = _LSP.apply(student_src, student_dst, problem, transpose)  # type: ignore[no-untyped-call]
    else:
        loss, _, _, _, diagnostics = _ops.lsp_forward(student_src, student_dst, *problem, False)
    if not torch.compiler.is_compiling() and len(_warned) < 2 and (diagnostics.device.type == "cpu" or check_finite):
        _warn_if_saturated(diagnostics, kernel, teacher_kernel)
    return loss


class _Transpose(NamedTuple):
    """What the gradient needs besides; the transposed graph only where edges have no reverse."""

    t_rowptr: Tensor | None
    t_col: Tensor | None
    t_perm: Tensor | None
    max_incident: int

    @staticmethod
    def of(graph: Graph, reverse: Tensor | None) -> _Transpose:
        if reverse is not None:
            return _Transpose(None, None, None, graph.max_incident)
        return _Transpose(graph.t_rowptr, graph.t_col, graph.t_perm, graph.max_incident)


class _LSP(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, student: Tensor, student_dst: Tensor | None, problem: _ops.Problem, transpose: _Transpose
    ) -> tuple[Tensor, Tensor]:
        loss, coef, src_inv_norm, dst_inv_norm, diagnostics = _ops.lsp_forward(student, student_dst, *problem, True)
        graph = (problem.rowptr, problem.col, problem.reverse, transpose.t_rowptr, transpose.t_col, transpose.t_perm)
        ctx.save_for_backward(student, student_dst, coef, src_inv_norm, dst_inv_norm, *graph)
        ctx.num_src, ctx.metric, ctx.max_degree = problem.num_src, problem.student_kernel[0], transpose.max_incident
        ctx.mark_non_differentiable(diagnostics)
        return loss, diagnostics

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        student, student_dst, coef, src_inv_norm, dst_inv_norm, *graph = ctx.saved_tensors
        rowptr, col, reverse, t_rowptr, t_col, t_perm = graph
        arguments = _ops.backward_arguments(
            grad=grad,
            student=student,
            student_dst=student_dst,
            coef=coef,
            src_inv_norm=src_inv_norm,
            dst_inv_norm=dst_inv_norm,
            rowptr=rowptr,
            col=col,
            reverse=reverse,
            t_rowptr=t_rowptr,
            t_col=t_col,
            t_perm=t_perm,
            num_src=ctx.num_src,
            metric=ctx.metric,
            max_degree=ctx.max_degree,
        )
        src, dst = _ops.lsp_backward(*arguments)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            src = _ops.no_second_derivative("lsp_loss", src, student)
            dst = dst if student_dst is None else _ops.no_second_derivative("lsp_loss", dst, student_dst)
        return src, None if student_dst is None else dst, None, None


class LSPLoss(nn.Module):
    """:func:`lsp_loss` as a module; the arguments are its keyword arguments.

    >>> import torch
    >>> from fastkd import LSPLoss
    >>> criterion = LSPLoss(kernel="rbf", reduction="none")
    >>> edge_index = torch.tensor([[1, 2, 0], [0, 0, 1]])
    >>> criterion(torch.randn(3, 4), torch.randn(3, 8), edge_index).shape
    torch.Size([3])
    """

    def __init__(
        self,
        kernel: str | Kernel = "rbf",
        *,
        teacher_kernel: str | Kernel | None = None,
        divergence: Divergence = "student||teacher",
        reduction: Reduction = "mean",
        norm_by: Literal["dst", "src"] = "dst",
        check_finite: bool = False,
    ) -> None:
        super().__init__()
        self.kernel = kernels.resolve(kernel)
        self.teacher_kernel = (
            self.kernel if teacher_kernel is None else kernels.resolve(teacher_kernel, "teacher_kernel")
        )
        _choice("divergence", divergence, _DIVERGENCES)
        _choice("reduction", reduction, _REDUCTIONS)
        self.divergence: Divergence = divergence
        self.reduction: Reduction = reduction
        self.norm_by: Literal["dst", "src"] = norm_by
        self.check_finite = check_finite

    @classmethod
    def preset(cls, name: Literal["paper", "distillgcn", "efficient_gnns"], kernel: str | None = None) -> LSPLoss:
        """The three published variants.

        * ``"paper"``: arXiv:2003.10477. RBF (sigma 100), KL(student||teacher), mean over nodes.
          ``kernel`` may be any name; "euclidean" is fastkd's, with a minus sign.
        * ``"distillgcn"``: the authors' code. Laplacian (sigma 100), KL(teacher||student), mean over
          nodes.
        * ``"efficient_gnns"``: the efficient-gnns repository. KL(teacher||student), mean over edges;
          ``kernel`` is one of its "cosine" (default), "poly" (cos^2), "l2" (the distance itself,
          with a plus sign) and "rbf" (sigma 1). A row of zeros has cosine similarity 0 here.
        """
        if name == "paper":
            return cls(kernel or "rbf")
        if name == "distillgcn":
            if kernel not in (None, "laplacian"):
                raise ValueError(f"kernel must be 'laplacian' for preset 'distillgcn', got {kernel!r}")
            return cls("laplacian", divergence="teacher||student")
        if name == "efficient_gnns":
            theirs: dict[str, Kernel] = {
                "cosine": kernels.Cosine(),
                "poly": kernels.Poly(normalize=True),
                "l2": kernels.Euclidean(sign=1, squared=False),
                "rbf": kernels.RBF(sigma=1.0),
            }
            chosen = kernel or "cosine"
            if chosen not in theirs:
                raise ValueError(
                    f"kernel must be one of {', '.join(theirs)} for preset 'efficient_gnns', got {kernel!r}"
                )
            return cls(theirs[chosen], divergence="teacher||student", reduction="mean_edges")
        raise ValueError(f"preset must be 'paper', 'distillgcn' or 'efficient_gnns', got {name!r}")

    def forward(
        self,
        student: Features,
        teacher: Features | TeacherStructure,
        graph: GraphLike,
        edge_weight: Tensor | None = None,
        teacher_graph: GraphLike | None = None,
    ) -> Tensor:
        return lsp_loss(
            student,
            teacher,
            graph,
            kernel=self.kernel,
            teacher_kernel=self.teacher_kernel,
            divergence=self.divergence,
            reduction=self.reduction,
            edge_weight=edge_weight,
            teacher_graph=teacher_graph,
            norm_by=self.norm_by,
            check_finite=self.check_finite,
        )

    def extra_repr(self) -> str:
        teacher = "" if self.teacher_kernel == self.kernel else f"teacher_kernel={self.teacher_kernel}, "
        return f"{self.kernel}, {teacher}divergence={self.divergence!r}, reduction={self.reduction!r}"


def _choice(argument: str, value: Any, choices: dict[str, int]) -> int:
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{argument} must be one of {', '.join(map(repr, choices))}, got {value!r}")
    return choices[value]


def _warn_if_saturated(diagnostics: Tensor, kernel: Kernel, teacher_kernel: Kernel) -> None:
    rows, *informative = diagnostics.tolist()
    if rows == 0:
        return
    for name, count, used in zip(("student", "teacher"), informative, (kernel, teacher_kernel), strict=True):
        if count == 0 and name not in _warned:
            _warned.add(name)
            remedy = {
                "rbf": "take a larger sigma, or scale='mean'",
                "laplacian": "take a larger sigma, or scale='mean'",
            }.get(used.name, "check that the features differ between nodes")
            warnings.warn(
                f"the {name}'s similarities are equal to within rounding in every neighbourhood: "
                f"{used} is saturated and the loss carries no information about its structure. "
                f"Remedy: {remedy}.",
                stacklevel=3,
            )
