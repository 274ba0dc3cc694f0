"""What a search and a smaller network save: seconds per generation, and speed-up against multiply-adds; what
fine-tuning takes in each precision and order of memory; and what the whole path takes at ImageNet's size.

``python -m bench.compression [--only NETWORK ...] [--parts PART ...] [--generations G]``, on the CPU, writes
results/compression.json and .md; of networks and parts that are not named, what the file has stays.
"""

from __future__ import annotations

import argparse
import copy
import json
import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastkd import PopulationEvaluator, compact
from fastkd.compress import load_config
from fastkd.compress.config import FinetuneConfig
from fastkd.compress.export import to_onnx
from fastkd.compress.train import fit, recalibrate
from fastkd.data.images import Images
from fastkd.evolve import ECS, Fitness, Limits, evolve
from fastkd.population import trace

from .cases import SEED
from .memory import _ROOT
from .population import CASES, Masked, new_network
from .report import table
from .test_lsp import environment, seconds, timer

RESULTS = _ROOT / "bench" / "results" / "compression.json"
PARTS = ("searches", "speed", "training", "paths")
SIZE, IMAGES, CALIBRATION = 32, 500, 250
SEARCHES = ("lenet", "resnet20", "resnet56")
BUDGETS = (0.75, 0.5, 0.25)
BATCHES = (1, 64)
TUNED, TUNED_IMAGES = ("resnet20", "resnet56"), 1024
WAYS = {
    f"{precision}, {'channels last' if last else 'contiguous'}": {"precision": precision, "channels_last": last}
    for precision in ("float32", "bfloat16")
    for last in (False, True)
}
LARGE = ("alexnet", "vgg16", "resnet50")
LARGE_SIZE, LARGE_IMAGES, LARGE_GENERATIONS = 8, 8, 3
SIDES = {"sequential": "masked networks, one by one", "compact": "smaller networks, made and run one by one"}


def normalised(model: nn.Module, forward: Callable[[Tensor], object], images: Tensor) -> None:
    """Batch-norm statistics as of these images alone."""
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    for m in norms:
        m.reset_running_stats()
        m.momentum = None
        m.train()
    if norms:
        forward(images)
    model.eval()


def evaluator(model: nn.Module, example: Tensor, held: Tensor) -> PopulationEvaluator:
    """With statistics of batch norm on the held images, where the network has any."""
    normed = any(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    e = PopulationEvaluator(model, example, bn="recalibrate" if normed else "inherit")
    if normed:
        e.calibrate([held])
    return e


def search(name: str, generations: int) -> dict[str, Any]:
    """An ECS search at half the multiply-adds, every generation of it evaluated by all sides in turn.

    All sides are given the individuals that the run does not know yet, so that its memo favours none, and recalibrate
    the statistics of batch norm. fastkd's time is of the whole generation, breeding and repair with it; the others' is
    of the evaluation.
    """
    case, g = CASES[name], torch.Generator().manual_seed(SEED)
    x, held = (torch.randn(n, *case.shape, generator=g) for n in (IMAGES, CALIBRATION))
    model = new_network(name)
    y = model(x).argmax(1)
    e = evaluator(model, x[:1], held)
    own = copy.deepcopy(model)
    masked = Masked(trace(own, x[:1]), x.device)
    taken: dict[str, list[float]] = {side: [] for side in SIDES}
    counts: list[int] = []
    off: dict[str, float] = dict.fromkeys(SIDES, 0.0)

    def one_by_one(masks: Tensor) -> Tensor:
        out = []
        for mask in masks.to(x.dtype):
            normalised(own, lambda images, mask=mask: masked(mask, images), held)  # type: ignore[misc]
            out.append((masked(mask, x).argmax(1) == y).double().mean())
        return torch.stack(out)

    def smaller(masks: Tensor) -> Tensor:
        out = []
        for mask in masks:
            small = compact(model, mask, e.space)
            normalised(small, small, held)
            out.append((small(x).argmax(1) == y).double().mean())
        return torch.stack(out)

    def quality(masks: Tensor) -> Tensor:
        expected = e.accuracy(masks, (x, y))
        for side, run in (("sequential", one_by_one), ("compact", smaller)):
            start = timer()
            result = run(masks)
            taken[side].append(timer() - start)
            off[side] = max(off[side], float((result - expected).abs().max()))
        counts.append(len(masks))
        return expected

    ends: list[float] = []
    with torch.inference_mode():
        evolve(
            e,
            Fitness(quality, budget={"macs": 0.5}),
            ECS(density="random"),
            SIZE,
            generations,
            SEED,
            callback=lambda result: ends.append(result.history[-1]["seconds"]),
        )
    whole = [b - a for a, b in zip([0.0, *ends], ends, strict=False)]
    taken["fastkd"] = [t - a - b for t, a, b in zip(whole, taken["sequential"], taken["compact"], strict=True)]
    # A class may change where two logits are as good as equal.
    assert max(off.values()) <= 0.01, f"{name}: the sides differ by {off}"
    return {"seconds": taken, "new": counts, "off": off, "recalibrated": e.bn == "recalibrate"}


def speed(name: str, rounds: int) -> list[dict[str, Any]]:
    """Of the networks of uniform L1 at budgets of multiply-adds, the full one and all others in turn."""
    case, model = CASES[name], new_network(name)
    space = trace(model, torch.zeros(1, *case.shape))
    networks, share = {1.0: model}, {1.0: 1.0}
    for budget in BUDGETS:
        limits = Limits(space, {"macs": budget})
        mask = limits.repair(space.ones(1))
        networks[budget] = compact(model, mask[0], space)
        share[budget] = float(limits.costs(limits.counts(mask), "macs")[0]) / limits.full["macs"]
    out = []
    with torch.inference_mode():
        for batch in BATCHES:
            x = torch.randn(batch, *case.shape)
            # Many short calls make a round, so that none is shorter than the clock's noise.
            repeats = {
                b: max(1, round(0.05 / min(seconds(lambda m=m: m(x)) for _ in range(3))))  # type: ignore[misc]
                for b, m in networks.items()
            }
            taken: dict[float, list[float]] = {b: [] for b in networks}
            for _ in range(rounds):
                for b, m in networks.items():
                    taken[b].append(seconds(lambda m=m: m(x), repeats[b]))  # type: ignore[misc]
            out += [
                {"batch": batch, "budget": b, "macs": share[b], "seconds": taken[b], "full": taken[1.0]}
                for b in BUDGETS
            ]
    return out


def training(name: str, rounds: int) -> dict[str, list[float]]:
    """Seconds of an epoch of fine-tuning at half the multiply-adds, the full network as teacher; all ways in turn."""
    case, g = CASES[name], torch.Generator().manual_seed(SEED)
    x = torch.randint(256, (TUNED_IMAGES, *case.shape), generator=g, dtype=torch.uint8)
    y = torch.randint(10, (TUNED_IMAGES,), generator=g)
    data = Images("noise", 10, "drawn", {"train": x}, {"train": y}, (0.5,) * len(x[0]), (0.25,) * len(x[0]))
    teacher = new_network(name)
    space = trace(teacher, torch.zeros(1, *case.shape))
    small = compact(teacher, Limits(space, {"macs": 0.5}).repair(space.ones(1))[0], space)
    taken: dict[str, list[float]] = {way: [] for way in WAYS}
    for k in range(rounds + 1):
        for way, options in WAYS.items():
            config = FinetuneConfig(epochs=1, kd=1.0, augment=True, lr=0.001, **options)  # type: ignore[arg-type]
            model = copy.deepcopy(small)
            with tempfile.TemporaryDirectory() as folder:
                start = timer()
                fit(
                    model,
                    data,
                    ["train"],
                    config,
                    SEED,
                    Path(folder) / "tuning.safetensors",
                    lambda _: 0.0,
                    teacher=teacher,
                )
                if k:  # the first is for caches
                    taken[way].append(timer() - start)
    return taken


def path(name: str) -> dict[str, Any]:
    """From a network for 1,000 classes at 224 x 224, of new weights, to the ONNX file of a smaller one, with the budget
    of its recipe; meant for a process of its own, whose peak memory it is."""
    config = load_config(f"{name}-imagenet")
    model, g = new_network(name), torch.Generator().manual_seed(SEED)
    x, held = (torch.randn(LARGE_IMAGES, 3, 224, 224, generator=g) for _ in range(2))
    times: dict[str, float] = {}

    def timed(what: str, run: Callable[[], Any]) -> Any:
        start = timer()
        out = run()
        times[what] = timer() - start
        return out

    space = timed("trace", lambda: trace(model, x[:1]))
    e = evaluator(model, x[:1], held)
    ends: list[float] = []
    result = timed(
        "search",
        lambda: evolve(
            e,
            Fitness("agreement", x, cost="macs", budget=config.budget),
            ECS(density="random"),
            LARGE_SIZE,
            LARGE_GENERATIONS,
            SEED,
            callback=lambda r: ends.append(r.history[-1]["seconds"]),
        ),
    )
    small = timed("compact", lambda: compact(model, result.best, e.space))
    timed("recalibrate", lambda: recalibrate(small, [held]))
    with tempfile.TemporaryDirectory() as folder:
        onnx = timed("onnx", lambda: to_onnx(small, Path(folder) / "model.onnx", x[:1]))
    limits = Limits(space, config.budget)
    left = {k: int(limits.costs(limits.counts(result.best[None]), k)[0]) for k in ("macs", "parameters")}
    return {
        "seconds": times,
        "generations": [b - a for a, b in zip([0.0, *ends], ends, strict=False)],
        "evaluations": result.evaluations,
        "budget": config.budget,
        "full": {k: limits.full[k] for k in left},
        "left": left,
        "onnx": onnx,
        "genes": space.num_genes,
        "peak_memory_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
    }


def alone(name: str) -> dict[str, Any]:
    """The path in a fresh process."""
    code = f"import json; from bench.compression import path; print(json.dumps(path({name!r})))"
    run = subprocess.run([sys.executable, "-c", code], cwd=_ROOT, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(run.stdout.splitlines()[-1])


def written(results: dict[str, Any]) -> str:
    def machines(part: str) -> str:
        found = {
            name: f"{r['environment']['cpu']}, {r['environment']['threads']} threads, torch {r['environment']['torch']}"
            for name, r in results[part].items()
        }
        return " ".join(f"{', '.join(n for n in found if found[n] == m)}: {m}." for m in dict.fromkeys(found.values()))

    text = ["# Searches and smaller networks\n"]
    body = []
    for name, b in results["searches"].items():
        own = b["seconds"]["fastkd"]
        row = [name, f"{statistics.median(own):.3g}", f"{statistics.median(b['new']):g}"]
        for side in SIDES:
            r = [t / o for t, o, n in zip(b["seconds"][side], own, b["new"], strict=True) if n]
            row.append(f"**{statistics.median(r):.3g}x** ({min(r):.3g} to {max(r):.3g})")
        body.append([*row, f"{max(b['off'].values()):.2g}"])
    text.append(
        "## Seconds per generation\n\n"
        f"ECS as published, {SIZE} individuals, half the multiply-adds, {IMAGES} images (with batch norm {CALIBRATION} "
        "more, on which its statistics are computed for every individual). fastkd: a whole generation, with breeding "
        "and repair. The other sides: the evaluation of the same individuals, those alone that the run had not seen. "
        "Ratios to fastkd: median (and range) over generations, all sides in turn in each. *Differ*: the largest "
        f"difference of any individual's accuracy.\n\n{machines('searches')}\n\n"
        + table(["network", "fastkd, s", "new individuals", *SIDES.values(), "differ"], body)
        + "\n"
    )
    body = []
    for name, own in results["speed"].items():
        for r in own["rows"]:
            gain = [f / s for f, s in zip(r["full"], r["seconds"], strict=True)]
            body.append(
                [
                    name,
                    str(r["batch"]),
                    f"{100 * r['macs']:.1f}",
                    f"{1e3 * statistics.median(r['full']):.3g}",
                    f"{1e3 * statistics.median(r['seconds']):.3g}",
                    f"**{statistics.median(gain):.2f}x** ({min(gain):.2f} to {max(gain):.2f})",
                    f"{1 / r['macs']:.2f}x",
                ]
            )
    columns = ["network", "batch", "MACs, %", "full, ms", "smaller, ms", "speed-up", "by multiply-adds"]
    text.append(
        "## Speed-up of the smaller network against its multiply-adds\n\n"
        "In torch, contiguous, fp32; the filters of smallest L1 norm are removed from all groups alike, as repair "
        f"does. *By multiply-adds*: what it would be if time were proportional to them.\n\n{machines('speed')}\n\n"
        + table(columns, body)
        + "\n"
    )
    body = []
    for name, own in results["training"].items():
        first = next(iter(WAYS))
        row = [name]
        for way, t in own["seconds"].items():
            gain = [a / b for a, b in zip(own["seconds"][first], t, strict=True)]
            row.append(
                f"{1e3 * statistics.median(t) / TUNED_IMAGES:.2f}"
                + ("" if way == first else f", **{statistics.median(gain):.2f}x** ({min(gain):.2f} to {max(gain):.2f})")
            )
        body.append(row)
    text.append(
        "## Fine-tuning\n\n"
        "Milliseconds per image, forward and backward, at half the multiply-adds with the full network as teacher, "
        f"batches of 128, augmented: epochs of {TUNED_IMAGES:,} images, their weights saved. Ratios to the first: "
        f"median (and range), all ways in turn.\n\n{machines('training')}\n\n" + table(["network", *WAYS], body) + "\n"
    )
    body = []
    for name, r in results["paths"].items():
        t, left, full = r["seconds"], r["left"], r["full"]
        body.append(
            [
                name,
                f"{r['genes']:,}",
                f"{t['trace']:.2f}",
                f"{t['search']:.1f}",
                f"{statistics.median(r['generations']):.1f}",
                f"{r['evaluations']}",
                f"{t['compact']:.2f}",
                f"{t['onnx']:.1f}",
                f"{full['macs'] / 1e9:.2f} to {left['macs'] / 1e9:.2f}",
                f"{full['parameters'] / 1e6:.1f} to {left['parameters'] / 1e6:.1f}",
                f"{r['onnx']['max_difference']:.1e}",
                f"{r['peak_memory_gb']:.1f}",
            ]
        )
    columns = [
        "network",
        "genes",
        "trace, s",
        "search, s",
        "a generation, s",
        "evaluated",
        "compact, s",
        "ONNX with parity, s",
        "MACs, G",
        "parameters, M",
        "ONNX differs",
        "peak memory, GB",
    ]
    text.append(
        "## The whole path at ImageNet's size\n\n"
        f"1,000 classes, 224 x 224, new weights and noise for images, since speed is all that is claimed: "
        f"{LARGE_SIZE} individuals by {LARGE_GENERATIONS} generations of ECS, on {LARGE_IMAGES} images (and, with "
        "batch norm, as many more for its statistics), at the budgets of the recipes. *ONNX differs*: the largest "
        "difference from torch's logits, relative to the largest logit. Peak memory is the process's, with torch in it."
        f"\n\n{machines('paths')}\n\n" + table(columns, body) + "\n"
    )
    return "\n".join(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=[*CASES, *LARGE], default=[*CASES, *LARGE])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--generations", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    results: dict[str, Any] = {part: known.get(part, {}) for part in PARTS}
    env = {"environment": environment(torch.device("cpu"))}
    parts: list[tuple[str, Collection[str], Callable[[str], dict[str, Any]]]] = [
        ("searches", SEARCHES, lambda name: search(name, args.generations)),
        ("speed", CASES, lambda name: {"rows": speed(name, args.rounds)}),
        ("training", TUNED, lambda name: {"seconds": training(name, args.rounds)}),
        ("paths", LARGE, alone),
    ]
    for name in args.only:
        print(name, flush=True)
        for part, networks, run in parts:
            if part in args.parts and name in networks:
                results[part][name] = env | run(name)
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    RESULTS.with_suffix(".md").write_text(written(results))
    print(written(results))


if __name__ == "__main__":
    main()
