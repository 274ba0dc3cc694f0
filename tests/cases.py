"""The table: every kind of graph, kernel and layout that the operators are tested on."""

from dataclasses import dataclass

import torch

from fastkd import kernels as K

KERNELS = {
    "linear": K.Linear("mean"),
    "poly": K.Poly(c=0.5, degree=3, scale="mean"),
    "poly_cos": K.Poly(normalize=True),
    "euclidean": K.Euclidean(scale="mean"),
    "distance": K.Euclidean(sign=1, squared=False),
    "rbf": K.RBF(sigma=2.0, scale="mean"),
    "laplacian": K.Laplacian(sigma=1.0, scale="mean"),
    "cosine": K.Cosine(),
}
DIVERGENCES = ("student||teacher", "teacher||student")
REDUCTIONS = ("mean", "mean_active", "mean_edges", "sum", "none")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
WIDTHS = (1, 3, 17, 64, 129)


@dataclass(frozen=True)
class Sample:
    """Edges (source, destination) and the numbers of nodes at both ends."""

    name: str
    edges: torch.Tensor
    num_src: int
    num_dst: int

    @property
    def bipartite(self):
        return self.num_src != self.num_dst


def _random(n_src, n_dst, e, seed):
    g = torch.Generator().manual_seed(seed)
    return torch.stack((torch.randint(n_src, (e,), generator=g), torch.randint(n_dst, (e,), generator=g)))


def _both(edges):
    return torch.cat((edges, edges.flip(0)), 1)


def _hub(n, degree, seed):
    """One node with `degree` in-edges (more than two blocks of either back end), others with few."""
    g = torch.Generator().manual_seed(seed)
    spokes = torch.stack((torch.randint(n, (degree,), generator=g), torch.full((degree,), n // 2)))
    return torch.cat((_random(n, n, 3 * n, seed + 1), spokes), 1)


def _samples():
    none = torch.empty(2, 0, dtype=torch.int64)
    directed = _random(40, 40, 150, 0)
    simple = directed[:, directed[0] != directed[1]]
    loops = torch.arange(10).repeat(2, 1)
    yield Sample("no_nodes", none, 0, 0)
    yield Sample("no_edges", none, 5, 5)
    yield Sample("one_node", torch.zeros(2, 1, dtype=torch.int64), 1, 1)
    yield Sample("one_edge", torch.tensor([[2], [0]]), 3, 3)
    yield Sample("directed", simple, 40, 40)
    yield Sample("symmetric", _both(simple), 40, 40)
    yield Sample("duplicates", _both(torch.cat((simple, simple[:, :50]), 1)), 40, 40)
    yield Sample("self_loops", _both(torch.cat((simple, loops, loops), 1)), 40, 40)
    yield Sample("only_self_loops", loops, 10, 10)
    yield Sample("isolated", _both(_random(20, 20, 30, 1)), 2000, 2000)
    yield Sample("star", _both(torch.stack((torch.arange(1, 60), torch.zeros(59, dtype=torch.int64)))), 60, 60)
    yield Sample("hub", _hub(300, 2600, 2), 300, 300)
    yield Sample("hub_symmetric", _both(_hub(300, 2600, 3)), 300, 300)
    yield Sample("two_hubs", torch.cat((_hub(100, 1500, 4), _hub(99, 1300, 5)), 1), 100, 100)
    yield Sample("bipartite", _random(30, 50, 200, 6), 30, 50)
    yield Sample(
        "bipartite_hub",
        torch.cat((_random(30, 5, 20, 7), torch.stack((torch.arange(1200) % 30, torch.full((1200,), 3)))), 1),
        30,
        5,
    )
    yield Sample("no_sources", none, 0, 4)


SAMPLES = {s.name: s for s in _samples()}


def features(rows, width, dtype, layout="plain", seed=0, device="cpu"):
    """[rows, width] in one of the layouts a user may pass."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, width, generator=g, dtype=torch.float64).to(dtype)
    if layout == "column_slice":  # rows further apart than they are wide, and not 16-byte aligned
        x = torch.cat((torch.full_like(x[:, :1], torch.nan), x, torch.full_like(x, torch.nan)), 1)[:, 1 : 1 + width]
    elif layout == "row_slice":
        x = x.repeat_interleave(2, 0)[::2]
    elif layout == "transposed":
        x = x.t().contiguous().t()
    else:
        assert layout == "plain"
    return x.to(device)


LAYOUTS = ("plain", "column_slice", "row_slice", "transposed")
