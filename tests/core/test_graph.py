"""Graph: every way to make one, and what it knows about itself."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cases import SAMPLES, features
from fastkd import Graph, lsp_loss


def sorted_edges(edges):
    return sorted(zip(*edges.tolist(), strict=True))


def check_invariants(graph, edges):
    """The structure against the plain list of (source, destination)."""
    rowptr, col = graph.rowptr.tolist(), graph.col.tolist()
    dst = [i for i in range(graph.num_dst) for _ in range(rowptr[i + 1] - rowptr[i])]
    assert rowptr[0] == 0 and rowptr[-1] == len(col) == graph.num_edges
    assert sorted(zip(col, dst, strict=True)) == sorted_edges(edges)
    assert list(zip(dst, col, strict=True)) == sorted(zip(dst, col, strict=True))
    assert torch.equal(graph.edge_index, edges.long())
    t_rowptr, t_col, t_perm = graph.t_rowptr.tolist(), graph.t_col.tolist(), graph.t_perm.tolist()
    src = [j for j in range(graph.num_src) for _ in range(t_rowptr[j + 1] - t_rowptr[j])]
    assert list(zip(src, t_col, strict=True)) == sorted(zip(src, t_col, strict=True))
    assert [(col[s], dst[s]) for s in t_perm] == list(zip(src, t_col, strict=True))
    assert sorted(t_perm) == list(range(graph.num_edges))
    assert graph.in_degree().tolist() == [dst.count(i) for i in range(graph.num_dst)]
    assert graph.max_degree == max(graph.in_degree().tolist(), default=0)
    symmetric = graph.num_src == graph.num_dst and sorted_edges(edges) == sorted_edges(edges.flip(0))
    assert graph.is_symmetric == symmetric
    if symmetric:
        reverse = graph.reverse.tolist()
        assert [(dst[s], col[s]) for s in reverse] == list(zip(col, dst, strict=True))


@pytest.mark.parametrize("name", SAMPLES)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_from_edge_index(name, dtype):
    sample = SAMPLES[name]
    if sample.edges.shape[1] > 1000:
        pytest.skip("checked by the smaller ones and by hypothesis")
    graph = Graph.from_edge_index(sample.edges.to(dtype), (sample.num_src, sample.num_dst), index_dtype=dtype)
    assert graph.col.dtype == dtype
    check_invariants(graph, sample.edges)


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_any_graph(data):
    num_src = data.draw(st.integers(1, 70))
    num_dst = data.draw(st.one_of(st.just(num_src), st.integers(1, 70)))
    edges = data.draw(st.lists(st.tuples(st.integers(0, num_src - 1), st.integers(0, num_dst - 1)), max_size=120))
    edges = torch.tensor(edges, dtype=torch.int64).reshape(-1, 2).t()
    if num_src == num_dst and data.draw(st.booleans()):
        edges = torch.cat((edges, edges.flip(0)), 1)
    graph = Graph.from_edge_index(edges, (num_src, num_dst))
    check_invariants(graph, edges)
    check_invariants(graph.reversed(), edges.flip(0))
    unique = torch.tensor(sorted(set(map(tuple, edges.t().tolist()))), dtype=torch.int64).reshape(-1, 2).t()
    merged = graph.coalesce()
    assert sorted_edges(merged.edge_index) == sorted_edges(unique)
    check_invariants(merged, merged.edge_index)
    if num_src == num_dst:
        loopless = graph.without_self_loops()
        assert sorted_edges(loopless.edge_index) == sorted_edges(edges[:, edges[0] != edges[1]])
        check_invariants(loopless, loopless.edge_index)
        both = graph.union(graph.reversed())
        assert both.is_symmetric


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("order", ["random", "by_source", "by_destination"])
def test_large_build_is_a_stable_sort(threads, order):
    """More than one radix pass, against torch.sort; the same for any number of threads."""
    before = torch.get_num_threads()
    g = torch.Generator().manual_seed(0)
    n, e = 100_000, 300_000
    edges = torch.randint(n, (2, e), generator=g)
    edges[:, :1000] = edges[:, 1000:2000]  # duplicates
    if order != "random":
        edges = edges[:, torch.sort(edges[(order == "by_destination" and 1) or 0], stable=True).indices]
    try:
        torch.set_num_threads(threads)
        graph = Graph.from_edge_index(edges, n)
    finally:
        torch.set_num_threads(before)
    key, perm = torch.sort(edges[1] * n + edges[0], stable=True)
    assert torch.equal(graph.perm.long(), perm)
    assert torch.equal(graph.col.long(), key % n)
    assert torch.equal(graph.rowptr.long(), torch.searchsorted(key // n, torch.arange(n + 1)))
    _t_key, t_perm = torch.sort(graph.col.long(), stable=True)
    assert torch.equal(graph.t_perm.long(), t_perm)


def test_every_way_in_gives_the_same_loss():
    """Direction is where conversions go wrong, so the graph is directed."""
    edges = SAMPLES["directed"].edges
    edges = torch.unique(edges, dim=1)
    x, t = features(40, 8, torch.float64), features(40, 5, torch.float64, seed=1)
    expected = lsp_loss(x, t, edges, reduction="none")
    assert not torch.equal(expected, lsp_loss(x, t, edges.flip(0), reduction="none"))
    adj_t = torch.sparse_coo_tensor(edges.flip(0), torch.ones(edges.shape[1]), (40, 40))
    graph = Graph.from_edge_index(edges, 40)
    ways = {
        "edge_index": edges,
        "int32": edges.int(),
        "non-contiguous": edges.t().contiguous().t(),
        "Graph": graph,
        "from_csr": Graph.from_csr(graph.rowptr, graph.col),
        "sparse_coo": adj_t,
        "sparse_csr": adj_t.coalesce().to_sparse_csr(),
        "sparse_csc": adj_t.coalesce().to_sparse_csc(),
        "target_to_source": Graph.from_edge_index(edges.flip(0), 40, flow="target_to_source"),
    }
    for name, way in ways.items():
        torch.testing.assert_close(lsp_loss(x, t, way, reduction="none"), expected, msg=name)


def test_pyg_edge_index_and_sparse_tensor():
    geometric = pytest.importorskip("torch_geometric", reason="torch_geometric is not installed")
    edges = torch.unique(SAMPLES["directed"].edges, dim=1).contiguous()
    x, t = features(40, 8, torch.float64), features(40, 5, torch.float64, seed=1)
    expected = lsp_loss(x, t, edges, reduction="none")
    edge_index = geometric.EdgeIndex(edges, sparse_size=(40, 40))
    torch.testing.assert_close(lsp_loss(x, t, edge_index, reduction="none"), expected)
    by_col = edge_index.sort_by("col").values
    torch.testing.assert_close(lsp_loss(x, t, by_col, reduction="none"), expected)

    class SparseTensor:  # torch_sparse's interface, which PyG uses where it is installed
        def csr(self):
            g = Graph.from_edge_index(edges, 40)
            return g.rowptr.long(), g.col.long(), None

        def sparse_sizes(self):
            return 40, 40

    torch.testing.assert_close(lsp_loss(x, t, SparseTensor(), reduction="none"), expected)


def test_from_csr_sorts_columns_and_keeps_edge_order():
    rowptr, col = torch.tensor([0, 3, 4]), torch.tensor([2, 0, 1, 1])
    graph = Graph.from_csr(rowptr, col, num_src=3)
    assert graph.col.tolist() == [0, 1, 2, 1] and (graph.num_src, graph.num_dst) == (3, 2)
    assert graph.edge_index.tolist() == [[2, 0, 1, 1], [0, 0, 0, 1]]
    assert Graph.from_csr(torch.tensor([0, 1, 2]), torch.tensor([0, 1])).perm is None


def test_knn_against_brute_force():
    x = features(60, 3, torch.float64)
    graph = Graph.from_knn(x, 5)
    distance = torch.cdist(x, x)
    for loop in (False, True):
        graph = Graph.from_knn(x, 5, loop=loop)
        d = distance.clone() if loop else distance + torch.diag(torch.full((60,), torch.inf))
        expected = d.topk(5, largest=False).indices.sort(1).values
        assert torch.equal(graph.col.reshape(60, 5).long(), expected)
    batch = torch.tensor([0] * 3 + [1] * 20 + [3] * 37)
    graph = Graph.from_knn(x, 5, batch)
    src, dst = graph.edge_index
    assert torch.equal(batch[src], batch[dst])
    assert graph.in_degree().tolist() == [2] * 3 + [5] * 57
    clouds = Graph.from_knn(x.reshape(3, 20, 3), 4)
    assert torch.equal(clouds.col, Graph.from_knn(x, 4, torch.arange(3).repeat_interleave(20)).col)
    far = Graph.from_knn(x.float() + 1e4, 5)  # centring keeps the differences of squares exact enough
    assert (
        far.col.reshape(60, 5).long()
        == distance.fill_diagonal_(torch.inf).topk(5, largest=False).indices.sort(1).values
    ).float().mean() > 0.9


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("loop", [False, True])
def test_clouds_together_are_the_clouds_one_by_one(ties, loop):
    """Also where some distances are equal, and for clouds that are cut into several groups."""
    for count, size in ((5, 40), (300, 64), (2, 1100)):
        x = features(count * size, 3, torch.float32).view(count, size, 3)
        if ties:
            x = (2 * x).round()
        graph = Graph.from_knn(x, 4, loop=loop)
        each = [Graph.from_knn(cloud, 4, loop=loop).col.long() + i * size for i, cloud in enumerate(x)]
        assert torch.equal(graph.col.long(), torch.cat(each))
        assert loop or not bool((graph.edge_index[0] == graph.edge_index[1]).any())


@pytest.mark.parametrize("loop", [False, True])
def test_clouds_of_different_sizes_are_the_clouds_one_by_one(loop):
    sizes = [6, 6, 9, 1, 1, 6, 3]
    x = features(sum(sizes), 3, torch.float32)
    graph = Graph.from_knn(x, 4, torch.arange(7).repeat_interleave(torch.tensor(sizes)), loop=loop)
    starts = [sum(sizes[:i]) for i in range(7)]
    each = [Graph.from_knn(x[a : a + n], 4, loop=loop) for a, n in zip(starts, sizes, strict=True)]
    assert torch.equal(graph.col.long(), torch.cat([g.col.long() + a for g, a in zip(each, starts, strict=True)]))
    assert torch.equal(graph.in_degree(), torch.cat([g.in_degree() for g in each]))


def test_statistics_and_repr():
    graph = Graph.from_edge_index(SAMPLES["star"].edges, 60)
    assert graph.degree_stats() == {"min": 1, "mean": 118 / 60, "max": 59, "isolated": 0}
    assert repr(graph) == "Graph(num_nodes=60, num_edges=118, symmetric=True, device='cpu')"
    assert "num_src=30, num_dst=50" in repr(Graph.from_edge_index(SAMPLES["bipartite"].edges, (30, 50)))
    assert graph.to("cpu") is graph
    assert Graph.from_edge_index(torch.empty(2, 0, dtype=torch.int64)).degree_stats()["isolated"] == 0


def test_fingerprints_tell_patterns_apart():
    edges = SAMPLES["directed"].edges
    graph = Graph.from_edge_index(edges, 40)
    same = Graph.from_edge_index(edges.flip(1), 40)
    assert graph.fingerprint == same.fingerprint
    others = [edges.flip(0), edges[:, :-1], torch.cat((edges[:, :-1], torch.tensor([[3], [4]])), 1)]
    prints = {Graph.from_edge_index(o, 40).fingerprint for o in others} | {graph.fingerprint}
    prints.add(Graph.from_edge_index(edges, 41).fingerprint)
    assert len(prints) == 5


E_ = torch.tensor([[0, 1], [1, 0]])


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: Graph.from_edge_index(E_, 1), IndexError, r"edge_index\[\d, \d\] = 1 .*\[0, 1\)"),
        (lambda: Graph.from_edge_index(E_, -1), ValueError, "num_nodes must be in"),
        (lambda: Graph.from_edge_index(E_, 2.0), TypeError, "num_nodes must be an int"),
        (lambda: Graph.from_edge_index(E_, (1, 2, 3)), TypeError, "num_nodes"),
        (lambda: Graph.from_edge_index([[0], [1]]), TypeError, "edge_index must be a tensor, got list"),
        (lambda: Graph.from_edge_index(E_, 2, flow="up"), ValueError, "flow must be"),
        (lambda: Graph.from_edge_index(E_, 2, index_dtype=torch.int16), TypeError, "index_dtype"),
        (lambda: Graph.from_csr(torch.tensor([0, 2]), torch.tensor([0])), ValueError, "must end at E = 1"),
        (lambda: Graph.from_csr(torch.tensor([1, 1]), torch.tensor([0])), ValueError, "start at 0"),
        (lambda: Graph.from_csr(torch.tensor([0, 2, 1]), torch.tensor([0])), ValueError, "must not decrease"),
        (lambda: Graph.from_csr(torch.tensor([0, 1]), torch.tensor([5]), 3), IndexError, r"= 5 .*\[0, 3\)"),
        (lambda: Graph.from_csr(torch.tensor([0.0]), torch.tensor([0])), TypeError, "rowptr must be int32 or int64"),
        (lambda: Graph.from_csr(torch.empty(0, dtype=torch.int64), E_[0]), ValueError, "rowptr must have"),
        (lambda: Graph.from_knn(torch.randn(4, 2), 0), ValueError, "k must be at least 1"),
        (lambda: Graph.from_knn(torch.randn(4, 2), 1.5), TypeError, "k must be an int"),
        (lambda: Graph.from_knn(torch.ones(4, dtype=torch.int64), 1), TypeError, "x must be a floating-point"),
        (lambda: Graph.from_knn(torch.randn(4), 1), ValueError, "x must have shape"),
        (lambda: Graph.from_knn(torch.full((4, 2), torch.nan), 1), ValueError, "x must be finite"),
        (
            lambda: Graph.from_knn(torch.randn(4, 2), 1, torch.tensor([1, 0, 0, 0])),
            ValueError,
            "batch must be ascending",
        ),
        (
            lambda: Graph.from_knn(torch.randn(4, 2), 1, torch.tensor([0, 0])),
            ValueError,
            r"batch must have shape \[4\]",
        ),
        (lambda: Graph.from_edge_index(E_, 2).union(Graph.from_edge_index(E_, 3)), ValueError, "graphs of one size"),
        (lambda: Graph.from_edge_index(E_, 2).union(E_), TypeError, "other must be a fastkd.Graph"),
        (
            lambda: lsp_loss(torch.randn(3, 2), torch.randn(3, 2), torch.eye(4).to_sparse_csr()),
            ValueError,
            r"sparse graph has shape \(4, 4\)",
        ),
    ],
)
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


WRAPS = torch.tensor(
    [0, 2**63 - 1, -2, 0]
)  # its differences are 2**63 - 1, 2**63 - 1 and 2: as int64, none is negative
NONE = torch.empty(0, dtype=torch.int64)


class Matrix:
    """torch_sparse's interface, with parts that may not fit each other."""

    def __init__(self, rowptr, col, sizes, values=None):
        self.parts, self.sizes = (rowptr, col, values), sizes

    def csr(self):
        return self.parts

    def sparse_sizes(self):
        return self.sizes


def unchecked(make, *parts):
    return make(*parts, check_invariants=False)


def loss_on(graph, nodes=3):
    return lsp_loss(torch.randn(nodes, 2), torch.randn(nodes, 2), graph)


@pytest.mark.parametrize(
    "way",
    [
        lambda p, c, n: Graph.from_csr(p, c),
        lambda p, c, n: loss_on(unchecked(torch.sparse_csr_tensor, p, c, torch.ones(len(c)), (n, n)), n),
        lambda p, c, n: loss_on(unchecked(torch.sparse_csc_tensor, p, c, torch.ones(len(c)), (n, n)), n),
        lambda p, c, n: loss_on(Matrix(p, c, (n, n)), n),
    ],
    ids=["from_csr", "sparse_csr", "sparse_csc", "SparseTensor"],
)
@pytest.mark.parametrize(
    "rowptr, col, error, message",
    [
        (
            WRAPS,
            NONE,
            ValueError,
            r"rowptr must not decrease, got rowptr\[1\] = 9223372036854775807 and rowptr\[2\] = -2",
        ),
        (torch.tensor([0, 2**31 - 1, -2, 0], dtype=torch.int32), NONE.int(), ValueError, "rowptr must not decrease"),
        (torch.tensor([0, -(2**63), 2**63 - 1, 1]), NONE.new_zeros(1), ValueError, "rowptr must not decrease"),
        (torch.tensor([0, 2**40, 2**40, 1]), NONE.new_zeros(1), ValueError, "rowptr must not decrease"),
        (torch.tensor([0, 0, 0, 2**63 - 1]), NONE, ValueError, "rowptr must end at E = 0"),
        (
            torch.tensor([0, 0, 0, 1]),
            torch.tensor([-(2**63)]),
            IndexError,
            r"col\[0\] = -9223372036854775808 .*\[0, 3\)",
        ),
    ],
)
def test_pointers_that_lie_are_found_before_they_are_followed(way, rowptr, col, error, message):
    with pytest.raises(error, match=message):
        way(rowptr, col, 3)


@pytest.mark.parametrize(
    "graph",
    [
        unchecked(torch.sparse_csr_tensor, torch.tensor([0, 1]), torch.tensor([0]), torch.ones(1), (3, 3)),
        unchecked(torch.sparse_csc_tensor, torch.tensor([0, 1]), torch.tensor([0]), torch.ones(1), (3, 3)),
        Matrix(torch.tensor([0, 1]), torch.tensor([0]), (3, 3)),
    ],
)
def test_fewer_rows_than_the_matrix_says(graph):
    with pytest.raises(ValueError, match=r"shape \(3, 3\), and so must have 4 row pointers, got 2"):
        loss_on(graph)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda i: Graph.from_edge_index(torch.tensor([[i], [0]])), ValueError, "num_nodes must be passed where"),
        (lambda i: Graph.from_edge_index(torch.tensor([[0], [i]]).int()), ValueError, "num_nodes must be passed where"),
        (lambda i: Graph.from_csr(torch.tensor([0, 1]), torch.tensor([i])), ValueError, "num_src must be passed where"),
    ],
)
def test_one_large_index_does_not_take_gigabytes(call, error, message):
    for index in (2**31 - 2, 2**24):
        with pytest.raises(error, match=rf"{message}.* 1 edges .* largest index is {index}: {index + 1} nodes take"):
            call(index)
    call(70_000)


def test_the_number_of_nodes_is_inferred_where_the_edges_bear_it_out(monkeypatch):
    from fastkd import _indices

    monkeypatch.setattr(_indices, "MOST_INFERRED", 100)
    assert Graph.from_edge_index(torch.tensor([[99], [0]])).num_src == 100
    edges = torch.arange(1, 11).repeat(2, 1) * 15
    assert Graph.from_edge_index(edges).num_src == 151
    with pytest.raises(ValueError, match="10 edges and its largest index is 160"):
        Graph.from_edge_index(torch.tensor([[*range(9), 160], [0] * 10]))
    assert Graph.from_edge_index(torch.tensor([[160], [0]]), 161).num_src == 161
    pointers = torch.arange(201).clamp(max=1)
    assert Graph.from_csr(pointers, torch.tensor([3000])).num_src == 3001, "as rowptr is long itself"


@pytest.mark.parametrize(
    "call, error, message",
    [
        (
            lambda: Graph.from_edge_index(torch.tensor([[2**63 - 1], [0]])),
            IndexError,
            "edge_index holds the index 9223372036854775807",
        ),
        (lambda: Graph.from_edge_index(torch.tensor([[2**31 - 1], [0]])), IndexError, "below 2\\*\\*31 - 1"),
        (lambda: Graph.from_edge_index(torch.tensor([[-5], [-3]])), IndexError, r"edge_index\[0, 0\] = -5"),
        (lambda: Graph.from_edge_index(E_, 2**31), ValueError, r"num_nodes must be in \[0, 2\*\*31\), got 2147483648"),
        (lambda: Graph.from_edge_index(E_, 2**70), ValueError, "num_nodes must be in"),
        (lambda: Graph.from_edge_index(E_, (2, -1)), ValueError, r"num_nodes\[1\] must be in .* got -1"),
        (lambda: Graph.from_edge_index(E_, True), TypeError, "num_nodes must be an int, got True"),
        (lambda: Graph.from_edge_index(E_, np.float64(2)), TypeError, "num_nodes must be an int"),
        (lambda: Graph.from_edge_index(torch.empty(2, 0)), TypeError, r"got torch.float32 \(an empty one, too"),
        (
            lambda: Graph.from_edge_index(E_.to("meta"), 2),
            ValueError,
            "edge_index must be on a device that holds values",
        ),
        (lambda: Graph.from_edge_index(E_.to_sparse()), TypeError, "edge_index must be a dense tensor"),
        (lambda: Graph.from_csr(torch.tensor([0, 1]), torch.tensor([0]), -1), ValueError, "num_src must be in"),
        (lambda: Graph.from_csr(torch.tensor([0, 1]), torch.tensor([0]), 1.0), TypeError, "num_src must be an int"),
        (lambda: Graph.from_csr(torch.tensor([0, 1]), torch.tensor([-7])), IndexError, r"col\[0\] = -7 .*\[0, 1\)"),
        (lambda: Graph.from_knn(torch.randn(4, 2), True), TypeError, "k must be an int"),
        (lambda: Graph.from_knn(torch.randn(4, 2, device="meta"), 1), ValueError, "x must be on a device"),
        (lambda: Graph.from_knn(torch.randn(4, 2).to_sparse(), 1), TypeError, "x must be a dense tensor"),
        (lambda: Graph.from_edge_index(E_, 2).repeat(-1), ValueError, "copies must be at least 0, got -1"),
        (lambda: Graph.from_edge_index(E_, 2).repeat(2.0), TypeError, "copies must be an int, got 2.0"),
        (lambda: Graph.from_edge_index(E_, 2).repeat(2**30), ValueError, "copies must be at most 1073741823 for Graph"),
        (lambda: loss_on([[0], [1]], 2), TypeError, r"got list: pass torch.stack\(\(sources, destinations\)\)"),
        (lambda: loss_on((E_[0], E_[1]), 2), TypeError, r"got tuple: pass torch.stack"),
        (lambda: loss_on(type("Data", (), {"edge_index": E_})(), 2), TypeError, "got Data: pass its edge_index"),
        (lambda: loss_on(torch.eye(3)), TypeError, "graph is a dense matrix of torch.float32: pass its entries"),
        (lambda: loss_on(torch.ones(3, 3, dtype=torch.int64)), TypeError, "graph is a dense matrix of torch.int64"),
        (lambda: loss_on(E_.numpy()), TypeError, r"got ndarray: pass torch\.from_numpy"),
        (lambda: loss_on(torch.zeros(5, 2, dtype=torch.int64)), ValueError, r"got \(5, 2\) \(pass its transpose\)"),
        (lambda: loss_on(None), TypeError, "graph must be a fastkd.Graph, .* got NoneType"),
    ],
)
def test_more_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("layout", ["to_sparse_coo", "to_sparse_csr", "to_sparse_csc"])
def test_weights_in_a_sparse_matrix_are_not_dropped(layout):
    matrix = torch.tensor([[0.0, 1.0, 0.0], [1.0, 0.0, 0.5], [0.0, 1.0, 0.0]])
    with pytest.raises(
        ValueError, match=r"must hold the value 1 for every edge, got 0\.5: pass edge weights by themselves"
    ):
        loss_on(getattr(matrix, layout)())
    ones = getattr(matrix.ceil(), layout)()
    loss_on(ones)
    loss_on(getattr(matrix.bool(), layout)())
    weighted = getattr(matrix, layout)()
    weight = weighted._values() if layout == "to_sparse_coo" else weighted.values()
    x, t = features(3, 4, torch.float64), features(3, 2, torch.float64, seed=1)
    dst, src = matrix.nonzero().t()
    expected = lsp_loss(x, t, torch.stack((src, dst)), edge_weight=matrix[dst, src])
    torch.testing.assert_close(lsp_loss(x, t, ones, edge_weight=weight), expected)
    with pytest.raises(ValueError, match=r"got 2\.0"):
        loss_on(Matrix(torch.tensor([0, 1, 1, 1]), torch.tensor([2]), (3, 3), torch.tensor([2.0])))


def test_scipy_matrices_are_told_how(tmp_path):
    sparse = pytest.importorskip("scipy.sparse", reason="scipy is not installed")
    m = sparse.coo_matrix(np.array([[0, 1, 0], [0, 0, 1], [0, 1, 0]]))
    with pytest.raises(TypeError, match=r"got coo_matrix: pass Graph\.from_csr"):
        loss_on(m)
    m = m.tocsr()
    graph = Graph.from_csr(torch.from_numpy(m.indptr), torch.from_numpy(m.indices), m.shape[1])
    assert graph.edge_index.tolist() == [[1, 2, 1], [0, 1, 2]]


def test_numbers_of_nodes_of_other_types():
    for n in (np.int64(3), np.int32(3), torch.tensor(3), (np.int64(3), 3)):
        assert repr(Graph.from_edge_index(E_, n)) == repr(Graph.from_edge_index(E_, 3))


def test_points_of_clouds_with_large_numbers():
    """The clouds' numbers only tell them apart: they are no sizes."""
    x, batch = features(30, 3, torch.float32), torch.arange(3).repeat_interleave(10)
    few, many = Graph.from_knn(x, 4, batch), Graph.from_knn(x, 4, batch * 2**61)
    assert torch.equal(few.col, many.col) and torch.equal(few.rowptr, many.rowptr)
    assert Graph.from_knn(x, 2**70, batch).num_edges == 30 * 9
    for shape in ((0, 5, 3), (4, 0, 3), (0, 3)):
        assert Graph.from_knn(torch.zeros(shape), 2).num_edges == 0


@pytest.mark.parametrize("name", SAMPLES)
@pytest.mark.parametrize("copies", [0, 1, 2, 5])
def test_repeated_graph_is_the_graph_of_the_shifted_edges(name, copies):
    sample = SAMPLES[name]
    if sample.edges.shape[1] > 1000:
        pytest.skip("checked by the smaller ones")
    sizes = torch.tensor([[sample.num_src], [sample.num_dst]])
    shifted = [sample.edges + c * sizes for c in range(copies)]
    edges = torch.cat([*shifted, sample.edges[:, :0]], 1)
    for dtype in (torch.int32, torch.int64):
        one = Graph.from_edge_index(sample.edges, (sample.num_src, sample.num_dst), index_dtype=dtype)
        graph = one.repeat(copies)
        expected = Graph.from_edge_index(edges, (copies * sample.num_src, copies * sample.num_dst), index_dtype=dtype)
        assert graph.col.dtype == dtype
        check_invariants(graph, edges)
        for key, value in vars(expected).items():
            if isinstance(value, torch.Tensor):
                assert torch.equal(getattr(graph, key), value), key
            else:
                assert getattr(graph, key) == value, key


def test_repeated_graph_without_perm_and_wider_indices(monkeypatch):
    one = Graph.from_knn(features(20, 2, torch.float32), 3)
    graph = one.repeat(4)
    assert graph.perm is None and graph.col.dtype == torch.int32
    assert torch.equal(graph.edge_index, torch.cat([one.edge_index + 20 * c for c in range(4)], 1))
    import fastkd.graph

    monkeypatch.setattr(fastkd.graph, "INT32_MAX", 239)
    assert one.repeat(4).col.dtype == torch.int64, "240 edges"
    assert one.repeat(3).col.dtype == torch.int32
    weight = torch.rand(60)
    x, t = features(80, 4, torch.float64), features(80, 3, torch.float64, seed=1)
    loss = lsp_loss(x, t, graph, edge_weight=weight.repeat(4), reduction="none")
    each = [
        lsp_loss(a, b, one, edge_weight=weight, reduction="none") for a, b in zip(x.split(20), t.split(20), strict=True)
    ]
    torch.testing.assert_close(loss, torch.cat(each))


def test_graphs_made_in_inference_mode_can_be_trained_on():
    edges = SAMPLES["directed"].edges
    x = features(40, 8, torch.float32).requires_grad_()
    t = features(40, 5, torch.float32, seed=1)
    with torch.inference_mode():
        graph = Graph.from_edge_index(edges.clone(), 40)
        graphs = [graph, graph.reversed().reversed(), graph.repeat(1), Graph.from_csr(graph.rowptr, graph.col)]
        near = Graph.from_knn(t.clone(), 3)
    assert repr(graph) == repr(Graph.from_edge_index(edges, 40))
    for way in graphs:
        (grad,) = torch.autograd.grad(lsp_loss(x, t, way), x)
        torch.testing.assert_close(grad, torch.autograd.grad(lsp_loss(x, t, edges), x)[0])
    lsp_loss(x, t, near.union(near.reversed())).backward()
