"""The population evaluator against compact networks, one individual at a time."""

import copy

import pytest
import torch
import torch.nn.functional as F
from test_cnn import file
from test_population import IMAGES, SHAPES, SMALL, Net, conv, lively, network, small_net, some_masks, tail
from torch import nn

from fastkd import PopulationEvaluator, data
from fastkd.models import build_cnn, load_weights
from fastkd.population import UnsupportedModelError, compact, engine, trace


def close(y, expected, tolerance):
    return torch.allclose(y.double(), expected.double(), rtol=tolerance, atol=tolerance * float(expected.abs().max()))


def alone(model, masks, space, x):
    """[P, N, classes], each by its compact network"""
    with torch.no_grad():
        return torch.stack([compact(model, mask, space)(x) for mask in masks])


def single(model):
    return copy.deepcopy(model).float()


def logits(device, model, masks, x):
    return PopulationEvaluator(copy.deepcopy(model).to(device), x.to(device)).logits(masks, x.to(device)).cpu()


@pytest.mark.parametrize("name", SHAPES)
def test_equals_compact_networks(name, device, poisoned):
    model, x, space = network(name)
    masks = torch.cat((some_masks(space), space.ones(1)))
    expected = alone(model, masks, space, x)
    y = logits(device, model, masks, x)
    assert y.dtype == torch.float64 and y.shape == expected.shape and close(y, expected, 1e-10)
    with torch.no_grad():
        assert close(y[-1], model(x), 1e-10)
    y = logits(device, single(model), masks, x.float())
    assert y.dtype == torch.float32 and close(y, expected, 1e-4)


def recalibrated(model, batches):
    """What torch makes of the batches: running statistics with momentum=None"""
    model = copy.deepcopy(model)
    for m in model.modules():
        if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d):
            m.reset_running_stats()
            m.momentum = None
            m.train()
    with torch.no_grad():
        for x in batches:
            model(x)
    return model.eval()


@pytest.mark.parametrize("name", ["resnet20", "resnet56", "vgg16_cifar", "mobilenet_v1", "resnet50"])
def test_recalibration(name, device, request, poisoned):
    if name in ("resnet50", "resnet56") and request.node.callspec.params["device"] == "simt":
        pytest.skip("a GPU is imitated on the smaller networks")
    model, x, space = network(name)
    masks = some_masks(space, (0.3, 0.6))
    g = torch.Generator().manual_seed(4)
    sizes = (33, 20) if name == "resnet20" else (20, 17)  # 33: more than one block of images
    batches = [torch.randn(n, *x.shape[1:], generator=g, dtype=x.dtype) for n in sizes]
    with torch.no_grad():
        expected = torch.stack([recalibrated(compact(model, mask, space), batches)(x) for mask in masks])
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-4)):
        own = x.to(device, dtype)
        e = PopulationEvaluator(copy.deepcopy(model).to(device, dtype), own, bn="recalibrate")
        e.calibrate([(b.to(device, dtype), None) for b in batches])
        assert close(e.logits(masks, own).cpu(), expected, tolerance)


@pytest.mark.parametrize("name", [name for name in SMALL if name not in ("scalars", "unused")])
def test_small_networks(name, device, poisoned):
    model, _, _ = small_net(name)
    space = PopulationEvaluator(model, IMAGES).space
    masks = torch.cat((some_masks(space, (0.1, 0.3, 0.5, 0.5, 0.8)), space.ones(1)))
    assert close(logits(device, model, masks, IMAGES), alone(model, masks, space, IMAGES), 1e-10)


def rows_and_columns(self, x):
    x = F.pad(self.a(x), (0, 1, 0, 2))
    x = x[:, :, 1:, 2::2] + x[..., :-1, 1:-1:2]
    return tail(self, F.relu(x.mean(2)).unsqueeze(3))


def gated(self, x):
    x = F.relu6(self.a(x) * 1.5 + 0.25) / 3
    return tail(self, self.prelu(self.bn(x) * -x) * x.mean(3, keepdim=True))


def resized(self, x):
    x = F.interpolate(self.a(x), scale_factor=2)
    return tail(self, F.max_pool2d(x, 3, 2, ceil_mode=True) + F.adaptive_max_pool2d(x, 8))


def with_softmax(self, x):
    return F.log_softmax(tail(self, F.gelu(self.a(x), approximate="tanh")), 1)


MORE = {
    "rows_and_columns": (rows_and_columns, {}),
    "gated": (gated, dict(prelu=nn.PReLU(6), bn=nn.BatchNorm2d(6))),
    "resized": (resized, {}),
    "with_softmax": (with_softmax, {}),
    "same": (
        lambda self, x: tail(self, F.leaky_relu(self.b(self.a(x)))),
        dict(b=nn.Conv2d(6, 6, 3, padding="same", dilation=2)),
    ),
    "maps": (lambda self, x: torch.tanh(self.a(x)), dict(fc=nn.Identity())),
}


@pytest.mark.parametrize("name", MORE)
def test_more_operations(name, device, poisoned):
    forward, modules = MORE[name]
    model = lively(Net(forward, **{"a": conv(3, 6), "fc": nn.Linear(6, 5), **copy.deepcopy(modules)}))
    space = PopulationEvaluator(model, IMAGES).space
    masks = torch.cat((some_masks(space, (0.2, 0.5, 0.8)), space.ones(1))) if space.num_genes else space.ones(2)
    assert close(logits(device, model, masks, IMAGES), alone(model, masks, space, IMAGES), 1e-10)


def test_genes_and_vectors():
    model = lively(nn.Sequential(nn.Linear(7, 9), nn.BatchNorm1d(9), nn.SiLU(), nn.Linear(9, 3), nn.Softmax(1)))
    x = torch.randn(4, 7, dtype=torch.float64)
    e = PopulationEvaluator(model, x)
    masks = some_masks(e.space)
    assert close(e.logits(masks, x), alone(model, masks, e.space, x), 1e-10)


# --- qualities ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def resnet():
    """float32 network, 300 images with labels, masks of which some are equal or begin alike"""
    model = lively(build_cnn("resnet20", num_classes=10), dtype=torch.float32)
    g = torch.Generator().manual_seed(6)
    x, y = torch.randn(150, 3, 16, 16, generator=g), torch.randint(10, (150,), generator=g)
    space = PopulationEvaluator(model, x).space
    masks = space.repair(space.random(7, 0.6, g))
    masks[4, :300] = masks[3, :300]
    masks[6] = masks[1]
    return model, x, y, masks


def make(resnet, **options):
    e = PopulationEvaluator(resnet[0], resnet[1], **options)
    if e.bn == "recalibrate":
        n = len(resnet[1])
        e.calibrate([resnet[1][: 2 * n // 5], resnet[1][2 * n // 5 : 3 * n // 5]])
    return e


def moved(resnet, device, request):
    """On the device; fewer images where a GPU is imitated."""
    model, x, y, masks = resnet
    n = 40 if request.node.callspec.params["device"] == "simt" else len(x)
    return copy.deepcopy(model).to(device), *(t.to(device) for t in (x[:n], y[:n], masks))


@pytest.mark.parametrize("bn", ["inherit", "recalibrate"])
def test_qualities_equal_plain_loops(resnet, bn, device, request):
    model, x, y, masks = resnet = moved(resnet, device, request)
    e = make(resnet, bn=bn)
    logits = e.logits(masks, x)
    n = len(x) // 2
    batches = [(x[:n], y[:n]), (x[n : n + 1], y[n : n + 1]), (x[n + 1 :], y[n + 1 :])]
    accuracy = [sum(int(row.argmax()) == int(c) for row, c in zip(one, y, strict=True)) / len(y) for one in logits]
    found = e.accuracy(masks, iter(batches))
    assert found.dtype == torch.float64 and found.tolist() == accuracy
    loss = torch.stack([F.cross_entropy(one.double(), y) for one in logits]).cpu()
    assert torch.allclose(e.loss(masks, batches), loss, rtol=1e-12)
    with torch.no_grad():
        full = model(x).argmax(1)
    same = [float((one.argmax(1) == full).double().mean()) for one in logits]
    assert torch.allclose(e.agreement(masks, batches), torch.tensor(same, dtype=torch.float64), atol=1e-12)
    assert torch.equal(e.agreement(masks, [b[0] for b in batches]), e.agreement(masks, x))
    if bn == "inherit":
        assert e.agreement(e.space.ones(1), x).item() == 1


@pytest.mark.parametrize("bn", ["inherit", "recalibrate"])
def test_results_do_not_depend_on_the_cut(resnet, bn, device, request, monkeypatch, poisoned):
    _, x, y, masks = resnet = moved(resnet, device, request)
    n = len(x)
    e = make(resnet, bn=bn)
    logits, loss, accuracy = e.logits(masks, x), e.loss(masks, (x, y)), e.accuracy(masks, (x, y))
    before = torch.get_num_threads()
    torch.set_num_threads(2)  # the CPU's need grows with them
    with pytest.raises(ValueError, match="one individual needs") as refused:
        make(resnet, bn=bn, memory_limit=1).loss(masks, (x, y))
    need = int(str(refused.value).rsplit(" ", 1)[1].replace(",", ""))
    order = torch.randperm(len(masks), generator=torch.Generator().manual_seed(1))
    masks, inputs = masks.cpu(), masks  # on any device
    assert torch.equal(e.loss(inputs, (x, y)), loss)
    calls = []
    try:
        for threads, work, piece, limit in (
            (1, 1, 768, None),
            (2, 1e12, 48, None),
            (3, 1e12, 7, 3 * need),
            (2, 1, 64, need + 20_000),
        ):
            torch.set_num_threads(threads)
            monkeypatch.setitem(engine.WORK, device.type, work)
            monkeypatch.setattr(engine, "PIECE", piece)
            other = make(resnet, bn=bn, memory_limit=limit)
            assert torch.equal(
                other.loss(
                    masks[order],
                    [(x[: n // 5], y[: n // 5]), (x[n // 5 :], y[n // 5 :])],
                    progress=lambda *a: calls.append(a),
                ),
                loss[order],
            )
            assert torch.equal(other.accuracy(masks[order[:1]], (x, y)), accuracy[order[:1]])
            assert limit is None or 0 < other._engine.network.taken() <= limit
            assert calls[-1][0] == calls[-1][1] == 6 * (n + 3 * n // 5 * (bn == "recalibrate"))
            other.memory_limit = None
            assert torch.equal(other.logits(masks[order], x), logits[order])
            assert torch.equal(other.logits(masks[2], x[n // 4 : n // 4 + 1]), logits[2:3, n // 4 : n // 4 + 1])
    finally:
        torch.set_num_threads(before)
    assert len(calls) > 10


# --- features ------------------------------------------------------------------------------------------


def hooked(model, space, mask, x, bn_of):
    """[N, D] of one compact network: what follows each layer but the last, at its place in the full network, by hooks"""
    small = copy.deepcopy(model) if mask is None else bn_of(compact(model, mask, space))
    full = torch.ones(space.num_genes, dtype=torch.bool)
    names = [op.name for op in space.ops if op.kind in ("conv", "linear")][:-1]
    found, out = {}, []
    for name in names:
        after = name.replace("conv", "bn")
        small.get_submodule(after).register_forward_hook(lambda m, i, o, name=name: found.__setitem__(name, o))
    with torch.no_grad():
        small(x)
    for name in names:
        op = next(op for op in space.ops if op.name == name)
        own, every = space.kept(op.output, full if mask is None else mask), space.kept(op.output, full)
        y = found[name].double()
        if not name.endswith("conv2"):  # the activation follows; after a sum it would be another value
            y = y.relu()
        z = torch.zeros(len(x), len(every), *y.shape[2:], dtype=torch.float64)
        z[:, torch.searchsorted(every, own)] = y.cpu()
        out.append(F.adaptive_avg_pool2d(z, 4).flatten(1))
    return out


@pytest.mark.parametrize("bn", ["inherit", "recalibrate"])
def test_features(resnet, bn, device, request):
    model, x, y, masks = resnet = moved(resnet, device, request)
    x, masks = x[:30], masks[:3]
    e = make(resnet, bn=bn)
    n = len(resnet[1])
    batches = [resnet[1][: 2 * n // 5], resnet[1][2 * n // 5 : 3 * n // 5]]
    bn_of = (lambda small: small) if bn == "inherit" else (lambda small: recalibrated(small, batches))
    expected = [hooked(model, e.space, mask.cpu(), x, bn_of) for mask in masks]
    found = e.features(masks, x).cpu()
    for one, parts in zip(found, expected, strict=True):
        assert close(one, torch.cat(parts, 1), 1e-4)
    own = hooked(model, e.space, None, x, None)
    errors = [
        sum(float((a - b).square().sum() / b.square().sum()) for a, b in zip(parts, own, strict=True)) / len(own)
        for parts in expected
    ]
    close_to = torch.tensor(errors, dtype=torch.float64)
    assert torch.allclose(e.reconstruction(masks, (x, y[:30])), close_to, rtol=1e-3)
    assert bool((close_to > 0.1).all())
    if bn == "inherit":
        assert e.reconstruction(e.space.ones(1), x).item() == 0
    pair = e.features(masks, x, ["layer2.0.conv1", "conv1"]).cpu()
    names = [op.name for op in e.space.ops if op.kind == "conv"]
    for one, parts in zip(pair, expected, strict=True):
        assert close(one, torch.cat([parts[names.index("layer2.0.conv1")], parts[0]], 1), 1e-4)


@pytest.mark.parametrize("bn", ["inherit", "recalibrate"])
def test_structure_of_features(resnet, bn):
    model, x, _, masks = resnet
    e = make(resnet, bn=bn)
    pooled = lambda m, x: F.adaptive_avg_pool2d(m.layer3(m.layer2(m.layer1(F.relu(m.bn1(m.conv1(x)))))), 1).flatten(1)
    n = len(x)
    batches = [x[: 2 * n // 5], x[2 * n // 5 : 3 * n // 5]]
    with torch.no_grad():
        full = pooled(model, x).double()
        distance = torch.cdist(full, full)
        distance.fill_diagonal_(float("inf"))
        near = distance.argsort(1)[:, :10]
        sigma = float((full[:, None] - full[near]).square().mean(2).mean()) / 2
        expected = []
        for mask in masks:
            small = compact(model, mask, e.space)
            if bn == "recalibrate":
                small = recalibrated(small, batches)
            z = pooled(small, x).double()
            own = torch.zeros_like(full)
            op = [op for op in e.space.ops if op.kind == "linear"][-1]
            own[:, e.space.kept(op.inputs[0], mask)] = z
            p, q = (
                torch.log_softmax(torch.exp(-(f[:, None] - f[near]).square().mean(2) / (2 * sigma)), 1)
                for f in (own, full)
            )
            expected.append(float((p.exp() * (p - q)).sum(1).mean()))
    found = e.lsp(masks, x)
    assert torch.allclose(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-3, atol=1e-7)
    assert float(found.min()) > 1e-4 and e.lsp(masks[:1], x[:2], k=1).isfinite().all()
    if bn == "inherit":
        assert abs(e.lsp(e.space.ones(1), x).item()) < 1e-9


def test_features_do_not_depend_on_the_cut(resnet, monkeypatch, poisoned):
    _, x, _, masks = resnet
    e = make(resnet, bn="recalibrate")
    found = {name: getattr(e, name)(masks, x) for name in ("reconstruction", "lsp")}
    order = torch.randperm(len(masks), generator=torch.Generator().manual_seed(1))
    monkeypatch.setitem(engine.WORK, "cpu", 1)
    monkeypatch.setattr(engine, "PIECE", 7)
    other = make(resnet, bn="recalibrate", memory_limit=400_000_000)
    for name, values in found.items():
        assert torch.equal(getattr(other, name)(masks[order], [x[:40], x[40:]]), values[order])
        before = other.stats.computed
        assert torch.equal(getattr(other, name)(masks[:1], x), values[:1]) and other.stats.computed == before


@pytest.mark.parametrize("name, copies", [("reconstruction", 1), ("lsp", 2)])
def test_memory_of_features(resnet, name, copies):
    """The model's own features, and those of an individual where they are kept, count."""
    _, x, _, masks = resnet
    e = make(resnet, memory_limit=16_000_000)
    layers = [op.name for op in e.space.ops if op.kind == "conv"]
    found = getattr(e, name)(masks[:2], x, layers)
    (inner,) = e._inner.values()
    held = copies * len(x) * inner.program.shape[0] * 4
    assert held > 5_000_000 and 0 < inner.network.taken() <= e.memory_limit - held
    assert torch.equal(found, getattr(make(resnet), name)(masks[:2], x, layers))
    e = make(resnet, memory_limit=held)
    with pytest.raises(ValueError, match="one individual needs"):
        getattr(e, name)(masks[:2], x, layers)


def test_layers_that_are_not_there(resnet):
    e = make(resnet)
    with pytest.raises(ValueError, match=r"layers must be of conv1, .*got 'conv9'"):
        e.features(resnet[3], resnet[1], ["conv9"])
    for layers in ([], "conv1"):
        with pytest.raises(ValueError, match="layers must be names of one layer or more"):
            e.reconstruction(resnet[3], resnet[1], layers)
    with pytest.raises(ValueError, match="at least two images"):
        e.lsp(resnet[3], resnet[1][:1])


def test_memo(resnet):
    _, x, y, masks = resnet
    e = make(resnet)
    first = e.accuracy(masks[:5], (x, y))
    assert (e.stats.asked, e.stats.computed, e.stats.remembered, e.stats.duplicates) == (5, 5, 0, 0)
    both = e.accuracy(masks, [(x[:9], y[:9]), (x[9:], y[9:])])
    assert torch.equal(both[:5], first) and both[1] == both[6]
    assert (e.stats.asked, e.stats.computed, e.stats.remembered, e.stats.duplicates) == (12, 6, 5, 1)
    other = y.clone()
    other[0] = (y[0] + 1) % 10
    e.accuracy(masks[:2], (x, other))
    e.loss(masks[:2], (x, y))
    assert e.stats.computed == 10, "other data, another quality"
    other = x.clone()
    other[3, 0, 0, 0] += 1
    e.loss(masks[:2], (other, y))
    assert e.stats.computed == 12
    r = make(resnet, bn="recalibrate")
    once = r.accuracy(masks[:1], (x, y))
    r.calibrate(x[:50])
    assert r.stats.computed == 1
    assert torch.equal(r.accuracy(masks[:1], (x, y)), r.accuracy(masks[:1], (x, y))) and r.stats.computed == 2
    r.calibrate([x[:60], x[60:90]])
    assert torch.equal(r.accuracy(masks[:1], (x, y)), once) and r.stats.computed == 2
    without = make(resnet, memo=False)
    for _ in range(2):
        assert torch.equal(without.accuracy(masks, (x, y)), both)
    assert (without.stats.asked, without.stats.computed, without.stats.remembered) == (14, 12, 0)


def test_interrupted(resnet, monkeypatch):
    _, x, y, masks = resnet
    monkeypatch.setitem(engine.WORK, "cpu", 1)
    monkeypatch.setattr(engine, "PIECE", 48)
    g = torch.Generator().manual_seed(0)
    e = make(resnet)
    masks = e.space.repair(e.space.random(20, 0.5, g))

    def stop(done, total):
        if done > 17 * 150:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        e.loss(masks, (x, y), progress=stop)
    assert e.stats.computed == 16, "the first chunk was complete"
    assert torch.equal(e.loss(masks, (x, y)), make(resnet).loss(masks, (x, y)))
    assert e.stats.computed == 20


def test_weights_are_those_of_construction(resnet):
    model, x, _, masks = resnet
    model = copy.deepcopy(model)
    e = PopulationEvaluator(model, x)
    y = e.logits(masks, x[:5])
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1)
        model.bn1.running_mean.add_(1)
    assert torch.equal(e.logits(masks, x[:5]), y)


def test_one_trace_serves_all(resnet):
    """The space that `trace` gave; its order of filters follows the weights that were loaded since."""
    model, x, _, masks = resnet
    model = copy.deepcopy(model)
    space = trace(model, x)
    before = space.l1.clone()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.5)
    e, other = PopulationEvaluator(model, space), PopulationEvaluator(model, x)
    assert e.space is space and torch.equal(space.l1, other.space.l1) and not torch.equal(space.l1, before)
    assert e.weights == other.weights and torch.equal(e.logits(masks, x), other.logits(masks, x))
    assert e.identity() == other.identity()
    with pytest.raises(ValueError, match="the trace of another model: its conv1 is not this model's"):
        PopulationEvaluator(copy.deepcopy(model), space)
    model.bn1.bias.data[0] = torch.inf
    with pytest.raises(ValueError, match=r"bn1\.bias holds values that are not finite"):
        PopulationEvaluator(model, space)
    with pytest.raises(ValueError, match="evaluation mode, but it is in training mode"):
        PopulationEvaluator(model.train(), space)


def test_published_resnet20():
    path = file("weights/cifar10_resnet20.npz")
    file("images/cifar10.packed.npz")
    model = build_cnn("resnet20")
    load_weights(model, path)
    images = data.images.load("cifar10")
    x, y = images.normalised(images.images["test"][:300]), images.labels["test"][:300]
    e = PopulationEvaluator(model.eval(), x)
    with torch.no_grad():
        expected = model(x)
    assert close(e.logits(e.space.ones(1), x)[0], expected, 1e-4)
    assert e.accuracy(e.space.ones(1), (x, y)).item() == float((expected.argmax(1) == y).double().mean()) > 0.88
    assert e.agreement(e.space.ones(1), x).item() == 1


def test_explain(resnet):
    _, x, _, masks = resnet
    e = make(resnet)
    text = e.explain(masks)
    assert "6 distinct individuals" in text and "layer2.0.conv2" in text and "last call" not in text
    total = next(line for line in text.splitlines() if line.startswith("total")).replace(",", "").split()[1:]
    distinct = torch.unique(masks, dim=0)
    assert int(total[0]) == 6 * int(e.space.macs(e.space.ones(1))) and int(total[1]) == int(
        e.space.macs(distinct).sum()
    )
    assert int(total[2]) < int(total[1])
    one = e.explain(masks[:1]).splitlines()
    total = next(line for line in one if line.startswith("total")).split()[1:]
    assert total[1] == total[2] == f"{int(e.space.macs(masks[:1])):,}"
    e.logits(masks, x)
    assert "last call: 6 individuals, 150 images" in e.explain(masks)


# --- bad input ---------------------------------------------------------------------------------------


def test_bad_masks_and_data(resnet):
    _, x, y, masks = resnet
    e = make(resnet)
    empty = masks.clone()
    empty[1, :16] = False
    for wrong, error, says in (
        (masks.float(), TypeError, "torch.bool"),
        (masks[:, :-1], ValueError, r"\[P, 400\]"),
        (masks[:0], ValueError, "P = 0"),
        (empty, ValueError, r"masks\[1\] leaves conv1 without any channel: use repair"),
    ):
        for call in (lambda m: e.logits(m, x), lambda m: e.accuracy(m, (x, y)), lambda m: e.agreement(m, x), e.explain):
            with pytest.raises(error, match=says):
                call(wrong)
    for wrong, error, says in (
        (x[:0], ValueError, "at least one image, got N = 0"),
        (x[:, :2], ValueError, r"\[N, 3, 16, 16\], got \[150, 2, 16, 16\]"),
        (x[..., :15], ValueError, r"\[N, 3, 16, 16\]"),
        (x[0], ValueError, r"\[N, 3, 16, 16\]"),
        (x.double(), TypeError, "torch.float32 as the model is"),
        (x.numpy(), TypeError, "must be a tensor, got ndarray"),
        (x.to("meta"), ValueError, "x .*must be on cpu as the model is, got meta"),
    ):
        with pytest.raises(error, match=says):
            e.logits(masks, wrong)
        with pytest.raises(error, match=says):
            e.agreement(masks, [wrong])
    for wrong, error, says in (
        ([], ValueError, "at least one batch"),
        (3, TypeError, "iterable, got int"),
        ([(x, y[:5])], ValueError, r"y of batches\[0\] must have shape \[150\]"),
        ([(x, y), (x, y + 5)], ValueError, r"y of batches\[1\] must be in \[0, 9\], got 14"),
        ([(x, y - 1)], ValueError, "got -1"),
        ([(x, y.float())], TypeError, r"y of batches\[0\] must be a torch.int64 tensor, got torch.float32"),
        ([x], TypeError, r"a pair \(x, y\)"),
    ):
        with pytest.raises(error, match=says):
            e.accuracy(masks, wrong)


def test_bad_construction(resnet):
    model, x = resnet[:2]
    for options, error, says in (
        (dict(bn="fresh"), ValueError, 'bn must be "inherit" or "recalibrate"'),
        (dict(memory_limit=0), ValueError, "at least 1"),
        (dict(memory_limit=1.5), TypeError, "memory_limit must be an int"),
    ):
        with pytest.raises(error, match=says):
            PopulationEvaluator(model, x, **options)
    with pytest.raises(ValueError, match="evaluation mode, but bn1 is in training mode"):
        other = copy.deepcopy(model)
        other.bn1.train()
        PopulationEvaluator(other, x)
    with pytest.raises(ValueError, match=r"conv1\.weight holds values that are not finite"):
        other = copy.deepcopy(model)
        other.conv1.weight.data[0, 0, 0, 0] = torch.nan
        PopulationEvaluator(other, x)
    with pytest.raises(ValueError, match="bn1 has running statistics that are not finite"):
        other = copy.deepcopy(model)
        other.bn1.running_var[0] = torch.inf
        PopulationEvaluator(other, x)
    with pytest.raises(ValueError, match="does not fit"):
        PopulationEvaluator(model, x[:, :2])
    with pytest.raises(TypeError, match=r"float32 or float64 on cpu, got torch\.bfloat16"):
        PopulationEvaluator(copy.deepcopy(model).bfloat16(), x.bfloat16())
    with pytest.raises(NotImplementedError, match="runs on CPUs and CUDA devices, but example_input is on meta"):
        PopulationEvaluator(model, x.to("meta"))
    with pytest.raises(UnsupportedModelError, match="cannot be traced"):
        PopulationEvaluator(Net(lambda self, x: self.a(x) if x.sum() > 0 else x, a=conv(3, 6)).eval(), IMAGES.float())


def test_memory_limit(resnet):
    _, x, y, masks = resnet
    with pytest.raises(ValueError, match=r"memory_limit = 1,000 bytes is too small: one individual needs [\d,]+$"):
        make(resnet, memory_limit=1000).accuracy(masks, (x, y))
    with pytest.raises(ValueError, match="of which the result takes 42,000"):
        make(resnet, memory_limit=1000).logits(masks, x)


def test_recalibration_needs_batches(resnet):
    model, x, y, masks = resnet
    e = PopulationEvaluator(model, x, bn="recalibrate")
    with pytest.raises(ValueError, match=r"needs calibrate\(batches\) first"):
        e.accuracy(masks, (x, y))
    with pytest.raises(ValueError, match="at least one batch"):
        e.calibrate([])
    with pytest.raises(ValueError, match="N = 0"):
        e.calibrate([x[:0]])
    with pytest.raises(ValueError, match='bn="inherit"'):
        make(resnet).calibrate([x])
    vectors = lively(nn.Sequential(nn.Linear(7, 9), nn.BatchNorm1d(9), nn.Linear(9, 3)))
    with pytest.raises(ValueError, match="more than one value per channel at 1, got a batch of 1 image"):
        PopulationEvaluator(vectors, torch.ones(1, 7).double(), bn="recalibrate").calibrate([torch.ones(1, 7).double()])


def within_softmax(self, x):
    return self.fc(F.softmax(self.a(x), 1).mean((2, 3)))


def bilinear(self, x):
    return tail(self, F.interpolate(self.a(x), scale_factor=2, mode="bilinear"))


REFUSED = {
    "elu": (
        lambda self, x: tail(self, F.elu(self.a(x))),
        r"elu with {'alpha': 1.0} has no kernel in the population evaluator, elu .*test_evaluator.py:\d+",
    ),
    "softmax": (within_softmax, r"softmax inside the network .*test_evaluator.py:\d+: return self.fc\(F.softmax"),
    "bilinear": (bilinear, r"interpolate with .*'bilinear'.*test_evaluator.py:\d+"),
    "clamp": (lambda self, x: tail(self, self.a(x).clamp(-1, 1)), r"clamp with {'min': -1, 'max': 1}"),
    "divisor": (lambda self, x: tail(self, F.avg_pool2d(self.a(x), 2, divisor_override=3)), "avg_pool2d with"),
    "reflect": (lambda self, x: tail(self, self.r(self.a(x))), "padding_mode='reflect'"),
    "even": (lambda self, x: tail(self, self.e(self.a(x))), "padding='same' with a kernel of"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    forward, says = REFUSED[name]
    model = lively(
        Net(
            forward,
            a=conv(3, 6),
            r=nn.Conv2d(6, 6, 3, padding=1, padding_mode="reflect"),
            e=nn.Conv2d(6, 6, 2, padding="same"),
            fc=nn.Linear(6, 5),
        )
    )
    with pytest.raises(UnsupportedModelError, match=says):
        PopulationEvaluator(model, IMAGES)
