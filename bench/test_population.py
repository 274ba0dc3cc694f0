"""A population of masked networks by all sides in turn; a population that converges; single layers; tracing.

Asserts that all agree, and nothing about time. Every benchmark is fastkd's time, and `seconds` in its extra_info has
what each side took in each round (`gemm`: a square product), for one call."""

from __future__ import annotations

import gc
import math
from typing import Any

import pytest
import torch
from torch import nn

from fastkd import PopulationEvaluator
from fastkd.population import trace
from fastkd.population.explain import work

from .cases import SEED, Absent
from .peers import available
from .population import CASES, DEPTH, LAYERS, Layer, Sides, generations, layer_sides, new_network, sides, trained
from .test_lsp import environment, seconds, timer

GEMM = 1024
ROUNDS = 3, 15  # fewest and most
LAYER_ROUNDS, LAYER_SHARE = (5, 15), 1 / 40  # a layer gets this share of the time of a case
GENERATIONS, SIZE = 20, 32
# Relative difference from fastkd's result in the 2-norm. On a GPU, torch takes TF32 for float32 convolutions.
TOLERANCE = {("cpu", "float32"): 1e-4, ("cuda", "float32"): 1e-2, ("cuda", "bfloat16"): 3e-2}

pytestmark = pytest.mark.benchmark(timer=timer, disable_gc=True)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "dtype" in metafunc.fixturenames:
        names = [name for device, name in TOLERANCE if device == metafunc.config.getoption("--device")]
        metafunc.parametrize("dtype", [getattr(torch, name) for name in names], ids=names)


@pytest.fixture(autouse=True)
def inference(device: torch.device):
    with torch.inference_mode():
        yield
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


@pytest.fixture
def budget(request: pytest.FixtureRequest) -> float:
    """Seconds for the rounds of a case."""
    return request.config.getoption("--seconds")


@pytest.fixture
def share(request: pytest.FixtureRequest) -> float:
    return request.config.getoption("--share")


def evaluator(model: nn.Module, x: torch.Tensor, **options: Any) -> PopulationEvaluator:
    try:
        return PopulationEvaluator(model, x, **options)
    except NotImplementedError as why:
        pytest.skip(str(why))


def agree(every: Sides, tolerance: float) -> dict[str, float]:
    """Seconds of the first call of each side; all agree with the first one."""
    once: dict[str, float] = {}
    expected = None
    for side, run in every.items():
        results: list[torch.Tensor] = []
        once[side] = seconds(lambda: results.append(run()))
        result = results.pop().float()
        expected = result if expected is None else expected
        off = float((result - expected).norm() / expected.norm())
        assert off <= tolerance, f"{side} is off by {off}"
    return once


def in_turns(
    benchmark: Any,
    every: Sides,
    rounds: int,
    device: torch.device,
    dtype: torch.dtype,
    calls: dict[str, int] | None = None,
) -> None:
    """Every round has all sides: the fixture times fastkd, which comes last, after the square product."""
    a, b = (torch.randn(GEMM, GEMM, device=device, dtype=dtype) for _ in range(2))
    products = 1 if device.type == "cpu" else 100
    taken: dict[str, list[float]] = {side: [] for side in (*every, "gemm")}
    calls = calls or dict.fromkeys(every, 1)
    a @ b

    def others() -> None:
        for side, run in every.items():
            if side != "fastkd":
                taken[side].append(seconds(run, calls[side]))
        taken["gemm"].append(min(seconds(lambda: a @ b, products) for _ in range(5)))

    benchmark.extra_info.update(
        environment(device),
        dtype=str(dtype).removeprefix("torch."),
        seconds=taken,
        gemm_macs=GEMM**3,
        calls=calls["fastkd"],
    )
    benchmark.pedantic(
        lambda: taken["fastkd"].append(seconds(every["fastkd"], calls["fastkd"])), setup=others, rounds=rounds
    )


def clip(value: float, least: int, most: int) -> int:
    return min(most, max(least, int(value)))


@pytest.mark.parametrize("name", CASES)
def test_network(name: str, dtype: torch.dtype, benchmark, device: torch.device, share: float, budget: float) -> None:
    case, generator = CASES[name], torch.Generator().manual_seed(SEED)
    images = max(1, round(case.images * share))
    x = torch.randn(images, *case.shape, generator=generator).to(device, dtype)
    model = new_network(case.network).to(device, dtype)
    e = evaluator(model, x)
    masks = e.space.repair(e.space.random(case.population, 0.5, generator))
    every, absent = sides(e, model, masks, x), {}
    # Input and result of the largest operation, for all at once.
    largest = 3 * x.element_size() * case.population * images * max(math.prod(v.shape) for v in e.space.values)
    if largest > 0.9 * available(device):
        absent = {side: f"needs {largest / 1e9:.0f} GB" for side in ("dense", "vmap")}
    every = {side: run for side, run in every.items() if side not in absent}
    once = agree(every, TOLERANCE[device.type, str(dtype).removeprefix("torch.")])
    steps = list(work(e._engine, masks))
    benchmark.group = f"{name}: all logits of a population"
    benchmark.extra_info.update(
        kind="population",
        case=name,
        population=case.population,
        images=images,
        absent=absent,
        asked=case.asked if device.type == "cpu" else (10 if case.shape[1:] == (32, 32) else None, None),
        macs=int(e.space.macs(masks).sum()) * images,
        shared=sum(int(s.macs[1]) for s in steps) / max(1, sum(int(s.macs[2]) for s in steps)),
    )
    in_turns(benchmark, every, clip(budget / sum(once.values()), *ROUNDS), device, dtype)


def test_converging(benchmark, device: torch.device, share: float) -> None:
    """The populations of a genetic algorithm, with memo and shared beginnings, and each individual by itself."""
    try:
        model, x, y = trained(share, device)
    except Absent as why:
        pytest.skip(str(why))
    fast, bare = evaluator(model, x), evaluator(model, x, memo=False)
    populations = generations(evaluator(model, x), x, y, GENERATIONS, SIZE)
    known: set[bytes] = set()
    taken: dict[str, list[float]] = {"fastkd": [], "alone": []}
    counts: dict[str, list[int]] = {"asked": [], "new": [], "macs": [], "shared_macs": []}

    def before() -> tuple[tuple, dict]:
        masks = populations[len(taken["alone"])]
        fresh = [m for m in torch.unique(masks, dim=0) if m.numpy().tobytes() not in known]
        known.update(m.numpy().tobytes() for m in fresh)
        steps = work(fast._engine, torch.stack(fresh)) if fresh else ()
        values = len(masks), len(fresh), int(fast.space.macs(masks).sum()), sum(int(s.macs[2]) for s in steps)
        for key, value in zip(counts, values, strict=True):
            counts[key].append(value)
        taken["alone"].append(seconds(lambda: [bare.accuracy(mask[None], (x, y)) for mask in masks]))
        return (masks,), {}

    benchmark.group = "a population that converges"
    benchmark.extra_info.update(
        environment(device),
        kind="converging",
        dtype="float32",
        images=len(x),
        size=SIZE,
        asked=1.5,
        seconds=taken,
        counts=counts,
    )
    benchmark.pedantic(
        lambda masks: taken["fastkd"].append(seconds(lambda: fast.accuracy(masks, (x, y)))),
        setup=before,
        rounds=GENERATIONS,
    )


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_layer(layer: Layer, dtype: torch.dtype, benchmark, device: torch.device, share: float, budget: float) -> None:
    images = max(1, round(layer.images * share))
    every = layer_sides(layer, images, device, dtype)
    tolerance = TOLERANCE[device.type, str(dtype).removeprefix("torch.")]
    whole = "fastkd" if device.type == "cuda" else "alone"
    kept = every[whole]().flatten(2).abs().amax((0, 2)) > 0
    agree(
        {whole: lambda: every[whole]()[:, kept], **{s: run for s, run in every.items() if s.startswith("torch")}},
        tolerance,
    )
    for run in every.values():
        run()
    calls = {side: clip(0.02 / seconds(run) + 1, 1, 1000) for side, run in every.items()}
    round_ = sum(seconds(run, calls[side]) for side, run in every.items())
    benchmark.group = f"layer {layer}"
    benchmark.extra_info.update(
        kind="layer",
        layer=layer.kind,
        kept=layer.kept,
        size=layer.size,
        images=images,
        asked=layer.asked if device.type == "cpu" else None,
        macs=layer.macs(images),
        depth=DEPTH if "alone" in every else 1,
        dense_macs=layer.macs(images) * (2 if layer.kind == "depthwise" else 4),
    )
    in_turns(benchmark, every, clip(budget * LAYER_SHARE / round_, *LAYER_ROUNDS), device, dtype, calls)


def test_trace(benchmark, device: torch.device) -> None:
    model, x = new_network("resnet50").to(device), torch.zeros(1, 3, 224, 224, device=device)
    benchmark.group = "trace"
    taken: dict[str, list[float]] = {"fastkd": []}
    benchmark.extra_info.update(environment(device), kind="trace", network="resnet50", asked=2, seconds=taken)
    benchmark.pedantic(lambda: taken["fastkd"].append(seconds(lambda: trace(model, x))), rounds=5)
