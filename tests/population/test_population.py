"""Genes of traced networks, their costs, and compact networks, against the masked reference."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx, nn
from torch.utils.flop_counter import FlopCounterMode

from fastkd.evolve import Limits
from fastkd.models import cnn
from fastkd.population import KEPT, ZERO, UnsupportedModelError, compact, export_onnx, load, save, trace
from fastkd.population.space import COSTS
from fastkd.reference import masked_forward


def lively(model, seed=0, dtype=torch.float64):
    """Weights, biases and statistics at random, such that signals neither vanish nor explode."""
    g = torch.Generator().manual_seed(seed)
    for m in model.modules():
        if isinstance(m, nn.Conv2d | nn.Linear):
            fan_in = m.weight[0].numel()
            m.weight.data = torch.randn(m.weight.shape, generator=g) * (2 / fan_in) ** 0.5
            if m.bias is not None:
                m.bias.data = 0.1 * torch.randn(m.bias.shape, generator=g)
        elif isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d):
            m.running_mean = 0.3 * torch.randn(m.num_features, generator=g)
            m.running_var = 0.5 + torch.rand(m.num_features, generator=g)
            m.weight.data = 0.5 + torch.rand(m.num_features, generator=g)
            m.bias.data = 0.3 * torch.randn(m.num_features, generator=g)
    return model.eval().to(dtype)


# Of the networks for ImageNet the smallest images that their strides permit, and 10 classes.
SHAPES = {
    "lenet": (1, 28, 28),
    "alexnet": (3, 63, 63),
    "vgg16": (3, 32, 32),
    "vgg16_cifar": (3, 32, 32),
    "resnet20": (3, 32, 32),
    "resnet56": (3, 32, 32),
    "resnet50": (3, 32, 32),
    "mobilenet_v1": (3, 32, 32),
}
_made = {}


def network(name):
    """model (float64), images [2, ...], genes; one at a time, since some are large"""
    if name not in _made:
        _made.clear()
        model = cnn.build_cnn(name, num_classes=10)
        if name in ("vgg16", "alexnet"):  # nearly all their parameters are in two linear layers
            i, j, k = [i for i, m in enumerate(model.classifier) if isinstance(m, nn.Linear)]
            model.classifier[i] = nn.Linear(model.classifier[i].in_features, 64)
            model.classifier[j], model.classifier[k] = nn.Linear(64, 64), nn.Linear(64, 10)
        x = torch.randn(2, *SHAPES[name], generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        model = lively(model)
        _made[name] = model, x, trace(model, x)
    return _made[name]


def some_masks(space, densities=(0.1, 0.3, 0.5, 0.8, 1.0)):
    g = torch.Generator().manual_seed(2)
    return space.repair(space.random(len(densities), torch.tensor(densities), g))


def count(model, x):
    """parameters and MACs of one image, by torch's own counter"""
    with FlopCounterMode(display=False) as flops, torch.no_grad():
        model(x[:1])
    return sum(p.numel() for p in model.parameters()), flops.get_total_flops() // 2


def check(model, x, space, masks, same_class=True):
    """Reference = compact in float64 and float32, and the costs."""
    macs, parameters = space.macs(masks), space.parameters(masks)
    for p, mask in enumerate(masks):
        small = compact(model, mask, space)
        assert isinstance(small, type(model)) == same_class
        with torch.no_grad():
            expected = masked_forward(space, mask, x)
            assert expected.abs().max() > 1e-3, "a signal to compare"
            assert torch.allclose(small(x), expected, rtol=1e-10, atol=1e-10 * float(expected.abs().max()))
            single = small.float()(x.float()).double()
        assert torch.allclose(single, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
        assert count(small, x.float()) == (int(parameters[p]), int(macs[p]))


@pytest.mark.parametrize("name", SHAPES)
def test_masked_is_compact(name):
    model, x, space = network(name)
    check(model, x, space, some_masks(space))


@pytest.mark.parametrize("name", SHAPES)
def test_all_ones_is_the_model(name):
    model, x, space = network(name)
    ones = space.ones(1)
    with torch.no_grad():
        expected = model(x)
        assert torch.equal(masked_forward(space, ones[0], x), expected)
        assert torch.equal(compact(model, ones[0], space)(x), expected)
    assert count(model, x) == (int(space.parameters(ones)), int(space.macs(ones)))


@pytest.mark.parametrize("name", SHAPES)
def test_operations_can_be_run_in_order_on_compact_values(name):
    """What an evaluator does: only ops, values, kept; every value has the channels that `kept` states."""
    model, x, space = network(name)
    mask = some_masks(space, (0.4,))[0]
    small = compact(model, mask, space)
    values = {0: x}
    with torch.no_grad():
        for op in space.ops:
            assert op.output not in values and all(i in values for i in op.inputs)
            inputs = [values[i] for i in op.inputs]
            kept = space.kept(op.output, mask)
            if op.kind == "pad":
                y = inputs[0]
            elif op.kind == "add":
                y = sum(
                    torch.zeros(len(a), len(kept), *a.shape[2:], dtype=a.dtype).index_copy(
                        1, torch.searchsorted(kept, space.kept(i, mask)), a
                    )
                    for i, a in zip(op.inputs, inputs, strict=True)
                )
            else:
                y = small.get_submodule(op.name)(*inputs) if op.module is not None else op.run(*inputs)
            values[op.output] = y
            if op.kind != "pad":
                assert y.shape[1:] == (len(kept), *space.values[op.output].shape[1:])
        expected = masked_forward(space, mask, x)
    assert torch.allclose(values[space.output], expected, rtol=1e-10, atol=1e-10)
    assert torch.equal(
        space.channels(mask)[0], torch.tensor([len(space.kept(i, mask)) for i in range(len(space.values))])
    )


def test_groups_of_resnet20():
    space = network("resnet20")[2]
    groups = {g.name: g for g in space.groups}
    outer = [f"layer{s}.{b}.conv2" for s in (1, 2, 3) for b in range(3)]
    assert groups["conv1"].size == 16 and groups["conv1"].modules == ("conv1", *outer)
    assert groups["layer2.0.conv2"].size == 16 and groups["layer2.0.conv2"].modules == tuple(outer[3:])
    assert groups["layer3.0.conv2"].size == 32 and groups["layer3.0.conv2"].modules == tuple(outer[6:])
    inner = {f"layer{s}.{b}.conv1": 8 * 2**s for s in (1, 2, 3) for b in range(3)}
    assert {n: g.size for n, g in groups.items() if n in inner} == inner
    assert len(groups) == 12 and space.num_genes == 16 + 16 + 32 + 3 * (16 + 32 + 64)
    start = 0
    for group in space.groups:
        assert group.start == start
        start += group.size
    trunk = next(v for v, op in zip(space.values[1:], space.ops, strict=True) if op.name == "layer2.0.conv2")
    assert torch.equal(trunk.genes[8:24], torch.arange(16)), "the shortcut puts stage 1 in the middle"
    pad = next(space.values[op.output] for op in space.ops if op.kind == "pad")
    assert pad.genes.tolist() == [ZERO] * 8 + list(range(16)) + [ZERO] * 8
    assert (space.values[0].genes == KEPT).all() and (space.values[space.output].genes == KEPT).all()
    assert "conv1 " in str(space) and "and 9 more" in str(space) and "400 of 400 genes" in str(space)


def test_groups_of_mobilenet_belong_to_the_pointwise_convolutions():
    space = network("mobilenet_v1")[2]
    assert [g.modules for g in space.groups] == [("conv1.0",), *((f"features.{i}.3",) for i in range(13))]
    assert [g.size for g in space.groups] == [32, 64, 128, 128, 256, 256, *[512] * 6, 1024, 1024]


def test_l1_is_the_sum_over_all_producers():
    model, _, space = network("resnet20")
    norms = model.conv1.weight.abs().sum((1, 2, 3))
    for block in model.layer1:
        norms = norms + block.conv2.weight.abs().sum((1, 2, 3))
    for block in model.layer2:
        norms = norms + block.conv2.weight.abs().sum((1, 2, 3))[8:24]
    for block in model.layer3:
        norms = norms + block.conv2.weight.abs().sum((1, 2, 3))[24:40]
    assert torch.allclose(space.l1[:16], norms.detach())


# --- small networks, one structure each ------------------------------------------------------------------


class Net(nn.Module):
    """Modules by name, and a forward."""

    def __init__(self, forward, **modules):
        super().__init__()
        self.f = forward
        for name, m in modules.items():
            setattr(self, name, m)

    def forward(self, x):
        return self.f(self, x)


def conv(a, b, k=3, **more):
    return nn.Conv2d(a, b, k, padding=k // 2, **more)


def tail(self, x):
    return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


def grouped(self, x):
    return tail(self, F.relu(self.b(F.relu(self.a(x)))))


def multiplied_depthwise(self, x):
    return tail(self, torch.sigmoid(self.b(self.a(x))))


def squeeze_excite(self, x):
    x = F.silu(self.a(x))
    y = x.mean((2, 3), keepdim=True)
    y = F.hardsigmoid(self.up(F.relu(self.down(y))))
    return tail(self, self.b(x * y))


def squeeze_excite_linear(self, x):
    x = self.a(x)
    n, c, _, _ = x.size()
    y = F.avg_pool2d(x, x.shape[2]).view(n, c)
    y = torch.sigmoid(self.up(F.relu(self.down(y)))).view(n, c, 1, 1)
    return tail(self, self.b(x * y.expand_as(x)))


def dense(self, x):
    x = self.a(x)
    x = torch.cat([x, self.b(F.relu(self.bn_a(x)))], 1)
    x = torch.cat((x, self.c(F.relu(self.bn_b(x)))), dim=1)
    return tail(self, F.max_pool2d(x, 2))


def flattened(self, x):
    x = F.max_pool2d(F.leaky_relu(self.a(x), 0.2), kernel_size=2)
    return self.fc(self.fc1(x.view(x.size(0), -1)))


def stated_width(self, x):
    return self.fc(self.fc1(self.a(x).view(-1, 6 * 8 * 8)))


def option_a(self, x):
    x = F.relu(self.a(x))
    shortcut = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2), "constant", 0)
    return tail(self, torch.add(self.b(x), shortcut).relu())


def zeros_are_read(self, x):
    x = F.relu(self.a(x))
    x = torch.cat((F.pad(x, (0, 0, 0, 0, 2, 1)), self.b(x)), 1)
    return tail(self, self.c(F.gelu(x)))


def inplace(self, x):
    x = self.a(x)
    y = self.relu(x)  # x, too, is what the activation wrote
    y = self.b(y)
    y += x
    return tail(self, F.relu_(y))


def attributes_decide(self, x):
    y = self.b(x := self.a(x))
    if self.a.out_channels == self.b.out_channels:
        y = y * 2
    return tail(self, y)


def scalars(self, x):
    x = self.a(x) * 2 + 0.5
    x = -(x / 3).clamp(min=-1, max=1)
    return F.log_softmax(tail(self, self.prelu(x)), 1)


def channel_slice(self, x):
    return tail(self, self.a(x)[:, :3])


def slices(self, x):
    x = self.a(x)
    return tail(self, torch.cat((x[:, 1::2, 2:, :-2], F.silu(self.b(x[:, :4]))[:, -3:, 1:-1, 1:-1]), 1))


def shuffle(self, x):
    x = self.a(x)
    return self.fc(x.view(-1, 2, 3, 8, 8).transpose(1, 2).reshape(-1, 6, 8, 8).flatten(1))


def shuffles(self, x):
    x = self.b(self.shuffle(torch.channel_shuffle(self.a(x), 2))).flatten(1)
    return self.fc(x.reshape(x.shape[0], 2, 2, 2).permute(0, 3, 1, 2).flatten(1))


def halves(self, x):  # a unit of ShuffleNetV2
    n, _, h, w = x.size()
    kept, x = F.relu(self.a(x)).chunk(2, dim=1)
    x = torch.cat((kept, F.relu(self.c(self.bn(self.b(x))))), dim=1)
    return tail(self, F.relu(self.d(x.view(n, 2, 4, h, w).transpose(1, 2).contiguous().view(n, -1, h, w))))


def pieces(self, x):  # as in Res2Net and CSPNet
    x = self.a(x)
    first, second, third = torch.split(x, [2, 2, 4], 1)
    second = self.b(first + second)
    return tail(self, torch.cat([second, *third.split([3, 1], 1), *list(x.chunk(2, 1))[1:]], 1))


def unused(self, x):
    return tail(self, nn.functional.dropout(self.a(x), 0.5, self.training))


SMALL = {
    "grouped": (grouped, dict(a=conv(3, 12), b=conv(12, 8, groups=4), fc=nn.Linear(8, 5)), [3, 2], True),
    "grouped_input": (grouped, dict(a=conv(3, 6, groups=3), b=conv(6, 8), fc=nn.Linear(8, 5)), [8], True),
    "depthwise_multiplier": (
        multiplied_depthwise,
        dict(a=conv(3, 6), b=conv(6, 12, groups=6), fc=nn.Linear(12, 5)),
        [6],
        True,
    ),
    "squeeze_excite": (
        squeeze_excite,
        dict(a=conv(3, 8), down=conv(8, 4, 1), up=conv(4, 8, 1), b=conv(8, 7), fc=nn.Linear(7, 5)),
        [8, 4, 7],
        True,
    ),
    "squeeze_excite_linear": (
        squeeze_excite_linear,
        dict(a=conv(3, 8), down=nn.Linear(8, 4), up=nn.Linear(4, 8), b=conv(8, 7), fc=nn.Linear(7, 5)),
        [8, 4, 7],
        True,
    ),
    "dense": (
        dense,
        dict(
            a=conv(3, 6),
            bn_a=nn.BatchNorm2d(6),
            b=conv(6, 4),
            bn_b=nn.BatchNorm2d(10),
            c=conv(10, 3),
            fc=nn.Linear(13, 5),
        ),
        [6, 4, 3],
        True,
    ),
    "flattened": (flattened, dict(a=conv(3, 6), fc1=nn.Linear(6 * 16, 9), fc=nn.Linear(9, 5)), [6, 9], True),
    "stated_width": (stated_width, dict(a=conv(3, 6), fc1=nn.Linear(6 * 64, 9), fc=nn.Linear(9, 5)), [6, 9], False),
    "option_a": (option_a, dict(a=conv(3, 6), b=conv(6, 10, stride=2), fc=nn.Linear(10, 5)), [6, 4], False),
    "zeros_are_read": (
        zeros_are_read,
        dict(a=conv(3, 6), b=conv(6, 4), c=conv(13, 8), fc=nn.Linear(8, 5)),
        [6, 4, 8],
        False,
    ),
    "inplace": (inplace, dict(a=conv(3, 6), relu=nn.ReLU(True), b=conv(6, 6), fc=nn.Linear(6, 5)), [6], True),
    "channel_slice": (channel_slice, dict(a=conv(3, 6), fc=nn.Linear(3, 5)), [3, 3], False),
    "slices": (slices, dict(a=conv(3, 6), b=conv(4, 5), fc=nn.Linear(6, 5)), [2, 2, 1, 1, 2, 3], False),
    "shuffle": (shuffle, dict(a=conv(3, 6), fc=nn.Linear(6 * 64, 5)), [6], False),
    "shuffles": (
        shuffles,
        dict(a=conv(3, 6), shuffle=nn.ChannelShuffle(3), b=conv(6, 8, stride=8), fc=nn.Linear(8, 5)),
        [6, 8],
        False,
    ),
    "halves": (
        halves,
        dict(
            a=conv(3, 8),
            b=conv(4, 4, groups=4),
            bn=nn.BatchNorm2d(4),
            c=conv(4, 4, 1),
            d=conv(8, 6),
            fc=nn.Linear(6, 5),
        ),
        [4, 4, 4, 6],
        False,
    ),
    "pieces": (pieces, dict(a=conv(3, 8), b=conv(2, 3), fc=nn.Linear(11, 5)), [2, 3, 1, 3], False),
    "scalars": (scalars, dict(a=conv(3, 6), prelu=nn.PReLU(6), fc=nn.Linear(6, 5)), [6], True),
    "unused": (unused, dict(a=conv(3, 6), aside=nn.Linear(4, 4), fc=nn.Linear(6, 5)), [6], True),
}
IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def small_net(name):
    forward, modules, sizes, same = SMALL[name]
    return lively(Net(forward, **copy.deepcopy(modules))), sizes, same


@pytest.mark.parametrize("name", SMALL)
def test_small_networks(name):
    model, sizes, same = small_net(name)
    space = trace(model, IMAGES)
    assert [g.size for g in space.groups] == sizes
    if space.num_genes:
        check(model, IMAGES, space, some_masks(space, (0.1, 0.3, 0.5, 0.5, 0.8)), same)
    check(model, IMAGES, space, space.ones(1), same)


def test_grouped_convolutions_keep_equal_counts():
    model, _, _ = small_net("grouped")
    space = trace(model, IMAGES)
    genes = space.values[1].genes
    assert genes.tolist() == [0, 1, 2] * 4
    small = compact(model, torch.tensor([True, False, True, False, True]), IMAGES)
    assert (small.a.out_channels, small.b.in_channels, small.b.out_channels, small.b.groups) == (8, 8, 4, 4)
    assert torch.equal(small.b.weight, model.b.weight[[1, 3, 5, 7]][:, [0, 2]])


def test_control_flow_over_attributes_stays_the_full_models():
    model = lively(Net(attributes_decide, a=conv(3, 6), b=conv(6, 6), fc=nn.Linear(6, 5)))
    space = trace(model, IMAGES)
    check(model, IMAGES, space, torch.tensor([[True] * 5 + [False] + [True] * 6]), False)


def test_shortcut_given_by_a_lambda():
    class Lambda(nn.Module):
        def __init__(self, f):
            super().__init__()
            self.f = f

        def forward(self, x):
            return self.f(x)

    model = cnn.CifarResNet(1)
    for layer, pad in ((model.layer2, 8), (model.layer3, 16)):
        layer[0].shortcut = Lambda(lambda x, pad=pad: F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, pad, pad), "constant", 0))
    model, x = lively(model), torch.randn(2, 3, 16, 16, dtype=torch.float64)
    space = trace(model, x)
    check(model, x, space, some_masks(space, (0.2, 0.6)))


@fx.wrap
def stochastic_depth(x, p, training):
    return x * (torch.rand(len(x), 1, 1, 1) > p) if training else x


@fx.wrap
def half(x):
    return x / 2


def test_functions_that_give_back_what_they_are_given():
    def forward(self, x):
        x = self.a(x)
        return tail(self, F.relu(x + stochastic_depth(self.b(x), 0.2, training=self.training)))

    model = lively(Net(forward, a=conv(3, 6), b=conv(6, 6), fc=nn.Linear(6, 5)))
    space = trace(model, IMAGES)
    check(model, IMAGES, space, some_masks(space, (0.5,)))
    with pytest.raises(UnsupportedModelError, match=r"test_population.half is not supported.*test_population.py:\d+: "):
        trace(lively(Net(lambda self, x: tail(self, half(self.a(x))), a=conv(3, 6), fc=nn.Linear(6, 5))), IMAGES)


def test_genes_that_only_some_values_hold_are_groups_of_their_own():
    space = trace(small_net("halves")[0], IMAGES)
    assert [(g.name, g.modules, g.size) for g in space.groups[:3]] == [
        ("a", ("a",), 4),
        ("a (2)", ("a",), 4),
        ("c", ("c",), 4),
    ]
    masks = space.repair(torch.zeros(1, space.num_genes, dtype=torch.bool))
    assert masks.sum() == 4, "each half keeps one"


def test_torch_modules_as_a_sequential():
    model = lively(
        nn.Sequential(
            conv(3, 6),
            nn.BatchNorm2d(6),
            nn.Hardswish(),
            nn.AvgPool2d(2),
            nn.Dropout2d(),
            conv(6, 4, bias=False),
            nn.ELU(),
            nn.Upsample(scale_factor=2),
            nn.Flatten(),
            nn.Linear(4 * 64, 7),
            nn.BatchNorm1d(7),
            nn.GELU(),
            nn.Linear(7, 5),
            nn.LogSoftmax(1),
        )
    )
    space = trace(model, IMAGES)
    assert [g.modules for g in space.groups] == [("0",), ("5",), ("9",)]
    check(model, IMAGES, space, some_masks(space))


# --- populations -----------------------------------------------------------------------------------------


def test_repair_brings_the_largest_filters_back():
    model, _, _ = small_net("flattened")
    space = trace(model, IMAGES)
    none = torch.zeros(3, space.num_genes, dtype=torch.bool)
    none[1, 2] = none[2] = True
    fixed = space.repair(none, 2)
    a, fc1 = space.l1[:6].argsort(descending=True), 6 + space.l1[6:].argsort(descending=True)
    assert set(fixed[0].nonzero()[:, 0].tolist()) == {*a[:2].tolist(), *fc1[:2].tolist()}
    assert set(fixed[1, :6].nonzero()[:, 0].tolist()) == {2, next(i for i in a.tolist() if i != 2)}
    assert fixed[2].all() and not none[0].any(), "a copy"
    assert torch.equal(space.repair(fixed, 2), fixed) and torch.equal(space.repair(none[0], 2), fixed[0])
    assert space.repair(none, 100).all(), "k_min beyond the width keeps what there is"


@pytest.mark.parametrize("k_min", [1, 8])
def test_repair_leaves_every_value_with_k_min(k_min):
    for name in ("resnet20", "mobilenet_v1"):
        space = network(name)[2]
        masks = space.repair(space.random(20, 0.02, torch.Generator().manual_seed(0)), k_min)
        full = space.channels(space.ones(1))
        assert bool((space.channels(masks) >= full.clamp(max=k_min)).all())


def test_random_populations_are_reproducible():
    space = network("resnet20")[2]
    draw = lambda: space.random(50, torch.linspace(0, 1, 50), torch.Generator().manual_seed(5))
    assert torch.equal(draw(), draw()) and not draw()[0].any() and draw()[-1].all()
    assert abs(float(space.random(50, 0.3).float().mean()) - 0.3) < 0.02


def test_wrong_masks():
    space = network("lenet")[2]
    mask = space.ones(1)
    for wrong, error, says in (
        (mask.float(), TypeError, "torch.bool"),
        (mask[:, :-1], ValueError, r"\[P, 570\]"),
        (mask[:0], ValueError, "P = 0"),
        (mask[None], ValueError, r"\[1, 1, 570\]"),
        ([True], TypeError, "list"),
    ):
        for f in (space.macs, space.parameters, space.channels, space.repair, space.check):
            with pytest.raises(error, match=says):
                f(wrong)
    mask[0, 20:70] = False
    with pytest.raises(ValueError, match=r"masks\[0\] leaves conv2 without any channel: use repair"):
        space.macs(mask)
    with pytest.raises(ValueError, match="conv2"):
        compact(network("lenet")[0], mask[0], space)
    with pytest.raises(ValueError, match=r"mask must be a tensor of shape \[570\]"):
        compact(network("lenet")[0], mask, space)
    with pytest.raises(ValueError, match="density must be in"):
        space.random(2, 1.5)
    with pytest.raises(ValueError, match="population must be at least 1"):
        space.random(0, 0.5)
    with pytest.raises(ValueError, match="k_min"):
        space.repair(mask, 0)
    with pytest.raises(ValueError, match="another model"):
        compact(lively(cnn.LeNet()), space.ones(1)[0], space)


# --- refusals ---------------------------------------------------------------------------------------------


def by_data(self, x):
    if x.sum() > 0:  # depends on data
        x = x + 1
    return tail(self, self.a(x))


def one_channel(self, x):
    return tail(self, self.a(x)[:, 3])


def channel_mean(self, x):
    x = self.a(x)
    return tail(self, x * x.mean(1, keepdim=True))


def own_weight(self, x):
    return tail(self, F.conv2d(x, self.a.weight))


def twice(self, x):
    return tail(self, self.b(self.b(self.a(x))))


def normalise_zeros(self, x):
    return tail(self, self.bn(F.pad(self.a(x), (0, 0, 0, 0, 1, 1))))


def shift_zeros(self, x):
    return tail(self, F.pad(self.a(x), (0, 0, 0, 0, 1, 1)) + 1)


def attention(self, x):
    x = self.a(x).view(-1, 2, 3, 8, 8).transpose(1, 2)
    return tail(self, x.softmax(1).reshape(-1, 6, 8, 8))


def mixed_up(self, x):
    return tail(self, self.a(x).view(-1, 2, 3, 8, 8).transpose(2, 3).reshape(-1, 6, 8, 8))


def fewer_pieces(self, x):
    return tail(self, self.a(x).chunk(4, 1)[0])


def batch_split(self, x):
    return tail(self, self.a(x).split(1)[0])


def layer_norm(self, x):
    return tail(self, self.norm(self.a(x)))


def spatial_gate(self, x):
    x = self.a(x)
    return tail(self, x * torch.sigmoid(self.gate(x)))


def active_dropout(self, x):
    return tail(self, F.dropout(self.a(x)))


def two_results(self, x):
    return self.fc(x.mean((2, 3))), x


def noise(self, x):
    return tail(self, self.a(x) + torch.ones(1, 6, 8, 8, dtype=torch.float64))


REFUSED = {
    "by_data": (by_data, {}, r"cannot be traced: .*test_population.py:\d+: if x.sum\(\) > 0"),
    "one_channel": (
        one_channel,
        dict(fc=nn.Linear(3, 5)),
        r"index of other dimensions .*test_population.py:\d+: return tail\(self, self.a\(x\)\[:, 3\]",
    ),
    "channel_mean": (channel_mean, {}, "mean over the dimensions 1, not H and W"),
    "own_weight": (own_weight, {}, "the tensor a.weight used outside a module"),
    "twice": (twice, dict(b=conv(6, 6)), "b called twice"),
    "normalise_zeros": (
        normalise_zeros,
        dict(bn=nn.BatchNorm2d(8), fc=nn.Linear(8, 5)),
        "BatchNorm2d bn of channels that are constantly zero",
    ),
    "shift_zeros": (shift_zeros, dict(fc=nn.Linear(8, 5)), "add of channels that are constantly zero"),
    "attention": (attention, {}, "softmax of channels along several dimensions"),
    "mixed_up": (mixed_up, {}, "transpose of channels along several dimensions"),
    "fewer_pieces": (fewer_pieces, {}, "chunk of 6 channels into 4"),
    "batch_split": (batch_split, {}, "split along dimension 0"),
    "layer_norm": (layer_norm, dict(norm=nn.LayerNorm([6, 8, 8])), "LayerNorm norm is not supported"),
    "group_norm": (layer_norm, dict(norm=nn.GroupNorm(2, 6)), "GroupNorm norm is not supported"),
    "batch_statistics": (
        layer_norm,
        dict(norm=nn.BatchNorm2d(6, track_running_stats=False)),
        "without running statistics",
    ),
    "spatial_gate": (spatial_gate, dict(gate=conv(6, 1)), "mul of values"),
    "active_dropout": (active_dropout, {}, "training=self.training"),
    "two_results": (two_results, dict(fc=nn.Linear(3, 5)), "must return one tensor"),
    "transposed": (layer_norm, dict(norm=nn.ConvTranspose2d(6, 6, 3)), "ConvTranspose2d norm"),
    "weight_norm": (
        layer_norm,
        dict(norm=nn.utils.parametrizations.weight_norm(conv(6, 6))),
        "ParametrizedConv2d norm is not supported",
    ),
    "constant": (noise, {}, "tensor.* used outside a module"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name_and_line(name):
    forward, modules, says = REFUSED[name]
    model = Net(forward, **{"a": conv(3, 6), "fc": nn.Linear(6, 5), **modules}).double().eval()
    with pytest.raises(UnsupportedModelError, match=says):
        trace(model, IMAGES)


def test_refusals_name_the_module_and_its_line():
    class Block(nn.Module):
        def forward(self, x):
            return torch.cumsum(x, 1)

    with pytest.raises(
        UnsupportedModelError,
        match=r"cumsum is not supported, in 1 \(.*test_population.py:\d+: return torch.cumsum\(x, 1\)\)",
    ):
        trace(nn.Sequential(conv(3, 6), Block()).double().eval(), IMAGES)


def test_refusals_in_torchs_own_containers_name_the_module_alone():
    with pytest.raises(UnsupportedModelError, match=r"^LayerNorm 1 is not supported$"):
        trace(nn.Sequential(conv(3, 6), nn.LayerNorm([6, 8, 8])).double().eval(), IMAGES)


def test_a_trace_that_is_not_the_model_is_refused():
    def aliased(self, x):
        x = self.a(x)
        y = x[:, :, 1:-1, 1:-1]
        y += 1  # x, too, changes
        return tail(self, self.b(x))

    with pytest.raises(UnsupportedModelError, match="something else than its operations"):
        trace(lively(Net(aliased, a=conv(3, 6), b=conv(6, 6), fc=nn.Linear(6, 5))), IMAGES)


def test_wrong_models_and_inputs():
    model = lively(cnn.LeNet())
    x = torch.randn(1, 1, 28, 28, dtype=torch.float64)
    with pytest.raises(TypeError, match=r"example_input must be torch\.float64 on cpu as conv1\.weight is"):
        trace(model, x.float())
    with pytest.raises(ValueError, match=r"\[1, 1, 20, 20\] does not fit: fc1 fails"):
        trace(model, x[..., :20, :20])
    with pytest.raises(TypeError, match="int64"):
        trace(model, x.long())
    with pytest.raises(ValueError, match="N >= 1"):
        trace(model, x[:0])
    with pytest.raises(ValueError, match=r"model.eval\(\)"):
        trace(copy.deepcopy(model).train(), x)
    broken = copy.deepcopy(model)
    broken.fc1.weight.data[3, 3] = torch.nan
    with pytest.raises(ValueError, match=r"fc1\.weight holds values that are not finite"):
        trace(broken, x)
    tied = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).eval()
    tied[1].weight = tied[0].weight
    with pytest.raises(UnsupportedModelError, match=r"1.weight and 0.weight are the same tensor"):
        trace(tied, torch.randn(1, 4))


# --- compact networks --------------------------------------------------------------------------------------


def test_compact_networks_can_be_trained_and_leave_the_model_alone():
    model, x, space = network("resnet20")
    before = copy.deepcopy(model.state_dict())
    small = compact(model, some_masks(space, (0.5,))[0], space).train()
    optimizer = torch.optim.SGD(small.parameters(), 0.01)
    losses = []
    for _ in range(5):
        loss = F.cross_entropy(small(x), torch.tensor([1, 2]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] and all(p.grad is not None for p in small.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))
    assert list(small.state_dict()) == list(before), "the model's own names"


@pytest.mark.parametrize("name", ["resnet20", "lenet"])
def test_saved_and_rebuilt(name, tmp_path):
    model, x, space = network(name)
    mask = some_masks(space, (0.4,))[0]
    small = compact(model, mask, space)
    with torch.no_grad():
        for p in small.parameters():
            p.add_(0.01)  # fine-tuned
    path = tmp_path / "sub" / "small.safetensors"
    save(path, small, mask, config={"name": name, "num_classes": 10}, input_shape=x.shape[1:])
    again = load(path, cnn.build_cnn)
    assert type(again) is type(small) and not again.training
    assert torch.equal(again(x), small(x)) and [f.name for f in path.parent.iterdir()] == [path.name]
    with pytest.raises(ValueError, match="does not fit the network"):
        load(path, lambda name, num_classes: cnn.build_cnn(name, num_classes=7))
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="no whole safetensors file"):
        load(path, cnn.build_cnn)
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "none", cnn.build_cnn)


def test_the_file_of_fastkd_compress(tmp_path):
    """Its config is a name with arguments, for `build_cnn` or for a function of one's own."""
    model, x, space = network("lenet")
    mask = some_masks(space, (0.4,))[0]
    small, path = compact(model, mask, space), tmp_path / "weights.safetensors"
    for config in ({"name": "lenet", "args": {"num_classes": 10}}, {"name": "lenet", "num_classes": 10}):
        save(path, small, mask, config=config, input_shape=x.shape[1:])
        assert torch.equal(load(path, cnn.build_cnn)(x), small(x))
    save(path, small, mask, config={"name": "nets:lenet", "args": {"num_classes": 10}}, input_shape=x.shape[1:])
    for build in (
        cnn.LeNet,
        lambda num_classes=3: cnn.LeNet(num_classes),
        lambda name, args: cnn.LeNet(**args),
        lambda *, name, **others: cnn.LeNet(**others),
    ):
        assert torch.equal(load(path, build)(x), small(x))
    with pytest.raises(
        ValueError, match=r"does not fit the network built with {'num_classes': 10}.*unexpected keyword"
    ):
        load(path, lambda classes: cnn.LeNet(classes))


def test_a_damaged_file_is_refused(tmp_path):
    """No bit of it can change without a word, but where it has no meaning."""
    torch.manual_seed(0)
    full = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2)).eval()
    x = torch.randn(3, 1, 4, 4)
    space = trace(full, x)
    mask = torch.tensor([True, False, True, True])
    small, path = compact(full, mask, space), tmp_path / "small.safetensors"
    save(path, small, mask, config={}, input_shape=(1, 4, 4))
    content, expected = path.read_bytes(), small(x)
    for bit in range(0, 8 * len(content), 3):
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        try:
            again = load(path, lambda: copy.deepcopy(full))
        except ValueError as error:
            assert str(path) in str(error)
        else:
            assert torch.equal(again(x), expected)
    for damaged in (b"", content[:7], content[:-1], b"x" * 1000):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"is no whole safetensors file .*: put a copy in its place"):
            load(path, lambda: full)


@pytest.mark.parametrize("name", ["lenet", "resnet20", "option_a", "halves"])
def test_onnx(name, tmp_path):
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    if name in SMALL:
        model, x = small_net(name)[0].float(), IMAGES.float()
    else:
        model, x = copy.deepcopy(network(name)[0]).float(), network(name)[1].float()
    space = trace(model, x)
    small = compact(model, some_masks(space, (0.5,))[0], space)
    export_onnx(small, tmp_path / "small.onnx", x[:1])
    options = runtime.SessionOptions()
    options.intra_op_num_threads = 1
    session = runtime.InferenceSession(str(tmp_path / "small.onnx"), options, providers=["CPUExecutionProvider"])
    for batch in (x[:1], torch.cat((x, x[:1]))):
        with torch.no_grad():
            expected = small(batch)
        (result,) = session.run(None, {"images": batch.numpy()})
        assert torch.allclose(torch.from_numpy(result), expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("name", ["lenet", "vgg16_cifar", "mobilenet_v1", "resnet50"])
def test_torch_pruning_removes_the_same(name):
    """One filter of each group, removed by Torch-Pruning's dependency graph (which does not do option A)."""
    tp = pytest.importorskip("torch_pruning", reason="torch-pruning is not installed")
    model, x, space = network(name)
    oracle = copy.deepcopy(model)
    mask = space.ones(1)[0]
    for group in space.groups:
        graph = tp.DependencyGraph().build_dependency(oracle, example_inputs=x[:1])
        module = oracle.get_submodule(group.modules[0])
        prune = tp.prune_conv_out_channels if isinstance(module, nn.Conv2d) else tp.prune_linear_out_channels
        graph.get_pruning_group(module, prune, idxs=[1, 2]).prune()
        mask[group.start + 1 : group.start + 3] = False
    small = compact(model, mask, space)
    theirs = oracle.state_dict()
    for key, value in small.state_dict().items():
        assert torch.equal(value, theirs[key]), key
    with torch.no_grad():
        assert torch.equal(small(x), oracle(x))


@pytest.mark.parametrize(
    "name",
    [
        "resnet18",
        "densenet121",
        "googlenet",
        "mobilenet_v3_small",
        "squeezenet1_1",
        "regnet_y_400mf",
        "efficientnet_b0",
        "shufflenet_v2_x0_5",
    ],
)
def test_networks_of_torchvision(name):
    models = pytest.importorskip(
        "torchvision", reason="torchvision is not installed", exc_type=(ImportError, RuntimeError)
    ).models
    more = {"aux_logits": False, "init_weights": False} if name == "googlenet" else {}
    model = lively(models.get_model(name, weights=None, **more))
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    space = trace(model, x)
    check(model, x, space, some_masks(space, (0.5,)), name != "shufflenet_v2_x0_5")


def test_groups_of_resnet50():
    space = network("resnet50")[2]
    trunk = {g.name: (g.size, len(g.modules)) for g in space.groups if len(g.modules) > 1}
    assert trunk == {f"layer{i + 1}.0.conv3": (256 << i, n + 1) for i, n in enumerate((3, 4, 6, 3))}
    assert len(space.ops) == 175 and len(space.groups) == 37 and space.num_genes == 11456


# --- networks at random --------------------------------------------------------------------------------------


@st.composite
def networks(draw):
    """A stack of steps of random kinds, each of which fits what came before."""
    channels, size, steps, modules = 3, 8, [], {}
    kinds = (
        "conv",
        "strided",
        "depthwise",
        "grouped",
        "residual",
        "option_a",
        "concat",
        "gate",
        "pool",
        "shuffle",
        "halves",
    )
    for i, kind in enumerate(draw(st.lists(st.sampled_from(kinds), min_size=1, max_size=6))):
        width = draw(st.integers(1, 4)) * 2
        name = f"m{i}"
        if (
            (kind == "option_a" and channels == 3)
            or (kind in ("strided", "option_a", "pool") and size < 4)
            or (kind in ("grouped", "shuffle", "halves") and channels % 2)
        ):
            kind = "conv"
        if kind == "depthwise":
            modules[name] = conv(channels, channels, groups=channels)
        elif kind == "residual":
            modules[name] = nn.Sequential(
                conv(channels, width), nn.BatchNorm2d(width), nn.ReLU(True), conv(width, channels)
            )
        elif kind == "gate":
            modules[name] = nn.Sequential(
                nn.AdaptiveAvgPool2d(1), conv(channels, 2, 1), nn.ReLU(), conv(2, channels, 1), nn.Sigmoid()
            )
        elif kind == "option_a":
            modules[name] = nn.Sequential(
                conv(channels, channels + 2, stride=2, bias=False), nn.BatchNorm2d(channels + 2)
            )
            channels, size = channels + 2, size // 2
        elif kind == "pool":
            size //= 2
        elif kind == "halves":
            modules[name] = conv(channels // 2, width)
            channels = channels // 2 + width
        elif kind != "shuffle":
            modules[name] = nn.Sequential(
                conv(channels, width, stride=2 if kind == "strided" else 1, groups=2 if kind == "grouped" else 1),
                nn.BatchNorm2d(width),
                nn.SiLU(),
            )
            channels = channels + width if kind == "concat" else width
            size = (size + 1) // 2 if kind == "strided" else size
        steps.append((kind, name))
    flat = draw(st.booleans())

    def forward(self, x):
        for kind, name in steps:
            if kind == "pool":
                x = F.max_pool2d(x, 2)
                continue
            if kind == "shuffle":
                x = torch.channel_shuffle(x, 2)
                continue
            if kind == "halves":
                kept, y = x.chunk(2, 1)
                x = torch.cat((getattr(self, name)(y), kept), 1)
                continue
            y = getattr(self, name)(x)
            if kind == "residual":
                x = F.relu(x + y)
            elif kind == "option_a":
                x = F.relu(y + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 1, 1)))
            elif kind == "concat":
                x = torch.cat((x, y), 1)
            else:
                x = x * y if kind == "gate" else y
        return self.fc(x.flatten(1) if flat else x.mean((2, 3)))

    fc = nn.Linear(channels * size * size if flat else channels, 4)
    return lively(Net(forward, **modules, fc=fc), draw(st.integers(0, 9)))


@settings(max_examples=15, deadline=None, derandomize=True)
@given(networks(), st.floats(0, 1), st.integers(1, 3), st.integers(0, 99))
def test_any_network(model, density, k_min, seed):
    space = trace(model, IMAGES)
    masks = space.repair(space.random(2, density, torch.Generator().manual_seed(seed)), k_min)
    full, limits = space.channels(space.ones(1)), Limits(space)
    for cost in COSTS:
        assert torch.equal(limits.costs(limits.counts(masks), cost), getattr(space, cost)(masks)), (
            "counts of groups are enough"
        )
    assert bool((space.channels(masks) >= full.clamp(max=k_min)).all())
    with torch.no_grad():
        whole = model(IMAGES)
        assert torch.equal(masked_forward(space, space.ones(1)[0], IMAGES), whole)
        for p, mask in enumerate(masks):
            expected = masked_forward(space, mask, IMAGES)
            small = compact(model, mask, space)
            assert torch.allclose(small(IMAGES), expected, rtol=1e-10, atol=1e-10 * float(whole.abs().max()))
            assert count(small, IMAGES) == (int(space.parameters(masks)[p]), int(space.macs(masks)[p]))
