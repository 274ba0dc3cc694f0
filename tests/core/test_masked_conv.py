"""masked_conv2d against the reference in float64, over a table; what users rely on; bad input."""

import os
import subprocess
import sys
from dataclasses import dataclass, field, replace

import pytest
import torch
import torch.nn.functional as F
from conftest import simt_module
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.library import opcheck

import fastkd
from fastkd import _ops, masked_conv2d, reference

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Conv:
    """x [N, channels, size], weight [outputs, channels / groups, kernel]."""

    individuals: int = 3
    images: int = 2
    channels: int = 5
    outputs: int = 7
    size: tuple = (6, 5)
    kernel: tuple = (3, 3)
    options: dict = field(default_factory=dict)

    def make(self, dtype=torch.float32, own=False, density=0.5, seed=0, device="cpu"):
        g = torch.Generator().manual_seed(seed)
        draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64).to(device, dtype)
        mask = lambda n: (torch.rand(self.individuals, n, generator=g) < density).to(device)
        x = draw(*([self.individuals] if own else []), self.images, self.channels, *self.size)
        weight = draw(self.outputs, self.channels // self.options.get("groups", 1), *self.kernel)
        return x, weight, draw(self.outputs), mask(self.channels), mask(self.outputs)


CONVS = {
    "plain": Conv(),
    "padded": Conv(options={"padding": 1}),
    "strided": Conv(options={"stride": 2, "padding": 1}),
    "uneven": Conv(kernel=(2, 5), size=(9, 8), options={"stride": (3, 1), "padding": (2, 0)}),
    "wide_padding": Conv(kernel=(1, 1), options={"padding": 3, "stride": 2}),
    "dilated": Conv(size=(11, 12), options={"dilation": (2, 3), "padding": (1, 4)}),
    "far_taps": Conv(size=(3, 3), options={"dilation": 4, "padding": 4}),
    "point": Conv(kernel=(1, 1), images=19),
    "point_strided": Conv(kernel=(1, 1), options={"stride": 2}),
    "linear": Conv(size=(1, 1), kernel=(1, 1), channels=33, outputs=10, images=37),
    "grouped": Conv(channels=6, outputs=9, options={"groups": 3, "padding": 1}),
    "depthwise": Conv(channels=5, outputs=5, options={"groups": 5, "padding": 1}),
    "multiplier": Conv(channels=4, outputs=12, options={"groups": 4, "padding": 1, "stride": 2}),
    "one": Conv(1, 1, 1, 1, (1, 1), (1, 1)),
    "odd_widths": Conv(channels=17, outputs=3, options={"padding": 1}),
    "odd_outputs": Conv(channels=3, outputs=17, options={"padding": 1}),
    "many": Conv(4, 70, 17, 19, (5, 4), options={"padding": 1}),
    "image": Conv(2, 1, 3, 4, (40, 33), (7, 7), {"stride": 2, "padding": 3}),
    "large_kernel": Conv(size=(9, 10), kernel=(5, 4), options={"stride": (1, 3), "padding": (4, 1)}),
    "far_strides": Conv(size=(13, 12), options={"stride": (3, 2), "dilation": (2, 3), "padding": (1, 3)}),
    "single": Conv(1, 1, 6, 7, options={"padding": (0, 2)}),
    "large": Conv(2, 40, 12, 20, (30, 31), options={"padding": 1}),
    "point_large": Conv(2, 50, 20, 24, (17, 16), (1, 1)),
    "no_images": Conv(images=0),
    "no_individuals": Conv(individuals=0),
}


def run(f, x, weight, bias, in_mask, out_mask, options, cotangent=None):
    """Result and gradients, with a fixed cotangent."""
    leaves = [t.detach().clone().requires_grad_() for t in (x, weight, bias)]
    y = f(*leaves, in_mask=in_mask, out_mask=out_mask, **options)
    if cotangent is None:  # of numbers that every dtype has
        cotangent = torch.linspace(-64, 128, y.numel(), device=y.device).round().reshape(y.shape) / 64
    return y.detach(), *torch.autograd.grad(y, leaves, cotangent.to(y.dtype))


def check(conv, dtype, own=False, which=(True, True), density=0.5, device="cpu"):
    x, weight, bias, in_mask, out_mask = conv.make(dtype, own, density, device=device)
    in_mask = in_mask if which[0] else None
    out_mask = out_mask if which[1] or (not own and not which[0]) else None
    ours = run(masked_conv2d, x, weight, bias, in_mask, out_mask, conv.options)
    exact = run(reference.masked_conv2d, x.double(), weight.double(), bias.double(), in_mask, out_mask, conv.options)
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    plain = run(reference.masked_conv2d, x.to(acc), weight.to(acc), bias.to(acc), in_mask, out_mask, conv.options)
    for k, (a, e, p) in enumerate(zip(ours, exact, plain, strict=True)):
        assert a.dtype == dtype and a.shape == e.shape and a.isfinite().all()
        if not e.numel():
            continue
        size = e.abs().max()
        # One rounding of a sum in acc; on CUDA, gradients are torch's own, in the dtype itself.
        eps = torch.finfo(dtype).eps
        native = k == 0 or x.device.type == "cpu"
        rounding = 0 if dtype == acc else (eps / 2 * e.abs() if native else 8 * eps * size)
        # In float64 there is nothing to measure the reference with: 1e-12 of the size.
        slack = 8 * torch.finfo(acc).eps if acc == torch.float32 else 1e-12
        allowed = 2 * (p.double() - e).abs().max() + slack * size + rounding
        error = (a.double() - e).abs()
        assert (error <= allowed).all(), f"output {k}: error {error.max():.3g} of {size:.3g}"
    if out_mask is not None:
        assert (ours[0][(~out_mask)[:, None].expand(ours[0].shape[:3])] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CONVS)
def test_table(device, poisoned, name, dtype):
    for own in (False, True):
        check(CONVS[name], dtype, own, device=device)


@pytest.mark.parametrize("which", [(True, False), (False, True), (False, False)])
@pytest.mark.parametrize("density", [0.0, 0.1, 1.0])
def test_masks(device, poisoned, which, density):
    for name in ("padded", "grouped", "depthwise", "many"):
        for own in (False, True):
            check(CONVS[name], torch.float32, own, which, density, device)


@pytest.mark.parametrize("name", CONVS)
def test_all_ones_is_conv2d(device, name):
    conv = CONVS[name]
    x, weight, bias, in_mask, out_mask = conv.make(torch.float64, density=2, device=device)
    y = masked_conv2d(x, weight, bias, in_mask=in_mask, out_mask=out_mask, **conv.options)
    expected = F.conv2d(x, weight, bias, **conv.options)
    for p in range(conv.individuals):
        torch.testing.assert_close(y[p], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CONVS)
def test_small_integers_are_exact(device, poisoned, name, dtype):
    conv = CONVS[name]
    tensors = [
        t if t.dtype == torch.bool else t.mul(1.2).round().clamp(-2, 2) for t in conv.make(torch.float32, device=device)
    ]
    x, weight, bias, in_mask, out_mask = tensors
    keep = {"in_mask": in_mask, "out_mask": out_mask, **conv.options}
    expected = reference.masked_conv2d(x.double(), weight.double(), bias.double(), **keep)
    y = masked_conv2d(x.to(dtype), weight.to(dtype), bias.to(dtype), **keep)
    assert torch.equal(y, expected.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CONVS)
def test_gradients_of_small_integers_are_exact(poisoned, name, dtype):
    conv = CONVS[name]
    for own, density in ((False, 0.5), (True, 0.5), (False, 1), (True, 1)):
        tensors = [
            t if t.dtype == torch.bool else t.mul(1.2).round().clamp(-2, 2)
            for t in conv.make(torch.float64, own, density)
        ]
        *_, in_mask, out_mask = tensors
        if density < 1:  # the first keeps no input, the last no output
            in_mask[:1], out_mask[-1:] = False, False
        shape = reference.masked_conv2d(*tensors[:3], in_mask=in_mask, out_mask=out_mask, **conv.options).shape
        cotangent = torch.randint(-2, 3, shape, generator=torch.Generator().manual_seed(1)).double()
        exact = run(reference.masked_conv2d, *tensors, conv.options, cotangent)
        ours = run(masked_conv2d, *(t.to(dtype) for t in tensors[:3]), *tensors[3:], conv.options, cotangent)
        for a, e in zip(ours, exact, strict=True):
            assert a.dtype == dtype and torch.equal(a, e.to(dtype))


@pytest.mark.parametrize("where", ["cpu", "simt"])
@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_shape(where, data):
    native = simt_module().cuda if where == "simt" else _ops.backends["cpu"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(_ops.backends, "cpu", native)
        patch.setattr(torch.backends.cudnn, "allow_tf32", False)
        _any_shape(data)


def _any_shape(data):
    draw = lambda low, high: data.draw(st.integers(low, high))
    groups = draw(1, 3)
    kernel, dilation, padding = (tuple(draw(*r) for _ in range(2)) for r in ((1, 4), (1, 3), (0, 4)))
    size = tuple(
        max(1, d * (k - 1) + 1 - 2 * p) + draw(0, 6) for k, d, p in zip(kernel, dilation, padding, strict=True)
    )
    conv = Conv(
        draw(0, 4),
        draw(0, 35),
        groups * draw(1, 7),
        groups * draw(1, 10),
        size,
        kernel,
        {"stride": (draw(1, 3), draw(1, 3)), "padding": padding, "dilation": dilation, "groups": groups},
    )
    check(
        conv,
        data.draw(st.sampled_from([torch.float32, torch.float64])),
        data.draw(st.booleans()),
        density=data.draw(st.sampled_from([0.2, 0.5, 0.9])),
    )


def test_what_is_masked_is_not_read(device, poisoned):
    for name in ("padded", "grouped", "depthwise", "point"):
        conv = CONVS[name]
        for own in (False, True):
            x, weight, bias, in_mask, out_mask = conv.make(own=own, device=device)
            in_mask[:, 1], out_mask[:, 2] = False, False
            y = masked_conv2d(x, weight, bias, in_mask=in_mask, out_mask=out_mask, **conv.options)
            cotangent = torch.linspace(-1, 2, y.numel(), device=device).reshape(y.shape)
            clean = run(masked_conv2d, x, weight, bias, in_mask, out_mask, conv.options, cotangent)
            x[..., 1, :, :], bias[2] = torch.nan, torch.nan
            cotangent.masked_fill_(~out_mask[:, None, :, None, None], torch.nan)
            if own:
                x.masked_fill_(~in_mask[:, None, :, None, None], torch.nan)
            if conv.options.get("groups", 1) == 1:
                weight[2], weight[:, 1] = torch.nan, torch.inf
            dirty = run(masked_conv2d, x, weight, bias, in_mask, out_mask, conv.options, cotangent)
            for a, b in zip(clean, dirty, strict=True):
                assert torch.equal(a, b)
            assert not dirty[1][..., 1, :, :].any() and not dirty[2][2].any() and not dirty[3][2]
            if own:
                assert not dirty[1].masked_select(~in_mask[:, None, :, None, None]).any()


def test_only_what_is_wanted(device):
    x, weight, bias, *masks = CONVS["many"].make(device=device)
    y = masked_conv2d(x, weight, bias, in_mask=masks[0], out_mask=masks[1], padding=1)
    f = lambda *wanted: torch.ops.fastkd.masked_conv2d_backward(
        torch.ones_like(y), x, weight, *masks, [1, 1], [1, 1], [1, 1], 1, wanted
    )
    both = f(True, True, True)
    for k in range(3):
        alone = f(*(j == k for j in range(3)))
        assert torch.equal(alone[k], both[k]) and not any(t.numel() for t in (*alone[:k], *alone[k + 1 :]))


@pytest.mark.parametrize("name", ["many", "large", "multiplier"])
def test_gradients_are_independent_of_threads(poisoned, name):
    threads = torch.get_num_threads()
    for own in (False, True):
        conv = replace(CONVS[name], individuals=5, images=100)
        tensors = conv.make(own=own)
        try:
            results = []
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                results.append(run(masked_conv2d, *tensors, conv.options))
        finally:
            torch.set_num_threads(threads)
        for other in results[1:]:
            for a, b in zip(results[0], other, strict=True):
                assert torch.equal(a, b)


def test_independent_of_threads_order_and_chunks(poisoned):
    conv = CONVS["many"]
    x, weight, bias, in_mask, out_mask = conv.make()
    f = lambda x, i, o: masked_conv2d(x, weight, bias, in_mask=i, out_mask=o, padding=1)
    y = f(x, in_mask, out_mask)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert torch.equal(f(x, in_mask, out_mask), y)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(f(x, in_mask.flip(0), out_mask.flip(0)), y.flip(0))
    assert torch.equal(f(x[20:33], in_mask, out_mask), y[:, 20:33])
    for p in range(conv.individuals):
        assert torch.equal(f(x, in_mask[p : p + 1], out_mask[p : p + 1])[0], y[p])


def test_every_instruction_set(tmp_path):
    """The same numbers to within rounding from every copy of the kernels."""
    code = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from test_masked_conv import CONVS, run
from fastkd import masked_conv2d
out = {}
for name, conv in CONVS.items():
    for dtype in (torch.float32, torch.float64):
        out[name, dtype] = run(masked_conv2d, *conv.make(dtype), conv.options)
torch.save(out, sys.argv[2])
"""
    results = []
    for isa in ("generic", "avx2", "avx512"):
        path = tmp_path / isa
        subprocess.run(
            [sys.executable, "-c", code, os.path.dirname(__file__), str(path)],
            check=True,
            cwd=tmp_path,
            env={**os.environ, "FASTKD_ISA": isa},
        )
        results.append(torch.load(path))
    for other in results[1:]:
        for key, tensors in results[0].items():
            tolerance = 1e-5 if key[1] == torch.float32 else 1e-13
            for a, b in zip(other[key], tensors, strict=True):
                size = max(10.0, float(b.abs().max())) if b.numel() else 0
                torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * size)


@pytest.mark.parametrize("name", ["strided", "dilated", "grouped", "depthwise", "point", "one"])
@pytest.mark.parametrize("own", [False, True])
def test_gradcheck(device, name, own):
    conv = replace(CONVS[name], individuals=min(CONVS[name].individuals, 2))
    x, weight, bias, in_mask, out_mask = conv.make(torch.float64, own, 0.7, device=device)
    x = x[..., :1, :, :8, :8]
    leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
    f = lambda *t: masked_conv2d(*t, in_mask=in_mask, out_mask=out_mask, **conv.options)
    assert torch.autograd.gradcheck(f, leaves)


@pytest.mark.parametrize("name", ["strided", "grouped", "many", "no_images"])
def test_loop_over_individuals(name):
    """The gradients of CUDA tensors."""
    conv = CONVS[name]
    for own in (False, True):
        x, weight, bias, i, o = conv.make(torch.float64, own)
        defaults = {"stride": 1, "padding": 0, "dilation": 1}
        rest = (i, o, *([conv.options.get(k, d)] * 2 for k, d in defaults.items()), conv.options.get("groups", 1))
        y = _ops.masked_conv2d(x, weight, bias, *rest)
        cotangent = torch.linspace(-1, 2, y.numel(), dtype=y.dtype).reshape(y.shape)
        loop = _ops.conv._masked_conv2d_backward_torch(cotangent, x, weight, *rest, [True] * 3)
        for a, b in zip(loop, _ops.masked_conv2d_backward(cotangent, x, weight, *rest, [True] * 3), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_opcheck():
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    for name in ("strided", "grouped"):
        x, weight, bias, i, o = CONVS[name].make()
        rest = (i, o, [1, 1], [1, 1], [1, 1], CONVS[name].options.get("groups", 1))
        opcheck(torch.ops.fastkd.masked_conv2d.default, (x, weight, bias, *rest), test_utils=tests)
        y = masked_conv2d(x, weight, bias, in_mask=i, out_mask=o, padding=1, groups=rest[-1])
        opcheck(
            torch.ops.fastkd.masked_conv2d_backward.default,
            (torch.ones_like(y), x, weight, *rest, [True, True, False]),
            test_utils=tests,
        )


def test_compile(device):
    conv = CONVS["strided"]
    x, weight, bias, i, o = conv.make(device=device)

    def step(x, weight, bias, i, o):
        return masked_conv2d(x, weight, bias, in_mask=i, out_mask=o, **conv.options).relu().sum((0, 1))

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    for rows in (3, 2):
        a, b = compiled(*leaves, i[:rows], o[:rows]), step(*leaves, i[:rows], o[:rows])
        assert torch.equal(a, b)
        for g, h in zip(torch.autograd.grad(a.sum(), leaves), torch.autograd.grad(b.sum(), leaves), strict=True):
            assert torch.equal(g, h)


def test_autocast():
    x, weight, bias, i, o = CONVS["padded"].make()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = masked_conv2d(x.requires_grad_(), weight, bias, in_mask=i, out_mask=o)
        assert F.conv2d(x, weight, bias).dtype == y.dtype == torch.bfloat16
        assert masked_conv2d(x.double(), weight.double(), in_mask=i).dtype == torch.float64
    assert torch.equal(y, masked_conv2d(x.bfloat16(), weight.bfloat16(), bias.bfloat16(), in_mask=i, out_mask=o))
    (grad,) = torch.autograd.grad(y.float().sum(), x)
    assert grad.dtype == torch.float32 and grad.isfinite().all()


def test_layouts(device):
    x, weight, bias, i, o = Conv(images=4, channels=6).make(device=device)
    f = lambda x, w: masked_conv2d(x, w, bias, in_mask=i[:, :6], out_mask=o)
    y = f(x, weight)
    assert y.is_contiguous()
    assert torch.equal(f(x.to(memory_format=torch.channels_last), weight.to(memory_format=torch.channels_last)), y)
    assert torch.equal(f(x.repeat_interleave(2, 3)[..., ::2], weight), y)
    assert torch.equal(f(x[:1].expand(4, -1, -1, -1), weight), y[:, :1].expand_as(y))


def test_second_derivative_is_an_error():
    x, weight, _, i, _ = CONVS["plain"].make(torch.float64)
    x.requires_grad_()
    (g,) = torch.autograd.grad(masked_conv2d(x, weight, in_mask=i).square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"reference\.masked_conv2d"):
        torch.autograd.grad(g.sum(), x)


X, W = torch.zeros(2, 4, 5, 5), torch.zeros(6, 4, 3, 3)
M = torch.ones(3, 4, dtype=torch.bool)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"x": None}, TypeError, "x must be a tensor"),
        ({"x": X[0]}, ValueError, r"x must have shape \[N, C, H, W\]"),
        ({"x": X.int()}, TypeError, "x must be float16"),
        ({"x": X.to("meta")}, ValueError, "weight is on cpu, but x is on meta"),
        ({"weight": W[0]}, ValueError, r"weight must have shape"),
        ({"weight": W.double()}, TypeError, "weight is torch.float64, but x is torch.float32"),
        ({"weight": W[:, :3]}, ValueError, "weight takes 3 channels"),
        ({"bias": torch.zeros(5)}, ValueError, r"bias must have shape \[6\], got \(5,\)"),
        ({"in_mask": M.int()}, TypeError, "in_mask must be bool, got torch.int32"),
        ({"in_mask": M[:, :3]}, ValueError, r"in_mask must have shape \[P, 4\], got \(3, 3\)"),
        ({"in_mask": M[0]}, ValueError, r"in_mask must have shape \[P, 4\]"),
        (
            {"out_mask": torch.ones(2, 6, dtype=torch.bool)},
            ValueError,
            "out_mask has P = 2 rows, but in_mask has P = 3",
        ),
        ({"x": X.expand(2, *X.shape)}, ValueError, "in_mask has P = 3 rows, but x has P = 2"),
        ({"in_mask": None}, ValueError, "number of individuals"),
        ({"stride": 0}, ValueError, r"stride must be two integers in \[1, inf\), got \(0, 0\)"),
        ({"padding": (0, -1)}, ValueError, r"padding must be two integers in \[0, inf\)"),
        ({"padding": "same"}, TypeError, "padding must be an integer or a pair"),
        ({"stride": (1, 2, 3)}, TypeError, "stride must be an integer or a pair"),
        ({"dilation": 1.5}, TypeError, "dilation must be an integer or a pair"),
        ({"dilation": 3}, ValueError, "the kernel spans 7 pixels"),
        ({"groups": 3}, ValueError, "groups = 3"),
        ({"groups": 0}, ValueError, "groups = 0"),
        ({"groups": 1.0}, TypeError, "groups must be an integer"),
    ],
)
def test_bad_input(change, error, message):
    arguments = {"x": X, "weight": W, "in_mask": M, **change}
    with pytest.raises(error, match=message):
        masked_conv2d(arguments.pop("x"), arguments.pop("weight"), **arguments)


def test_public():
    assert fastkd.masked_conv2d is masked_conv2d
