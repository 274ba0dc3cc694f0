"""The strong baseline: sparse products of stock torch, put together by hand.

With a_e = exp(-d_e^2 / 2 sigma) and b_e the kernel values of student and teacher on an edge
e = (j -> i), Z_i = sum_j exp(a), m = exp(a) (a - b), U_i = sum_j m and q_i = U_i / Z_i:

    S_i = q_i - log Z_i + log Z^t_i          dS_i / da_e = (m_e - q_i exp(a_e)) / Z_i

What makes it fast, measured on a CPU with AVX2 (one thread, E = 1.6 M, N = 57,000, D = 136):

* d^2 = |z_i|^2 + |z_j|^2 - 2 z_i . z_j with the dot products from torch.sparse.sampled_addmm (which
  loses digits where nodes are close: fastkd sums (z_i - z_j)^2).
* `composite_pairs` does so, on a symmetric graph, for the pairs j <= i alone, as fastkd does: 37 ms
  instead of 103. `composite` is what is usually written: every edge.
* The kernel's values lie in [0, 1], so the softmax needs no maximum subtracted.
* A segment sum is the product of the CSR matrix with ones: 1.3 ms, where torch.segment_reduce takes
  2.1, scatter_add_ 3.6 and index_add_ 4.7.
* index_select reads a vector by edge in 1.0 ms; x[index] and gather take 4.1.
* int32 indices: sampled_addmm takes 0.6 to 1.0 of its time with int64, MKL's products 0.6 to 0.9
  (its interface is 32-bit: torch converts in every call).
* The backward pass is one product with C + C^T. On a directed graph its rows are the in-edges and
  the out-edges together (2 E entries): no second product, no sum of two results.
* That product is either MKL's (torch.addmm, here 270 ms) or torch's own (torch.sparse.mm with
  "sum", 150 ms). MKL's is ahead, by up to a fifth, where all features fit the cache. Which one is
  faster is found out per case, when the plan is made.

torch.compile of the operations between the products gained nothing (0.9 to 1.6 times the time), and
it does not take the values of a sparse matrix without a copy.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

from .cases import SIGMA, Case


def _product_mkl(matrix: Tensor, x: Tensor, diagonal: Tensor) -> Tensor:  # cuSPARSE on a GPU
    return torch.addmm(x * diagonal[:, None], matrix, x)


def _product_native(matrix: Tensor, x: Tensor, diagonal: Tensor) -> Tensor:
    return torch.sparse.mm(matrix, x, "sum").addcmul_(x, diagonal[:, None])


class _Plan:
    """What depends on the graph alone.

    A pair is what has one kernel value: an edge, or with `pairs` both directions of one on a symmetric
    graph.
    """

    def __init__(self, case: Case, pairs: bool) -> None:
        graph = case.graph
        n = self.nodes = case.num_nodes
        self.rowptr, self.col = graph.rowptr, graph.col
        index, device = self.col.dtype, self.col.device
        degree = (self.rowptr[1:] - self.rowptr[:-1]).long()
        row = torch.repeat_interleave(torch.arange(n, device=device), degree, output_size=case.num_edges)
        self.ones = torch.ones(n, device=device)
        self.empty = (degree == 0).float()  # makes Z of a node without edges 1, and its S_i 0
        self.symmetric = graph.is_symmetric and pairs
        self.reverse = graph.reverse if graph.is_symmetric and not pairs else None
        if self.symmetric:
            lower = row >= self.col
            pair = lower.cumsum(0) - 1
            # [E] the pair of every edge.
            self.of_edge = torch.where(lower, pair, pair[graph.reverse.long()]).to(index)
            self.pair_row, self.pair_col = row[lower].to(index), self.col[lower]
            counts = torch.bincount(row[lower], minlength=n)
            self.pair_rowptr = torch.cat((counts.new_zeros(1), counts.cumsum(0))).to(index)
            self.back_rowptr, self.back_col, self.back_pair = self.rowptr, self.col, self.of_edge
        elif self.reverse is not None:
            self.of_edge = None
            self.pair_row, self.pair_col, self.pair_rowptr = row.to(index), self.col, self.rowptr
            self.back_rowptr, self.back_col = self.rowptr, self.col
        else:
            self.of_edge = None
            self.pair_row, self.pair_col, self.pair_rowptr = row.to(index), self.col, self.rowptr
            # Row i of C + C^T, not merged: its in-edges and its out-edges, by column.
            here, there = torch.cat((row, self.col.long())), torch.cat((self.col.long(), row))
            key, order = torch.sort(here * n + there)
            self.back_col = (key % n).to(index)
            self.back_pair = (order % case.num_edges).to(index)
            bounds = torch.arange(n + 1, device=device)
            self.back_rowptr = torch.searchsorted(key // n, bounds).to(index)
        zeros = torch.zeros(self.pair_col.numel(), device=device)
        self.pattern = self._matrix(self.pair_rowptr, self.pair_col, zeros)
        self.product = self._faster_product(case)

    def _matrix(self, rowptr: Tensor, col: Tensor, values: Tensor) -> Tensor:
        return torch.sparse_csr_tensor(rowptr, col, values, (self.nodes, self.nodes), check_invariants=False)

    def backward_matrix(self, coef: Tensor) -> Tensor:
        if self.reverse is not None:
            values = coef + coef.index_select(0, self.reverse)
        else:
            values = coef.index_select(0, self.back_pair)
        return self._matrix(self.back_rowptr, self.back_col, values)

    def row_sums(self, pairs: Tensor) -> Tensor:
        """[N] sums over the in-edges of every node of what belongs to their pairs."""
        values = pairs if self.of_edge is None else pairs.index_select(0, self.of_edge)
        return self._matrix(self.rowptr, self.col, values).mv(self.ones)

    def _faster_product(self, case: Case) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        if self.col.is_cuda:
            return _product_mkl
        x = case.student.detach().float()
        matrix = self.backward_matrix(torch.ones(self.pair_col.numel()))
        best = {}
        for product in (_product_mkl, _product_native) * 3:
            start = time.perf_counter()
            product(matrix, x, self.ones)
            best[product] = min(best.get(product, 1e9), time.perf_counter() - start)
        return min(best, key=best.get)

    def kernel(self, x: Tensor) -> Tensor:
        """exp(-d^2 / 2 sigma) of every pair."""
        dots = torch.sparse.sampled_addmm(self.pattern, x, x.t(), beta=0.0).values()
        # Unlike vecdot, the norm makes no [N, D] product first: half the time.
        squares = torch.linalg.vector_norm(x, dim=1).square_().mul_(-0.5 / SIGMA)
        exponent = dots.mul_(1 / SIGMA).add_(squares.index_select(0, self.pair_row))
        return exponent.add_(squares.index_select(0, self.pair_col)).exp_()

    def teacher(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Kernel values, and log Z of every node: together the log-probabilities."""
        values = self.kernel(x.float())
        return values, self.row_sums(values.exp()).add_(self.empty).log_()


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, student: Tensor, plan: _Plan, teacher: Tensor, values: Tensor | None, log_total: Tensor | None
    ) -> Tensor:
        if values is None:
            values, log_total = plan.teacher(teacher)
        x = student.float()
        own = plan.kernel(x)
        weight = own.exp()
        moment = torch.sub(own, values).mul_(weight)
        total = plan.row_sums(weight).add_(plan.empty)
        mean = plan.row_sums(moment).div_(total)
        loss = (mean - total.log() + log_total).sum() / plan.nodes

        # d loss / d (2 sigma d^2), of both directions on a symmetric graph.
        inverse = total.reciprocal_()
        mean.mul_(inverse)
        first = inverse.index_select(0, plan.pair_row)
        second = mean.index_select(0, plan.pair_row)
        if plan.symmetric:
            first.add_(inverse.index_select(0, plan.pair_col))
            second.add_(mean.index_select(0, plan.pair_col))
        coef = moment.mul_(first).sub_(weight.mul_(second)).mul_(own)
        ctx.save_for_backward(student, coef)
        ctx.plan = plan
        return loss

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        student, coef = ctx.saved_tensors
        plan, x = ctx.plan, student.float()
        matrix = plan.backward_matrix(coef * (grad / (SIGMA * plan.nodes)))
        # sum_j c_ij (z_j - z_i) = (C z)_i - z_i sum_j c_ij.
        out = plan.product(matrix, x, matrix.mv(plan.ones).neg_())
        return out.to(student.dtype), None, None, None, None


def composite_pairs(case: Case, cached: bool) -> Callable[[], Tensor]:
    return composite(case, cached, pairs=True)


def composite(case: Case, cached: bool, pairs: bool = False) -> Callable[[], Tensor]:
    plan = _Plan(case, pairs)
    student, teacher = case.student, case.teacher
    values = log_total = None
    if cached:
        with torch.no_grad():
            values, log_total = plan.teacher(teacher)

    def loss() -> Tensor:
        return _Loss.apply(student, plan, teacher, values, log_total)

    loss.variant = plan.product.__name__.removeprefix("_product_")
    return loss
