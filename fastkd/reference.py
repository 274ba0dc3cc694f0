"""The specification in plain torch, readable and slow; tests compare the kernels with it in float64.

:func:`lsp_loss` and :func:`masked_conv2d` are differentiable twice; the loss keeps tensors of size E x D.
:func:`masked_forward` is one individual of a population, with every channel computed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from . import kernels
from ._adjacency import GraphLike, as_graph
from ._features import pair_of, sizes_of
from .kernels import Kernel
from .lsp import Divergence, Features, Reduction, TeacherStructure

if TYPE_CHECKING:
    from .population.space import GeneSpace

__all__ = ["edge_softmax", "lsp_loss", "masked_conv2d", "masked_forward", "similarity"]


def similarity(kernel: Kernel, a: Tensor, b: Tensor) -> Tensor:
    """SIM(a_e, b_e) of rows a, b [E, D] -> [E].

    >>> import torch
    >>> from fastkd import kernels, reference
    >>> reference.similarity(kernels.Euclidean(), torch.zeros(1, 2), torch.tensor([[3.0, 4.0]])).tolist()
    [-25.0]
    """
    total = torch.mean if getattr(kernel, "scale", "sum") == "mean" else torch.sum

    def distance(squared: bool) -> Tensor:
        square = total((a - b) ** 2, -1)
        if squared:
            return square
        # The distance with the subgradient 0 at 0, where sqrt would give infinity.
        zero = square == 0
        return torch.where(zero, torch.zeros_like(square), torch.where(zero, torch.ones_like(square), square).sqrt())

    def cosine() -> Tensor:
        norms = a.norm(dim=-1) * b.norm(dim=-1)
        zero = norms == 0
        safe = torch.where(zero, torch.ones_like(norms), norms)
        return torch.where(zero, torch.zeros_like(norms), (a * b).sum(-1) / safe)

    match kernel:
        case kernels.Linear():
            return total(a * b, -1)
        case kernels.Poly():
            return ((cosine() if kernel.normalize else total(a * b, -1)) + kernel.c) ** kernel.degree
        case kernels.Euclidean():
            return kernel.sign * distance(kernel.squared)
        case kernels.RBF():
            return torch.exp(-distance(True) / (2 * kernel.sigma))
        case kernels.Laplacian():
            return torch.exp(-total((a - b).abs(), -1) / kernel.sigma)
        case kernels.Cosine():
            return cosine()
    raise TypeError(f"unknown kernel {kernel!r}")


def edge_softmax(logits: Tensor, dst: Tensor, num_dst: int) -> Tensor:
    """log_softmax of logits [E] over the edges of each destination, as dst int64 [E] numbers them.

    >>> import torch
    >>> from fastkd import reference
    >>> reference.edge_softmax(torch.zeros(3), torch.tensor([0, 0, 1]), 2).exp().tolist()
    [0.5, 0.5, 1.0]
    """
    high = logits.new_full((num_dst,), -torch.inf).scatter_reduce(0, dst, logits.detach(), "amax")
    high = torch.where(torch.isfinite(high), high, torch.zeros_like(high))
    shifted = logits - high[dst]
    total = logits.new_zeros(num_dst).index_add(0, dst, shifted.exp())
    return shifted - torch.where(total > 0, total, torch.ones_like(total)).log()[dst]


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
    """Same arguments and result as :func:`fastkd.lsp_loss`, computed in the features' own dtype; nothing is checked.

    The paper is arXiv:2003.10477.

    >>> import torch
    >>> from fastkd import reference
    >>> edges = torch.tensor([[1, 2, 3], [0, 0, 0]])
    >>> student, teacher = torch.eye(4, dtype=torch.float64), torch.arange(8, dtype=torch.float64).view(4, 2)
    >>> round(float(reference.lsp_loss(student, teacher, edges, kernel="linear")), 6)
    0.26108
    """
    kernel = kernels.resolve(kernel)
    teacher_kernel = kernel if teacher_kernel is None else kernels.resolve(teacher_kernel)
    s_src, s_dst = pair_of("student", student)
    s_dst = s_src if s_dst is None else s_dst
    sizes = sizes_of(s_src, s_dst)
    graph = as_graph(graph, *sizes)
    if teacher_graph is not None:
        graph = graph.union(as_graph(teacher_graph, *sizes))
    src, dst = graph.edge_index
    num_rows = graph.num_dst

    student_sim = similarity(kernel, s_dst[dst], s_src[src])
    if isinstance(teacher, TeacherStructure):
        teacher_sim = torch.empty_like(teacher.values)
        teacher_sim[slice(None) if graph.perm is None else graph.perm.long()] = teacher.values
    else:
        t_src, t_dst = pair_of("teacher", teacher)
        t_dst = t_src if t_dst is None else t_dst
        teacher_sim = similarity(teacher_kernel, t_dst.detach()[dst], t_src.detach()[src])
    teacher_sim = teacher_sim.to(student_sim.dtype)

    row = dst
    if norm_by == "src":
        row, num_rows = src, graph.num_src
    if edge_weight is not None:
        kept = edge_weight > 0
        log_weight = edge_weight[kept].to(student_sim.dtype).log()
        student_sim, teacher_sim, row = student_sim[kept] + log_weight, teacher_sim[kept] + log_weight, row[kept]

    log_s, log_t = edge_softmax(student_sim, row, num_rows), edge_softmax(teacher_sim, row, num_rows)
    if divergence == "student||teacher":
        terms = log_s.exp() * (log_s - log_t)
    else:
        terms = log_t.exp() * (log_t - log_s)
    rows = terms.new_zeros(num_rows).index_add(0, row, terms)
    if reduction == "none":
        return rows
    count = {"sum": 1, "mean": num_rows, "mean_active": int(row.unique().numel()), "mean_edges": row.numel()}[reduction]
    return rows.sum() / count if count else rows.sum() * 0


def masked_forward(space: GeneSpace, mask: Tensor, x: Tensor) -> Tensor:
    """The traced network with every channel set to zero whose gene is off, after every operation.

    Equals the physically smaller network: a channel that is zero wherever it is read might as well not exist.

    Args:
        space: from :func:`fastkd.population.trace`.
        mask: bool [num_genes].
        x: [N, C, ...], of the dtype and on the device of the network.

    Returns:
        [N, classes].
    """
    mask = torch.cat((space.check(mask)[0], mask.new_ones(2))).to(x.device)  # ZERO and KEPT are the last two
    values: list[Tensor | None] = [None] * len(space.values)
    values[0] = x
    last = {i: op for op in space.ops for i in op.inputs}
    for op in space.ops:
        y = op.run(*(values[i] for i in op.inputs))  # type: ignore[arg-type]
        on = mask[space.values[op.output].genes.to(x.device)]
        values[op.output] = torch.where(on.reshape(-1, *(1,) * (y.dim() - 2)), y, 0)
        for i in op.inputs:
            if last[i] is op and i != space.output:  # free its memory
                values[i] = None
    result = values[space.output]
    assert result is not None
    return result


def masked_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    in_mask: Tensor | None = None,
    out_mask: Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
) -> Tensor:
    """Same arguments and result as :func:`fastkd.masked_conv2d`: one full convolution per individual.

    >>> import torch
    >>> from fastkd import reference
    >>> x, weight = torch.ones(1, 2, 1, 1), torch.tensor([[[[1.0]], [[10.0]]]])
    >>> reference.masked_conv2d(x, weight, in_mask=torch.tensor([[True, False], [True, True]])).flatten().tolist()
    [1.0, 11.0]
    """
    individuals = next(t.shape[0] for t in (in_mask, out_mask, x) if t is not None)

    def kept(y: Tensor, mask: Tensor | None, p: int) -> Tensor:
        return y if mask is None else torch.where(mask[p][:, None, None], y, torch.zeros_like(y))

    results = []
    for p in range(individuals):
        inputs = kept(x if x.dim() == 4 else x[p], in_mask, p)
        results.append(kept(torch.conv2d(inputs, weight, bias, stride, padding, dilation, groups), out_mask, p))
    if results:
        return torch.stack(results)
    none = torch.conv2d(x if x.dim() == 4 else x.flatten(0, 1), weight, bias, stride, padding, dilation, groups)
    return none[None][:0] if x.dim() == 4 else none.reshape(0, x.shape[1], *none.shape[1:])
