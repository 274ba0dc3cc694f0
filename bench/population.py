"""A population of masked networks, evaluated by fastkd and in the ways in which it is done without.

``python -m bench.population [CASE ...] [--seconds S]`` writes results/population.json and .md, on the CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastkd import PopulationEvaluator, data
from fastkd.models import build_cnn, load_weights
from fastkd.population import GeneSpace, compact

from .cases import SEED, Absent
from .memory import _ROOT
from .peers import available
from .report import number, table
from .test_lsp import environment, seconds

RESULTS = _ROOT / "bench" / "results" / "population.json"
LEAST, MOST = 2, 7  # rounds
GEMM = 1024


@dataclass(frozen=True)
class Case:
    network: str
    population: int
    images: int
    shape: tuple[int, ...]
    target: tuple[float, float | None]  # the sequential loop and the best baseline, over fastkd


CASES = {
    "lenet": Case("lenet", 64, 1000, (1, 28, 28), (10, 3)),
    "resnet20": Case("resnet20", 32, 256, (3, 32, 32), (5, 2)),
    "resnet56": Case("resnet56", 32, 256, (3, 32, 32), (5, 2)),
    "vgg16_cifar": Case("vgg16_cifar", 16, 128, (3, 32, 32), (4, 1.3)),
    "mobilenet_v1": Case("mobilenet_v1", 8, 8, (3, 224, 224), (3, None)),
}


# --- the other sides ----------------------------------------------------------------------------------


def read_by_layers(space: GeneSpace) -> set[int]:
    """Values that a layer mixes: where a mask has to be applied at the latest, and once is enough."""
    mixing = [op for op in space.ops if op.kind in ("conv", "linear") and not op.depthwise]
    return {op.inputs[0] for op in mixing} - {0}


def masked(space: GeneSpace, mask: Tensor, x: Tensor) -> Tensor:
    """mask float [genes], or [P, genes] with x [P * N, ...]: multiplied once before each layer that mixes channels."""
    lookup = torch.cat((mask, mask.new_zeros((*mask.shape[:-1], 1)), mask.new_ones((*mask.shape[:-1], 1))), -1)
    values, mixed = {0: x}, read_by_layers(space)
    last = {i: op for op in space.ops for i in op.inputs}
    for op in space.ops:
        y = op.run(*(values[i] for i in op.inputs))
        if op.output in mixed:
            m = lookup[..., space.values[op.output].genes]
            if m.dim() == 1:
                y = y * m.reshape(-1, *(1,) * (y.dim() - 2))
            else:
                m = m.reshape(len(m), 1, -1, *(1,) * (y.dim() - 2))
                y = y.unflatten(0, (len(m), -1)).mul_(m).flatten(0, 1)
        values[op.output] = y
        for i in op.inputs:
            if last[i] is op:
                del values[i]
    return values[space.output]


def sides(model: nn.Module, space: GeneSpace, masks: Tensor, x: Tensor) -> dict[str, Callable[[], Tensor]]:
    floats, small = masks.float(), [compact(model, mask, space) for mask in masks]
    last = [compact(model, mask, space).to(memory_format=torch.channels_last) for mask in masks]
    x_last = x.contiguous(memory_format=torch.channels_last)
    e = PopulationEvaluator(model, x)
    return {
        "fastkd": lambda: e.logits(masks, x),
        "sequential": lambda: torch.stack([masked(space, m, x) for m in floats]),
        "dense": lambda: masked(space, floats, x.repeat(len(masks), 1, 1, 1)).unflatten(0, (len(masks), -1)),
        "compact": lambda: torch.stack([m(x) for m in small]),
        "compact_last": lambda: torch.stack([m(x_last) for m in last]),
        "vmap": lambda: torch.func.vmap(lambda m: masked(space, m, x))(floats),
    }


# --- measuring ----------------------------------------------------------------------------------------


def gemm_rate() -> float:
    """Multiplications per second of a square product."""
    a, b = torch.randn(GEMM, GEMM), torch.randn(GEMM, GEMM)
    a @ b
    return GEMM ** 3 / min(seconds(lambda: a @ b) for _ in range(5))


def made(case: Case, seed: int = SEED) -> nn.Module:
    torch.manual_seed(seed)
    return build_cnn(case.network).eval()


def measure(name: str, budget: float, share: float) -> dict[str, Any]:
    case = CASES[name]
    images = max(1, round(case.images * share))
    model, generator = made(case), torch.Generator().manual_seed(SEED)
    x = torch.randn(images, *case.shape, generator=generator)
    e = PopulationEvaluator(model, x)
    masks = e.space.repair(e.space.random(case.population, 0.5, generator))
    every = sides(model, e.space, masks, x)
    skipped = {}
    # Input and result of the largest operation, for all at once.
    largest = 3 * 4 * case.population * images * max(torch.tensor(v.shape).prod().item() for v in e.space.values)
    if largest > 0.9 * available(torch.device("cpu")):
        skipped = {side: f"needs {largest / 1e9:.0f} GB" for side in ("dense", "vmap")}
    chosen = {side: run for side, run in every.items() if side not in skipped}
    expected, once = every["fastkd"](), {}
    for side, run in chosen.items():  # also warms up
        results = []
        once[side] = seconds(lambda: results.append(run()))
        off = float((results[0] - expected).norm() / expected.norm())
        assert off < 1e-4, f"{name}: {side} is off by {off}"
    rounds: list[dict[str, float]] = []
    rates = []
    for _ in range(min(MOST, max(LEAST, int(budget / sum(once.values()))))):
        rates.append(gemm_rate())
        rounds.append({side: seconds(run) for side, run in chosen.items()})
    ratios = {side: [r[side] / r["fastkd"] for r in rounds] for side in chosen}
    macs = int(e.space.macs(masks).sum()) * images
    rate = statistics.median(rates)
    ours = statistics.median(r["fastkd"] for r in rounds)
    steps = list(e._program.steps(e._network, masks.numpy()))
    return {
        "population": case.population, "images": images, "rounds": len(rounds), "skipped": skipped,
        "seconds": {side: statistics.median(r[side] for r in rounds) for side in chosen},
        "ratio": {side: statistics.median(v) for side, v in ratios.items()},
        "ratio_range": {side: [min(v), max(v)] for side, v in ratios.items()},
        "gemm_macs_per_s": rate, "macs": macs, "bound_s": macs / rate, "rate": macs / ours,
        "shared": sum(int(s.macs[1]) for s in steps) / sum(int(s.macs[2]) for s in steps),
    }


# --- a population that converges ----------------------------------------------------------------------


def generations(e: PopulationEvaluator, x: Tensor, y: Tensor, count: int, size: int) -> list[Tensor]:
    """The populations of a plain genetic algorithm with the published probabilities: roulette, one elite, copies
    0.2, two-point crossover 0.7, a flipped segment 0.1; fitness is accuracy plus half the removed share of genes."""
    g = torch.Generator().manual_seed(SEED)
    masks, seen = e.space.repair(e.space.random(size, 0.5, g)), []
    cuts = lambda: torch.randint(e.space.num_genes + 1, (2,), generator=g).sort().values.tolist()
    for _ in range(count):
        seen.append(masks)
        fitness = e.accuracy(masks, (x, y)) + 0.5 * (1 - masks.double().mean(1))
        chance = fitness / fitness.sum()
        children = [masks[fitness.argmax()]]
        while len(children) < size:
            kind = float(torch.rand((), generator=g))
            a, b = masks[torch.multinomial(chance, 2, generator=g)].clone()
            i, j = cuts()
            if kind < 0.7:
                a[i:j], b[i:j] = b[i:j].clone(), a[i:j].clone()
                children += [a, b]
            elif kind < 0.8:
                a[i:j] = ~a[i:j]
                children.append(a)
            else:
                children.append(a)
        masks = e.space.repair(torch.stack(children[:size]))
    return seen


def converging(count: int = 20, size: int = 32) -> dict[str, Any]:
    folder = Path(os.environ.get("FASTKD_DATA", ""))
    weights = folder / "weights" / "cifar10_resnet20.npz"
    if not weights.is_file():
        raise Absent("resnet20: no file weights/cifar10_resnet20.npz in $FASTKD_DATA")
    model = build_cnn("resnet20")
    load_weights(model, weights)
    images = data.images.load("cifar10")
    x, y = images.normalised(images.images["val"][:256]), images.labels["val"][:256]
    e = PopulationEvaluator(model.eval(), x)
    populations = generations(e, x, y, count, size)
    fast = PopulationEvaluator(model, x)
    bare = PopulationEvaluator(model, x, memo=False)
    rows, known = [], set()
    for masks in populations:
        fresh = []
        for mask in masks:
            key = mask.numpy().tobytes()
            if key not in known:
                known.add(key)
                fresh.append(mask)
        new = torch.stack(fresh).numpy() if fresh else None
        shared = 0 if new is None else sum(int(s.macs[2]) for s in fast._program.steps(fast._network, new))
        row = {"asked": len(masks), "new": len(fresh), "macs": int(e.space.macs(masks).sum()), "shared_macs": shared}
        row["fastkd"] = seconds(lambda: fast.accuracy(masks, (x, y)))
        row["alone"] = seconds(lambda: [bare.accuracy(mask, (x, y)) for mask in masks])
        rows.append(row)
    gain = lambda part, a, b: sum(r[a] for r in part) / sum(r[b] for r in part)
    third = count // 3
    return {"generations": count, "population": size, "rows": rows,
            "gain": gain(rows, "alone", "fastkd"), "gain_macs": gain(rows, "macs", "shared_macs"),
            "gain_last_third": gain(rows[-third:], "alone", "fastkd"),
            "gain_first_third": gain(rows[:third], "alone", "fastkd"),
            "new_share": gain(rows, "new", "asked")}


# --- the report ---------------------------------------------------------------------------------------


def row(name: str, r: dict[str, Any]) -> list[str]:
    case = CASES[name]

    def ratio(side: str) -> str:
        if side in r["skipped"]:
            return r["skipped"][side]
        low, high = r["ratio_range"][side]
        return f"{number(r['ratio'][side], 2)}x ({number(low, 2)}–{number(high, 2)})"

    form = min(("compact", "compact_last"), key=lambda s: r["ratio"][s])
    best = min(v for side, v in r["ratio"].items() if side not in ("fastkd", "sequential"))
    wanted = f"{case.target[0]:g}x" + (f", {case.target[1]:g}x" if case.target[1] else "")
    return [f"{name} (P={case.population}, N={r['images']})", number(1e3 * r["seconds"]["fastkd"]), ratio("sequential"),
            ratio("dense"), ratio(form), ratio("vmap"), f"{number(best, 2)}x", wanted,
            f"{r['rate'] / 1e9:.0f}", f"{r['bound_s'] / r['seconds']['fastkd']:.0%}"]


def report(results: dict[str, Any]) -> str:
    info, cases = results["environment"], results["cases"]
    done = {name: r for name, r in cases.items() if name in CASES}
    head = ["case", "fastkd, ms", "sequential", "dense batch", "compact loop", "vmap", "best of them", "target",
            "GMAC/s", "of GEMM"]
    parts = [
        f"# A population of masked networks, on {info['cpu']}",
        f"{info['threads']} threads, instruction set {info['isa']}; fastkd {info['fastkd']}, torch {info['torch']}, "
        f"Python {info['python']}. Random masks of density 0.5, float32, all logits.",
        table(head, [row(name, r) for name, r in done.items()]),
        "Each column is the time of that side over fastkd's: medians (and range) of "
        f"{min((r['rounds'] for r in done.values()), default=0)} or more rounds, in each of which all sides run in "
        "turn. *Target*: sequential, best of the others. *GMAC/s* counts the multiplications of the compact networks; "
        f"*of GEMM* is that rate over a product of {GEMM} x {GEMM} matrices, "
        + ", ".join(f"{r['gemm_macs_per_s'] / 1e9:.0f} in {name}" for name, r in done.items()) + ".",
    ]
    if "converging" in cases:
        c = cases["converging"]
        parts += ["## A population that converges", (
            "ResNet-20 with published weights, 256 images of CIFAR-10's validation part, "
            f"{c['generations']} generations of {c['population']} from a genetic algorithm (see `generations`). "
            f"{c['new_share']:.0%} of individuals were new. "
            f"Memo and shared beginnings, against every individual by itself in the same executor: "
            f"**{number(c['gain'], 3)}x** (first third of the generations {number(c['gain_first_third'], 3)}x, last "
            f"{number(c['gain_last_third'], 3)}x); in multiplications {number(c['gain_macs'], 3)}x.")]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", nargs="*", help=", ".join((*CASES, "converging")))
    parser.add_argument("--seconds", type=float, default=120, help="of the rounds of a case, about")
    parser.add_argument("--share", type=float, default=1.0, help="of the images; the table says how many")
    args = parser.parse_args()
    known = json.loads(RESULTS.read_text())["cases"] if args.cases and RESULTS.exists() else {}
    results: dict[str, Any] = {"environment": environment(torch.device("cpu")), "cases": known}
    for name in args.cases or (*CASES, "converging"):
        with torch.inference_mode():
            results["cases"][name] = converging() if name == "converging" else measure(name, args.seconds, args.share)
        results["cases"] = {n: results["cases"][n] for n in (*CASES, "converging") if n in results["cases"]}
        print(name, json.dumps(results["cases"][name]), flush=True)
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
        RESULTS.with_suffix(".md").write_text(report(results))


if __name__ == "__main__":
    main()
