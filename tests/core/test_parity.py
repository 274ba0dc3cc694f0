"""Parity of the presets with the three published variants of the loss.

Every variant is written here a second time, in plain torch and in the shape of its publication, so
that a preset cannot agree with itself only. Features go in as they are: which layer they come from,
the loss's weight and its schedule belong to the training script, not to the loss.
"""

import warnings
from functools import partial

import pytest
import torch
import torch.nn.functional as F

import fastkd.lsp
from fastkd import Graph, LSPLoss, lsp_loss
from fastkd.kernels import RBF, Cosine, Euclidean, Laplacian

N = 60
ISOLATED = 7  # the last nodes, without any edge
WIDTHS = {"student": 7, "teacher": 24}

# --- the published variants ---------------------------------------------------------------------


def paper(student, teacher, edge_index, similarity):
    """arXiv:2003.10477, the local structure preserving module, node by node:

        p_i = softmax over j in N(i) of SIM(z_i, z_j);   LSP = 1/N sum_i KL(p^s_i || p^t_i)

    A node without neighbours has no structure and adds nothing; N counts it all the same.
    """
    src, dst = edge_index
    total = student.new_zeros(())
    for i in range(len(student)):
        near = src[dst == i]
        log_s = similarity(student[i], student[near]).log_softmax(0)
        log_t = similarity(teacher[i], teacher[near]).log_softmax(0)
        total = total + (log_s.exp() * (log_s - log_t)).sum()
    return total / len(student)


def edge_softmax(logits, dst, num_nodes):
    """Softmax over the in-edges of a destination, as DGL and PyG compute it. (PyG adds 1e-16 to the
    sum, which is at least 1: no change in float64 either.)"""
    high = logits.new_full((num_nodes,), -torch.inf)
    high = high.scatter_reduce(0, dst, logits.detach(), "amax")
    e = (logits - high[dst]).exp()
    return e / e.new_zeros(num_nodes).index_add(0, dst, e)[dst]


def distillgcn(student, teacher, edge_index):
    """The authors' code, DistillGCN.PyTorch:

    * local_structure.py, distanceNet: exp(-||z_src - z_dst||_1 / 100), then DGL's edge_softmax,
      which normalises over the in-edges of the destination;
    * auxilary_loss.py, graph_KLDiv, called with x = student, y = teacher: every edge has
      y (log y - log x), which is KL(teacher||student); a destination sums its in-edges; then the
      mean over all nodes. DGL's sum gives 0 to a node without in-edges.

    A graph without a single edge is left out: DGL 0.4, the version they pin, skips the sum there.
    """
    src, dst = edge_index

    def structure(x):
        return edge_softmax(torch.exp(-(x[src] - x[dst]).abs().sum(-1) / 100), dst, len(x))

    s, t = structure(student), structure(teacher)
    nodes = student.new_zeros(len(student)).index_add(0, dst, t * (t.log() - s.log()))
    return nodes.mean()


def efficient_gnns(student, teacher, edge_index, similarity):
    """chaitjo/efficient-gnns, lpw_criterion in {ppi,arxiv,mag}_pyg/criterion.py:

        src, dst = edge_index;  p = PyG softmax of SIM(z_src, z_dst) grouped by dst
        F.kl_div(log p^s, p^t) with its default reduction: 1/E sum_e p^t (log p^t - log p^s)

    which is KL(teacher||student), by destination like the others, but a mean over edges. Without
    edges it is 0 / 0 = NaN.
    """
    src, dst = edge_index
    s = edge_softmax(similarity(student[src], student[dst]), dst, len(student))
    t = edge_softmax(similarity(teacher[src], teacher[dst]), dst, len(teacher))
    return F.kl_div(s.log(), t, reduction="none").mean()  # the default, less torch's warning of it


def square_distance(a, b):
    return ((a - b) ** 2).sum(-1)


PAPER = {
    "rbf": lambda a, b: torch.exp(-square_distance(a, b) / (2 * 100)),
    "linear": lambda a, b: (a * b).sum(-1),
    "poly": lambda a, b: (a * b).sum(-1) ** 2,
    # The minus is fastkd's choice: see test_sign_of_the_euclidean_kernel.
    "euclidean": lambda a, b: -square_distance(a, b),
}
EFFICIENT_GNNS = {
    "cosine": F.cosine_similarity,
    "poly": lambda a, b: F.cosine_similarity(a, b) ** 2,
    "l2": lambda a, b: (a - b).norm(dim=-1),  # neither a minus nor a square
    "rbf": lambda a, b: torch.exp(-square_distance(a, b) / 2),
}
EDGES = dict(divergence="teacher||student", reduction="mean_edges")

# What fastkd offers, what was published, and a scale of the features at which the kernel is
# sensitive to them.
VARIANTS = {"distillgcn": (LSPLoss.preset("distillgcn", kernel="laplacian"), distillgcn, 5)}
for _kernel, _scale in {"rbf": 3, "linear": 0.7, "poly": 0.5, "euclidean": 0.5}.items():
    VARIANTS[f"paper-{_kernel}"] = (
        LSPLoss.preset("paper", kernel=_kernel),
        partial(paper, similarity=PAPER[_kernel]),
        _scale,
    )
for _kernel, _scale in {"cosine": 1, "poly": 1, "l2": 1, "rbf": 0.3}.items():
    VARIANTS[f"efficient_gnns-{_kernel}"] = (
        LSPLoss.preset("efficient_gnns", kernel=_kernel),
        partial(efficient_gnns, similarity=EFFICIENT_GNNS[_kernel]),
        _scale,
    )

# --- what they are compared on ------------------------------------------------------------------

pytestmark = pytest.mark.usefixtures("one_thread")


def edges(kind="mixed", seed=0):
    """Unsorted directed edges among the first N - ISOLATED nodes."""
    g = torch.Generator().manual_seed(seed)
    n = N - ISOLATED
    if kind == "mixed":  # with self-loops and repeated edges, which all variants keep
        some = torch.randint(n, (2, 5 * n), generator=g)
        loops = torch.arange(0, n, 4).repeat(2, 1)
        found = torch.cat((some, loops, some[:, :20]), 1)
    else:  # "hubs": everyone points at 0 and 1, 2 points at everyone, and a directed ring
        one, every = torch.ones(n, dtype=torch.int64), torch.arange(n)
        ends = [(every, 0 * one), (every, one), (2 * one, every), (every, (every + 1) % n)]
        found = torch.cat([torch.stack(pair) for pair in ends], 1)
    return found[:, torch.randperm(found.shape[1], generator=g)]


def features(scale, seed=0, dtype=torch.float64, n=N):
    """Student and teacher, exact in float32, so that both precisions see the same numbers."""
    g = torch.Generator().manual_seed(100 + seed)
    student, teacher = (scale * torch.randn(n, d, generator=g) for d in WIDTHS.values())
    return student.to(dtype), teacher.to(dtype)


def value_and_grad(criterion, student, teacher, graph):
    student = student.detach().clone().requires_grad_()
    loss = criterion(student, teacher, graph)
    return loss.detach(), torch.autograd.grad(loss, student)[0]


def error(found, true):
    return float((found.double() - true).norm() / true.norm())


def test_graphs_are_directed_with_hubs_and_isolated_nodes():
    for kind in ("mixed", "hubs"):
        graph = Graph.from_edge_index(edges(kind), N)
        assert not graph.is_symmetric
        assert graph.degree_stats()["isolated"] >= ISOLATED
    assert graph.max_degree >= N - ISOLATED
    assert int(graph.out_degree().max()) >= N - ISOLATED


# --- parity -------------------------------------------------------------------------------------


def test_default_kernels():
    """lpw_criterion's own default is cosine; the scripts pass rbf, in mag_pyg poly."""
    kernels = {"paper": RBF(100.0), "distillgcn": Laplacian(100.0), "efficient_gnns": Cosine()}
    for name, kernel in kernels.items():
        assert LSPLoss.preset(name).kernel == kernel


@pytest.mark.parametrize("kind", ["mixed", "hubs"])
@pytest.mark.parametrize("name", VARIANTS)
def test_float64(name, kind):
    criterion, published, scale = VARIANTS[name]
    student, teacher = features(scale)
    loss, grad = value_and_grad(criterion, student, teacher, edges(kind))
    true_loss, true_grad = value_and_grad(published, student, teacher, edges(kind))
    assert loss.dtype == torch.float64
    assert true_loss > 1e-5 and torch.equal(grad[-ISOLATED:], torch.zeros(ISOLATED, grad.shape[1]))
    assert error(loss, true_loss) < 1e-10
    assert error(grad, true_grad) < 1e-10


@pytest.mark.parametrize("kind", ["mixed", "hubs"])
@pytest.mark.parametrize("name", VARIANTS)
def test_float32(name, kind):
    """At most twice the float32 error of the published form. The rounding error of one sum is a
    matter of luck, so that both are taken over several draws."""
    criterion, published, scale = VARIANTS[name]
    true, ours, theirs = [], [], []
    for seed in range(4):
        graph = edges(kind, seed)
        single = features(scale, seed, torch.float32)
        true.append(value_and_grad(published, *features(scale, seed), graph))
        ours.append(value_and_grad(criterion, *single, graph))
        theirs.append(value_and_grad(published, *single, graph))
    for of_true, of_ours, of_theirs in zip(
        zip(*true, strict=False), zip(*ours, strict=False), zip(*theirs, strict=False), strict=False
    ):  # loss, gradient
        exact, found = torch.stack(of_true), torch.stack(of_ours)
        assert found.dtype == torch.float32
        limit = 2 * error(torch.stack(of_theirs), exact) + 4 * torch.finfo(torch.float32).eps
        assert limit < 1e-4  # or a wrong formula could pass
        assert error(found, exact) <= limit


@pytest.mark.parametrize("name", VARIANTS)
def test_each_choice_of_a_preset_matters(name):
    """What the parity tests above would see if a preset had one of its choices wrong."""
    criterion, published, scale = VARIANTS[name]
    student, teacher = features(scale)
    true = published(student, teacher, edges())
    right = {k: getattr(criterion, k) for k in ("kernel", "divergence", "reduction", "norm_by")}
    other = {
        "norm_by": "src",
        "divergence": ({"student||teacher", "teacher||student"} - {criterion.divergence}).pop(),
        "reduction": "mean" if criterion.reduction == "mean_edges" else "mean_active",
    }
    assert error(lsp_loss(student, teacher, edges(), **right), true) < 1e-10
    for choice, value in other.items():
        wrong = lsp_loss(student, teacher, edges(), **{**right, choice: value})
        assert error(wrong, true) > 1e-3, choice


@pytest.mark.parametrize("name", [n for n in VARIANTS if n.startswith("efficient_gnns")])
def test_efficient_gnns_arxiv_script_groups_by_source(name):
    """arxiv_pyg/gnn.py takes edge_index from adj_t.coo(), whose rows are destinations, so that
    lpw_criterion groups by source. Its graph is made symmetric, where this is the same; on a
    directed one it is fastkd's norm_by="src", or the other flow."""
    criterion, published, scale = VARIANTS[name]
    student, teacher = features(scale)
    adj_t_coo = edges().flip(0)
    true_loss, true_grad = value_and_grad(published, student, teacher, adj_t_coo)

    def by_source(s, t, graph):
        return lsp_loss(s, t, graph, kernel=criterion.kernel, norm_by="src", **EDGES)

    flow = Graph.from_edge_index(edges(), N, flow="target_to_source")
    for side, graph in ((by_source, edges()), (criterion, flow)):
        loss, grad = value_and_grad(side, student, teacher, graph)
        assert error(loss, true_loss) < 1e-10
        assert error(grad, true_grad) < 1e-10

    both = torch.cat((edges(), adj_t_coo), 1)
    true_loss = published(student, teacher, both.flip(0))
    assert error(criterion(student, teacher, both), true_loss) < 1e-10


# --- where they differ --------------------------------------------------------------------------


def test_mean_edges_is_mean_times_nodes_over_edges():
    student, teacher = features(5)
    per_node = LSPLoss.preset("distillgcn")(student, teacher, edges())
    per_edge = LSPLoss(Laplacian(), **EDGES)(student, teacher, edges())
    torch.testing.assert_close(per_edge, per_node * N / edges().shape[1], rtol=1e-14, atol=0)


def test_isolated_nodes_dilute_the_means_over_nodes_only():
    student, teacher = features(1)
    active = N - ISOLATED
    factors = {"paper": active / N, "distillgcn": active / N, "efficient_gnns": 1.0}
    for name, factor in factors.items():
        criterion = LSPLoss.preset(name)
        without = criterion(student[:active], teacher[:active], edges())
        torch.testing.assert_close(criterion(student, teacher, edges()), factor * without, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", ["paper", "distillgcn", "efficient_gnns"])
def test_no_edges(name):
    """0, where efficient-gnns gives NaN."""
    nothing = torch.empty(2, 0, dtype=torch.int64)
    loss, grad = value_and_grad(LSPLoss.preset(name), *features(1), nothing)
    assert loss == 0 and torch.equal(grad, torch.zeros_like(grad))
    assert efficient_gnns(*features(1), nothing, F.cosine_similarity).isnan()


@pytest.mark.parametrize("kernel", [RBF, Laplacian])
def test_sums_over_the_features_are_not_normalised(kernel):
    """Every feature given twice doubles the distance: the published kernels then sit where half the
    sigma would put them. scale="mean" does not notice."""
    student, teacher = features(3)
    wide = torch.cat((teacher, teacher), 1)
    loss = partial(lsp_loss, student, graph=edges())
    same = partial(torch.testing.assert_close, rtol=1e-11, atol=0)
    same(loss(wide, teacher_kernel=kernel()), loss(teacher, teacher_kernel=kernel(sigma=50.0)))
    assert error(loss(wide, teacher_kernel=kernel()), loss(teacher, teacher_kernel=kernel())) > 1e-2
    mean = kernel(scale="mean", sigma=4.0)
    same(loss(wide, teacher_kernel=mean), loss(teacher, teacher_kernel=mean))


def saturated(sigma):
    """With sigma = 1, as in efficient-gnns, the similarity of standard normal features of width 64
    is about exp(-64). Softmax takes exp of it: 1 in float32, whatever the neighbour."""
    student, teacher = torch.randn(2, N, 64, generator=torch.Generator().manual_seed(0))
    graph = edges()
    graph = graph[:, graph[0] != graph[1]]  # a self-loop has similarity 1
    return LSPLoss(RBF(sigma=sigma), **EDGES), student, teacher, graph


@pytest.mark.filterwarnings("ignore:.*saturated")
@pytest.mark.parametrize("sigma", [1.0, 1e-3])
def test_rbf_with_a_small_sigma_vanishes(sigma):
    criterion, *data = saturated(sigma)
    loss, grad = value_and_grad(criterion, *data)
    assert loss < 1e-30 and grad.abs().max() < 1e-30
    if sigma == 1:
        assert efficient_gnns(*data, EFFICIENT_GNNS["rbf"]).abs() < 1e-7


@pytest.mark.parametrize("sigma", [1.0, 1e-3])
def test_rbf_with_a_small_sigma_warns_once(sigma, monkeypatch):
    monkeypatch.setattr(fastkd.lsp, "_warned", set())
    criterion, *data = saturated(sigma)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        criterion(*data)
        criterion(*data)
    told = [str(w.message) for w in caught if "saturated" in str(w.message)]
    assert len(told) == 2 and "student's" in told[0] and "teacher's" in told[1]  # each side once


def test_kernels_between_0_and_1_bound_the_loss():
    """Half of the neighbours are near in the student and as far as can be in the teacher, the other
    half the reverse. To logits in [0, 1] that is a divergence of only tanh(1/2) = 0.46 nats (and
    0.47 at the worst split of the neighbours)."""
    near, far = torch.zeros(1), torch.full((1,), 1e4)
    student = torch.stack([near] + 4 * [near] + 4 * [far])
    teacher = torch.stack([near] + 4 * [far] + 4 * [near])
    star = torch.stack((torch.arange(1, 9), torch.zeros(8, dtype=torch.int64)))
    for name in ("paper", "distillgcn"):
        worst = len(student) * LSPLoss.preset(name)(student, teacher, star)
        torch.testing.assert_close(worst, torch.tensor(0.5).tanh())


def test_sign_of_the_euclidean_kernel():
    """Without a minus sign, as in efficient-gnns, far neighbours weigh most. The paper is said to
    write its squared distance without one, too; fastkd has both, and the preset takes the minus."""
    student, teacher = features(0.5)
    unsigned = paper(student, teacher, edges(), square_distance)
    plus = lsp_loss(student, teacher, edges(), kernel=Euclidean(sign=1))
    preset = LSPLoss.preset("paper", kernel="euclidean")(student, teacher, edges())
    assert error(plus, unsigned) < 1e-10
    assert error(preset, unsigned) > 1e-2
    assert LSPLoss.preset("efficient_gnns", kernel="l2").kernel == Euclidean(sign=1, squared=False)


def test_l2_of_distant_features_stays_finite():
    """efficient-gnns takes the logarithm of a softmax, which is -inf once a probability underflows:
    no parity there. fastkd stays in log space, like the same formula in float64."""
    student, teacher = features(40, dtype=torch.float32)
    similarity = EFFICIENT_GNNS["l2"]
    assert not efficient_gnns(student, teacher, edges(), similarity).isfinite()
    loss, grad = value_and_grad(LSPLoss.preset("efficient_gnns", kernel="l2"), student, teacher, edges())
    true = efficient_gnns(student.double(), teacher.double(), edges(), similarity)
    assert true.isfinite() and error(loss, true) < 1e-5
    assert grad.isfinite().all()


def test_cosine_of_a_zero_row():
    """Features after a ReLU may be all 0. Both take the similarity to be 0. fastkd's gradient for
    that row is 0; torch divides by its eps of 1e-8, and has one that nobody can use."""
    student, teacher = features(1)
    student[3] = teacher[5] = 0
    criterion, published, _ = VARIANTS["efficient_gnns-cosine"]
    loss, grad = value_and_grad(criterion, student, teacher, edges())
    true_loss, true_grad = value_and_grad(published, student, teacher, edges())
    assert error(loss, true_loss) < 1e-10
    assert true_grad[3].abs().max() > 1e3 and torch.equal(grad[3], torch.zeros_like(grad[3]))
    rest = torch.arange(N) != 3
    assert error(grad[rest], true_grad[rest]) < 1e-10
