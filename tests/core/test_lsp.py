"""What users rely on: decisions, determinism, compilation, autocast, errors."""

import subprocess
import sys
import threading
import warnings

import pytest
import torch
from torch.library import opcheck

import fastkd
from cases import SAMPLES, features
from fastkd import Graph, LSPLoss, _ops, lsp_loss, reference, teacher_structure
from fastkd import kernels as K


@pytest.fixture
def problem():
    sample = SAMPLES["symmetric"]
    return features(40, 8, torch.float32), features(40, 12, torch.float32, seed=1), sample.edges


def grad_of(loss, x):
    return torch.autograd.grad(loss, x)[0]


# --- decisions ------------------------------------------------------------------------------------


def test_direction():
    """The softmax runs over the in-edges of the destination."""
    x, t = features(3, 4, torch.float64), features(3, 4, torch.float64, seed=1)
    into_0 = torch.tensor([[1, 2], [0, 0]])  # 1 -> 0, 2 -> 0
    rows = lsp_loss(x, t, into_0, reduction="none", kernel="linear")
    p = torch.log_softmax(torch.stack((x[0] @ x[1], x[0] @ x[2])), 0)
    q = torch.log_softmax(torch.stack((t[0] @ t[1], t[0] @ t[2])), 0)
    torch.testing.assert_close(rows, torch.tensor([(p.exp() * (p - q)).sum(), 0, 0]), rtol=1e-12, atol=1e-12)
    out_of_0 = into_0.flip(0)
    assert lsp_loss(x, t, out_of_0, kernel="linear") == 0  # every destination has one in-edge
    by_src = lsp_loss(x, t, out_of_0, kernel="linear", norm_by="src", reduction="none")
    torch.testing.assert_close(by_src, rows)
    flow = Graph.from_edge_index(out_of_0, 3, flow="target_to_source")
    torch.testing.assert_close(lsp_loss(x, t, flow, kernel="linear", reduction="none"), rows)


def test_isolated_and_single_edges_are_exactly_zero():
    x = features(6, 5, torch.float32).requires_grad_()
    edges = torch.tensor([[0, 2, 3, 4], [1, 3, 3, 5]])
    for name in ("rbf", "euclidean", "linear", "poly", "laplacian", "cosine"):
        rows = lsp_loss(x, features(6, 5, torch.float32, seed=1), edges, kernel=name, reduction="none")
        g = grad_of(rows.sum(), x)
        assert (rows[[0, 1, 2, 4, 5]] == 0).all()
        assert (g[[0, 1, 4, 5]] == 0).all() and g.isfinite().all()


def test_pair_on_a_symmetric_square_graph():
    """As many sources as destinations, but not the same nodes: SIM(i, j) is not SIM(j, i)."""
    edges = SAMPLES["symmetric"].edges
    x = tuple(features(40, 8, torch.float64, seed=s).requires_grad_() for s in (0, 1))
    t = tuple(features(40, 6, torch.float64, seed=s) for s in (2, 3))
    for teacher in (t, teacher_structure(t, edges, "rbf")):
        a, b = lsp_loss(x, teacher, edges), reference.lsp_loss(x, t, edges)
        torch.testing.assert_close(a, b)
        for ours, theirs in zip(torch.autograd.grad(a, x), torch.autograd.grad(b, x), strict=True):
            torch.testing.assert_close(ours, theirs)


def test_identical_structure_is_zero(problem):
    x, _, edges = problem
    for name in ("rbf", "linear", "cosine"):
        leaf = x.clone().requires_grad_()
        loss = lsp_loss(leaf, x, edges, kernel=name)
        assert loss == 0
        assert (grad_of(loss, leaf) == 0).all()


def test_loss_is_never_negative():
    """Teacher and student almost equal: the terms cancel to second order."""
    x = features(40, 8, torch.float32)
    for scale in (1e-2, 1e-3, 1e-4):
        t = x + scale * features(40, 8, torch.float32, seed=5)
        rows = lsp_loss(x, t, SAMPLES["symmetric"].edges, kernel="linear", reduction="none")
        exact = reference.lsp_loss(
            x.double(), t.double(), SAMPLES["symmetric"].edges, kernel="linear", reduction="none"
        )
        assert (rows >= 0).all()
        assert (rows - exact).abs().max() < 1e-2 * exact.max() + 1e-12


def test_coincident_points_have_zero_subgradient():
    x = torch.ones(4, 3, requires_grad=True)
    edges = torch.tensor([[1, 2, 3, 0], [0, 0, 0, 1]])
    for kernel in (K.Euclidean(squared=False), K.Laplacian()):
        g = grad_of(lsp_loss(x, features(4, 3, torch.float32), edges, kernel=kernel), x)
        assert (g == 0).all()


def test_zero_rows_under_cosine():
    x = features(6, 4, torch.float32)
    x[2] = 0
    x.requires_grad_()
    edges = torch.combinations(torch.arange(6)).t()
    loss = lsp_loss(x, features(6, 4, torch.float32, seed=1), torch.cat((edges, edges.flip(0)), 1), kernel="cosine")
    assert loss.isfinite() and grad_of(loss, x).isfinite().all()


def test_extreme_similarities_do_not_overflow():
    x = 1e4 * features(20, 8, torch.float32)
    x.requires_grad_()
    edges = SAMPLES["symmetric"].edges % 20
    for kernel in ("linear", "euclidean"):
        loss = lsp_loss(x, 1e4 * features(20, 8, torch.float32, seed=1), edges, kernel=kernel)
        assert loss.isfinite() and loss > 0
        assert grad_of(loss, x).isfinite().all()


def test_zero_weight_removes_the_edge(problem):
    x, t, edges = problem
    keep = torch.arange(edges.shape[1]) % 3 != 0
    x = x.requires_grad_()
    for reduction in ("mean", "mean_active", "mean_edges", "none"):
        a = lsp_loss(x, t, edges, edge_weight=keep.float(), reduction=reduction)
        b = lsp_loss(x, t, edges[:, keep], reduction=reduction)
        torch.testing.assert_close(a, b)
        torch.testing.assert_close(grad_of(a.sum(), x), grad_of(b.sum(), x))
    gone = lsp_loss(x, t, edges, edge_weight=torch.zeros(edges.shape[1]))
    assert gone == 0 and (grad_of(gone, x) == 0).all()


def test_weights_scale_probabilities():
    """w = 2 on an edge is two copies of it."""
    x, t = features(3, 4, torch.float64), features(3, 4, torch.float64, seed=1)
    edges = torch.tensor([[1, 2, 1], [0, 0, 0]])
    weighted = lsp_loss(x, t, edges[:, :2], edge_weight=torch.tensor([2.0, 1.0], dtype=torch.float64))
    torch.testing.assert_close(weighted, lsp_loss(x, t, edges))


def test_union_graph(problem):
    x, t, edges = problem
    other = SAMPLES["directed"].edges.flip(0)[:, :60]
    both = Graph.from_edge_index(torch.cat((edges, other), 1), 40).coalesce()
    leaf = x.clone().requires_grad_()
    a = lsp_loss(leaf, t, edges, teacher_graph=other)
    b = lsp_loss(leaf, t, both)
    assert torch.equal(a, b) and torch.equal(grad_of(a, leaf), grad_of(b, leaf))
    torch.testing.assert_close(a, reference.lsp_loss(leaf, t, edges, teacher_graph=other))


def test_scale_mean_makes_widths_comparable(problem):
    x, _, edges = problem
    wide = x.repeat(1, 4)
    assert lsp_loss(x, wide, edges, kernel=K.RBF(1.0, scale="mean")) < 1e-10
    assert lsp_loss(x, wide, edges, kernel=K.RBF(1.0, scale="sum")) > 1e-4


def test_teacher_gets_no_gradient(problem):
    x, t, edges = problem
    t = t.requires_grad_()
    lsp_loss(x.requires_grad_(), t, edges).backward()
    assert t.grad is None and x.grad is not None


def test_no_grad_result_is_the_same(problem):
    x, t, edges = problem
    plain = lsp_loss(x, t, edges)
    assert not plain.requires_grad
    assert torch.equal(plain, lsp_loss(x.clone().requires_grad_(), t, edges))


def test_teacher_structure_log_prob(problem):
    _, t, edges = problem
    structure = teacher_structure(t, Graph.from_edge_index(edges, 40), "rbf")
    logits = reference.similarity(K.RBF(), t[edges[1]], t[edges[0]])
    expected = reference.edge_softmax(logits, edges[1], 40)
    torch.testing.assert_close(structure.log_prob, expected)


def test_presets():
    assert LSPLoss.preset("paper").kernel == K.RBF(100.0)
    assert LSPLoss.preset("distillgcn").divergence == "teacher||student"
    assert LSPLoss.preset("efficient_gnns").reduction == "mean_edges"
    with pytest.raises(ValueError, match="preset must be"):
        LSPLoss.preset("nobody")
    with pytest.raises(ValueError, match="'efficient_gnns', got 'laplacian'"):
        LSPLoss.preset("efficient_gnns", kernel="laplacian")
    assert "RBF" in repr(LSPLoss())


# --- determinism, threads, second derivatives -------------------------------------------------------


@pytest.mark.parametrize("name", ["directed", "hub", "hub_symmetric", "bipartite"])
def test_bitwise_deterministic_for_any_thread_count(name):
    sample = SAMPLES[name]
    src, dst = features(sample.num_src, 33, torch.float32), features(sample.num_dst, 33, torch.float32, seed=1)
    student = (src, dst) if sample.bipartite else src
    teacher = (src.flip(1), dst.flip(1)) if sample.bipartite else src.flip(1)
    threads = torch.get_num_threads()
    results = []
    try:
        for n in (1, 2, 3, 7, 1):
            torch.set_num_threads(n)
            leaves = tuple(x.clone().requires_grad_() for x in (student if sample.bipartite else (student,)))
            loss = lsp_loss(
                leaves if sample.bipartite else leaves[0],
                teacher,
                sample.edges.clone() if not sample.bipartite else Graph.from_edge_index(sample.edges, (30, 50)),
            )
            results.append((loss.detach(), *torch.autograd.grad(loss, leaves)))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_calls_from_several_threads():
    """The kernels release the GIL; calls must not disturb each other."""
    sample = SAMPLES["hub_symmetric"]
    graph = Graph.from_edge_index(sample.edges, sample.num_src)
    x, t = features(sample.num_src, 33, torch.float32), features(sample.num_src, 9, torch.float32)
    expected = lsp_loss(x, t, graph)
    results = []
    workers = [
        threading.Thread(target=lambda: results.extend(lsp_loss(x, t, graph) for _ in range(20))) for _ in range(4)
    ]
    for w in workers:
        w.start()
    for w in workers:
        w.join()
    assert len(results) == 80 and all(torch.equal(r, expected) for r in results)


def test_forked_worker_does_not_hang(tmp_path):
    """As in a DataLoader: one thread in a forked child of a process that used OpenMP."""
    code = """
import torch, fastkd, os
torch.set_num_threads(2)
x = torch.randn(3000, 16); e = torch.randint(0, 3000, (2, 20000))
fastkd.lsp_loss(x, x.flip(1), e)
pid = os.fork()
if pid == 0:
    torch.set_num_threads(1)
    fastkd.lsp_loss(x, x.flip(1), e)
    os._exit(0)
assert os.waitpid(pid, 0)[1] == 0
"""
    # Elsewhere than in the repository, whose folder fastkd/ has no compiled core.
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120, cwd=tmp_path)


def test_second_derivative_is_refused(problem):
    x, t, edges = problem
    x = x.requires_grad_()
    (g,) = torch.autograd.grad(lsp_loss(x, t, edges), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        g.sum().backward()
    (g,) = torch.autograd.grad(reference.lsp_loss(x, t, edges), x, create_graph=True)
    g.sum().backward()


# --- torch integration ------------------------------------------------------------------------------


def op_args(sample, reverse=True, weight=False, reduction=2, dtype=torch.float32, bipartite=False):
    graph = Graph.from_edge_index(sample.edges, (sample.num_src, sample.num_dst))
    x = features(sample.num_src, 5, dtype)
    y = features(sample.num_dst, 5, dtype, seed=1) if sample.bipartite else None
    w = torch.rand(graph.num_edges) if weight else None
    spec = K.Cosine().spec(5)
    return graph, (
        x,
        y,
        x,
        y,
        None,
        w,
        graph.rowptr,
        graph.col,
        graph.reverse,
        graph.num_src,
        *spec,
        *spec,
        0,
        reduction,
        graph.max_degree,
        True,
    )


@pytest.mark.parametrize("name", ["symmetric", "directed", "bipartite"])
@pytest.mark.parametrize("reduction", [0, 2])
def test_opcheck(name, reduction):
    sample = SAMPLES[name]
    graph, args = op_args(sample, reduction=reduction)
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    opcheck(torch.ops.fastkd.lsp_forward.default, args, test_utils=tests)
    loss, coef, src_norm, dst_norm, _ = _ops.lsp_forward(*args)
    opcheck(
        torch.ops.fastkd.lsp_backward.default,
        (
            torch.ones_like(loss),
            args[0],
            args[1],
            coef,
            src_norm,
            dst_norm,
            graph.rowptr,
            graph.col,
            graph.reverse,
            graph.t_rowptr,
            graph.t_col,
            graph.t_perm,
            graph.num_src,
            1,
            graph.max_incident,
        ),
        test_utils=tests,
    )
    opcheck(
        torch.ops.fastkd.kernel_values.default,
        (args[0], args[1], graph.rowptr, graph.col, graph.reverse, graph.num_src, *K.RBF().spec(5)),
        test_utils=tests,
    )


def test_opcheck_graph_ops():
    edges = SAMPLES["directed"].edges
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    opcheck(torch.ops.fastkd.csr_from_coo.default, (edges[0], edges[1], 40, 40, False), test_utils=tests)
    g = Graph.from_edge_index(edges, 40)
    opcheck(torch.ops.fastkd.csr_transpose.default, (g.rowptr, g.col, 40), test_utils=tests)
    h = g.reversed()
    opcheck(torch.ops.fastkd.csr_union.default, (g.rowptr, g.col, h.rowptr, h.col, 40), test_utils=("test_schema",))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile_fullgraph_with_dynamic_shapes(backend):
    torch._dynamo.reset()
    compiles = []

    def counting(gm, inputs):
        compiles.append(1)
        return torch._dynamo.lookup_backend(backend)(gm, inputs)

    @torch.compile(fullgraph=True, dynamic=True, backend=counting)
    def step(x, t, graph):
        return lsp_loss(x * 2, t, graph, kernel="cosine")

    for n in (30, 40, 55):
        edges = SAMPLES["directed"].edges % n
        x, t = features(n, 8, torch.float32), features(n, 6, torch.float32, seed=1)
        graph = Graph.from_edge_index(torch.cat((edges, edges.flip(0)), 1), n)
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        loss = step(a, t, graph)
        loss.backward()
        eager = lsp_loss(b * 2, t, graph, kernel="cosine")
        eager.backward()
        torch.testing.assert_close(loss, eager)
        torch.testing.assert_close(a.grad, b.grad)
    assert len(compiles) <= 2, "recompiles for every graph"


def test_compile_with_raw_edge_index():
    torch._dynamo.reset()
    step = torch.compile(lambda x, t, e: lsp_loss(x, t, e), fullgraph=True, dynamic=True, backend="aot_eager")
    edges = SAMPLES["symmetric"].edges
    x, t = features(40, 8, torch.float32), features(40, 6, torch.float32, seed=1)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    step(a, t, edges).backward()
    lsp_loss(b, t, edges).backward()
    torch.testing.assert_close(a.grad, b.grad)


def test_autocast_gives_a_float32_loss():
    linear = torch.nn.Linear(8, 8)
    x, t = features(40, 8, torch.float32), features(40, 12, torch.float32, seed=1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        h = linear(x)
        assert h.dtype == torch.bfloat16
        loss = lsp_loss(h, t, SAMPLES["symmetric"].edges)
    assert loss.dtype == torch.float32
    loss.backward()
    assert linear.weight.grad.dtype == torch.float32 and linear.weight.grad.abs().sum() > 0


def test_module_trains_and_pickles(problem):
    import pickle

    x, t, edges = problem
    graph = Graph.from_edge_index(edges, 40)
    criterion = pickle.loads(pickle.dumps(LSPLoss(K.RBF(5.0))))
    structure = teacher_structure(t, graph, K.RBF(5.0))
    w = torch.nn.Parameter(torch.eye(8))
    optimizer = torch.optim.Adam([w], 0.05)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = criterion(x @ w, structure, graph)
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < 0.7 * losses[0]


# --- errors and warnings ----------------------------------------------------------------------------

EDGES = torch.tensor([[0, 1, 2], [1, 2, 0]])
X = torch.randn(3, 4)


def nan_features():
    x = X.clone()
    x[1, 2] = float("nan")
    return x


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: lsp_loss(X, X, torch.tensor([[0, 3], [1, 2]])), IndexError, r"edge_index\[0, 1\] = 3 .*\[0, 3\)"),
        (lambda: lsp_loss(X, X, torch.tensor([[0, 1], [-1, 2]])), IndexError, r"edge_index\[1, 0\] = -1 .*\[0, 3\)"),
        (lambda: lsp_loss(X, X, EDGES.float()), TypeError, "edge_index must be int32 or int64, got torch.float32"),
        (lambda: lsp_loss(X, X, EDGES.t()), ValueError, r"edge_index must have shape \[2, E\], got \(3, 2\)"),
        (lambda: lsp_loss(X, X, "graph"), TypeError, "graph must be .* got str"),
        (lambda: lsp_loss(X[0], X, EDGES), ValueError, r"student must have shape \[N, D\], got \(4,\)"),
        (lambda: lsp_loss([1.0], X, EDGES), ValueError, r"student must be a tensor or a pair"),
        (lambda: lsp_loss(X, X[:2], EDGES), ValueError, "teacher has 2 rows, but the graph has num_src = 3"),
        (lambda: lsp_loss(X.int(), X, EDGES), TypeError, "student must be float16.* got torch.int32"),
        (lambda: lsp_loss(X.to(torch.complex64), X, EDGES), TypeError, "got torch.complex64"),
        (lambda: lsp_loss(X.double(), X, EDGES), TypeError, "teacher is torch.float32, but student is torch.float64"),
        (
            lambda: lsp_loss((X, X[:2].double()), (X, X[:2]), EDGES[:, [2]]),
            TypeError,
            r"student\[0\] is torch.float32, but student\[1\] is torch.float64",
        ),
        (
            lambda: lsp_loss((X, X[:2, :3]), (X, X[:2]), EDGES[:, [2]]),
            ValueError,
            r"student\[0\] has 4 columns, but student\[1\] has 3",
        ),
        (lambda: lsp_loss(X, X, Graph.from_edge_index(EDGES, (3, 5))), ValueError, "bipartite.*pair"),
        (lambda: lsp_loss(X.to("meta"), X, Graph.from_edge_index(EDGES, 3)), ValueError, "student is on meta"),
        (lambda: lsp_loss(X, X, EDGES, kernel="gauss"), ValueError, "kernel must be one of rbf.*got 'gauss'"),
        (lambda: lsp_loss(X, X, EDGES, kernel=3), TypeError, "kernel must be a name.*got int"),
        (lambda: lsp_loss(X, X, EDGES, teacher_kernel="gauss"), ValueError, "teacher_kernel must be one of"),
        (lambda: lsp_loss(X, X, EDGES, divergence="js"), ValueError, "divergence must be one of .*got 'js'"),
        (lambda: lsp_loss(X, X, EDGES, reduction="avg"), ValueError, "reduction must be one of .*got 'avg'"),
        (lambda: lsp_loss(X, X, EDGES, norm_by="row"), ValueError, "norm_by must be"),
        (
            lambda: lsp_loss(X, X, EDGES, edge_weight=torch.tensor([1.0, -2.0, 1.0])),
            ValueError,
            r"edge_weight\[1\] = -2.0: weights must be finite and in \[0, inf\)",
        ),
        (
            lambda: lsp_loss(X, X, EDGES, edge_weight=torch.tensor([1.0, 1.0, torch.nan])),
            ValueError,
            r"edge_weight\[2\] = nan",
        ),
        (lambda: lsp_loss(X, X, EDGES, edge_weight=torch.ones(2)), ValueError, r"edge_weight must have shape \[3\]"),
        (
            lambda: lsp_loss(X, X, EDGES, edge_weight=torch.ones(3, requires_grad=True)),
            ValueError,
            "must not require grad",
        ),
        (lambda: lsp_loss(nan_features(), X, EDGES, check_finite=True), ValueError, r"student\[1, 2\] = nan"),
        (lambda: lsp_loss(X, nan_features(), EDGES, check_finite=True), ValueError, r"teacher\[1, 2\] = nan"),
        (
            lambda: lsp_loss(X, teacher_structure(X, EDGES[:, :2]), EDGES),
            ValueError,
            "TeacherStructure of another graph",
        ),
        (
            lambda: lsp_loss(X, teacher_structure(X, EDGES.flip(0)), EDGES),
            ValueError,
            "TeacherStructure of another graph",
        ),
        (lambda: lsp_loss(X, teacher_structure(X, EDGES), EDGES, teacher_graph=EDGES), ValueError, "teacher_graph"),
        (lambda: lsp_loss(X, X, EDGES, teacher_graph=EDGES, edge_weight=torch.ones(3)), ValueError, "edge_weight"),
        (lambda: K.RBF(0.0), ValueError, r"sigma must be finite and in \(0, inf\), got 0.0"),
        (lambda: K.RBF(-1.0), ValueError, "sigma"),
        (lambda: K.Laplacian(float("inf")), ValueError, "sigma must be finite"),
        (lambda: K.Laplacian("1"), TypeError, "sigma must be a number, got str"),
        (lambda: K.RBF(scale="max"), ValueError, "scale must be 'sum' or 'mean', got 'max'"),
        (lambda: K.Euclidean(sign=2), ValueError, "sign must be -1 or 1"),
        (lambda: K.Poly(degree=0), ValueError, r"degree must be in \[1, 16\]"),
        (lambda: K.Poly(degree=1.5), TypeError, "degree must be an int"),
        (lambda: K.Poly(c=float("nan")), ValueError, "c must be finite"),
        (lambda: K.Poly(normalize=1), TypeError, "normalize must be a bool"),
    ],
)
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_nan_without_check_gives_nan():
    assert lsp_loss(nan_features(), X, torch.cat((EDGES, EDGES.flip(0)), 1)).isnan()


def test_saturated_kernel_warns_once(monkeypatch, problem):
    x, t, edges = problem
    monkeypatch.setattr(fastkd.lsp, "_warned", set())
    with pytest.warns(UserWarning, match="student's similarities are equal.*larger sigma"):
        assert lsp_loss(100 * x, t, edges, kernel=K.RBF(sigma=1e-3), teacher_kernel=K.RBF(10.0)) > 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lsp_loss(100 * x, t, edges, kernel=K.RBF(sigma=1e-3), teacher_kernel=K.RBF(10.0))
    with pytest.warns(UserWarning, match="teacher's similarities"):
        lsp_loss(x, 0 * t, edges, kernel=K.RBF(10.0))


def test_meta_device_has_no_kernels():
    with pytest.raises((RuntimeError, NotImplementedError)):
        torch.ops.fastkd.lsp_forward(*op_args(SAMPLES["directed"])[1][:1])
