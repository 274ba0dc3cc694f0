"""The operators: schemas, checks, fakes, implementations. The only file that touches addresses.

Each operator's real and fake implementation call the same check, so that a shape error is the same
in eager mode and under ``torch.compile``. Implementations allocate; the native core writes every
element.
"""

from __future__ import annotations

from typing import Any

import torch  # before _C: both then share one OpenMP runtime
from torch import Tensor

from . import _C

_lib = torch.library.Library("fastkd", "DEF")

# Device type -> native functions. The tests put the host build of the CUDA sources in place of "cpu".
backends: dict[str, Any] = {"cpu": _C.cpu, "cuda": getattr(_C, "cuda", None)}

DTYPES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2, torch.float64: 3}
_NONE, _COSINE = 0, 1  # Reduction.none, Metric.cosine


def _backend(device: torch.device) -> Any:
    backend = backends.get(device.type)
    if backend is None:
        built = "this build of fastkd has no CUDA kernels (see fastkd.show_config())"
        reason = built if device.type == "cuda" else "supported devices are cpu and cuda"
        raise RuntimeError(f"no fastkd kernels for device {device}: {reason}")
    return backend


class _Launch:
    """The native functions for a device, and where they run: a thread count or a stream."""

    def __init__(self, device: torch.device) -> None:
        self.native = _backend(device)
        self.device = device
        self.where = torch.get_num_threads()
        self.guard = None
        if device.type == "cuda":
            self.guard = torch.cuda.device(device)
            self.where = torch.cuda.current_stream(device).cuda_stream

    def __enter__(self) -> _Launch:
        if self.guard is not None:
            self.guard.__enter__()
        return self

    def __exit__(self, *exc: object) -> None:
        if self.guard is not None:
            self.guard.__exit__(*exc)

    def run(self, function: Any, *args: Any) -> None:
        """Calls a native function that may want scratch memory."""
        if self.native.uses_workspace:
            size = function(*args, 0, False, self.where)
            workspace = torch.empty(size, dtype=torch.uint8, device=self.device)
            function(*args, workspace.data_ptr(), True, self.where)
        else:
            function(*args, 0, True, self.where)


_HUGE = 4 << 20  # bytes from which numpy asks for huge pages, too


def _empty(shape: torch.Size | tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """torch.empty; large ones on the CPU in huge pages.

    The first touch of 4 KB of new memory costs about a microsecond, and large tensors are new memory in
    every step: in pages of 4 KB that was a fifth of a step with 87 MB of gradient.
    """
    out = torch.empty(shape, dtype=dtype, device=device)
    if device.type == "cpu" and (size := out.numel() * out.element_size()) >= _HUGE:
        _C.cpu.advise_huge_pages(out.data_ptr(), size)
    return out


def _ptr(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _features(x: Tensor) -> tuple[int, int, int, int, int]:
    return x.data_ptr(), x.shape[0], x.shape[1], x.stride(0), DTYPES[x.dtype]


def _csr(rowptr: Tensor, col: Tensor, num_src: int) -> tuple[int, int, int, int, int, bool]:
    return (rowptr.data_ptr(), col.data_ptr(), rowptr.shape[0] - 1, num_src, col.shape[0], col.dtype == torch.int64)


def _rows(x: Tensor) -> Tensor:
    """x with unit column stride; other layouts are copied."""
    return x if x.stride(1) == 1 and x.stride(0) >= x.shape[1] else x.contiguous()


def acc_dtype(x: Tensor) -> torch.dtype:
    """The dtype of sums, coefficients and the loss: float64 for float64, else float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


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


def _check_graph(rowptr: Tensor, col: Tensor, reverse: Tensor | None) -> None:
    index = rowptr.dtype
    for name, x in (("rowptr", rowptr), ("col", col), ("reverse", reverse)):
        if x is None:
            continue
        if x.dim() != 1 or x.dtype is not index or index not in (torch.int32, torch.int64):
            raise TypeError(f"{name} must be a vector of int32 or int64 like rowptr, got {x.dtype}")
        if not x.is_contiguous():
            raise ValueError(f"{name} must be contiguous")
    if rowptr.shape[0] < 1:
        raise ValueError("rowptr must have num_dst + 1 >= 1 elements")


# --- graph construction ---------------------------------------------------------------------------

_lib.define(
    "csr_from_coo(Tensor src, Tensor dst, SymInt num_src, SymInt num_dst, bool wide) -> (Tensor, Tensor, Tensor)"
)
_lib.define("csr_transpose(Tensor rowptr, Tensor col, SymInt num_src) -> (Tensor, Tensor, Tensor)")
_lib.define("csr_union(Tensor rowptr, Tensor col, Tensor rowptr2, Tensor col2, SymInt num_src) -> (Tensor, Tensor)")


def _check_coo(src: Tensor, dst: Tensor) -> None:
    for name, x in (("edge_index[0]", src), ("edge_index[1]", dst)):
        if x.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"{name} must be int32 or int64, got {x.dtype}")
    if src.dim() != 1 or src.shape != dst.shape:
        raise ValueError(f"edge_index must have shape [2, E], got {tuple(src.shape)} and {tuple(dst.shape)}")
    if src.dtype != dst.dtype or src.device != dst.device:
        raise ValueError("both rows of edge_index must have one dtype and device")


def _out_of_range(src: int, dst: int, edge: int, num_src: int, num_dst: int) -> IndexError:
    row, value, size = (0, src, num_src) if not 0 <= src < num_src else (1, dst, num_dst)
    end = "source" if row == 0 else "destination"
    return IndexError(
        f"edge_index[{row}, {edge}] = {value} ({end} of edge {edge}) is out of range: valid indices are in [0, {size})"
    )


def _csr_from_coo_cpu(src: Tensor, dst: Tensor, num_src: int, num_dst: int, wide: bool):
    _check_coo(src, dst)
    src, dst = src.contiguous(), dst.contiguous()
    dtype = torch.int64 if wide else torch.int32
    edges = src.shape[0]
    rowptr = torch.empty(num_dst + 1, dtype=dtype)
    col, perm = torch.empty(edges, dtype=dtype), torch.empty(edges, dtype=dtype)
    bad = _C.cpu.csr_from_coo(
        src.data_ptr(),
        dst.data_ptr(),
        src.dtype == torch.int64,
        edges,
        num_src,
        num_dst,
        wide,
        rowptr.data_ptr(),
        col.data_ptr(),
        perm.data_ptr(),
        torch.get_num_threads(),
    )
    if bad >= 0:
        raise _out_of_range(int(src[bad]), int(dst[bad]), bad, num_src, num_dst)
    return rowptr, col, perm


def _rowptr(sorted_rows: Tensor, rows: int, dtype: torch.dtype) -> Tensor:
    bounds = torch.arange(rows + 1, device=sorted_rows.device, dtype=sorted_rows.dtype)
    return torch.searchsorted(sorted_rows, bounds).to(dtype)


def _csr_from_coo_cuda(src: Tensor, dst: Tensor, num_src: int, num_dst: int, wide: bool):
    _check_coo(src, dst)
    dtype = torch.int64 if wide else torch.int32
    bad = (src < 0) | (src >= num_src) | (dst < 0) | (dst >= num_dst)
    if bool(bad.any()):
        edge = int(bad.nonzero()[0])
        raise _out_of_range(int(src[edge]), int(dst[edge]), edge, num_src, num_dst)
    key, perm = torch.sort(dst.long() * num_src + src.long(), stable=True)
    row = torch.div(key, max(num_src, 1), rounding_mode="floor")
    return _rowptr(row, num_dst, dtype), (key - row * num_src).to(dtype), perm.to(dtype)


def _csr_from_coo_fake(src: Tensor, dst: Tensor, num_src: int, num_dst: int, wide: bool):
    _check_coo(src, dst)
    dtype = torch.int64 if wide else torch.int32
    return (
        src.new_empty(num_dst + 1, dtype=dtype),
        src.new_empty(src.shape[0], dtype=dtype),
        src.new_empty(src.shape[0], dtype=dtype),
    )


def _csr_transpose_cpu(rowptr: Tensor, col: Tensor, num_src: int):
    _check_graph(rowptr, col, None)
    t_rowptr = rowptr.new_empty(num_src + 1)
    t_col, t_perm = torch.empty_like(col), torch.empty_like(col)
    _C.cpu.csr_transpose(
        _csr(rowptr, col, num_src), t_rowptr.data_ptr(), t_col.data_ptr(), t_perm.data_ptr(), torch.get_num_threads()
    )
    return t_rowptr, t_col, t_perm


def expand_rows(rowptr: Tensor, edges: int) -> Tensor:
    """The row of every slot [E], int64."""
    rows = torch.arange(rowptr.shape[0] - 1, device=rowptr.device)
    return torch.repeat_interleave(rows, (rowptr[1:] - rowptr[:-1]).long(), output_size=edges)


def _csr_transpose_cuda(rowptr: Tensor, col: Tensor, num_src: int):
    _check_graph(rowptr, col, None)
    sorted_col, perm = torch.sort(col, stable=True)
    row = expand_rows(rowptr, col.shape[0]).to(col.dtype)
    return _rowptr(sorted_col, num_src, col.dtype), row[perm], perm.to(col.dtype)


def _csr_transpose_fake(rowptr: Tensor, col: Tensor, num_src: int):
    _check_graph(rowptr, col, None)
    return rowptr.new_empty(num_src + 1), torch.empty_like(col), torch.empty_like(col)


def _check_union(rowptr: Tensor, col: Tensor, rowptr2: Tensor, col2: Tensor) -> None:
    _check_graph(rowptr, col, None)
    _check_graph(rowptr2, col2, None)
    if rowptr.shape != rowptr2.shape:
        raise ValueError(f"a union needs equal num_dst, got {rowptr.shape[0] - 1} and {rowptr2.shape[0] - 1}")
    if rowptr.dtype != rowptr2.dtype:
        raise TypeError(f"a union needs equal index dtypes, got {rowptr.dtype} and {rowptr2.dtype}")


def _csr_union_cpu(rowptr: Tensor, col: Tensor, rowptr2: Tensor, col2: Tensor, num_src: int):
    _check_union(rowptr, col, rowptr2, col2)
    a, b = _csr(rowptr, col, num_src), _csr(rowptr2, col2, num_src)
    out = torch.empty_like(rowptr)
    _C.cpu.csr_union(a, b, out.data_ptr(), 0, torch.get_num_threads())
    out_col = col.new_empty(int(out[-1]))
    if out_col.numel():
        _C.cpu.csr_union(a, b, out.data_ptr(), out_col.data_ptr(), torch.get_num_threads())
    return out, out_col


def _csr_union_cuda(rowptr: Tensor, col: Tensor, rowptr2: Tensor, col2: Tensor, num_src: int):
    _check_union(rowptr, col, rowptr2, col2)
    keys = [expand_rows(p, c.shape[0]) * num_src + c.long() for p, c in ((rowptr, col), (rowptr2, col2))]
    key = torch.unique_consecutive(torch.sort(torch.cat(keys)).values)
    row = torch.div(key, max(num_src, 1), rounding_mode="floor")
    return _rowptr(row, rowptr.shape[0] - 1, rowptr.dtype), (key - row * num_src).to(col.dtype)


def _csr_union_fake(rowptr: Tensor, col: Tensor, rowptr2: Tensor, col2: Tensor, num_src: int):
    _check_union(rowptr, col, rowptr2, col2)
    size = torch.library.get_ctx().new_dynamic_size()
    return torch.empty_like(rowptr), col.new_empty(size)


# --- the loss -------------------------------------------------------------------------------------

_lib.define(
    "kernel_values(Tensor src, Tensor? dst, Tensor rowptr, Tensor col, Tensor? reverse, SymInt num_src,"
    " int[] kernel, float[] kernel_param) -> Tensor"
)
_lib.define(
    "lsp_forward(Tensor student, Tensor? student_dst, Tensor? teacher, Tensor? teacher_dst,"
    " Tensor? teacher_values, Tensor? weight, Tensor rowptr, Tensor col, Tensor? reverse, SymInt num_src,"
    " int[] student_kernel, float[] student_param, int[] teacher_kernel, float[] teacher_param,"
    " int divergence, int reduction, SymInt max_degree, bool want_coef) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_lib.define(
    "lsp_backward(Tensor grad, Tensor student, Tensor? student_dst, Tensor coef, Tensor src_inv_norm,"
    " Tensor dst_inv_norm, Tensor rowptr, Tensor col, Tensor? reverse, Tensor? t_rowptr, Tensor? t_col,"
    " Tensor? t_perm, SymInt num_src, int metric, SymInt max_degree) -> (Tensor, Tensor)"
)


def _inverse_norms(launch: _Launch, src: Tensor, dst: Tensor | None, metric: int) -> tuple[Tensor, Tensor]:
    """Of both ends; empty unless the metric needs them, and for dst None those of src serve both."""
    if metric != _COSINE:
        none = torch.empty(0, dtype=acc_dtype(src), device=src.device)
        return none, torch.empty_like(none)

    def of(x: Tensor | None) -> Tensor:
        if x is None:
            return src.new_empty(0, dtype=acc_dtype(src))
        out = x.new_empty(x.shape[0], dtype=acc_dtype(x))
        launch.native.inverse_norm(_features(x), out.data_ptr(), launch.where)
        return out

    return of(src), of(dst)


def _similarity(
    launch: _Launch,
    src: Tensor,
    dst: Tensor | None,
    rowptr: Tensor,
    col: Tensor,
    reverse: Tensor | None,
    num_src: int,
    metric: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The raw reduction r [E], and the inverse norms that went into it."""
    src_norm, dst_norm = _inverse_norms(launch, src, dst, metric)
    r = _empty(col.shape, acc_dtype(src), src.device)
    ends = src if dst is None else dst
    norm = src_norm if dst is None else dst_norm
    launch.native.similarity(
        _csr(rowptr, col, num_src),
        _features(src),
        _features(ends),
        src_norm.data_ptr(),
        norm.data_ptr(),
        metric,
        _ptr(reverse),
        r.data_ptr(),
        launch.where,
    )
    return r, src_norm, dst_norm


def _kernel_values(
    src: Tensor,
    dst: Tensor | None,
    rowptr: Tensor,
    col: Tensor,
    reverse: Tensor | None,
    num_src: int,
    kernel: list[int],
    param: list[float],
) -> Tensor:
    _check_graph(rowptr, col, reverse)
    _check_side("teacher", src, dst, rowptr, num_src)
    src = _rows(src)
    dst = None if dst is None else _rows(dst)
    with _Launch(src.device) as launch:
        r, _, _ = _similarity(launch, src, dst, rowptr, col, reverse, num_src, kernel[0])
        values = _empty(r.shape, r.dtype, r.device)
        launch.native.kernel_values(
            r.shape[0], (*kernel, *param), DTYPES[r.dtype], r.data_ptr(), values.data_ptr(), launch.where
        )
    return values


def _kernel_values_fake(src, dst, rowptr, col, reverse, num_src, kernel, param):
    _check_graph(rowptr, col, reverse)
    _check_side("teacher", src, dst, rowptr, num_src)
    return src.new_empty(col.shape[0], dtype=acc_dtype(src))


def _check_forward(
    student, student_dst, teacher, teacher_dst, teacher_values, weight, rowptr, col, reverse, num_src
) -> torch.dtype:
    """The dtype of all sums: float64 if the student is, else float32."""
    _check_graph(rowptr, col, reverse)
    if reverse is not None and (student_dst is not None or teacher_dst is not None):
        raise ValueError("reverse goes with one feature matrix for both ends of an edge")
    _check_side("student", student, student_dst, rowptr, num_src)
    acc = acc_dtype(student)
    if teacher is not None:
        _check_side("teacher", teacher, teacher_dst, rowptr, num_src)
        if acc_dtype(teacher) != acc:
            raise TypeError(
                f"teacher is {teacher.dtype}, but student is {student.dtype}: float64 goes with float64 only"
            )
    elif teacher_values is not None:
        _check_edges("teacher structure", teacher_values, col, acc)
    else:
        raise ValueError("lsp_forward needs teacher or teacher_values")
    if weight is not None:
        _check_edges("edge_weight", weight, col, acc)
    return acc


def _lsp_forward(
    student,
    student_dst,
    teacher,
    teacher_dst,
    teacher_values,
    weight,
    rowptr,
    col,
    reverse,
    num_src,
    student_kernel,
    student_param,
    teacher_kernel,
    teacher_param,
    divergence,
    reduction,
    max_degree,
    want_coef,
):
    acc = _check_forward(
        student, student_dst, teacher, teacher_dst, teacher_values, weight, rowptr, col, reverse, num_src
    )
    num_dst, metric = rowptr.shape[0] - 1, student_kernel[0]
    student = _rows(student)
    student_dst = None if student_dst is None else _rows(student_dst)
    weight = None if weight is None else weight.contiguous()
    with _Launch(student.device) as launch:
        r_s, src_norm, dst_norm = _similarity(launch, student, student_dst, rowptr, col, reverse, num_src, metric)
        if teacher is not None:
            teacher = _rows(teacher)
            teacher_dst = None if teacher_dst is None else _rows(teacher_dst)
            r_t, _, _ = _similarity(launch, teacher, teacher_dst, rowptr, col, reverse, num_src, teacher_kernel[0])
        else:
            r_t = teacher_values.contiguous()
        coef = r_s if want_coef else r_s.new_empty(0)  # written over what it is made from
        rows = torch.empty(num_dst, dtype=acc, device=student.device)
        loss = rows if reduction == _NONE else torch.empty((), dtype=acc, device=student.device)
        diagnostics = torch.empty(3, dtype=torch.int64, device=student.device)
        cosine = metric == _COSINE
        launch.run(
            launch.native.divergences,
            _csr(rowptr, col, num_src),
            (*student_kernel, *student_param),
            (*teacher_kernel, *teacher_param),
            divergence,
            reduction,
            teacher is None,
            DTYPES[acc],
            r_s.data_ptr(),
            r_t.data_ptr(),
            _ptr(weight),
            src_norm.data_ptr() if cosine else 0,
            (src_norm if student_dst is None else dst_norm).data_ptr() if cosine else 0,
            coef.data_ptr() if want_coef else 0,
            rows.data_ptr(),
            0 if reduction == _NONE else loss.data_ptr(),
            diagnostics.data_ptr(),
            max_degree,
        )
    return loss, coef, src_norm, dst_norm, diagnostics


def _lsp_forward_fake(
    student,
    student_dst,
    teacher,
    teacher_dst,
    teacher_values,
    weight,
    rowptr,
    col,
    reverse,
    num_src,
    student_kernel,
    student_param,
    teacher_kernel,
    teacher_param,
    divergence,
    reduction,
    max_degree,
    want_coef,
):
    acc = _check_forward(
        student, student_dst, teacher, teacher_dst, teacher_values, weight, rowptr, col, reverse, num_src
    )
    num_dst = rowptr.shape[0] - 1
    cosine = student_kernel[0] == _COSINE
    return (
        student.new_empty([num_dst] if reduction == _NONE else [], dtype=acc),
        student.new_empty(col.shape[0] if want_coef else 0, dtype=acc),
        student.new_empty(num_src if cosine else 0, dtype=acc),
        student.new_empty(num_dst if cosine and student_dst is not None else 0, dtype=acc),
        student.new_empty(3, dtype=torch.int64),
    )


def _check_backward(student, student_dst, coef, rowptr, col, reverse, t_rowptr, num_src) -> None:
    _check_graph(rowptr, col, reverse)
    _check_side("student", student, student_dst, rowptr, num_src)
    _check_edges("coef", coef, col, acc_dtype(student))
    if reverse is None and t_rowptr is None:
        raise ValueError("lsp_backward needs reverse or the transposed graph")


def _lsp_backward(
    grad,
    student,
    student_dst,
    coef,
    src_inv_norm,
    dst_inv_norm,
    rowptr,
    col,
    reverse,
    t_rowptr,
    t_col,
    t_perm,
    num_src,
    metric,
    max_degree,
):
    _check_backward(student, student_dst, coef, rowptr, col, reverse, t_rowptr, num_src)
    student = _rows(student)
    student_dst = None if student_dst is None else _rows(student_dst)
    grad = grad.contiguous()
    if grad.dtype != coef.dtype:
        grad = grad.to(coef.dtype)
    per_row = grad.dim() == 1
    arriving = _csr(rowptr, col, num_src)
    leaving = None if t_rowptr is None else _csr(t_rowptr, t_col, rowptr.shape[0] - 1)
    x, y = _features(student), _features(student if student_dst is None else student_dst)

    def product(launch: _Launch, like: Tensor, ends: tuple, inv_norm: Tensor, *lists: tuple) -> Tensor:
        out = _empty(like.shape, like.dtype, like.device)
        launch.run(
            launch.native.gradient,
            ends,
            lists,
            metric,
            coef.data_ptr(),
            grad.data_ptr(),
            per_row,
            inv_norm.data_ptr(),
            out.data_ptr(),
            max_degree,
        )
        return out

    with _Launch(student.device) as launch:
        if student_dst is None and reverse is not None:
            one = (arriving, reverse.data_ptr(), True, x)
            return product(launch, student, x, src_inv_norm, one), student.new_empty(0)
        outgoing = (leaving, t_perm.data_ptr(), False, y)
        incoming = (arriving, 0, False, x)
        if student_dst is None:
            return product(launch, student, x, src_inv_norm, incoming, outgoing), student.new_empty(0)
        return (
            product(launch, student, x, src_inv_norm, outgoing),
            product(launch, student_dst, y, dst_inv_norm, incoming),
        )


def _lsp_backward_fake(
    grad,
    student,
    student_dst,
    coef,
    src_inv_norm,
    dst_inv_norm,
    rowptr,
    col,
    reverse,
    t_rowptr,
    t_col,
    t_perm,
    num_src,
    metric,
    max_degree,
):
    _check_backward(student, student_dst, coef, rowptr, col, reverse, t_rowptr, num_src)
    return (
        student.new_empty(student.shape),
        student.new_empty(0) if student_dst is None else student_dst.new_empty(student_dst.shape),
    )


_lib.impl("csr_from_coo", _csr_from_coo_cpu, "CPU")
_lib.impl("csr_from_coo", _csr_from_coo_cuda, "CUDA")
_lib.impl("csr_transpose", _csr_transpose_cpu, "CPU")
_lib.impl("csr_transpose", _csr_transpose_cuda, "CUDA")
_lib.impl("csr_union", _csr_union_cpu, "CPU")
_lib.impl("csr_union", _csr_union_cuda, "CUDA")
for _device in ("CPU", "CUDA"):
    _lib.impl("kernel_values", _kernel_values, _device)
    _lib.impl("lsp_forward", _lsp_forward, _device)
    _lib.impl("lsp_backward", _lsp_backward, _device)
_fakes: dict[str, Any] = {
    "csr_from_coo": _csr_from_coo_fake,
    "csr_transpose": _csr_transpose_fake,
    "csr_union": _csr_union_fake,
    "kernel_values": _kernel_values_fake,
    "lsp_forward": _lsp_forward_fake,
    "lsp_backward": _lsp_backward_fake,
}
for _name, _fake in _fakes.items():
    torch.library.register_fake(f"fastkd::{_name}", _fake, lib=_lib)

csr_from_coo = torch.ops.fastkd.csr_from_coo.default
csr_transpose = torch.ops.fastkd.csr_transpose.default
csr_union = torch.ops.fastkd.csr_union.default
kernel_values = torch.ops.fastkd.kernel_values.default
lsp_forward = torch.ops.fastkd.lsp_forward.default
lsp_backward = torch.ops.fastkd.lsp_backward.default


# --- masked networks ------------------------------------------------------------------------------

_OPERATIONS = ("conv", "norm", "activation", "max_pool", "avg_pool", "add", "multiply", "select", "flatten")
ACTIVATIONS = (
    "none",
    "relu",
    "relu6",
    "leaky_relu",
    "sigmoid",
    "silu",
    "hardsigmoid",
    "hardswish",
    "tanh",
    "gelu",
    "gelu_tanh",
)
ALWAYS, NEVER = -1, -2  # genes of a channel that always, that never exists


class _Memory:
    """Memory of a device for native code that takes and gives it back as it goes."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.held: dict[int, Tensor] = {}
        self.most = self._now = 0  # bytes

    def take(self, size: int) -> int:
        return self._hold(torch.empty(size, dtype=torch.uint8, device=self.device))

    def put(self, data: memoryview) -> int:
        x = torch.frombuffer(data, dtype=torch.uint8)
        # Pinned, the copy waits for nothing, and torch keeps the memory until it is done.
        return self._hold(x.clone() if self.device.type == "cpu" else x.pin_memory().to(self.device, non_blocking=True))

    def give(self, address: int) -> None:
        self._now -= self.held.pop(address).numel()

    def _hold(self, x: Tensor) -> int:
        self.held[x.data_ptr()] = x
        self._now += x.numel()
        self.most = max(self.most, self._now)
        return x.data_ptr()


def runs(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a device has a :class:`Network` of this dtype."""
    return dtype in DTYPES and (_backend(device).uses_workspace or dtype in (torch.float32, torch.float64))


def _tf32() -> bool:
    """Whether torch's own convolutions may use it."""
    try:
        return torch.backends.cudnn.allow_tf32
    except RuntimeError:  # set by torch's newer switches, which this one does not know
        return torch.backends.cudnn.conv.fp32_precision == "tf32"  # type: ignore[attr-defined]


class Network:
    """A network for ``csrc/network.h``, made of plain data.

    ``values`` are tuples (channels, height, width, genes), value 0 the input; ``genes`` gives for every
    channel its index in a mask, ALWAYS or NEVER. ``nodes`` are dictionaries in topological order, with
    "op", "inputs" (indices of values), "output" (an index) and

    * conv: weight [out, in / groups, kh, kw], bias; stride, padding, dilation (pairs), groups. A linear
      layer is one too: its weight [out, features] is taken for a kernel of the size of its input.
    * norm: scale, shift [channels]; for a batch norm weight, bias (or None) and eps as well.
    * activation: name (one of ACTIVATIONS), param.
    * max_pool, avg_pool: kernel, stride, padding, dilation (pairs), count_include_pad; a kernel (0, 0) is
      adaptive. x[:, :, ::2, ::2] is a max_pool with kernel (1, 1) and stride (2, 2).
    * add: two inputs or more. multiply: two, the second perhaps 1 x 1.
    * select: source, for every channel (input, channel) or None for zeros. flatten: nothing.

    ``dtype`` is that of the weights and, on a GPU, of what passes between layers; sums, biases, scales and shifts
    are float32, or float64 for float64. The CPU takes float32 and float64 only.
    """

    def __init__(
        self,
        values: Any,
        nodes: Any,
        num_genes: int,
        dtype: torch.dtype,
        output: int | None = None,
        device: torch.device | None = None,
    ) -> None:
        self.dtype, self.num_genes, self.device = dtype, num_genes, device or torch.device("cpu")
        self.acc = torch.float64 if dtype == torch.float64 else torch.float32
        self._taken = 0
        self.shapes = [tuple(v[:3]) for v in values]
        self.output = nodes[-1]["output"] if output is None else output
        self.norms = [n["output"] for n in nodes if n["op"] == "norm"]
        self._tensors: list[Tensor] = []  # what the native network points to
        genes = [torch.tensor(v[3], dtype=torch.int32) for v in values]
        self._native = _backend(self.device).Network(
            DTYPES[dtype],
            num_genes,
            tuple((*shape, g.data_ptr()) for shape, g in zip(self.shapes, genes, strict=True)),
            tuple(self._node(n) for n in nodes),
            self.output,
        )

    def _keep(self, x: Tensor | None, dtype: torch.dtype | None = None, device: str | None = None) -> int:
        if x is None:
            return 0
        x = x.detach().to(device or self.device, dtype or self.acc).contiguous()
        self._tensors.append(x)
        return x.data_ptr()

    def _node(self, n: dict[str, Any]) -> tuple:
        select, kernel = 0, tuple(n.get("kernel", (1, 1)))
        if n["op"] == "conv":
            weight = n["weight"]
            kernel = self.shapes[n["inputs"][0]][1:] if weight.dim() == 2 else tuple(weight.shape[2:])
        if n["op"] == "select":
            pairs = [(-1, 0) if s is None else s for s in n["source"]]
            select = self._keep(torch.tensor(pairs, dtype=torch.int32).reshape(-1, 2), torch.int32, "cpu")
        geometry = (
            *kernel,
            *n.get("stride", (1, 1)),
            *n.get("padding", (0, 0)),
            *n.get("dilation", (1, 1)),
            n.get("groups", 1),
            n.get("count_include_pad", True),
            "eps" in n,
        )
        return (
            _OPERATIONS.index(n["op"]),
            tuple(n["inputs"]),
            n["output"],
            geometry,
            ACTIVATIONS.index(n.get("name", "none")),
            float(n.get("eps", n.get("param", 0.0))),
            self._keep(n.get("weight"), self.dtype if n["op"] == "conv" else None),
            self._keep(n.get("bias")),
            self._keep(n.get("scale")),
            self._keep(n.get("shift")),
            select,
        )

    def bytes(self, images: int, recalibrate: bool = False, individuals: int = 1) -> int:
        """At most what a run takes beyond its arguments."""
        threads = () if _backend(self.device).uses_workspace else (torch.get_num_threads(),)
        return self._native.bytes(images, recalibrate, individuals, *threads)

    def taken(self) -> int:
        """What the last run took, on the CPU that of values alone."""
        return self._taken if _backend(self.device).uses_workspace else self._native.taken()

    def outline(self) -> tuple[list[int], list[int], list[int]]:
        """Genes in the order in which they are met; of each value the step that makes it (steps are nodes that are
        done at once), or -1; for each step how many of the genes individuals must agree on to share it."""
        return self._native.outline()

    def _run(self, masks: Tensor, x: Tensor, out: Tensor | None, affines: tuple, agree: bool, moments: tuple) -> None:
        shared = x.dim() == 4
        images = x.shape[0 if shared else 1]
        x, masks = x.contiguous(), masks.cpu().contiguous()
        with _Launch(self.device) as launch:
            where: tuple = (launch.where,)
            if launch.native.uses_workspace:
                memory = _Memory(self.device)
                where = (_tf32(), memory.take, memory.put, memory.give, launch.where)
            self._native.run(
                masks.data_ptr(),
                masks.shape[0],
                x.data_ptr(),
                DTYPES[x.dtype],
                0 if shared else x.numel() // max(x.shape[0], 1),
                images,
                _ptr(out),
                DTYPES[self.dtype if out is None else out.dtype],
                affines,
                agree,
                moments,
                *where,
            )
            if launch.native.uses_workspace:
                self._taken = memory.most

    def __call__(
        self,
        masks: Tensor,
        x: Tensor,
        affines: list[tuple[Tensor, Tensor] | None] | None = None,
        out_dtype: torch.dtype | None = None,
        agree: bool = False,
    ) -> Tensor:
        """masks bool [P, genes], x [N, C, H, W] or [P, N, C, H, W] -> [P, N, C', H', W'].

        ``affines`` gives for every norm its (scale, shift), each [channels] or [P, channels], or None for
        its own. ``agree`` says that their rows come from the masks: a GPU, which does not compare them, then
        shares what individuals with equal beginnings have in common.
        """
        images = x.shape[-4]
        out = _empty((masks.shape[0], images, *self.shapes[self.output]), out_dtype or self.dtype, x.device)
        rows, kept = [], []
        for pair in affines or ():
            if pair is None:
                rows.append((0, 0, 0))
                continue
            scale, shift = (t.to(self.device, self.acc).contiguous() for t in pair)
            kept += [scale, shift]
            rows.append((scale.data_ptr(), shift.data_ptr(), scale.shape[1] if scale.dim() == 2 else 0))
        self._run(masks, x, out, tuple(rows), agree, ())
        return out

    def moments(self, masks: Tensor, x: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Mean and biased variance [P, channels], float64, of the batch x at every norm.

        Batch norms use these while they are computed. 0 and 1 where a channel does not exist.
        """
        pairs = []
        for v in self.norms:
            shape = (masks.shape[0], self.shapes[v][0])
            pairs.append(
                (
                    torch.zeros(shape, dtype=torch.float64, device=self.device),
                    torch.ones(shape, dtype=torch.float64, device=self.device),
                )
            )
        self._run(masks, x, None, (), False, tuple((m.data_ptr(), v.data_ptr()) for m, v in pairs))
        return pairs


_CONV = "Tensor? in_mask, Tensor? out_mask, SymInt[2] stride, SymInt[2] padding, SymInt[2] dilation, SymInt groups"
_lib.define(f"masked_conv2d(Tensor x, Tensor weight, Tensor? bias, {_CONV}) -> Tensor")
_lib.define(
    f"masked_conv2d_backward(Tensor grad, Tensor x, Tensor weight, {_CONV}, bool[3] wanted) -> (Tensor, Tensor, Tensor)"
)


def _check_masked_conv(x, weight, bias, in_mask, out_mask, stride, padding, dilation, groups) -> tuple:
    """The shape of the result [P, N, C_out, H', W']."""
    if x.dtype not in DTYPES:
        raise TypeError(f"x must be float16, bfloat16, float32 or float64, got {x.dtype}")
    if x.dim() not in (4, 5):
        raise ValueError(f"x must have shape [N, C, H, W] or [P, N, C, H, W], got {tuple(x.shape)}")
    if weight.dim() != 4:
        raise ValueError(f"weight must have shape [C_out, C_in / groups, kH, kW], got {tuple(weight.shape)}")
    channels, outputs = x.shape[-3], weight.shape[0]
    for name, t in (("weight", weight), ("bias", bias)):
        if t is not None and t.dtype != x.dtype:
            raise TypeError(f"{name} is {t.dtype}, but x is {x.dtype}")
    for name, t in (("weight", weight), ("bias", bias), ("in_mask", in_mask), ("out_mask", out_mask)):
        if t is not None and t.device != x.device:
            raise ValueError(f"{name} is on {t.device}, but x is on {x.device}")
    for name, pair, least in (("stride", stride, 1), ("padding", padding, 0), ("dilation", dilation, 1)):
        if len(pair) != 2 or pair[0] < least or pair[1] < least:
            raise ValueError(f"{name} must be two integers in [{least}, inf), got {tuple(pair)}")
    if groups < 1 or channels % groups or outputs % groups:
        raise ValueError(
            f"groups = {groups} must be in [1, inf) and divide the channels of x ({channels}) and of "
            f"the result ({outputs})"
        )
    if weight.shape[1] * groups != channels:
        raise ValueError(
            f"weight takes {weight.shape[1] * groups} channels ({weight.shape[1]} x {groups} groups), "
            f"but x has {channels}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must have shape [{outputs}], got {tuple(bias.shape)}")
    individuals, source = (x.shape[0], "x") if x.dim() == 5 else (None, "")
    for name, mask, size in (("in_mask", in_mask, channels), ("out_mask", out_mask, outputs)):
        if mask is None:
            continue
        if mask.dtype != torch.bool:
            raise TypeError(f"{name} must be bool, got {mask.dtype}")
        if mask.dim() != 2 or mask.shape[1] != size:
            raise ValueError(f"{name} must have shape [P, {size}], got {tuple(mask.shape)}")
        if individuals is not None and mask.shape[0] != individuals:
            raise ValueError(f"{name} has P = {mask.shape[0]} rows, but {source} has P = {individuals}")
        individuals, source = mask.shape[0], name
    if individuals is None:
        raise ValueError("the number of individuals is not known: pass in_mask, out_mask or x of shape [P, N, C, H, W]")
    out = []
    for axis, s in enumerate(x.shape[-2:]):
        extent = dilation[axis] * (weight.shape[2 + axis] - 1) + 1
        if weight.shape[2 + axis] < 1 or s + 2 * padding[axis] < extent:
            raise ValueError(
                f"the kernel spans {extent} pixels, but x with its padding has "
                f"{s + 2 * padding[axis]} on axis {'HW'[axis]}"
            )
        out.append((s + 2 * padding[axis] - extent) // stride[axis] + 1)
    return individuals, x.shape[-4], outputs, *out


def _masked_conv2d(x, weight, bias, in_mask, out_mask, stride, padding, dilation, groups) -> Tensor:
    shape = _check_masked_conv(x, weight, bias, in_mask, out_mask, stride, padding, dilation, groups)
    channels, outputs = x.shape[-3], shape[2]
    masks = [m for m in (in_mask, out_mask) if m is not None]
    genes_in = [ALWAYS] * channels if in_mask is None else range(channels)
    first = 0 if in_mask is None else channels
    genes_out = [ALWAYS] * outputs if out_mask is None else range(first, first + outputs)
    node = {
        "op": "conv",
        "inputs": (0,),
        "output": 1,
        "weight": weight,
        "bias": bias,
        "stride": stride,
        "padding": padding,
        "dilation": dilation,
        "groups": groups,
    }
    values = ((*x.shape[-3:], list(genes_in)), (*shape[2:], list(genes_out)))
    dtype = x.dtype if _backend(x.device).uses_workspace else acc_dtype(x)
    network = Network(values, [node], sum(m.shape[1] for m in masks), dtype, device=x.device)
    mask = torch.cat(masks, 1) if masks else torch.empty(shape[0], 0, dtype=torch.bool)
    return network(mask, x, out_dtype=x.dtype)


def _indices(mask: Tensor | None, p: int) -> Tensor | slice:
    return slice(None) if mask is None else mask[p].nonzero()[:, 0]


def _clear(x: Tensor, mask: Tensor | None, p: int, axis: int = 1) -> Tensor:
    """x without the channels that individual p lacks, whatever they hold."""
    if mask is None:
        return x
    return x.masked_fill(~mask[p].reshape([-1] + [1] * (x.dim() - 1 - axis)), 0)


def _masked_conv2d_fake(x, weight, bias, in_mask, out_mask, stride, padding, dilation, groups) -> Tensor:
    return x.new_empty(_check_masked_conv(x, weight, bias, in_mask, out_mask, stride, padding, dilation, groups))


def _check_masked_conv_backward(grad, x, weight, in_mask, out_mask, stride, padding, dilation, groups) -> tuple:
    shape = _check_masked_conv(x, weight, None, in_mask, out_mask, stride, padding, dilation, groups)
    if tuple(grad.shape) != shape or grad.dtype != x.dtype:
        raise ValueError(f"grad must be {x.dtype} of shape {shape}, got {grad.dtype} {tuple(grad.shape)}")
    return shape


def _masked_conv2d_backward_cpu(grad, x, weight, in_mask, out_mask, stride, padding, dilation, groups, wanted):
    shape = _check_masked_conv_backward(grad, x, weight, in_mask, out_mask, stride, padding, dilation, groups)
    acc, shared = acc_dtype(x), x.dim() == 4
    gx = x.new_zeros(x.shape if wanted[0] else 0, dtype=acc if shared else x.dtype)
    gw = x.new_zeros(weight.shape if wanted[1] else 0, dtype=acc)
    gb = x.new_zeros(shape[2] if wanted[2] else 0, dtype=acc)
    grad, x, weight = grad.contiguous(), x.contiguous(), weight.to(acc).contiguous()
    in_mask, out_mask = (None if m is None else m.contiguous() for m in (in_mask, out_mask))
    if shape[0] and shape[1]:
        _C.cpu.conv_backward(
            DTYPES[acc],
            DTYPES[x.dtype],
            (*shape[:2], x.shape[-3], shape[2], groups),
            (*x.shape[-2:], *shape[3:], *weight.shape[2:], *stride, *padding, *dilation),
            _ptr(in_mask),
            _ptr(out_mask),
            _ptr(grad),
            _ptr(x),
            shared,
            _ptr(weight),
            *(_ptr(g) if w else 0 for g, w in zip((gx, gw, gb), wanted, strict=True)),
            torch.get_num_threads(),
        )
    return gx.to(x.dtype), gw.to(x.dtype), gb.to(x.dtype)


def _masked_conv2d_backward_torch(grad, x, weight, in_mask, out_mask, stride, padding, dilation, groups, wanted):
    """Individual after individual, each on what it keeps; sums over individuals in their order."""
    shape = _check_masked_conv_backward(grad, x, weight, in_mask, out_mask, stride, padding, dilation, groups)
    acc = acc_dtype(x)
    shared = x.dim() == 4
    gx = torch.zeros_like(x, dtype=acc if shared else x.dtype) if wanted[0] else x.new_empty(0)
    gw = torch.zeros_like(weight, dtype=acc) if wanted[1] else x.new_empty(0)
    gb = weight.new_zeros(shape[2], dtype=acc) if wanted[2] else x.new_empty(0)
    for p in range(shape[0] if shape[1] else 0):
        i = _indices(in_mask if groups == 1 else None, p)
        o = _indices(out_mask if groups == 1 else None, p)
        own, g = (x if shared else x[p])[:, i], grad[p][:, o]
        if groups > 1:  # groups may keep unequal counts
            own, g = _clear(own, in_mask, p), _clear(g, out_mask, p)
        if wanted[2]:
            gb[o] += g.sum((0, 2, 3), dtype=acc)
        if not own.numel() or not g.numel() or not any(wanted[:2]):
            continue
        dx, dw, _ = torch.ops.aten.convolution_backward(
            g, own, weight[o][:, i], None, stride, padding, dilation, False, [0, 0], groups, [*wanted[:2], False]
        )
        if wanted[0]:
            (gx if shared else gx[p])[:, i] += dx if groups == 1 else _clear(dx, in_mask, p)
        if wanted[1]:
            rows = gw[o]
            rows[:, i] += dw
            gw[o] = rows
    return gx.to(x.dtype), gw.to(x.dtype), gb.to(x.dtype)


def _masked_conv2d_backward_fake(grad, x, weight, in_mask, out_mask, stride, padding, dilation, groups, wanted):
    shape = _check_masked_conv_backward(grad, x, weight, in_mask, out_mask, stride, padding, dilation, groups)
    return (
        torch.empty_like(x) if wanted[0] else x.new_empty(0),
        torch.empty_like(weight) if wanted[1] else x.new_empty(0),
        x.new_empty(shape[2] if wanted[2] else 0),
    )


for _device in ("CPU", "CUDA"):
    _lib.impl("masked_conv2d", _masked_conv2d, _device)
_lib.impl("masked_conv2d_backward", _masked_conv2d_backward_cpu, "CPU")
_lib.impl("masked_conv2d_backward", _masked_conv2d_backward_torch, "CUDA")
torch.library.register_fake("fastkd::masked_conv2d", _masked_conv2d_fake, lib=_lib)
torch.library.register_fake("fastkd::masked_conv2d_backward", _masked_conv2d_backward_fake, lib=_lib)

masked_conv2d = torch.ops.fastkd.masked_conv2d.default
masked_conv2d_backward = torch.ops.fastkd.masked_conv2d_backward.default


class NoSecondDerivative(torch.autograd.Function):
    """Marks a gradient of the operator `name`, so that differentiating it is an error and not a silent 0."""

    @staticmethod
    def forward(ctx, name, gradient, *inputs):
        ctx.name = name
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx, _):
        raise NotImplementedError(
            f"{ctx.name} has no second derivative: use fastkd.reference.{ctx.name}, which has, "
            "or leave it out of what is differentiated twice"
        )
