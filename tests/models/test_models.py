"""Networks: against PyG's own layers, in every form of their inputs, and what can be tapped."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

pytest.importorskip("torch_geometric", reason="torch-geometric is not installed")

from torch_geometric.nn import EdgeConv, GATConv, GCNConv, SAGEConv

from cases import SAMPLES
from fastkd import Graph, models
from fastkd.models import dgcnn
from fastkd.models.dgcnn import EdgeConv as FastEdgeConv
from fastkd.models.gnn import GATLayer, GCNLayer, SAGELayer
from fastkd.models.sparse import Sparse

GRAPH_MODELS = {
    "gat": {"hidden": 5, "heads": (2, 2, 3)},
    "gcn": {"hidden": 8, "num_layers": 3, "norm": "batch"},
    "graphsage": {"hidden": 8, "num_layers": 3, "norm": "layer"},
    "mlp": {"hidden": 8, "num_layers": 3},
}


def parameters(model):
    return sum(p.numel() for p in model.parameters())


def directed(loops=True):
    """40 nodes, some without in-edges, some with a self-loop."""
    edges = torch.unique(SAMPLES["directed"].edges, dim=1)
    return torch.cat((edges, torch.arange(0, 40, 7).expand(2, -1)), 1).unique(dim=1) if loops else edges


def adj_t(edges, n):
    ones = torch.ones(edges.shape[1])
    return torch.sparse_coo_tensor(edges.flip(0), ones, (n, n)).coalesce().to_sparse_csr()


def make(name, in_dim=12, out_dim=4, seed=0, **changes):
    torch.manual_seed(seed)
    return models.build(name, in_dim, out_dim, **{**GRAPH_MODELS[name], **changes}).eval()


def bags(n=40, features=12, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.rand(n, features, generator=g) * (torch.rand(n, features, generator=g) < 0.2)


# --- sizes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, count", [("gat_teacher", 2_026_021), ("gat_student", 120_693)])
def test_gat_sizes_on_ppi(name, count):
    model = models.build(name, 50, 121)
    assert parameters(model) == count
    assert f"{count:,}" in getattr(models, name).__doc__


def test_how_the_teacher_differs_from_the_published_counts():
    """2.59 M: no skip around layer 0, in the last one a matrix and bias per head; 3.64 M: a matrix for each."""
    dgl = 2_026_021 - 50 * 1024 + 5 * 1024 * 121 + 5 * 121
    assert dgl == 2_594_946 and dgl + 1024 * 1024 == 3_643_522
    assert 50 * 1024 == 51_200 and 5 * 1024 * 121 + 5 * 121 == 620_125


@pytest.mark.parametrize("name, count", [("dgcnn_teacher", 1_809_320), ("dgcnn_student", 94_440)])
def test_dgcnn_sizes(name, count):
    assert parameters(models.build(name, 3, 40)) == count
    assert f"{count:,}" in getattr(models, name).__doc__


@pytest.mark.parametrize(
    "name, count",
    [("gcn", 12 * 8 + 8 + 8 * 4 + 4), ("graphsage", 2 * 12 * 8 + 8 + 2 * 8 * 4 + 4), ("mlp", 12 * 8 + 8 + 8 * 4 + 4)],
)
def test_simple_sizes(name, count):
    assert parameters(models.build(name, 12, 4, hidden=8)) == count


# --- against PyG's layers ---------------------------------------------------------------------------


@pytest.mark.parametrize("width", [3, 20])  # narrower and wider than the input
@pytest.mark.parametrize("layer", ["gat", "gat-mean", "gat-skip", "gcn", "sage"])
def test_layer_is_pygs(layer, width):
    torch.manual_seed(0)
    ours, theirs = {
        "gat": lambda: (GATLayer(12, width, 3, True, False), GATConv(12, width, 3)),
        "gat-mean": lambda: (GATLayer(12, width, 3, False, False), GATConv(12, width, 3, concat=False)),
        "gat-skip": lambda: (GATLayer(12, width, 3, True, True), GATConv(12, width, 3, residual=True)),
        "gcn": lambda: (GCNLayer(12, width), GCNConv(12, width)),
        "sage": lambda: (SAGELayer(12, width), SAGEConv(12, width)),
    }[layer]()
    for p in ours.parameters():  # no zero biases
        nn.init.normal_(p, std=0.5)
    theirs.load_state_dict(ours.state_dict())
    ours, theirs = ours.double(), theirs.double()
    edges = directed()
    x = torch.randn(40, 12, dtype=torch.float64)
    grad = torch.randn(40, ours(x, edges).shape[1], dtype=torch.float64)
    results = []
    for module in (ours, theirs):
        leaf = x.clone().requires_grad_()
        out = module(leaf, edges)
        results.append((out, *torch.autograd.grad(out, [leaf, *module.parameters()], grad)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_identity_skip():
    torch.manual_seed(0)
    layer, bare = GATLayer(12, 4, 3, True, True), GATLayer(12, 4, 3, True, False)
    assert layer.res is None
    bare.load_state_dict(layer.state_dict())
    x = torch.randn(40, 12)
    torch.testing.assert_close(layer(x, directed()), bare(x, directed()) + x)


def test_large_attention_logits_do_not_overflow():
    layer = GATLayer(3, 2, 2, True, False)
    x = 1e4 * torch.randn(40, 3)
    out = layer(x, directed())
    out.sum().backward()
    assert out.isfinite().all() and all(p.grad.isfinite().all() for p in layer.parameters())


def test_sparse_product_gradient():
    g = torch.Generator().manual_seed(0)
    dense = torch.rand(7, 5, generator=g, dtype=torch.float64) * (torch.rand(7, 5, generator=g) < 0.4)
    x = torch.randn(5, 3, generator=g, dtype=torch.float64, requires_grad=True)
    matrix = Sparse.of(dense.to_sparse_csr())
    torch.testing.assert_close(matrix @ x, dense @ x)
    assert torch.autograd.gradcheck(lambda x: matrix @ x, (x,))


@pytest.mark.parametrize(
    "parts, words",
    [
        (([0, 1, 2], [0, 1], [1.0]), "got values \\(1,\\) and 3 pointers"),
        (([0, 2], [0, 1], [1.0, 1.0]), "got values \\(2,\\) and 2 pointers"),
        (([0, 2**63 - 1, 2], [0, 1], [1.0, 1.0]), "rowptr must not decrease"),
        (([0, 1, 2], [0, 9], [1.0, 1.0]), r"col\[1\] = 9 "),
    ],
)
def test_sparse_features_whose_parts_do_not_fit(parts, words):
    x = torch.sparse_csr_tensor(*map(torch.tensor, parts), (2, 2), check_invariants=False)
    with pytest.raises((ValueError, IndexError), match=words):
        Sparse.of(x)


def test_sparse_product_of_nothing():
    empty = Sparse.of(torch.zeros(4, 5).to_sparse_csr())
    x = torch.randn(5, 3, requires_grad=True)
    (empty @ x).sum().backward()
    assert not (empty @ x).any() and not x.grad.any()


# --- inputs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GRAPH_MODELS)
def test_every_form_of_the_graph_gives_the_same(name):
    model, edges, x = make(name), directed(), torch.randn(40, 12)
    expected = model(x, edges)
    assert expected.shape == (40, 4)
    for way in (
        adj_t(edges, 40),
        edges[:, torch.randperm(edges.shape[1])],
        edges.int(),
        Graph.from_edge_index(edges, 40),
        adj_t(edges, 40).to_sparse_coo(),
    ):
        torch.testing.assert_close(model(x, way), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", GRAPH_MODELS)
def test_sparse_and_dense_features_give_the_same(name):
    model, edges, x = make(name), adj_t(directed(), 40), bags()
    results = []
    for way in (x, x.to_sparse_csr()):
        out = model(way, edges)
        results.append((out, *torch.autograd.grad(out.square().sum(), list(model.parameters()))))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", GRAPH_MODELS)
def test_identity_as_features(name):
    """What stands for no features: the first layer's weights are an embedding of the nodes."""
    model = make(name, in_dim=40)
    torch.testing.assert_close(model(torch.eye(40).to_sparse_csr(), directed()), model(torch.eye(40), directed()))


@pytest.mark.parametrize("name", GRAPH_MODELS)
def test_information_flows_from_source_to_destination(name):
    """0 -> 1 -> 2, and 3 by itself: what an input may change."""
    edges = torch.tensor([[0, 1], [1, 2]])
    reached = {"mlp": [[0], [1], [2], [3]]}.get(name, [[0, 1, 2], [1, 2], [2], [3]])
    model = make(name)
    x = torch.randn(4, 12)
    for way in (edges, adj_t(edges, 4)):
        before = model(x, way)
        for node, expected in enumerate(reached):
            changed = x.clone()
            changed[node] += 1
            moved = (model(changed, way) - before).abs().amax(1) > 1e-6
            assert moved.nonzero()[:, 0].tolist() == expected


@pytest.mark.parametrize("name", GRAPH_MODELS)
@pytest.mark.parametrize("sparse", [False, True])
def test_gradient_reaches_every_parameter(name, sparse):
    model = make(name).train()
    x = bags().to_sparse_csr() if sparse else torch.randn(40, 12)
    out = model(x, directed())
    F.cross_entropy(out, torch.arange(40) % 4).backward()
    for key, p in model.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all(), key
        # A bias before batch normalisation has the gradient 0 but for rounding.
        assert p.grad.any(), key


@pytest.mark.parametrize("name", GRAPH_MODELS)
def test_no_edges_and_a_graph_that_is_changed_in_place(name):
    model, x = make(name), torch.randn(5, 12)
    assert model(x, torch.empty(2, 0, dtype=torch.int64)).isfinite().all()
    edges = torch.tensor([[0], [1]])
    before = model(x, edges)
    edges.copy_(torch.tensor([[2], [3]]))
    torch.testing.assert_close(model(x, edges), model(x, edges.clone()))
    assert (name == "mlp") == torch.equal(before, model(x, edges))


@pytest.mark.parametrize("name", GRAPH_MODELS)
def test_bfloat16_autocast(name):
    model, x, edges = make(name), torch.randn(40, 12), directed()
    expected = model(x, edges)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(x, edges)
    out.float().sum().backward()
    assert (out.float() - expected).norm() < 0.05 * expected.norm()


def test_mlp_needs_no_graph():
    assert make("mlp")(torch.randn(3, 12)).shape == (3, 4)


def test_nothing_is_kept_longer_than_the_graph():
    from fastkd.models import sparse

    model, edges = make("gcn"), directed()
    before = len(sparse._kept)
    model(torch.randn(40, 12), edges)
    assert len(sparse._kept) == before + 1
    del edges
    assert len(sparse._kept) == before


@pytest.mark.parametrize("name", GRAPH_MODELS)
def test_what_a_hook_sees(name):
    """layers.i returns [N, dims[i]] before norm and activation; the last one the logits."""
    model, x, edges = make(name), torch.randn(40, 12), directed()
    seen = {}
    for i, layer in enumerate(model.layers):
        layer.register_forward_hook(lambda module, args, out, i=i: seen.__setitem__(i, (args[0], out)))
    logits = model(x, edges)
    assert [out.shape for _, out in seen.values()] == [(40, d) for d in model.dims]
    assert seen[len(model.layers) - 1][1] is logits and model.hidden in (5, 8)
    for i in range(len(model.layers) - 1):
        z = seen[i][1]
        assert (z < 0).any()
        z = model.norms[i](z) if len(model.norms) else z
        torch.testing.assert_close(seen[i + 1][0], F.elu(z) if name == "gat" else z.relu())


@pytest.mark.parametrize("name", GRAPH_MODELS)
def test_dropout_only_in_training(name):
    model, x, edges = make(name, dropout=0.5), torch.randn(40, 12), directed()
    assert torch.equal(model(x, edges), model(x, edges))
    model.train()
    assert not torch.equal(model(x, edges), model(x, edges))


# --- point clouds -----------------------------------------------------------------------------------


def clouds(b=3, p=50, seed=0):
    return torch.randn(b, p, 3, generator=torch.Generator().manual_seed(seed))


def test_edge_conv_is_pygs_with_batch_norm_on_every_edge():
    """Values, gradients and running statistics, with weights of either sign."""
    torch.manual_seed(0)
    ours = FastEdgeConv(6, 9).double()
    nn.init.normal_(ours.norm.weight)
    nn.init.normal_(ours.norm.bias)
    assert (ours.norm.weight < 0).any() and (ours.norm.weight > 0).any()
    lin, norm = nn.Linear(12, 9, bias=False), nn.BatchNorm1d(9)
    theirs = EdgeConv(nn.Sequential(lin, norm)).double()
    lin.weight, norm.weight, norm.bias = ours.lin.weight, ours.norm.weight, ours.norm.bias
    x = 3 + torch.randn(60, 6, dtype=torch.float64)
    graph = Graph.from_knn(x, 7, loop=True)
    grad = torch.randn(60, 9, dtype=torch.float64)
    for training in (True, False):
        ours.train(training)
        theirs.train(training)
        results = []
        for module, g in ((ours, graph), (theirs, graph.edge_index)):
            leaf = x.clone().requires_grad_()
            out = module(leaf, g)
            wanted = [leaf, ours.lin.weight, ours.norm.weight, ours.norm.bias]
            results.append((out, *torch.autograd.grad(out, wanted, grad)))
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
        for key in ("running_mean", "running_var"):
            torch.testing.assert_close(getattr(ours.norm, key), getattr(norm, key), rtol=1e-6, atol=1e-6)


def test_neighbour_max_is_the_same_where_there_is_no_sparse_maximum():
    x = torch.randn(60, 9, dtype=torch.float64, requires_grad=True)
    graph = Graph.from_knn(x, 7, loop=True)
    grad = torch.randn(60, 9, dtype=torch.float64)
    a = dgcnn.neighbour_max(x, graph)
    b = dgcnn._GatheredMax.apply(x, graph.col.view(60, 7).long())
    assert torch.equal(a, b)
    torch.testing.assert_close(*(torch.autograd.grad(out, x, grad)[0] for out in (a, b)))


def small(**changes):
    torch.manual_seed(0)
    return models.DGCNN(5, **{"k": 6, "widths": (8, 16), "emb": 24, "head": (12,), **changes})


def test_dgcnn_graphs_and_taps():
    model, points = small().eval(), clouds()
    seen = {}
    for i, layer in enumerate(model.layers):
        layer.register_forward_hook(lambda module, args, out, i=i: seen.__setitem__(i, (args[0], out)))
    assert model(points).shape == (3, 5)
    assert [out.shape for _, out in seen.values()] == [(150, d) for d in model.dims] and model.dims == [8, 16]
    for i in range(2):
        graph = model.graph(i)
        assert graph is model.graph(f"layers.{i}") is model.graphs[i] and isinstance(graph, Graph)
        assert graph.num_dst == 150 and bool((graph.in_degree() == 6).all())
        # Brute force in the layer's input space: in the first layer, the points themselves.
        x = seen[i][0].view(3, 50, -1)
        for b in range(3):
            near = torch.cdist(x[b].double(), x[b].double()).topk(6, largest=False).indices.sort(1).values
            assert torch.equal(graph.col.view(3, 50, 6)[b].long() - 50 * b, near)
    assert torch.equal(seen[0][0], points.reshape(-1, 3))
    torch.testing.assert_close(seen[1][0], F.leaky_relu(seen[0][1], 0.2))


def test_dgcnn_does_not_depend_on_the_order_of_points_or_on_other_clouds():
    model, points = small().eval(), clouds()
    expected = model(points)
    kept = []
    model.layers[-1].register_forward_hook(lambda module, args, out: kept.append(out))
    model(points)
    order = torch.randperm(50, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(model(points[:, order]), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(kept[1].view(3, 50, -1), kept[0].view(3, 50, -1)[:, order], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model(points[1:2]), expected[1:2], rtol=1e-4, atol=1e-5)


def test_dgcnn_gradient_reaches_every_parameter():
    model = small(widths=(8, 8, 16, 16), head=(12, 8), dropout=0.0).train()
    F.cross_entropy(model(clouds(6)), torch.arange(6) % 5).backward()
    for key, p in model.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.any(), key


def test_dgcnn_with_fewer_points_than_neighbours():
    model = small(k=20).eval()
    assert model(clouds(2, 7)).shape == (2, 5)
    assert bool((model.graph(0).in_degree() == 7).all())


def test_dgcnn_bfloat16_autocast():
    model, points = small().eval(), clouds()
    expected = model(points)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(points)
    assert (out.float() - expected).norm() < 0.1 * expected.norm()


def test_dgcnn_errors():
    with pytest.raises(RuntimeError, match="there was none yet"):
        small().graph(0)
    model = small()
    model(clouds())
    with pytest.raises(ValueError, match=r"layers\.0, layers\.1.*got 'layers\.2'"):
        model.graph("layers.2")
    with pytest.raises(ValueError, match=r"points must have shape \[B, P, 3\], got \(50, 3\)"):
        model(torch.randn(50, 3))


# --- the registry and its errors --------------------------------------------------------------------


@pytest.mark.parametrize("name", models.MODELS)
def test_build_every_model(name):
    points = name.startswith("dgcnn")
    model = models.build(name, 3, 4).eval()
    out = model(clouds(2, 30)) if points else model(torch.randn(40, 3), directed())
    assert out.shape == ((2, 4) if points else (40, 4)) and out.isfinite().all()
    assert len(model.dims) == len(model.layers) and model.hidden


def test_lists_from_a_configuration_file():
    assert models.build("gat", 3, 4, heads=[2, 2], hidden=3).dims == [6, 4]
    assert models.build("dgcnn", 3, 4, widths=[8], head=[]).dims == [8]


@pytest.mark.parametrize(
    "call, told",
    [
        (lambda: models.build("gnc", 3, 4), ["'gnc'", "graphsage", "did you mean 'gcn'"]),
        (lambda: models.build("gcn", 3, 4, hiden=8), ["gcn", "'hiden'", "did you mean 'hidden'", "num_layers"]),
        (lambda: models.build("gcn", 3, 4, heads=2), ["'heads'", "dropout"]),
        (lambda: models.build("dgcnn", 5, 4), ["in_dim must be 3", "got 5"]),
        (lambda: models.GCN(3, 4, hidden=0), ["hidden must be at least 1", "got 0"]),
        (lambda: models.GCN(3, 4, norm="group"), ["norm", "'batch'", "'group'"]),
        (lambda: models.GCN(3, 4, dropout=1.0), ["dropout", "[0, 1)", "1.0"]),
        (lambda: models.GCN(3, 4, num_layers=0), ["num_layers", "got 0"]),
        (lambda: models.GAT(3, 4, heads=()), ["heads", "()"]),
        (lambda: models.GAT(3, 4, heads=(2, 0)), ["heads[1]", "got 0"]),
        (lambda: models.DGCNN(4, widths=()), ["widths", "()"]),
        (lambda: models.DGCNN(4, k=0), ["k must be at least 1"]),
        (lambda: make("gcn")(torch.randn(40, 3), directed()), ["x must have shape [N, 12]", "(40, 3)"]),
        (lambda: make("gcn")(torch.randn(40, 12), 2 * adj_t(directed(), 40)), ["value 1", "edge weights"]),
        (lambda: make("gcn")(torch.randn(30, 12), adj_t(directed(), 40)), ["(40, 40)", "(30, 30)"]),
    ],
)
def test_errors_name_what_is_valid(call, told):
    with pytest.raises(ValueError) as caught:
        call()
    for part in told:
        assert part in str(caught.value)


def test_errors_of_other_types():
    with pytest.raises(TypeError, match=r"hidden must be an int, got 2\.5"):
        models.GCN(3, 4, hidden=2.5)
    with pytest.raises(TypeError, match=r"x must be a dense or torch\.sparse_csr tensor, got NoneType"):
        make("gcn")(None, directed())
    with pytest.raises(IndexError, match="edge_index"):
        make("gcn")(torch.randn(30, 12), directed())
    for name in ("gcn", "graphsage", "gat"):
        for adj, words in ((None, "got NoneType"), (([0], [1]), r"got tuple: pass torch\.stack")):
            with pytest.raises(TypeError, match=rf"graph must be a fastkd\.Graph.*{words}"):
                make(name)(torch.randn(30, 12), adj)
    for value in ("0.5", None, True):
        with pytest.raises(TypeError, match="dropout must be a number, got"):
            models.GCN(3, 4, dropout=value)
