"""The operators of the local structure preserving loss."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _C
from . import native, structs
from .native import DTYPES, Launch, acc_dtype, address, check_graph, csr, features, unit_columns

Metric, Shape, Divergence, Reduction = _C.Metric, _C.Shape, _C.Divergence, _C.Reduction


_COSINE, _NONE = Metric.cosine, Reduction.none
_inverse_norm_op, _similarity_op = structs.by_name(structs.InverseNorm), structs.by_name(structs.Similarity)
_values_op, _divergences_op = structs.by_name(structs.KernelValues), structs.by_name(structs.Divergences)
_gradient_op, _incidence = structs.by_name(structs.Gradient), structs.by_name(structs.Incidence)


def kernel_spec(
    *, metric: int, shape: int, root: bool = False, degree: int = 1, scale: float = 1.0, param: float = 1.0
) -> tuple[list[int], list[float]]:
    """A kernel as the operators take it: what is an integer, and what is not. torch reads an enum's members slowly."""
    return [int(metric), int(shape), int(root), degree], [scale, param]


def _kernel(name: str, integers: list[int], numbers: list[float]) -> structs.Kernel:
    if len(integers) != 4 or len(numbers) != 2:
        raise ValueError(
            f"{name} must be [metric, shape, root, degree] and [scale, param], got {list(integers)} and {list(numbers)}"
        )
    return structs.Kernel._make((*integers, *numbers))


def _check_features(name: str, x: Tensor, rows: int, what: str, like: Tensor) -> None:
    if x.dtype not in DTYPES:
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {x.dtype}")
    if x.dim() != 2:
        raise ValueError(f"{name} must have shape [{what}, D], got {tuple(x.shape)}")
    if x.device != like.device:
        raise ValueError(f"{name} is on {x.device}, but the graph is on {like.device}")
    if x.shape[0] != rows:
        raise ValueError(f"{name} has {x.shape[0]} rows, but the graph has {what} = {rows}")


def _check_side(name: str, src: Tensor, dst: Tensor | None, rowptr: Tensor, num_src: int) -> None:
    num_dst = rowptr.shape[0] - 1
    if dst is None:
        if num_src != num_dst:
            raise ValueError(
                f"{name} is one tensor, but the graph is bipartite with num_src = {num_src} and "
                f"num_dst = {num_dst}: pass a pair ({name}_src, {name}_dst)"
            )
        _check_features(name, src, num_src, "num_src", rowptr)
        return
    _check_features(f"{name}[0]", src, num_src, "num_src", rowptr)
    _check_features(f"{name}[1]", dst, num_dst, "num_dst", rowptr)
    if src.dtype != dst.dtype:
        raise TypeError(f"{name}[0] is {src.dtype}, but {name}[1] is {dst.dtype}")
    if src.shape[1] != dst.shape[1]:
        raise ValueError(f"{name}[0] has {src.shape[1]} columns, but {name}[1] has {dst.shape[1]}")


def _check_edges(name: str, x: Tensor, col: Tensor, dtype: torch.dtype) -> None:
    if x.shape != col.shape:
        raise ValueError(f"{name} must have shape [{col.shape[0]}] (one per edge), got {tuple(x.shape)}")
    if x.dtype != dtype:
        raise TypeError(f"{name} must be {dtype}, got {x.dtype}")
    if x.device != col.device:
        raise ValueError(f"{name} is on {x.device}, but the graph is on {col.device}")


def _inverse_norm(launch: Launch, x: Tensor) -> Tensor:
    out = x.new_empty(x.shape[0], dtype=acc_dtype(x))
    launch.native.inverse_norm(_inverse_norm_op(x=features(x), inv_norm=out.data_ptr()), launch.where)
    return out


def _similarity(
    launch: Launch, src: Tensor, dst: Tensor | None, graph: structs.Csr, reverse: Tensor | None, metric: int
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The raw reduction [E] of every edge, and the inverse norms of src and dst that went into it: None where the
    metric needs none, or those of src serve both ends. Rows have unit column stride."""
    src_norm = dst_norm = None
    if metric == _COSINE:
        src_norm = _inverse_norm(launch, src)
        dst_norm = None if dst is None else _inverse_norm(launch, dst)
    r = native.empty(src, (graph.edges,), acc_dtype(src))
    side = features(src)
    launch.native.similarity(
        _similarity_op(
            graph=graph,
            src=side,
            dst=side if dst is None else features(dst),
            src_inv_norm=address(src_norm),
            dst_inv_norm=address(src_norm if dst is None else dst_norm),
            metric=metric,
            reverse=address(reverse),
            r=r.data_ptr(),
        ),
        launch.where,
    )
    return r, src_norm, dst_norm


# --- kernel_values --------------------------------------------------------------------------------


def _kernel_values(
    src: Tensor,
    dst: Tensor | None,
    rowptr: Tensor,
    col: Tensor,
    reverse: Tensor | None,
    num_src: int,
    kernel: list[int],
    kernel_param: list[float],
) -> Tensor:
    check_graph(rowptr, col, reverse)
    _check_side("teacher", src, dst, rowptr, num_src)
    native_kernel = _kernel("kernel", kernel, kernel_param)
    src = unit_columns(src)
    dst = None if dst is None else unit_columns(dst)
    with Launch(src.device) as launch:
        r, _, _ = _similarity(launch, src, dst, csr(rowptr, col, num_src), reverse, native_kernel.metric)
        values = native.empty(r, r.shape, r.dtype)
        launch.native.kernel_values(
            _values_op(
                edges=r.shape[0], kernel=native_kernel, acc=DTYPES[r.dtype], r=r.data_ptr(), values=values.data_ptr()
            ),
            launch.where,
        )
    return values


def _kernel_values_fake(
    src: Tensor,
    dst: Tensor | None,
    rowptr: Tensor,
    col: Tensor,
    reverse: Tensor | None,
    num_src: int,
    kernel: list[int],
    kernel_param: list[float],
) -> Tensor:
    check_graph(rowptr, col, reverse)
    _check_side("teacher", src, dst, rowptr, num_src)
    return src.new_empty(col.shape[0], dtype=acc_dtype(src))


kernel_values = native.register(
    "kernel_values(Tensor src, Tensor? dst, Tensor rowptr, Tensor col, Tensor? reverse, SymInt num_src,"
    " int[] kernel, float[] kernel_param) -> Tensor",
    fake=_kernel_values_fake,
    cpu=_kernel_values,
    cuda=_kernel_values,
)


# --- lsp_forward ----------------------------------------------------------------------------------


class Problem(NamedTuple):
    """What the loss is taken of besides the student's features: lsp_forward's arguments between student_dst and
    want_coef."""

    teacher: Tensor | None
    teacher_dst: Tensor | None
    teacher_values: Tensor | None
    weight: Tensor | None
    rowptr: Tensor
    col: Tensor
    reverse: Tensor | None
    num_src: int
    student_kernel: list[int]
    student_param: list[float]
    teacher_kernel: list[int]
    teacher_param: list[float]
    divergence: int
    reduction: int
    max_degree: int


problem = structs.by_name(Problem)

# Loss, coefficients, inverse norms of sources and destinations, diagnostics.
_Results = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def _check_forward(student: Tensor, student_dst: Tensor | None, p: Problem) -> torch.dtype:
    """The dtype of all sums: float64 if the student is, else float32."""
    rowptr, col, num_src, teacher = p.rowptr, p.col, p.num_src, p.teacher
    check_graph(rowptr, col, p.reverse)
    if p.reverse is not None and (student_dst is not None or p.teacher_dst is not None):
        raise ValueError("reverse goes with one feature matrix for both ends of an edge")
    _check_side("student", student, student_dst, rowptr, num_src)
    acc = acc_dtype(student)
    if teacher is not None:
        _check_side("teacher", teacher, p.teacher_dst, rowptr, num_src)
        if acc_dtype(teacher) != acc:
            raise TypeError(
                f"teacher is {teacher.dtype}, but student is {student.dtype}: float64 goes with float64 only"
            )
    elif p.teacher_values is not None:
        _check_edges("teacher structure", p.teacher_values, col, acc)
    else:
        raise ValueError("lsp_forward needs teacher or teacher_values")
    if p.weight is not None:
        _check_edges("edge_weight", p.weight, col, acc)
    return acc


def _teacher_reduced(launch: Launch, p: Problem, graph: structs.Csr, metric: int) -> Tensor:
    """The raw reduction [E] of the teacher's features, or its kernel values."""
    if p.teacher is None:
        assert p.teacher_values is not None  # checked
        return p.teacher_values.contiguous()
    dst = None if p.teacher_dst is None else unit_columns(p.teacher_dst)
    r, _, _ = _similarity(launch, unit_columns(p.teacher), dst, graph, p.reverse, metric)
    return r


def _forward(student: Tensor, student_dst: Tensor | None, p: Problem, want_coef: bool) -> _Results:
    acc = _check_forward(student, student_dst, p)
    student_kernel = _kernel("student_kernel", p.student_kernel, p.student_param)
    teacher_kernel = _kernel("teacher_kernel", p.teacher_kernel, p.teacher_param)
    student = unit_columns(student)
    student_dst = None if student_dst is None else unit_columns(student_dst)
    weight = None if p.weight is None else p.weight.contiguous()
    graph = csr(p.rowptr, p.col, p.num_src)
    metric, per_row = student_kernel.metric, p.reduction == _NONE
    with Launch(student.device) as launch:
        r_s, src_norm, dst_norm = _similarity(launch, student, student_dst, graph, p.reverse, metric)
        r_t = _teacher_reduced(launch, p, graph, teacher_kernel.metric)
        coef = r_s if want_coef else r_s.new_empty(0)  # written over what it is made from
        rows = torch.empty(graph.rows, dtype=acc, device=student.device)
        loss = rows if per_row else torch.empty((), dtype=acc, device=student.device)
        diagnostics = torch.empty(3, dtype=torch.int64, device=student.device)
        op = _divergences_op(
            graph=graph,
            student=student_kernel,
            teacher=teacher_kernel,
            divergence=p.divergence,
            reduction=p.reduction,
            teacher_is_values=p.teacher is None,
            acc=DTYPES[acc],
            r_s=r_s.data_ptr(),
            r_t=r_t.data_ptr(),
            weight=address(weight),
            src_inv_norm=address(src_norm),
            dst_inv_norm=address(src_norm if student_dst is None else dst_norm),
            coef=coef.data_ptr() if want_coef else 0,
            rows=rows.data_ptr(),
            loss=0 if per_row else loss.data_ptr(),
            diagnostics=diagnostics.data_ptr(),
            max_degree=p.max_degree,
            workspace=0,
        )
        if launch.native.uses_workspace:
            workspace = launch.workspace(launch.native.divergences_bytes(op))
            op = op._replace(workspace=workspace.data_ptr())
        launch.native.divergences(op, launch.where)
    src_norm, dst_norm = (rows.new_empty(0) if norm is None else norm for norm in (src_norm, dst_norm))
    return loss, coef, src_norm, dst_norm, diagnostics  # an operator returns tensors, never None


def _forward_fake(student: Tensor, student_dst: Tensor | None, p: Problem, want_coef: bool) -> _Results:
    acc = _check_forward(student, student_dst, p)
    num_dst = p.rowptr.shape[0] - 1
    cosine = p.student_kernel[0] == _COSINE
    return (
        student.new_empty([num_dst] if p.reduction == _NONE else [], dtype=acc),
        student.new_empty(p.col.shape[0] if want_coef else 0, dtype=acc),
        student.new_empty(p.num_src if cosine else 0, dtype=acc),
        student.new_empty(num_dst if cosine and student_dst is not None else 0, dtype=acc),
        student.new_empty(3, dtype=torch.int64),
    )


def _lsp_forward(student: Tensor, student_dst: Tensor | None, *rest: Any) -> _Results:
    return _forward(student, student_dst, Problem._make(rest[:-1]), rest[-1])


def _lsp_forward_fake(student: Tensor, student_dst: Tensor | None, *rest: Any) -> _Results:
    return _forward_fake(student, student_dst, Problem._make(rest[:-1]), rest[-1])


lsp_forward = native.register(
    "lsp_forward(Tensor student, Tensor? student_dst, Tensor? teacher, Tensor? teacher_dst,"
    " Tensor? teacher_values, Tensor? weight, Tensor rowptr, Tensor col, Tensor? reverse, SymInt num_src,"
    " int[] student_kernel, float[] student_param, int[] teacher_kernel, float[] teacher_param,"
    " int divergence, int reduction, SymInt max_degree, bool want_coef) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=_lsp_forward_fake,
    cpu=_lsp_forward,
    cuda=_lsp_forward,
    names=("student", "student_dst", *Problem._fields, "want_coef"),
)


# --- lsp_backward ---------------------------------------------------------------------------------


class Backward(NamedTuple):
    """The arguments of lsp_backward."""

    grad: Tensor
    student: Tensor
    student_dst: Tensor | None
    coef: Tensor
    src_inv_norm: Tensor
    dst_inv_norm: Tensor
    rowptr: Tensor
    col: Tensor
    reverse: Tensor | None
    t_rowptr: Tensor | None
    t_col: Tensor | None
    t_perm: Tensor | None
    num_src: int
    metric: int
    max_degree: int


backward_arguments = structs.by_name(Backward)


def _check_backward(b: Backward) -> None:
    check_graph(b.rowptr, b.col, b.reverse)
    _check_side("student", b.student, b.student_dst, b.rowptr, b.num_src)
    _check_edges("coef", b.coef, b.col, acc_dtype(b.student))
    if b.reverse is None and (b.t_rowptr is None or b.t_col is None or b.t_perm is None):
        raise ValueError("lsp_backward needs reverse or the transposed graph")


def _backward(b: Backward) -> tuple[Tensor, Tensor]:
    _check_backward(b)
    student = unit_columns(b.student)
    student_dst = None if b.student_dst is None else unit_columns(b.student_dst)
    coef, grad = b.coef.contiguous(), b.grad.contiguous()
    if grad.dtype != coef.dtype:
        grad = grad.to(coef.dtype)
    arriving = csr(b.rowptr, b.col, b.num_src)
    x = features(student)
    y = x if student_dst is None else features(student_dst)

    def product(
        launch: Launch, like: Tensor, ends: structs.Features, inv_norm: Tensor, *lists: structs.Incidence
    ) -> Tensor:
        out = native.empty(like, like.shape, like.dtype)
        op = _gradient_op(
            self=ends,
            lists=lists,
            metric=b.metric,
            coef=coef.data_ptr(),
            grad=grad.data_ptr(),
            grad_per_row=grad.dim() == 1,
            inv_norm=inv_norm.data_ptr(),
            out=out.data_ptr(),
            max_degree=b.max_degree,
            workspace=0,
        )
        if launch.native.uses_workspace:
            workspace = launch.workspace(launch.native.gradient_bytes(op))
            op = op._replace(workspace=workspace.data_ptr())
        launch.native.gradient(op, launch.where)
        return out

    with Launch(student.device) as launch:
        if student_dst is None and b.reverse is not None:
            both = _incidence(graph=arriving, perm=b.reverse.data_ptr(), mirrored=True, other=x)
            return product(launch, student, x, b.src_inv_norm, both), student.new_empty(0)
        assert b.t_rowptr is not None and b.t_col is not None and b.t_perm is not None  # checked
        leaving = csr(b.t_rowptr, b.t_col, arriving.rows)
        outgoing = _incidence(graph=leaving, perm=b.t_perm.data_ptr(), mirrored=False, other=y)
        incoming = _incidence(graph=arriving, perm=0, mirrored=False, other=x)
        if student_dst is None:
            return product(launch, student, x, b.src_inv_norm, incoming, outgoing), student.new_empty(0)
        return (
            product(launch, student, x, b.src_inv_norm, outgoing),
            product(launch, student_dst, y, b.dst_inv_norm, incoming),
        )


def _backward_fake(b: Backward) -> tuple[Tensor, Tensor]:
    _check_backward(b)
    return (
        b.student.new_empty(b.student.shape),
        b.student.new_empty(0) if b.student_dst is None else b.student_dst.new_empty(b.student_dst.shape),
    )


def _lsp_backward(*args: Any) -> tuple[Tensor, Tensor]:
    return _backward(Backward._make(args))


def _lsp_backward_fake(*args: Any) -> tuple[Tensor, Tensor]:
    return _backward_fake(Backward._make(args))


lsp_backward = native.register(
    "lsp_backward(Tensor grad, Tensor student, Tensor? student_dst, Tensor coef, Tensor src_inv_norm,"
    " Tensor dst_inv_norm, Tensor rowptr, Tensor col, Tensor? reverse, Tensor? t_rowptr, Tensor? t_col,"
    " Tensor? t_perm, SymInt num_src, int metric, SymInt max_degree) -> (Tensor, Tensor)",
    fake=_lsp_backward_fake,
    cpu=_lsp_backward,
    cuda=_lsp_backward,
    names=Backward._fields,
)
