"""A step of a genetic algorithm, without the fitness: fastkd, pymoo, and one copy of the population.

``python -m bench.evolution [--pymoo P]`` writes results/evolution.json and .md, on the CPU. 10,000 individuals of
10,000 genes; pymoo at P individuals of P genes, and fastkd there too.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from fastkd.evolve import ECS, GA, NSGA2, Limits, Pymoo, Scores, operators
from fastkd.population import GeneSpace, trace

from .memory import _ROOT
from .report import table
from .test_lsp import environment, seconds

RESULTS = _ROOT / "bench" / "results" / "evolution.json"
ROUNDS = 7


def space_of(genes: int, groups: int = 20) -> GeneSpace:
    """Of 1x1 convolutions, with so many genes."""
    layers: list[nn.Module] = []
    width = 3
    for _ in range(groups):
        layers += [nn.Conv2d(width, genes // groups, 1), nn.ReLU()]
        width = genes // groups
    return trace(nn.Sequential(*layers, nn.Flatten(), nn.Linear(width, 10)).eval(), torch.zeros(2, 3, 1, 1))


def scored(masks: Tensor) -> Scores:
    cost = masks.sum(1).double() / masks.shape[1]
    quality = torch.rand(len(masks), dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return Scores(quality, torch.stack((-quality, cost), 1))


def steps(size: int, pymoo: bool) -> dict[str, Callable[[], object]]:
    space, g = space_of(size), torch.Generator().manual_seed(0)
    masks = operators.initial(size, space.num_genes, 0.5, g)
    scores, free, limits = scored(masks), Limits(space), Limits(space, {"macs": 0.2})
    both = Scores(*(torch.cat((a, b)) for a, b in zip(scores, scored(masks.roll(1, 0)), strict=True)))
    out: dict[str, Callable[[], object]] = {"copy of the population": masks.clone}
    algorithms = {
        "ECS as published": ECS(),
        "GA: tournament, uniform crossover, bits": GA(),
        "GA: adaptive rates, group crossover": GA(rates="adaptive", crossover_by="group"),
        "NSGA-II": NSGA2(),
    }
    for name, algorithm in algorithms.items():
        out[name] = lambda algorithm=algorithm: algorithm.ask(free, masks, scores, g)  # type: ignore[misc]
    widths = GA(genome="widths")
    out["GA over widths, within 20 % of the MACs"] = lambda: widths.ask(limits, masks, scores, g)
    out["NSGA-II: survival"] = lambda: NSGA2().tell(masks, masks.roll(1, 0), both)
    out["repair to 20 % of the MACs, all over it"] = lambda: limits.repair(masks)
    if pymoo:
        out["pymoo NSGA-II, with survival"] = theirs(free, size)
    return out


def theirs(limits: Limits, size: int) -> Callable[[], object]:
    from pymoo.algorithms.moo.nsga2 import NSGA2 as Theirs
    from pymoo.operators.crossover.ux import UX
    from pymoo.operators.mutation.bitflip import BitflipMutation
    from pymoo.operators.sampling.rnd import BinaryRandomSampling

    algorithm = Pymoo(
        Theirs(
            pop_size=size,
            sampling=BinaryRandomSampling(),
            crossover=UX(),
            mutation=BitflipMutation(),
            eliminate_duplicates=False,
        )
    )
    first = algorithm.initial(limits, size, 2, torch.Generator().manual_seed(0), torch.device("cpu"))
    state = [first[:0], first, scored(first)]

    def step() -> None:
        old, children, scores = state
        masks = torch.cat((old, children))  # type: ignore[arg-type]
        stay = algorithm.tell(old, children, scores)  # type: ignore[arg-type]
        kept = Scores(*(x[stay] for x in scores))
        children = algorithm.ask(limits, masks[stay], kept, torch.Generator())
        new = scored(children)
        state[:] = [masks[stay], children, Scores(*(torch.cat((a, b)) for a, b in zip(kept, new, strict=True)))]

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pymoo", type=int, default=1000)
    args = parser.parse_args()
    results: dict[str, Any] = {"environment": environment(torch.device("cpu")), "sizes": {}}
    for size in (args.pymoo, 10_000):
        functions = steps(size, size == args.pymoo and find_spec("pymoo") is not None)
        taken: dict[str, list[float]] = {name: [] for name in functions}
        for k in range(ROUNDS + 1):  # in turn, and the first round warms up
            for name, function in functions.items():
                spent = seconds(function)
                if k:
                    taken[name].append(spent)
        results["sizes"][size] = taken
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    env = results["environment"]
    text = [
        f"{env['cpu']}, {env['threads']} threads, torch {env['torch']}; seconds, median of {ROUNDS} rounds (least "
        "to most).\n"
    ]
    for size, taken in results["sizes"].items():
        body = [[name, f"{statistics.median(x):.3g}", f"{min(x):.3g} to {max(x):.3g}"] for name, x in taken.items()]
        text.append(table([f"{size:,} individuals of {size:,} genes", "seconds", "spread"], body) + "\n")
    RESULTS.with_suffix(".md").write_text("\n".join(text))
    print("\n".join(text))


if __name__ == "__main__":
    main()
