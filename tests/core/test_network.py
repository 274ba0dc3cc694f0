"""The executor of masked networks against the same network in plain torch, one individual at a time."""

import pytest
import torch
import torch.nn.functional as F

from fastkd import _ops
from fastkd._ops import ALWAYS, NEVER, Network

ACTIVATION = {
    "relu": F.relu,
    "relu6": F.relu6,
    "leaky_relu": lambda x: F.leaky_relu(x, 0.1),
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "hardsigmoid": F.hardsigmoid,
    "hardswish": F.hardswish,
    "tanh": torch.tanh,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


def kept(mask, genes):
    return torch.tensor([g == ALWAYS or (g >= 0 and bool(mask[g])) for g in genes])


def interpret(values, nodes, mask, x, norms=None, moments=None):
    """One individual. What does not exist is zero; norms: (scale, shift) of each norm, or moments: a list
    that takes (mean, variance), and batch norms use the batch."""
    held = {0: x * kept(mask, values[0][3])[:, None, None]}
    index = 0
    for n in nodes:
        a, *rest = (held[v] for v in n["inputs"])
        match n["op"]:
            case "conv" if n["weight"].dim() == 2:
                y = F.linear(a.flatten(1), n["weight"], n.get("bias"))[:, :, None, None]
            case "conv":
                y = F.conv2d(
                    a,
                    n["weight"],
                    n.get("bias"),
                    n.get("stride", 1),
                    n.get("padding", 0),
                    n.get("dilation", 1),
                    n.get("groups", 1),
                )
            case "norm":
                scale, shift = n["scale"], n["shift"]
                if norms is not None and norms[index] is not None:
                    scale, shift = norms[index]
                if moments is not None and "eps" in n:
                    var, mean = torch.var_mean(a, (0, 2, 3), correction=0)
                    exists = kept(mask, values[n["output"]][3])
                    moments.append((torch.where(exists, mean, 0), torch.where(exists, var, 1)))
                    scale = n["weight"] / torch.sqrt(var + n["eps"])
                    shift = n["bias"] - mean * scale
                y = a * scale[:, None, None] + shift[:, None, None]
                index += 1
            case "activation":
                y = ACTIVATION[n["name"]](a)
            case "max_pool":
                y = F.max_pool2d(
                    a,
                    n["kernel"],
                    n.get("stride", 1),
                    n.get("padding", 0),
                    n.get("dilation", 1),
                    n.get("ceil_mode", False),
                )
            case "avg_pool" if n["kernel"] == (0, 0):
                y = F.adaptive_avg_pool2d(a, values[n["output"]][1:3])
            case "avg_pool":
                y = F.avg_pool2d(
                    a,
                    n["kernel"],
                    n.get("stride", 1),
                    n.get("padding", 0),
                    n.get("ceil_mode", False),
                    n.get("count_include_pad", True),
                )
            case "add":
                y = sum(rest, a)
            case "multiply":
                y = a * rest[0]
            case "select":
                planes = (a, *rest)
                y = torch.stack(
                    [torch.zeros_like(a[:, 0]) if s is None else planes[s[0]][:, s[1]] for s in n["source"]], 1
                )
            case "flatten":
                y = a.flatten(1)[:, :, None, None]
        held[n["output"]] = y * kept(mask, values[n["output"]][3])[:, None, None]
    return held[nodes[-1]["output"]]


class Builder:
    """Values and nodes, with random weights; shapes from running the network."""

    def __init__(self, channels, height, width, seed=0, genes=None):
        self.g = torch.Generator().manual_seed(seed)
        self.values = [(channels, height, width, genes or [ALWAYS] * channels)]
        self.nodes = []
        self.num_genes = 0

    def new(self, n):
        first = self.num_genes
        self.num_genes += n
        return list(range(first, first + n))

    def randn(self, *shape):
        return torch.randn(*shape, generator=self.g, dtype=torch.float64)

    def node(self, op, inputs, genes, **rest):
        n = {"op": op, "inputs": list(inputs), "output": len(self.values), **rest}
        self.nodes.append(n)
        self.values.append((len(genes), *self.size(n, op, inputs, rest), list(genes)))
        return n["output"]

    def size(self, n, op, inputs, rest):
        _, h, w, _ = self.values[inputs[0]]
        if "size" in rest:
            return rest["size"]
        if op == "flatten" or (op == "conv" and rest["weight"].dim() == 2):
            return 1, 1
        if op not in ("conv", "max_pool", "avg_pool"):
            return h, w
        kernel = rest.get("kernel") or tuple(rest["weight"].shape[2:])
        stride, padding, dilation = (
            rest.get(k, d) for k, d in (("stride", (1, 1)), ("padding", (0, 0)), ("dilation", (1, 1)))
        )
        return tuple(
            (s + 2 * p - d * (k - 1) - 1) // t + 1
            for s, k, t, p, d in zip((h, w), kernel, stride, padding, dilation, strict=True)
        )

    def conv(self, x, out, kernel=3, stride=1, groups=1, bias=False, genes=None, padding=None, dilation=1):
        c = self.values[x][0]
        weight = self.randn(out, c // groups, kernel, kernel) / (c // groups * kernel**2) ** 0.5
        p = kernel // 2 * dilation if padding is None else padding
        return self.node(
            "conv",
            [x],
            genes or self.new(out),
            weight=weight,
            bias=self.randn(out) if bias else None,
            stride=(stride, stride),
            padding=(p, p),
            dilation=(dilation, dilation),
            groups=groups,
        )

    def norm(self, x):
        c, genes = self.values[x][0], self.values[x][3]
        return self.node(
            "norm",
            [x],
            genes,
            scale=self.randn(c).abs() + 0.5,
            shift=self.randn(c),
            weight=self.randn(c).abs() + 0.5,
            bias=self.randn(c),
            eps=1e-3,
        )

    def act(self, x, name="relu"):
        return self.node(
            "activation", [x], self.values[x][3], name=name, **({"param": 0.1} if name == "leaky_relu" else {})
        )

    def unit(self, x, out, **options):
        return self.act(self.norm(self.conv(x, out, **options)))

    def linear(self, x, out, genes=None):
        c, h, w, _ = self.values[x]
        return self.node(
            "conv",
            [x],
            genes or [ALWAYS] * out,
            weight=self.randn(out, c * h * w) / (c * h * w) ** 0.5,
            bias=self.randn(out),
        )

    def pool(self, x, op="max_pool", kernel=(2, 2), **rest):
        rest.setdefault("stride", kernel if kernel != (0, 0) else (1, 1))
        return self.node(op, [x], self.values[x][3], kernel=kernel, **rest)


def lenet():
    b = Builder(1, 14, 14)
    x = b.pool(b.act(b.conv(0, 6, 5, bias=True, padding=0)))
    x = b.pool(b.act(b.conv(x, 17, 3, bias=True)))
    x = b.act(b.linear(x, 21, b.new(21)))
    b.linear(x, 10)
    return b


def resnet():
    b = Builder(3, 9, 9)
    x = b.unit(0, 5)
    group = b.values[x][3]
    for width, stride in ((5, 1), (5, 1), (10, 2)):
        y = b.unit(x, width, stride=stride)
        if stride == 2:  # option A
            pad = (width - 5) // 2
            group = b.new(pad) + group + b.new(width - 5 - pad)
            x = b.pool(x, kernel=(1, 1), stride=(2, 2))
            source = [None] * pad + [(0, c) for c in range(5)] + [None] * (width - 5 - pad)
            x = b.node("select", [x], [NEVER] * pad + b.values[x][3] + [NEVER] * (width - 5 - pad), source=source)
        y = b.norm(b.conv(y, width, genes=group))
        x = b.act(b.node("add", [y, x] if stride == 2 else [x, y], group))
    # A shortcut with a convolution, made after the main branch.
    y = b.norm(b.conv(b.unit(x, 7), 9))
    z = b.norm(b.conv(x, 9, 1, genes=b.values[y][3]))
    x = b.act(b.node("add", [y, z], b.values[y][3]))
    b.linear(b.pool(x, "avg_pool", (0, 0), size=(1, 1)), 10)
    return b


def mobile():
    b = Builder(3, 12, 12)
    x = b.unit(0, 8, stride=2)
    for width, stride in ((9, 1), (17, 2)):
        x = b.act(b.norm(b.conv(x, b.values[x][0], 3, stride, groups=b.values[x][0], genes=b.values[x][3])), "relu6")
        x = b.act(b.norm(b.conv(x, width, 1)), "silu")
    gate = b.act(
        b.conv(b.act(b.conv(b.pool(x, "avg_pool", (3, 3)), 4, 1, bias=True)), 17, 1, bias=True, genes=b.values[x][3]),
        "hardsigmoid",
    )
    x = b.node("multiply", [x, gate], b.values[x][3])
    x = b.conv(x, 34, 3, groups=17, genes=[g for g in b.values[x][3] for _ in range(2)])
    x = b.node("flatten", [x], [g for g in b.values[x][3] for _ in range(9)])
    b.linear(b.act(x, "leaky_relu"), 5)
    return b


def dense():
    b = Builder(4, 8, 6, genes=[0, 1, 2, 3])
    b.num_genes = 4
    x = b.act(b.conv(0, 6, groups=2), "gelu")
    y = b.act(b.conv(x, 5, 3, dilation=2), "hardswish")
    z = b.node(
        "select",
        [x, y],
        b.values[x][3] + b.values[y][3],
        source=[(0, c) for c in range(6)] + [(1, c) for c in range(5)],
    )
    z = b.norm(z)
    a = b.pool(z, "avg_pool", (3, 3), stride=(2, 2), padding=(1, 1), count_include_pad=False)
    c = b.pool(z, "max_pool", (3, 2), stride=(2, 2), padding=(1, 0))
    d = b.pool(z, "avg_pool", (3, 2), stride=(2, 2), padding=(1, 0))
    s = b.node("add", [a, c, d], b.values[a][3])
    b.act(b.norm(b.conv(s, 3, 3, groups=1, genes=[ALWAYS, ALWAYS, NEVER])), "tanh")
    return b


def strided():
    """Widths, strides and dilations for which several columns stand in one register, or do not."""
    b = Builder(2, 13, 11)
    x = b.act(b.conv(0, 9, 3, stride=2, bias=True))
    y = b.act(b.conv(x, 7, 3, dilation=2), "gelu")
    z = b.conv(y, 7, 5, groups=7, genes=b.values[y][3], bias=True)
    z = b.act(b.conv(z, 11, 1, stride=1), "relu6")
    z = b.act(b.norm(b.conv(z, 11, 3, stride=3, groups=11, genes=b.values[z][3], padding=2, dilation=2)), "silu")
    z = b.conv(b.act(b.conv(z, 5, 1)), 6, 2, padding=3, stride=2)
    b.linear(b.node("flatten", [z], [g for g in b.values[z][3] for _ in range(b.values[z][1] * b.values[z][2])]), 3)
    return b


NETWORKS = {"lenet": lenet, "resnet": resnet, "mobile": mobile, "dense": dense, "strided": strided}


class Moved:
    """The network on a device; what goes in and comes out is on the CPU."""

    def __init__(self, b, dtype, device):
        self.device, self.net = device, Network(b.values, b.nodes, b.num_genes, dtype, device=device)

    def __call__(self, masks, x, affines=None, **rest):
        return self.net(masks, x.to(self.device), affines, **rest).cpu()

    def moments(self, masks, x):
        return [(m.cpu(), v.cpu()) for m, v in self.net.moments(masks, x.to(self.device))]


def population(b, count, seed=0, density=0.6):
    """Random masks, some equal, some with a common beginning; no value empty."""
    g = torch.Generator().manual_seed(seed)
    masks = torch.rand(count, b.num_genes, generator=g) < density
    for k in range(1, count):
        if k % 3 == 0:
            masks[k, : b.num_genes * (k % 4) // 4] = masks[k - 1, : b.num_genes * (k % 4) // 4]
    if count > 2:
        masks[-1] = True
        masks[2] = masks[0]
    return masks


def batch(b, images, seed=5):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(images, *b.values[0][:3], generator=g, dtype=torch.float64)


@pytest.mark.parametrize("images", [1, 3, 8, 17, 50])
@pytest.mark.parametrize("name", NETWORKS)
def test_equals_each_alone(name, images, device, poisoned):
    b = NETWORKS[name]()
    masks, x = population(b, 7), batch(b, images)
    expected = torch.stack([interpret(b.values, b.nodes, m, x) for m in masks])
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 2e-5)):
        net = Moved(b, dtype, device)
        y = net(masks, x.to(dtype))
        assert y.dtype == dtype and y.shape == expected.shape
        torch.testing.assert_close(y.double(), expected, rtol=tolerance, atol=tolerance * expected.abs().max().item())


@pytest.mark.parametrize("name", NETWORKS)
def test_does_not_depend_on_the_others(name, device, poisoned):
    b = NETWORKS[name]()
    masks, x = population(b, 9), batch(b, 130).float()
    net = Moved(b, torch.float32, device)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        y = net(masks, x)
        for k in range(9):
            assert torch.equal(net(masks[k : k + 1], x)[0], y[k])
        order = torch.randperm(9, generator=torch.Generator().manual_seed(1))
        assert torch.equal(net(masks[order], x), y[order])
        for first, last in ((0, 1), (1, 20), (20, 99), (99, 130)):
            assert torch.equal(net(masks, x[first:last]), y[:, first:last])
        moments = net.moments(masks, x)
        for count in (2, 3, 5):
            torch.set_num_threads(count)
            assert torch.equal(net(masks, x), y)
            for a, c in zip(net.moments(masks, x), moments, strict=True):
                assert torch.equal(a[0], c[0]) and torch.equal(a[1], c[1])
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("name", ["mobile", "strided"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_does_not_depend_on_the_number_of_images(name, dtype, poisoned):
    b = NETWORKS[name]()
    masks, x = population(b, 5), batch(b, 50).to(dtype)
    x[7, 0, 4, 4], x[49, 1, 0, 0] = torch.nan, torch.inf
    net = Network(b.values, b.nodes, b.num_genes, dtype)
    y = net(masks, x)
    assert y[:, 7].isnan().any() and not y[:, 8].isnan().any()
    for images in (1, 2, 3, 4, 5, 8, 9, 16, 17, 33):
        part = net(masks, x[:images])
        assert part.nan_to_num(7).equal(y[:, :images].nan_to_num(7)), images
    for p, mask in enumerate(masks):
        expected = interpret(b.values, b.nodes, mask, x[8:40].double())
        torch.testing.assert_close(y[p, 8:40].double(), expected, rtol=2e-5, atol=2e-5 * expected.abs().max().item())


@pytest.mark.parametrize("size, stride", [(28, 2), (15, 1)])
def test_depthwise_and_pointwise(size, stride, poisoned):
    """Many channels, odd widths, few images."""
    b = Builder(130, size, size, genes=list(range(130)))
    b.num_genes = 130
    x = b.act(b.conv(0, 130, 3, stride, groups=130, genes=b.values[0][3], bias=True), "relu6")
    b.act(b.norm(b.conv(x, 9, 1, genes=[ALWAYS] * 9)))
    masks, x = population(b, 3, density=0.9), batch(b, 17)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 2e-5)):
        net = Network(b.values, b.nodes, b.num_genes, dtype)
        y = net(masks, x.to(dtype))
        for p, mask in enumerate(masks):
            expected = interpret(b.values, b.nodes, mask, x)
            torch.testing.assert_close(y[p].double(), expected, rtol=tolerance, atol=10 * tolerance)
        for images in (1, 2, 4, 7, 16):
            assert torch.equal(net(masks, x[:images].to(dtype)), y[:, :images])
            assert torch.equal(net(masks[1:2], x[:images].to(dtype)), y[1:2, :images])


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("threads", [1, 3])
def test_memory_is_within_the_bound(name, threads, poisoned):
    b = NETWORKS[name]()
    net = Network(b.values, b.nodes, b.num_genes, torch.float32)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        for individuals in (1, 2, 3, 20):
            for images in (1, 50, 130):
                masks = population(b, individuals, seed=images, density=0.8)
                net(masks, batch(b, images).float())
                assert 0 < net.taken() <= net.bytes(images, False, individuals)
                net.moments(masks, batch(b, images).float())
                assert 0 < net.taken() <= net.bytes(images, True, individuals)
    finally:
        torch.set_num_threads(before)
    assert net.bytes(50) < net.bytes(50, individuals=2) <= net.bytes(50, individuals=99)


@pytest.mark.parametrize("name", ["resnet", "mobile", "dense"])
@pytest.mark.parametrize("images", [5, 60])
def test_moments_of_the_batch(name, images, device, poisoned):
    b = NETWORKS[name]()
    masks, x = population(b, 6), batch(b, images)
    net = Moved(b, torch.float64, device)
    found = net.moments(masks, x)
    affines = []
    for node, (mean, variance) in zip((n for n in b.nodes if n["op"] == "norm"), found, strict=True):
        scale = node["weight"] / torch.sqrt(variance + node["eps"])
        affines.append((scale, node["bias"] - mean * scale))
    y = net(masks, x, affines)
    for p, mask in enumerate(masks):
        moments = []
        expected = interpret(b.values, b.nodes, mask, x, moments=moments)
        for k, (mean, variance) in enumerate(moments):
            torch.testing.assert_close(found[k][0][p], mean, rtol=1e-9, atol=1e-11)
            torch.testing.assert_close(found[k][1][p], variance, rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(y[p], expected, rtol=1e-9, atol=1e-10)
        own = [None if a is None else (a[0][p : p + 1], a[1][p : p + 1]) for a in affines]
        assert torch.equal(net(mask[None], x, own)[0], y[p])


def test_norms_of_ones_own_are_not_shared(device, poisoned):
    """Equal masks with other parameters are other individuals."""
    b = resnet()
    x, masks = batch(b, 4), population(b, 1).expand(3, -1)
    net = Moved(b, torch.float64, device)
    norms = [n for n in b.nodes if n["op"] == "norm"]
    g = torch.Generator().manual_seed(2)
    affines = [
        None,
        *(
            (
                torch.rand(3, len(n["scale"]), generator=g, dtype=torch.float64),
                torch.rand(len(n["scale"]), generator=g, dtype=torch.float64).expand(3, -1),
            )
            for n in norms[1:]
        ),
    ]
    y = net(masks, x, affines)
    for p in range(3):
        own = [None if a is None else (a[0][p], a[1][p]) for a in affines]
        torch.testing.assert_close(y[p], interpret(b.values, b.nodes, masks[p], x, norms=own), rtol=1e-10, atol=1e-10)


def test_residual_that_is_also_the_input(device, poisoned):
    b = Builder(3, 6, 6)
    x = b.act(b.conv(0, 8))
    b.linear(b.act(b.node("add", [b.conv(x, 8, genes=b.values[x][3]), x], b.values[x][3])), 4)
    masks, x = population(b, 6), batch(b, 3)
    y = Moved(b, torch.float64, device)(masks, x)
    for p, mask in enumerate(masks):
        torch.testing.assert_close(y[p], interpret(b.values, b.nodes, mask, x), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", ACTIVATION)
def test_activations(name, device, poisoned):
    b = Builder(2, 3, 3)
    b.act(b.conv(0, 3, bias=True), name)
    x = 4 * batch(b, 20)
    x[0, 0, 0, 0] = torch.nan
    masks = torch.ones(1, b.num_genes, dtype=torch.bool)
    expected = interpret(b.values, b.nodes, masks[0], x)
    for dtype, tolerance in ((torch.float64, 1e-13), (torch.float32, 2e-6)):
        y = Moved(b, dtype, device)(masks, x.to(dtype))[0]
        torch.testing.assert_close(y.double(), expected, rtol=tolerance, atol=4 * tolerance, equal_nan=True)


def test_input_of_ones_own(device, poisoned):
    b = dense()
    masks, x = population(b, 4), torch.stack([batch(b, 6, s) for s in range(4)])
    y = Moved(b, torch.float64, device)(masks, x)
    for p in range(4):
        torch.testing.assert_close(y[p], interpret(b.values, b.nodes, masks[p], x[p]), rtol=1e-11, atol=1e-11)


# Tolerances over the largest value: sums are exact products in float32; what passes between layers is rounded.
@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize(
    ("dtype", "tensor_cores", "tolerance"),
    [
        (torch.bfloat16, True, 4e-2),
        (torch.float16, True, 5e-3),
        (torch.float32, True, 5e-3),
        (torch.bfloat16, False, 4e-2),
        (torch.float16, False, 5e-3),
    ],
)
def test_tensor_cores(name, dtype, tensor_cores, tolerance, device, monkeypatch, request, poisoned):
    where = request.node.callspec.params["device"]
    if where == "cpu":
        pytest.skip("the CPU runs in float32 and float64")
    if not tensor_cores:
        if where == "cuda":
            pytest.skip("only a GPU before compute capability 8.0 does without")
        monkeypatch.setenv("FASTKD_SIMT_COMPUTE_CAPABILITY", "7")
    if dtype == torch.float32:
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    b = NETWORKS[name]()
    masks, x = population(b, 5), batch(b, 9).to(dtype)
    net = Moved(b, dtype, device)
    y = net(masks, x)
    expected = torch.stack([interpret(b.values, b.nodes, m, x.double()) for m in masks])
    assert y.dtype == dtype
    assert (y.double() - expected).abs().max() < tolerance * expected.abs().max()
    if dtype == torch.float32:  # else it would not have been used
        assert (y.double() - expected).abs().max() > 1e-6 * expected.abs().max()
    for k in range(5):
        assert torch.equal(net(masks[k : k + 1], x)[0], y[k])


@pytest.mark.parametrize("schedule", ["reverse", "random"])
def test_simt_schedule_does_not_matter(schedule, monkeypatch, poisoned):
    """A kernel that misses a barrier gives other results when its threads run in another order."""
    from conftest import simt_module

    monkeypatch.setitem(_ops.backends, "cpu", simt_module().cuda)
    for dtype in (torch.bfloat16, torch.float32):
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
        for name in NETWORKS:
            b = NETWORKS[name]()
            masks, x = population(b, 3), batch(b, 5).to(dtype)
            net = Moved(b, dtype, torch.device("cpu"))
            monkeypatch.setenv("FASTKD_SIMT_ORDER", "forward")
            y, moments = net(masks, x), net.moments(masks, x)
            monkeypatch.setenv("FASTKD_SIMT_ORDER", schedule)
            assert torch.equal(net(masks, x), y)
            for a, c in zip(net.moments(masks, x), moments, strict=True):
                assert torch.equal(a[0], c[0]) and torch.equal(a[1], c[1])


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("where", ["simt", "cuda"])
def test_device_memory_is_within_what_is_stated(name, where, monkeypatch):
    from conftest import simt_module

    device = torch.device("cuda" if where == "cuda" else "cpu")
    if where == "simt":
        monkeypatch.setitem(_ops.backends, "cpu", simt_module().cuda)
    elif not torch.cuda.is_available() or _ops.backends["cuda"] is None:
        pytest.skip("no CUDA device, or a build without CUDA")
    b = NETWORKS[name]()
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        net = Moved(b, dtype, device)
        for count, images, density in ((1, 1, 2), (1, 70, 0.4), (4, 9, 2), (6, 33, 0.9), (7, 20, 0.5)):
            masks, x = population(b, count, density=density), batch(b, images).to(dtype)
            for recalibrate, run in ((False, net), (True, net.moments)):
                run(masks, x)
                assert 0 < net.net.taken() <= net.net.bytes(images, recalibrate, count)
