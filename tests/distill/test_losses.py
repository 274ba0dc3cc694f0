"""The distillation losses against their papers' formulas, written a second time with plain loops."""

import copy
import math
import time
from math import exp, log, sqrt
from types import SimpleNamespace

import pytest
import torch

from fastkd import Graph, LSPLoss, kernels, lsp_loss, teacher_structure
from fastkd.distill.losses import (
    GCRD,
    KD,
    LOSSES,
    LSP,
    PKT,
    RKD,
    AttentionTransfer,
    FitNet,
    RepresentationMatching,
    SimilarityPreserving,
    build,
)

pytestmark = pytest.mark.usefixtures("one_thread")

N, DS, DT = 9, 4, 6


# --- the published formulas, in float64 -----------------------------------------------------------


def dot(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True))


def cosine(a, b):
    return dot(a, b) / sqrt(dot(a, a) * dot(b, b))


def distance(a, b):
    return sqrt(sum((x - y) ** 2 for x, y in zip(a, b, strict=True)))


def softmax(row):
    e = [exp(x) for x in row]
    return [x / sum(e) for x in e]


def kl(p, q):
    return sum(x * log(x / y) for x, y in zip(p, q, strict=True))


def huber(x, y):
    d = abs(x - y)
    return d * d / 2 if d < 1 else d - 0.5


def linear(layer, rows):
    w, b = layer.weight.detach().double().numpy(), layer.bias.detach().double().numpy()
    return [[dot(w[o], row) + b[o] for o in range(len(w))] for row in rows]


def mean_square(a, b):
    """Of two matrices."""
    terms = [(x - y) ** 2 for p, q in zip(a, b, strict=True) for x, y in zip(p, q, strict=True)]
    return sum(terms) / len(terms)


def kd(loss, s, t):
    T = loss.temperature
    nodes = [kl(softmax(b / T), softmax(a / T)) for a, b in zip(s, t, strict=True)]
    return T * T * sum(nodes) / len(nodes)


def kd_multilabel(loss, s, t):
    """Binary cross-entropy with soft labels, less what it is at best."""
    T, total = loss.temperature, 0.0
    for a, b in zip(s.ravel() / T, t.ravel() / T, strict=True):
        p, q = 1 / (1 + exp(-b)), 1 / (1 + exp(-a))
        cross = -(p * log(q) + (1 - p) * log(1 - q))
        entropy = -(p * log(p) + (1 - p) * log(1 - p))
        total += cross - entropy
    return T * T * total / s.size


def fitnet(loss, s, t):
    return mean_square(linear(loss.regressor, s), t)


def attention(loss, s, t):
    def q(rows):
        a = [sum(abs(x) ** loss.p for x in row) for row in rows]
        return [x / sqrt(dot(a, a)) for x in a]

    return sum((x - y) ** 2 for x, y in zip(q(s), q(t), strict=True))


def rkd(loss, s, t):
    n = len(s)
    pairs = [(i, j) for i in range(n) for j in range(n) if i != j]
    mu_s, mu_t = (sum(distance(z[i], z[j]) for i, j in pairs) / len(pairs) for z in (s, t))
    d = [huber(distance(s[i], s[j]) / mu_s, distance(t[i], t[j]) / mu_t) for i, j in pairs]

    triples = [(i, j, k) for i, j in pairs for k in range(n) if k not in (i, j)]
    a = [huber(cosine(s[i] - s[j], s[k] - s[j]), cosine(t[i] - t[j], t[k] - t[j])) for i, j, k in triples]
    return loss.distance_weight * sum(d) / len(d) + loss.angle_weight * sum(a) / len(a)


def gsp_linear(loss, s, t):
    def g(z):
        gram = [[dot(a, b) for b in z] for a in z]
        return [[x / sqrt(dot(row, row)) for x in row] for row in gram]

    return mean_square(g(s), g(t))


def gsp_cosine(loss, s, t):
    return mean_square(*([[cosine(a, b) for b in z] for a in z] for z in (s, t)))


def pkt(loss, s, t):
    def p(z):
        k = [[(cosine(a, b) + 1) / 2 for b in z] for a in z]
        return [[x / sum(row) for x in row] for row in k]

    return sum(map(kl, p(t), p(s))) / len(s)


def gcrd(loss, s, t):
    s, t = linear(loss.student_proj, s), linear(loss.teacher_proj, t)
    total = 0.0
    for i in range(len(s)):
        total -= log(softmax([cosine(s[i], b) / loss.temperature for b in t])[i])
    return total / len(s)


def rsd(loss, s, t):
    similarity = cosine if loss.normalize else dot
    s = linear(loss.proj, s)
    return mean_square(*([[similarity(a, b) for b in z] for a in z] for z in (s, t)))


EDGES = [(s, d) for d in range(N - 1) for s in range(N) if (3 * s + 5 * d) % 4 == 0]  # N - 1 is isolated
GRAPH = Graph.from_edge_index(torch.tensor(EDGES).T, N)


def lsp(loss, s, t):
    """RBF with sigma = 2, KL(student||teacher), mean over nodes."""
    total = 0.0
    for i in range(N):
        near = [j for j, d in EDGES if d == i]
        p, q = (softmax([exp(-(distance(z[i], z[j]) ** 2) / 4) for j in near]) for z in (s, t))
        total += kl(p, q)
    return total / N


LOGITS = dict(student_dim=5, teacher_dim=5)
FEATURES = dict(student_dim=DS, teacher_dim=DT)


def case(truth, name, dims=FEATURES, **hyperparameters):
    return SimpleNamespace(truth=truth, name=name, dims=dims, hyperparameters=hyperparameters)


CASES = {
    "lsp": case(lsp, "lsp", kernel_args={"sigma": 2.0}),
    "kd": case(kd, "kd", LOGITS),
    "kd-T1": case(kd, "kd", LOGITS, temperature=1),
    "kd-multilabel": case(kd_multilabel, "kd", LOGITS, temperature=3.0, multilabel=True),
    "fitnet": case(fitnet, "fitnet"),
    "at": case(attention, "at"),
    "at-p3": case(attention, "at", p=3.0),
    "rkd": case(rkd, "rkd"),
    "rkd-distance": case(rkd, "rkd", angle_weight=0),
    "rkd-angle": case(rkd, "rkd", distance_weight=0, angle_weight=2.0),
    "gsp-linear": case(gsp_linear, "gsp"),
    "gsp-cosine": case(gsp_cosine, "gsp", kernel="cosine"),
    "pkt": case(pkt, "pkt"),
    "gcrd": case(gcrd, "gcrd", proj_dim=7),
    "gcrd-T1": case(gcrd, "gcrd", proj_dim=3, temperature=1.0),
    "rsd": case(rsd, "rsd"),
    "rsd-nosmog": case(rsd, "rsd", normalize=False),
}
SAMPLED = ["rkd", "gsp-linear", "gsp-cosine", "pkt", "gcrd", "rsd", "rsd-nosmog"]
ZERO_WHEN_EQUAL = [name for name, c in CASES.items() if c.name not in ("fitnet", "gcrd", "rsd")]

every_case = pytest.mark.parametrize("name", CASES)
every_sampled = pytest.mark.parametrize("name", SAMPLED)


def made(name, seed=0, **more):
    c = CASES[name]
    torch.manual_seed(seed)
    return build(c.name, **c.dims, **{**c.hyperparameters, **more})


def problem(name, seed=0, dtype=torch.float64, n=N):
    """Student and teacher, exact in bfloat16, so that all precisions see the same numbers."""
    g = torch.Generator().manual_seed(seed)
    dims = CASES[name].dims
    s, t = (torch.randn(n, d, generator=g).bfloat16().to(dtype) for d in (dims["student_dim"], dims["teacher_dim"]))
    return s, t


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# --- values ---------------------------------------------------------------------------------------


@every_case
@pytest.mark.parametrize("seed", [0, 1])
def test_formula(name, seed):
    loss = made(name, seed)
    s, t = problem(name, seed)
    true = CASES[name].truth(loss, s.numpy(), t.numpy())
    assert true > 1e-3
    found = loss(s, t, GRAPH)
    assert found.shape == () and found.dtype == torch.float64
    assert found.item() == pytest.approx(true, rel=1e-10)
    single = loss(s.float(), t.float(), GRAPH)
    assert single.dtype == torch.float32
    assert single.item() == pytest.approx(true, rel=1e-4)


@pytest.mark.parametrize("name", ZERO_WHEN_EQUAL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_sides_give_zero(name, dtype):
    x = problem(name, dtype=dtype)[0].requires_grad_()
    loss = made(name)(x, x.detach().clone(), GRAPH)
    grad = torch.autograd.grad(loss, x)[0]
    assert loss == 0
    assert grad.abs().max() <= (1e-5 if dtype == torch.float32 else 1e-13)


@pytest.mark.parametrize("name", ["fitnet", "rsd", "rsd-nosmog"])
def test_zero_when_the_projection_is_the_identity(name):
    x = problem(name)[0]
    loss = build(CASES[name].name, student_dim=DS, teacher_dim=DS, **CASES[name].hyperparameters)
    with torch.no_grad():
        layer = loss.regressor if name == "fitnet" else loss.proj
        layer.weight.copy_(torch.eye(DS))
        layer.bias.zero_()
    assert loss(x, x.clone()) == 0


def test_gcrd_known_values():
    """One against n - 1 orthogonal nodes at best; log n where all nodes are alike."""
    n = 6
    loss = GCRD(student_dim=n, teacher_dim=n, proj_dim=n, temperature=0.5)
    with torch.no_grad():
        for layer in (loss.student_proj, loss.teacher_proj):
            layer.weight.copy_(torch.eye(n))
            layer.bias.zero_()
    basis = 3 * torch.eye(n).double()
    assert loss(basis, basis).item() == pytest.approx(log(1 + (n - 1) * exp(-2)), rel=1e-12)
    assert loss(torch.ones(n, n).double(), basis).item() == pytest.approx(log(n), rel=1e-12)


def test_scales_that_do_not_matter():
    """Attention, relations and similarities know no scale; distances no shift; GSP no rotation."""
    s, t = problem("at")
    rotation = torch.linalg.qr(torch.randn(DS, DS, generator=generator()).double())[0]
    for name in ("at", "rkd", "gsp-linear", "gsp-cosine", "pkt"):
        loss = made(name)

        def same(x, y, loss=loss):
            torch.testing.assert_close(loss(x, y), loss(s, t), rtol=1e-9, atol=0)

        same(5 * s, t)
        same(s, 0.1 * t)
        if name != "at":
            same(s @ rotation, t)
        if name == "rkd":
            same(s + 100, t - 7)


def test_kd_is_soft_cross_entropy_to_its_gradient():
    """The teacher's entropy is a constant: the gradient is that of Hinton's cross-entropy."""
    s, t = problem("kd")
    s.requires_grad_()
    for multilabel in (False, True):
        loss = KD(temperature=3.0, multilabel=multilabel)(s, t)
        if multilabel:
            cross = 9 * torch.nn.functional.binary_cross_entropy_with_logits(s / 3, (t / 3).sigmoid())
        else:
            cross = 9 * torch.nn.functional.cross_entropy(s / 3, (t / 3).softmax(1))
        torch.testing.assert_close(torch.autograd.grad(loss, s), torch.autograd.grad(cross, s), rtol=1e-10, atol=0)


def test_pkt_of_opposite_nodes():
    """Their probability is 0, and the teacher's is not."""
    s, t = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]]), torch.eye(3)
    s.requires_grad_()
    loss = PKT()(s, t)
    assert loss.isfinite() and loss > 1
    assert torch.autograd.grad(loss, s)[0].isfinite().all()


@pytest.mark.parametrize("multilabel", [False, True])
def test_kd_of_extreme_logits(multilabel):
    s = torch.tensor([[500.0, -500.0], [0.0, 0.0]], requires_grad=True)
    loss = KD(temperature=1.0, multilabel=multilabel)(s, torch.tensor([[-500.0, 500.0], [300.0, -300.0]]))
    assert loss.isfinite() and loss > 100
    assert torch.autograd.grad(loss, s)[0].isfinite().all()


# --- gradients and precisions ---------------------------------------------------------------------


@every_case
def test_gradient_reaches_student_and_parameters_only(name):
    loss = made(name)
    s, t = problem(name)
    s.requires_grad_()
    t.requires_grad_()
    loss(s, t, GRAPH).backward()
    assert t.grad is None
    assert s.grad.isfinite().all() and (s.grad != 0).any()
    parameters = dict(loss.named_parameters())
    assert bool(parameters) == (CASES[name].name in ("fitnet", "gcrd", "rsd"))
    for p in parameters.values():
        assert p.grad.isfinite().all() and (p.grad != 0).any()


@every_case
def test_gradcheck(name):
    loss = made(name).double()
    s, t = problem(name)
    assert torch.autograd.gradcheck(lambda x: loss(x, t, GRAPH), s.requires_grad_(), atol=1e-7, rtol=1e-5)


@every_case
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_widened(name, dtype):
    loss = made(name)
    s, t = problem(name, dtype=dtype)
    s.requires_grad_()
    found = loss(s, t, GRAPH)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, loss(s.float(), t.float(), GRAPH), rtol=1e-6, atol=0)
    grad = torch.autograd.grad(found, s)[0]
    assert grad.dtype == dtype and grad.isfinite().all()


@every_case
def test_autocast_changes_nothing(name):
    loss = made(name)
    s, t = problem(name, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = loss(s, t, GRAPH)
    assert torch.equal(inside, loss(s, t, GRAPH)) and inside.dtype == torch.float32


@every_case
def test_dead_and_coincident_nodes(name):
    """A ReLU makes rows of zeros; the gradient must not notice by its size."""
    loss = made(name)
    s, t = problem(name, dtype=torch.float32)
    with torch.no_grad():
        for layer in loss.modules():
            if isinstance(layer, torch.nn.Linear):
                layer.bias.zero_()  # so that zeros stay zeros
    for rows in (slice(0, 3), slice(None)):
        for value in (0.0, 1.5):
            x, y = s.clone(), t.clone()
            x[rows] = value
            y[2:5] = value
            x.requires_grad_()
            found = loss(x, y, GRAPH)
            grad = torch.autograd.grad(found, x)[0]
            assert found.isfinite() and grad.isfinite().all() and grad.abs().max() < 1e3


# --- sampling -------------------------------------------------------------------------------------


@every_sampled
def test_sampling(name):
    n, few = 40, 12
    s, t = problem(name, n=n)
    sampled = made(name, max_nodes=few, **({"max_angle_nodes": few} if name == "rkd" else {}))
    full = made(name)
    value = sampled(s, t, generator=generator(3))
    assert value == sampled(s, t, generator=generator(3))
    assert value != sampled(s, t, generator=generator(4))
    kept = torch.randperm(n, generator=generator(3))[:few]
    assert value == full(s[kept], t[kept])

    enough = made(name, max_nodes=n)
    g = generator(3)
    assert enough(s, t, generator=g) == full(s, t)
    assert torch.equal(g.get_state(), generator(3).get_state())  # nothing drawn

    torch.manual_seed(7)
    one = sampled(s, t)
    torch.manual_seed(7)
    assert one == sampled(s, t)


def test_rkd_draws_fewer_nodes_for_angles():
    s, t = problem("rkd", n=40)
    few = torch.randperm(40, generator=generator(3))[:5]
    both = RKD(max_angle_nodes=5)(s, t, generator=generator(3))
    distances = RKD(angle_weight=0)(s, t)
    angles = RKD(distance_weight=0)(s[few], t[few])
    torch.testing.assert_close(both, distances + angles, rtol=1e-12, atol=0)


@every_sampled
def test_gradient_of_a_sample(name):
    s, t = problem(name, n=40)
    s.requires_grad_()
    loss = made(name, max_nodes=12)
    grad = torch.autograd.grad(loss(s, t, generator=generator(3)), s)[0]
    kept = torch.randperm(40, generator=generator(3))[:12]
    assert set(grad.any(1).nonzero().flatten().tolist()) == set(kept.tolist())


@every_sampled
def test_many_nodes(name):
    """All pairs of 50 000 nodes would be 10 GB."""
    s, t = problem(name, dtype=torch.float32, n=50_000)
    s.requires_grad_()
    loss = made(name, max_nodes=256, **({"max_angle_nodes": 32} if name == "rkd" else {}))
    start = time.perf_counter()
    found = loss(s, t, generator=generator())
    found.backward()
    assert time.perf_counter() - start < 1
    assert found.isfinite()


# --- LSP ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", ["paper", "distillgcn", "efficient_gnns"])
def test_lsp_presets(preset):
    s, t = problem("lsp")
    assert LSP(preset=preset)(s, t, GRAPH) == LSPLoss.preset(preset)(s, t, GRAPH)


def test_lsp_arguments():
    s, t = problem("lsp")
    assert LSP()(s, t, GRAPH) == lsp_loss(s, t, GRAPH)
    laplacian = kernels.Laplacian(sigma=3.0, scale="mean")
    want = lsp_loss(s, t, GRAPH, kernel=laplacian, divergence="teacher||student", reduction="mean_edges")
    for kernel, constants in (
        (laplacian, None),
        ("laplacian", {"sigma": 3.0, "scale": "mean"}),
        (kernels.Laplacian(sigma=3.0), {"scale": "mean"}),
    ):
        loss = LSP(kernel=kernel, kernel_args=constants, divergence="teacher||student", reduction="mean_edges")
        assert loss(s, t, GRAPH) == want
    poly = LSP(preset="efficient_gnns", kernel="poly", kernel_args={"c": 0.5})
    assert poly.criterion.kernel == poly.criterion.teacher_kernel == kernels.Poly(c=0.5, normalize=True)


def test_lsp_teacher_structure():
    s, t = problem("lsp")
    loss = made("lsp")
    structure = teacher_structure(t, GRAPH, loss.criterion.kernel)
    assert loss(s, structure, GRAPH) == loss(s, t, GRAPH)


def test_lsp_of_dynamic_graphs():
    s, t = problem("lsp")
    own, theirs = Graph.from_knn(s, 3), Graph.from_knn(t, 3)
    kernel = kernels.RBF(sigma=2.0)
    union = lsp_loss(s, t, own.union(theirs), kernel=kernel)
    only = lsp_loss(s, t, own, kernel=kernel)
    assert union != only
    assert made("lsp")(s, t, own, teacher_graph=theirs) == union
    assert made("lsp", graph="student")(s, t, own, teacher_graph=theirs) == only
    assert made("lsp", graph="student")(s, teacher_structure(t, own, kernel), own, teacher_graph=theirs) == only
    twice = Graph.from_edge_index(torch.cat((GRAPH.edge_index, GRAPH.edge_index[:, ::2]), 1), N)
    assert made("lsp")(s, t, twice, teacher_graph=twice) == made("lsp")(s, t, twice)  # not merged


def random_graph(seed=0, n=50, e=400):
    return Graph.from_edge_index(torch.randint(n, (2, e), generator=generator(seed)), n)


def test_shuffled_graph():
    graph = random_graph()
    loss = LSP(shuffle=True)
    wrong = loss.shuffled(graph, generator())
    assert torch.equal(wrong.in_degree(), graph.in_degree())
    assert torch.equal(wrong.out_degree(), graph.out_degree())
    right, found = (set(map(tuple, g.edge_index.T.tolist())) for g in (graph, wrong))
    assert len(right & found) < 0.3 * len(right)  # 8 of 50 nodes are sources of a node: chance gives 0.16
    assert loss.shuffled(graph, generator(5)) is wrong
    assert loss.shuffled(random_graph()).fingerprint == wrong.fingerprint  # the same edges, made anew
    same = LSP(shuffle=True).shuffled(graph, generator())
    other = LSP(shuffle=True).shuffled(graph, generator(1))
    assert same.fingerprint == wrong.fingerprint != other.fingerprint

    resumed = LSP(shuffle=True)
    resumed.load_state_dict(loss.state_dict())
    assert resumed.shuffled(graph, generator(5)).fingerprint == wrong.fingerprint
    assert copy.deepcopy(loss).shuffled(random_graph()).fingerprint == wrong.fingerprint
    assert not LSP().state_dict()


def test_shuffled_loss():
    graph = random_graph()
    s, t = problem("lsp", n=50)
    loss = made("lsp", shuffle=True)
    value = loss(s, t, graph, generator())
    assert value == loss(s, t, graph, generator(9)) == loss(s, t, graph)
    assert value == made("lsp")(s, t, loss.shuffled(graph))
    assert value != made("lsp")(s, t, graph)
    assert loss(s, teacher_structure(t, loss.shuffled(graph), loss.criterion.kernel), graph) == value
    with pytest.raises(ValueError, match="shuffled"):
        loss(s, teacher_structure(t, graph), graph)


def test_shuffled_loss_of_two_graphs():
    graph, theirs = random_graph(), random_graph(1)
    s, t = problem("lsp", n=50)
    loss = made("lsp", shuffle=True)
    value = loss(s, t, graph, generator(), theirs)
    assert value == loss(s, t, graph, generator(9), theirs)
    assert value == made("lsp")(s, t, loss.shuffled(graph.union(theirs)))
    own = made("lsp", shuffle=True, graph="student")
    assert own(s, t, graph, generator(), theirs) == made("lsp")(s, t, own.shuffled(graph))


def test_shuffled_graphs_are_let_go():
    loss = LSP(shuffle=True)
    for seed in range(3):
        loss.shuffled(random_graph(seed))
    assert len(loss._shuffled) <= 1


# --- registry and errors --------------------------------------------------------------------------


def test_registry():
    assert list(LOSSES) == ["lsp", "kd", "fitnet", "at", "rkd", "gsp", "pkt", "gcrd", "rsd"]
    for name, cls in LOSSES.items():
        loss = build(name, student_dim=3, teacher_dim=4)
        assert type(loss) is cls and loss.name == name
        assert loss.uses == ("logits" if name == "kd" else "features")
    assert build("gsp", kernel="cosine", max_nodes=7).max_nodes == 7
    assert "temperature=4.0" in repr(build("kd", temperature=4))


def test_registry_errors():
    with pytest.raises(ValueError, match=r"one of 'lsp', 'kd', .* got 'fitnets' \(did you mean 'fitnet'\?\)"):
        build("fitnets", student_dim=3, teacher_dim=4)
    with pytest.raises(ValueError, match=r"one of 'lsp', .* got 'zzz'$"):
        build("zzz")
    with pytest.raises(TypeError, match=r"'kd' has no .* 'temprature' \(did you mean 'temperature'\?\); it has 'mult"):
        build("kd", temprature=3.0)
    with pytest.raises(TypeError, match="'fitnet' has no hyperparameter 'beta'; it has none"):
        build("fitnet", student_dim=3, teacher_dim=4, beta=3)
    for name in ("fitnet", "gcrd", "rsd"):
        with pytest.raises(ValueError, match="student_dim must be given"):
            build(name, teacher_dim=4)
        with pytest.raises(ValueError, match="teacher_dim must be given"):
            build(name, student_dim=4)


@pytest.mark.parametrize(
    "cls, wrong, told",
    [
        (KD, {"temperature": 0}, r"temperature must be a number in \(0, inf\), got 0"),
        (KD, {"temperature": math.nan}, "temperature .* got nan"),
        (KD, {"temperature": "2"}, "temperature .* got '2'"),
        (KD, {"multilabel": 1}, "multilabel must be True or False, got 1"),
        (AttentionTransfer, {"p": 0.5}, r"p must be a number in \[1, inf\), got 0.5"),
        (RKD, {"distance_weight": -1.0}, r"distance_weight must be a number in \[0, inf\), got -1"),
        (RKD, {"angle_weight": math.inf}, "angle_weight .* got inf"),
        (RKD, {"max_angle_nodes": 2}, "max_angle_nodes must be an int >= 3, got 2"),
        (SimilarityPreserving, {"kernel": "rbf"}, "kernel must be one of 'linear', 'cosine', got 'rbf'"),
        (SimilarityPreserving, {"max_nodes": 1}, "max_nodes must be an int >= 2, got 1"),
        (PKT, {"max_nodes": 10.0}, r"max_nodes must be an int >= 2, got 10\.0"),
        (FitNet, {"student_dim": 0, "teacher_dim": 3}, "student_dim must be an int >= 1, got 0"),
        (GCRD, {"student_dim": 3, "teacher_dim": -3}, "teacher_dim must be an int >= 1, got -3"),
        (GCRD, {"student_dim": 3, "teacher_dim": 3, "proj_dim": 0}, "proj_dim must be an int >= 1, got 0"),
        (GCRD, {"student_dim": 3, "teacher_dim": 3, "temperature": -1}, "temperature .* got -1"),
        (RepresentationMatching, {"student_dim": 3, "teacher_dim": 3, "normalize": None}, "normalize .* got None"),
        (LSP, {"kernel": "rbff"}, "kernel must be one of rbf, .* got 'rbff'"),
        (LSP, {"kernel_args": {"sigmaa": 1}}, "kernel_args must be of 'sigma', 'scale' for kernel 'rbf', got 'sigmaa'"),
        (LSP, {"kernel_args": {"sigma": -1.0}}, "sigma must be finite"),
        (LSP, {"reduction": "none"}, "reduction must be one of 'mean', .* got 'none'"),
        (LSP, {"divergence": "js"}, "divergence must be one of .* got 'js'"),
        (LSP, {"preset": "papers"}, "preset must be .* got 'papers'"),
        (LSP, {"preset": "paper", "reduction": "sum"}, "reduction must be None with preset='paper', got 'sum'"),
        (LSP, {"preset": "paper", "kernel": kernels.RBF()}, "kernel must be a name or None with preset='paper'"),
        (LSP, {"graph": "teacher"}, "graph must be one of 'student', 'union', got 'teacher'"),
        (LSP, {"shuffle": "yes"}, "shuffle must be True or False, got 'yes'"),
    ],
)
def test_wrong_hyperparameters(cls, wrong, told):
    with pytest.raises(ValueError, match=told):
        cls(**wrong)


def test_wrong_inputs():
    loss = PKT()
    s, t = problem("pkt")
    with pytest.raises(ValueError, match="same nodes, got 9 and 8 rows"):
        loss(s, t[:8])
    with pytest.raises(ValueError, match=r"student must have shape \[N, D\] with N >= 1, got \(9,\)"):
        loss(s[:, 0], t)
    with pytest.raises(ValueError, match=r"teacher must have shape .* got \(0, 6\)"):
        loss(s, t[:0])
    with pytest.raises(TypeError, match=r"teacher must be a floating-point tensor \[N, D\], got torch.int64"):
        loss(s, t.long())
    with pytest.raises(TypeError, match=r"teacher must be .* got TeacherStructure"):
        loss(s, teacher_structure(t, GRAPH))
    with pytest.raises(ValueError, match="same classes, got 4 and 6 columns"):
        KD()(s, t)
    with pytest.raises(TypeError, match=r"graph must be a fastkd.Graph for lsp, got NoneType"):
        LSP()(s, t)
    for name in ("fitnet", "gcrd", "rsd"):
        with pytest.raises(ValueError, match=r"student must have shape \[N, 4\] \(student_dim\), got \(9, 6\)"):
            made(name)(t, t)
        with pytest.raises(ValueError, match=r"teacher must have shape \[N, 6\] \(teacher_dim\), got \(9, 4\)"):
            made(name)(s, s)


def test_a_single_node_is_no_error():
    for name in CASES:
        s, t = (x[:1].requires_grad_() for x in problem(name))
        found = made(name)(s, t, Graph.from_edge_index(torch.zeros(2, 1, dtype=torch.int64), 1))
        assert found.isfinite() and torch.autograd.grad(found, s)[0].isfinite().all()
