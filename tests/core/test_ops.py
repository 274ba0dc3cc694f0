"""The loss and its gradient against the reference in float64, over the whole table."""

import pytest
import torch

from cases import DIVERGENCES, DTYPES, KERNELS, LAYOUTS, REDUCTIONS, SAMPLES, WIDTHS, Sample, features
from fastkd import Graph, lsp_loss, reference, teacher_structure


def make(sample, width, dtype, layout="plain", device="cpu", seed=0):
    """Student (or pair) and teacher (or pair) for a sample."""

    def side(w, s):
        src = features(sample.num_src, w, dtype, layout, s, device)
        if not sample.bipartite:
            return src
        return src, features(sample.num_dst, w, dtype, layout, s + 1, device)

    return side(width, seed), side(2 * width + 1, seed + 10)


def map_pair(f, x):
    return tuple(f(v) for v in x) if isinstance(x, tuple) else f(x)


def gradient(loss_fn, student, teacher, graph, **options):
    """(loss, gradients) with the cotangent a fixed pattern for reduction="none", else 0.7."""
    leaves = map_pair(lambda x: x.detach().requires_grad_(), student)
    loss = loss_fn(leaves, teacher, graph, **options)
    cotangent = torch.full_like(loss, 0.7)
    if loss.dim():
        cotangent = torch.linspace(-1, 2, loss.numel(), dtype=loss.dtype, device=loss.device)
    inputs = leaves if isinstance(leaves, tuple) else (leaves,)
    return loss.detach(), torch.autograd.grad(loss, inputs, cotangent)


def check(student, teacher, graph, dtype, **options):
    """fastkd against the reference in float64, within twice the reference's own error in the dtype
    that fastkd accumulates in, and one rounding of the gradient to the features' dtype."""
    loss, grads = gradient(lsp_loss, student, teacher, graph, **options)
    weight = options.pop("edge_weight", None)

    def ref(to):
        w = {} if weight is None else {"edge_weight": weight.to(to)}
        cast = lambda x: map_pair(lambda v: v.to(to), x)
        return gradient(reference.lsp_loss, cast(student), cast(teacher), graph, **options, **w)

    exact, exact_grads = ref(torch.float64)
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    plain, plain_grads = ref(acc)
    assert loss.dtype == acc and loss.shape == exact.shape
    eps = torch.finfo(acc).eps

    def close(ours, plain, exact, own_eps):
        assert ours.isfinite().all()
        if not exact.numel():
            return
        size = exact.abs().max()
        error = (ours.double() - exact).abs()
        # A divergence is a sum of terms that cancel to second order: its floor is eps, not eps * size.
        # In float64 there is nothing to measure the reference with: 1e-12 of the size.
        slack = 8 * eps if acc == torch.float32 else 1e-12
        allowed = 2 * (plain.double() - exact).abs().max() + slack * (size + 0.01) + own_eps * exact.abs()
        assert (error <= allowed).all(), f"error {error.max():.3g}, allowed {allowed.max():.3g} of {size:.3g}"

    close(loss, plain, exact, 0)
    for ours, p, e in zip(grads, plain_grads, exact_grads, strict=True):
        assert ours.dtype == dtype and ours.shape == e.shape
        rounding = torch.finfo(dtype).eps / 2 if dtype != acc else 0
        # Half's subnormals are this far apart.
        floor = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps if dtype == torch.float16 else 0
        close(ours, p, e, rounding) if not floor else close(
            torch.where((ours.double() - e).abs() <= floor, e, ours.double()), p, e, rounding
        )


@pytest.mark.parametrize("name", SAMPLES)
@pytest.mark.parametrize("kernel", KERNELS)
def test_every_graph_and_kernel(device, poisoned, name, kernel):
    sample = SAMPLES[name]
    graph = Graph.from_edge_index(sample.edges.to(device), (sample.num_src, sample.num_dst))
    student, teacher = make(sample, 17, torch.float32, device=device)
    for divergence in DIVERGENCES:
        for reduction in ("mean", "none"):
            check(
                student,
                teacher,
                graph,
                torch.float32,
                kernel=KERNELS[kernel],
                divergence=divergence,
                reduction=reduction,
            )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", ["directed", "symmetric", "hub_symmetric", "bipartite"])
def test_every_dtype_and_width(device, poisoned, name, width, dtype):
    sample = SAMPLES[name]
    graph = Graph.from_edge_index(sample.edges.to(device), (sample.num_src, sample.num_dst))
    student, teacher = make(sample, width, dtype, device=device)
    for kernel in ("euclidean", "poly", "laplacian", "poly_cos"):
        if kernel == "poly_cos" and width == 1:
            continue  # the cosine of two numbers is +-1, and its gradient nothing but rounding
        check(student, teacher, graph, dtype, kernel=KERNELS[kernel])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["directed", "symmetric", "bipartite"])
def test_every_layout(device, poisoned, name, layout, dtype):
    sample = SAMPLES[name]
    graph = Graph.from_edge_index(sample.edges.to(device), (sample.num_src, sample.num_dst))
    for width in (8, 19):
        student, teacher = make(sample, width, dtype, layout, device)
        check(student, teacher, graph, dtype, kernel=KERNELS["rbf"])
        check(student, teacher, graph, dtype, kernel=KERNELS["cosine"])


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", ["directed", "symmetric", "isolated", "hub_symmetric", "bipartite", "no_edges"])
def test_every_reduction_and_weight(device, poisoned, name, weighted, reduction):
    sample = SAMPLES[name]
    graph = Graph.from_edge_index(sample.edges.to(device), (sample.num_src, sample.num_dst))
    student, teacher = make(sample, 9, torch.float32, device=device)
    options = {}
    if weighted:
        g = torch.Generator().manual_seed(3)
        e = graph.num_edges
        options["edge_weight"] = (torch.rand(e, generator=g) * (torch.rand(e, generator=g) > 0.3)).to(device)
    check(student, teacher, graph, torch.float32, kernel=KERNELS["rbf"], reduction=reduction, **options)


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("name", ["directed", "symmetric", "hub", "bipartite"])
def test_index_dtypes(device, poisoned, name, index_dtype):
    sample = SAMPLES[name]
    graph = Graph.from_edge_index(sample.edges.to(device), (sample.num_src, sample.num_dst), index_dtype=index_dtype)
    assert graph.col.dtype == index_dtype
    student, teacher = make(sample, 9, torch.float64, device=device)
    check(student, teacher, graph, torch.float64, kernel=KERNELS["linear"])


@pytest.mark.parametrize("name", ["directed", "symmetric", "duplicates", "hub_symmetric", "bipartite", "no_edges"])
def test_teacher_structure_is_the_teacher(device, poisoned, name):
    sample = SAMPLES[name]
    graph = Graph.from_edge_index(sample.edges.to(device), (sample.num_src, sample.num_dst))
    student, teacher = make(sample, 9, torch.float32, device=device)
    structure = teacher_structure(teacher, graph, KERNELS["laplacian"])
    for divergence in DIVERGENCES:
        options = {"kernel": KERNELS["rbf"], "divergence": divergence}
        full = gradient(lsp_loss, student, teacher, graph, teacher_kernel=KERNELS["laplacian"], **options)
        cached = gradient(lsp_loss, student, structure, graph, **options)
        torch.testing.assert_close(cached, full, rtol=1e-5, atol=1e-7)
    # A graph of the same pattern, built anew, is the same graph.
    again = Graph.from_edge_index(sample.edges.to(device), (sample.num_src, sample.num_dst))
    assert torch.equal(lsp_loss(student, structure, again), lsp_loss(student, structure, graph))


@pytest.mark.parametrize("name", ["directed", "symmetric", "bipartite"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_gradcheck(device, name, kernel):
    """Finite differences in float64, independent of the reference."""
    src, dst = (8, 12) if name == "bipartite" else (12, 12)
    edges = SAMPLES[name].edges[:, :30] % torch.tensor([[src], [dst]])
    edges = edges[:, edges[0] != edges[1]]
    if name == "symmetric":
        edges = torch.cat((edges, edges.flip(0)), 1)
    sample = Sample(name, edges, src + 1, dst + 1)  # the last node is isolated
    graph = Graph.from_edge_index(edges.to(device), (sample.num_src, sample.num_dst))
    student, teacher = make(sample, 3, torch.float64, device=device)
    student = map_pair(lambda x: x.requires_grad_(), student)
    inputs = student if isinstance(student, tuple) else (student,)

    def loss(*x):
        return lsp_loss(x if len(x) > 1 else x[0], teacher, graph, kernel=KERNELS[kernel], reduction="none")

    assert torch.autograd.gradcheck(loss, inputs)
    fast = lambda *x: lsp_loss(x if len(x) > 1 else x[0], teacher, graph, kernel=KERNELS[kernel])
    assert torch.autograd.gradcheck(fast, inputs)


def test_small_integers_are_exact(device, poisoned):
    """Sums of small integers are exact in any order: the raw reduction must match bit for bit."""
    sample = SAMPLES["hub_symmetric"]
    graph = Graph.from_edge_index(sample.edges.to(device), sample.num_src)
    g = torch.Generator().manual_seed(0)
    x = torch.randint(-8, 9, (sample.num_src, 37), generator=g).float().to(device)
    src, dst = graph.edge_index
    for kernel, expected in {"linear": (x[dst] * x[src]).sum(1), "euclidean": -((x[dst] - x[src]) ** 2).sum(1)}.items():
        structure = teacher_structure(x, graph, kernel)
        assert torch.equal(structure.values, expected[graph.perm.long()])
        bf16 = teacher_structure(x.bfloat16(), graph, kernel)
        assert torch.equal(bf16.values, structure.values)


@pytest.mark.parametrize("name", ["directed", "symmetric", "hub_symmetric", "duplicates"])
def test_order_of_edges_does_not_matter(device, name):
    sample = SAMPLES[name]
    g = torch.Generator().manual_seed(1)
    edges = sample.edges if name == "duplicates" else torch.unique(sample.edges, dim=1)
    order = torch.randperm(edges.shape[1], generator=g)
    student, teacher = make(sample, 9, torch.float32, device=device)
    weight = torch.rand(order.numel(), generator=g).to(device)
    edges = edges.to(device)
    a = gradient(lsp_loss, student, teacher, edges, edge_weight=weight)
    b = gradient(lsp_loss, student, teacher, edges[:, order], edge_weight=weight[order])
    if name == "duplicates":  # copies of an edge may swap places, with their weights
        torch.testing.assert_close(a, b)
    else:
        assert torch.equal(a[0], b[0]) and torch.equal(a[1][0], b[1][0])


@pytest.mark.parametrize("schedule", ["reverse", "random"])
def test_simt_schedule_does_not_matter(schedule, monkeypatch, request):
    """A kernel that misses a barrier gives other results when its threads run in another order."""
    from conftest import simt_module

    from fastkd import _ops

    monkeypatch.setitem(_ops.backends, "cpu", simt_module().cuda)
    for name in ("hub_symmetric", "directed", "bipartite_hub"):
        sample = SAMPLES[name]
        graph = Graph.from_edge_index(sample.edges, (sample.num_src, sample.num_dst))
        student, teacher = make(sample, 40, torch.float32)
        for kernel in ("rbf", "cosine"):
            monkeypatch.setenv("FASTKD_SIMT_ORDER", "forward")
            a = gradient(lsp_loss, student, teacher, graph, kernel=kernel)
            monkeypatch.setenv("FASTKD_SIMT_ORDER", schedule)
            b = gradient(lsp_loss, student, teacher, graph, kernel=kernel)
            assert torch.equal(a[0], b[0])
            assert all(torch.equal(x, y) for x, y in zip(a[1], b[1], strict=True))


@pytest.mark.large
def test_offsets_beyond_2_31():
    """E * D and N * D past 2^31 elements, in half precision to spare memory."""
    n, width = 1 << 16, (1 << 15) + 8
    x = torch.empty(n, width, dtype=torch.float16)
    g = torch.Generator().manual_seed(0)
    for start in range(0, n, 4096):
        x[start : start + 4096] = torch.randn(4096, width, generator=g).half()
    # Edges among the last nodes, whose rows lie beyond element 2^31.
    last = torch.arange(n - 40, n)
    edges = torch.stack((last.roll(1), last))
    edges = torch.cat((edges, torch.stack((last.roll(7), last))), 1)
    small = edges - (n - 40)
    for kernel in ("rbf", "linear"):
        big_loss = lsp_loss(x, x.flip(1)[:, :64].contiguous(), edges, kernel=kernel, reduction="sum")
        tail = x[n - 40 :].clone()
        small_loss = lsp_loss(tail, tail.flip(1)[:, :64].contiguous(), small, kernel=kernel, reduction="sum")
        assert torch.equal(big_loss, small_loss)
