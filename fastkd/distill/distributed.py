"""Training on several processes, started by torchrun, each with the whole network.

Whole static graphs: every rank runs the whole forward pass, with the same dropout masks, and owns a
part of the rows of the losses that are means over rows; the other losses are computed whole by every
rank and divided by their number. The sum over ranks of losses and gradients is what one process computes,
so that the number of ranks changes nothing but rounding.

Batches of graphs, neighbourhoods or shapes: every rank takes its share of each batch. The statistics of
batch normalisation are then of the rank's share alone, as in DistributedDataParallel without
SyncBatchNorm, and losses compare no two rows of different ranks.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..graph import Graph
from ..lsp import teacher_structure
from .losses import LSP

__all__ = ["LSPPart"]


class LSPPart:
    """A rank's part of an LSP loss over a static graph: some destinations, with all their sources.

    >>> import torch
    >>> from fastkd import Graph
    >>> graph = Graph.from_edge_index(torch.tensor([[0, 1, 2, 3, 0], [1, 1, 2, 2, 3]]), 4)
    >>> student, teacher = torch.randn(4, 2), torch.randn(4, 8)
    >>> parts = [LSPPart(LSP(), teacher, graph, rows, torch.Generator()) for rows in (slice(0, 2), slice(2, 4))]
    >>> torch.allclose(sum(part(student) for part in parts), LSP()(student, teacher, graph))
    True
    """

    def __init__(self, loss: LSP, teacher: Tensor, graph: Graph, rows: slice, generator: torch.Generator) -> None:
        if loss.shuffle:  # the wrong graph of all destinations, and not a wrong one of these rows
            graph = loss.shuffled(graph, generator)
        begin, end = int(graph.rowptr[rows.start]), int(graph.rowptr[rows.stop])
        rowptr = graph.rowptr[rows.start : rows.stop + 1] - graph.rowptr[rows.start]
        part = Graph.from_csr(rowptr, graph.col[begin:end], graph.num_src)
        self.rows = rows
        self.criterion = loss.criterion
        self.structure = teacher_structure((teacher, teacher[rows]), part, loss.criterion.teacher_kernel)
        count: dict[str, Callable[[Graph], int]] = {
            "sum": lambda _: 1,
            "mean": lambda g: g.num_dst,
            "mean_edges": lambda g: g.num_edges,
            "mean_active": lambda g: int((g.in_degree() > 0).sum()),
        }
        divisor = count[loss.criterion.reduction]
        self.share = divisor(part) / max(divisor(graph), 1)

    def __call__(self, student: Tensor) -> Tensor:
        loss: Tensor = self.criterion((student, student[self.rows]), self.structure, self.structure.graph)
        return loss * self.share
