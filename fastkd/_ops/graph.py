"""The operators that build graphs."""

from __future__ import annotations

import torch
from torch import Tensor

from . import native
from .native import check_graph, csr

_INT32_MAX = 2**31 - 1


def expand_rows(rowptr: Tensor, edges: int) -> Tensor:
    """The row of every slot [E], int64."""
    rows = torch.arange(rowptr.shape[0] - 1, device=rowptr.device)
    return torch.repeat_interleave(rows, (rowptr[1:] - rowptr[:-1]).long(), output_size=edges)


def _rowptr(sorted_rows: Tensor, rows: int, dtype: torch.dtype) -> Tensor:
    bounds = torch.arange(rows + 1, device=sorted_rows.device, dtype=sorted_rows.dtype)
    return torch.searchsorted(sorted_rows, bounds).to(dtype)


def _index_dtype(wide: bool) -> torch.dtype:
    return torch.int64 if wide else torch.int32


# What follows looks at values, which fakes do not have.


def _check_size(name: str, size: int) -> None:
    if not 0 <= size <= _INT32_MAX:
        raise ValueError(f"{name} must be in [0, 2**31), got {size}")


def _check_width(edges: int, wide: bool) -> None:
    if not wide and edges > _INT32_MAX:
        raise ValueError(f"{edges} edges need indices of int64")


def _first_wrong(rowptr: Tensor, col: Tensor, num_src: int) -> int:
    """As the native csr_first_wrong, for a device; it waits for the device once where all is right."""
    edges, rows = col.shape[0], rowptr.shape[0] - 1
    wrong = torch.cat(
        (rowptr[:1] != 0, (rowptr[1:] < rowptr[:-1]) | (rowptr[1:] > edges), (col < 0) | (col >= num_src))
    )
    wrong[rows] |= rowptr[rows] != edges
    return int(wrong.nonzero()[0]) if bool(wrong.any()) else -1


def _check_slots(rowptr: Tensor, col: Tensor, num_src: int) -> None:
    """Raises unless rowptr rises from 0 to E and columns are in [0, num_src)."""
    _check_size("num_src", num_src)
    on_host = rowptr.device.type == "cpu"
    k = native.host.csr_first_wrong(csr(rowptr, col, num_src)) if on_host else _first_wrong(rowptr, col, num_src)
    if k < 0:
        return
    rows, edges = rowptr.shape[0] - 1, col.shape[0]
    if k > rows:
        e = k - rows - 1
        raise IndexError(f"col[{e}] = {int(col[e])} is out of range: valid indices are in [0, {num_src})")
    before = "" if k == 0 else f" after rowptr[{k - 1}] = {int(rowptr[k - 1])}"
    raise ValueError(f"rowptr must rise from 0 to E = {edges}, got rowptr[{k}] = {int(rowptr[k])}{before}")


# --- csr_from_coo ---------------------------------------------------------------------------------


def _check_coo(src: Tensor, dst: Tensor) -> None:
    for name, x in (("edge_index[0]", src), ("edge_index[1]", dst)):
        if x.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"{name} must be int32 or int64, got {x.dtype}")
    if src.dim() != 1 or src.shape != dst.shape:
        raise ValueError(f"edge_index must have shape [2, E], got {tuple(src.shape)} and {tuple(dst.shape)}")
    if src.dtype != dst.dtype or src.device != dst.device:
        raise ValueError("both rows of edge_index must have one dtype and device")


def _check_coo_sizes(src: Tensor, num_src: int, num_dst: int, wide: bool) -> None:
    _check_size("num_src", num_src)
    _check_size("num_dst", num_dst)
    _check_width(src.shape[0], wide)


def _out_of_range(src: int, dst: int, edge: int, num_src: int, num_dst: int) -> IndexError:
    row, value, size = (0, src, num_src) if not 0 <= src < num_src else (1, dst, num_dst)
    end = "source" if row == 0 else "destination"
    return IndexError(
        f"edge_index[{row}, {edge}] = {value} ({end} of edge {edge}) is out of range: valid indices are in [0, {size})"
    )


def _csr_from_coo_cpu(
    src: Tensor, dst: Tensor, num_src: int, num_dst: int, wide: bool
) -> tuple[Tensor, Tensor, Tensor]:
    _check_coo(src, dst)
    _check_coo_sizes(src, num_src, num_dst, wide)
    src, dst = src.contiguous(), dst.contiguous()
    dtype, edges = _index_dtype(wide), src.shape[0]
    rowptr = torch.empty(num_dst + 1, dtype=dtype)
    col, perm = torch.empty(edges, dtype=dtype), torch.empty(edges, dtype=dtype)
    bad = native.host.csr_from_coo(
        src=src.data_ptr(),
        dst=dst.data_ptr(),
        wide_in=src.dtype == torch.int64,
        edges=edges,
        num_src=num_src,
        num_dst=num_dst,
        wide_out=wide,
        rowptr=rowptr.data_ptr(),
        col=col.data_ptr(),
        perm=perm.data_ptr(),
        threads=torch.get_num_threads(),
    )
    if bad >= 0:
        raise _out_of_range(int(src[bad]), int(dst[bad]), bad, num_src, num_dst)
    return rowptr, col, perm


def _csr_from_coo_cuda(
    src: Tensor, dst: Tensor, num_src: int, num_dst: int, wide: bool
) -> tuple[Tensor, Tensor, Tensor]:
    _check_coo(src, dst)
    _check_coo_sizes(src, num_src, num_dst, wide)
    dtype = _index_dtype(wide)
    bad = (src < 0) | (src >= num_src) | (dst < 0) | (dst >= num_dst)
    if bool(bad.any()):
        edge = int(bad.nonzero()[0])
        raise _out_of_range(int(src[edge]), int(dst[edge]), edge, num_src, num_dst)
    key, perm = torch.sort(dst.long() * num_src + src.long(), stable=True)
    row = torch.div(key, max(num_src, 1), rounding_mode="floor")
    return _rowptr(row, num_dst, dtype), (key - row * num_src).to(dtype), perm.to(dtype)


def _csr_from_coo_fake(
    src: Tensor, dst: Tensor, num_src: int, num_dst: int, wide: bool
) -> tuple[Tensor, Tensor, Tensor]:
    _check_coo(src, dst)
    dtype, edges = _index_dtype(wide), src.shape[0]
    return (
        src.new_empty(num_dst + 1, dtype=dtype),
        src.new_empty(edges, dtype=dtype),
        src.new_empty(edges, dtype=dtype),
    )


csr_from_coo = native.register(
    "csr_from_coo(Tensor src, Tensor dst, SymInt num_src, SymInt num_dst, bool wide) -> (Tensor, Tensor, Tensor)",
    fake=_csr_from_coo_fake,
    cpu=_csr_from_coo_cpu,
    cuda=_csr_from_coo_cuda,
)


# --- csr_transpose --------------------------------------------------------------------------------


def _csr_transpose_cpu(rowptr: Tensor, col: Tensor, num_src: int) -> tuple[Tensor, Tensor, Tensor]:
    check_graph(rowptr, col, None)
    _check_slots(rowptr, col, num_src)
    t_rowptr = rowptr.new_empty(num_src + 1)
    t_col, t_perm = torch.empty_like(col), torch.empty_like(col)
    native.host.csr_transpose(
        csr(rowptr, col, num_src),
        rowptr=t_rowptr.data_ptr(),
        col=t_col.data_ptr(),
        perm=t_perm.data_ptr(),
        threads=torch.get_num_threads(),
    )
    return t_rowptr, t_col, t_perm


def _csr_transpose_cuda(rowptr: Tensor, col: Tensor, num_src: int) -> tuple[Tensor, Tensor, Tensor]:
    check_graph(rowptr, col, None)
    _check_slots(rowptr, col, num_src)
    sorted_col, perm = torch.sort(col, stable=True)
    row = expand_rows(rowptr, col.shape[0]).to(col.dtype)
    return _rowptr(sorted_col, num_src, col.dtype), row[perm], perm.to(col.dtype)


def _csr_transpose_fake(rowptr: Tensor, col: Tensor, num_src: int) -> tuple[Tensor, Tensor, Tensor]:
    check_graph(rowptr, col, None)
    return rowptr.new_empty(num_src + 1), torch.empty_like(col), torch.empty_like(col)


csr_transpose = native.register(
    "csr_transpose(Tensor rowptr, Tensor col, SymInt num_src) -> (Tensor, Tensor, Tensor)",
    fake=_csr_transpose_fake,
    cpu=_csr_transpose_cpu,
    cuda=_csr_transpose_cuda,
)


# --- csr_union ------------------------------------------------------------------------------------


def _check_union(rowptr: Tensor, col: Tensor, rowptr2: Tensor, col2: Tensor) -> None:
    check_graph(rowptr, col, None)
    check_graph(rowptr2, col2, None)
    if rowptr.shape != rowptr2.shape:
        raise ValueError(f"a union needs equal num_dst, got {rowptr.shape[0] - 1} and {rowptr2.shape[0] - 1}")
    if rowptr.dtype != rowptr2.dtype:
        raise TypeError(f"a union needs equal index dtypes, got {rowptr.dtype} and {rowptr2.dtype}")


def _check_union_slots(rowptr: Tensor, col: Tensor, rowptr2: Tensor, col2: Tensor, num_src: int) -> None:
    _check_slots(rowptr, col, num_src)
    _check_slots(rowptr2, col2, num_src)
    _check_width(col.shape[0] + col2.shape[0], col.dtype == torch.int64)


def _csr_union_cpu(rowptr: Tensor, col: Tensor, rowptr2: Tensor, col2: Tensor, num_src: int) -> tuple[Tensor, Tensor]:
    _check_union(rowptr, col, rowptr2, col2)
    _check_union_slots(rowptr, col, rowptr2, col2, num_src)
    a, b, threads = csr(rowptr, col, num_src), csr(rowptr2, col2, num_src), torch.get_num_threads()
    out = torch.empty_like(rowptr)
    native.host.csr_union(a, b, rowptr=out.data_ptr(), col=0, threads=threads)
    out_col = col.new_empty(int(out[-1]))
    if out_col.numel():
        native.host.csr_union(a, b, rowptr=out.data_ptr(), col=out_col.data_ptr(), threads=threads)
    return out, out_col


def _csr_union_cuda(rowptr: Tensor, col: Tensor, rowptr2: Tensor, col2: Tensor, num_src: int) -> tuple[Tensor, Tensor]:
    _check_union(rowptr, col, rowptr2, col2)
    _check_union_slots(rowptr, col, rowptr2, col2, num_src)
    keys = [expand_rows(p, c.shape[0]) * num_src + c.long() for p, c in ((rowptr, col), (rowptr2, col2))]
    key = torch.unique_consecutive(torch.sort(torch.cat(keys)).values)
    row = torch.div(key, max(num_src, 1), rounding_mode="floor")
    return _rowptr(row, rowptr.shape[0] - 1, rowptr.dtype), (key - row * num_src).to(col.dtype)


def _csr_union_fake(rowptr: Tensor, col: Tensor, rowptr2: Tensor, col2: Tensor, num_src: int) -> tuple[Tensor, Tensor]:
    _check_union(rowptr, col, rowptr2, col2)
    size = torch.library.get_ctx().new_dynamic_size()
    return torch.empty_like(rowptr), col.new_empty(size)


csr_union = native.register(
    "csr_union(Tensor rowptr, Tensor col, Tensor rowptr2, Tensor col2, SymInt num_src) -> (Tensor, Tensor)",
    fake=_csr_union_fake,
    cpu=_csr_union_cpu,
    cuda=_csr_union_cuda,
)
