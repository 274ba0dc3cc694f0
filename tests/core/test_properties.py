"""Random graphs and features against the reference, and laws that hold for any input."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cases import DIVERGENCES, KERNELS, REDUCTIONS, features
from fastkd import Graph, lsp_loss, reference


@settings(deadline=None, max_examples=200)
@given(st.data())
def test_any_graph_against_reference(data):
    num_src = data.draw(st.integers(1, 30))
    bipartite = data.draw(st.booleans())
    num_dst = data.draw(st.integers(1, 30)) if bipartite else num_src
    edges = data.draw(st.lists(st.tuples(st.integers(0, num_src - 1), st.integers(0, num_dst - 1)), max_size=80))
    edges = torch.tensor(edges, dtype=torch.int64).reshape(-1, 2).t()
    if not bipartite and data.draw(st.booleans()):
        edges = torch.cat((edges, edges.flip(0)), 1)
    graph = Graph.from_edge_index(edges, (num_src, num_dst))
    width, seed = data.draw(st.integers(1, 20)), data.draw(st.integers(0, 1000))
    options = {
        "kernel": KERNELS[data.draw(st.sampled_from(sorted(KERNELS)))],
        "teacher_kernel": KERNELS[data.draw(st.sampled_from(sorted(KERNELS)))],
        "divergence": data.draw(st.sampled_from(DIVERGENCES)),
        "reduction": data.draw(st.sampled_from(REDUCTIONS)),
    }
    if not bipartite:
        options["norm_by"] = data.draw(st.sampled_from(("dst", "src")))
    if data.draw(st.booleans()):
        weight = data.draw(
            st.lists(st.sampled_from((0.0, 0.1, 1.0, 7.0)), min_size=edges.shape[1], max_size=edges.shape[1])
        )
        options["edge_weight"] = torch.tensor(weight, dtype=torch.float64)

    def side(w, s):
        x = features(num_src, w, torch.float64, seed=s).requires_grad_()
        return (x, features(num_dst, w, torch.float64, seed=s + 1).requires_grad_()) if bipartite else x

    student, teacher = side(width, seed), side(width + 2, seed + 7)
    leaves = student if bipartite else (student,)
    a = lsp_loss(student, teacher, graph, **options)
    b = reference.lsp_loss(student, teacher, graph, **options)
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
    assert (a >= 0).all()
    cotangent = torch.ones_like(a)
    for ours, theirs in zip(
        torch.autograd.grad(a, leaves, cotangent), torch.autograd.grad(b, leaves, cotangent), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-10)


@settings(deadline=None, max_examples=50)
@given(st.integers(2, 40), st.integers(0, 10_000))
def test_renumbering_nodes_permutes_the_gradient(n, seed):
    g = torch.Generator().manual_seed(seed)
    edges = torch.randint(n, (2, 4 * n), generator=g)
    order = torch.randperm(n, generator=g)
    x = features(n, 6, torch.float64, seed=seed).requires_grad_()
    t = features(n, 6, torch.float64, seed=seed + 1)
    position = torch.empty_like(order)
    position[order] = torch.arange(n)
    y = x.detach()[order].requires_grad_()
    a, b = lsp_loss(x, t, edges), lsp_loss(y, t[order], position[edges])
    torch.testing.assert_close(a, b)
    torch.testing.assert_close(torch.autograd.grad(a, x)[0][order], torch.autograd.grad(b, y)[0])


@settings(deadline=None, max_examples=50)
@given(st.integers(3, 40), st.integers(0, 10_000), st.floats(-100, 100, allow_subnormal=False))
def test_distance_kernels_ignore_translation(n, seed, shift):
    g = torch.Generator().manual_seed(seed)
    edges = torch.randint(n, (2, 5 * n), generator=g)
    x = features(n, 4, torch.float64, seed=seed)
    t = features(n, 4, torch.float64, seed=seed + 1)
    for kernel in ("rbf", "euclidean", "laplacian"):
        torch.testing.assert_close(
            lsp_loss(x + shift, t, edges, kernel=kernel), lsp_loss(x, t, edges, kernel=kernel), rtol=1e-7, atol=1e-10
        )
        y = (x + shift).requires_grad_()
        grad = torch.autograd.grad(lsp_loss(y, t, edges, kernel=kernel, reduction="sum"), y)[0]
        assert grad.sum(0).abs().max() < 1e-9  # no net force
