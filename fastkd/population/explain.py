"""How a population is evaluated: what the executor does at once, and what masks and sharing save."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .engine import Engine
from .masks import distinct

__all__ = ["Work", "explanation", "work"]


@dataclass
class Work:
    """What the executor does at once, for a population."""

    name: str
    kernel: str
    shape: tuple[int, ...]
    kept: float
    """Mean number of channels."""
    macs: NDArray[np.int64]
    """int64 [3]: of full networks, masked ones, and with equal beginnings shared."""


def work(engine: Engine, masks: Tensor) -> Iterator[Work]:
    """What a population of distinct masks bool [P, genes] costs for one image, in the order in which it is done."""
    program, bits = engine.program, masks.numpy()
    order, producer, seen = engine.network.outline()
    key = bits[:, order]
    rows = np.lexsort(key.T[::-1]) if bits.shape[1] else np.arange(len(bits))
    key = key[rows]
    agree = np.zeros(len(rows), np.int64)  # with the one before
    if bits.shape[1]:
        differ = key[1:] != key[:-1]
        agree[1:] = np.where(differ.any(1), differ.argmax(1), bits.shape[1])
    lookup = np.concatenate((bits[rows], np.zeros((len(rows), 1), bool), np.ones((len(rows), 1), bool)), 1)

    def kept(value: int) -> NDArray[np.bool_]:
        return lookup[:, program.values[value][3]]

    for k, depends in enumerate(seen):
        nodes = [n for n in program.nodes if producer[n["output"]] == k]
        main, out = nodes[0], nodes[-1]["output"]
        on = kept(out)
        macs = np.zeros(3, np.int64)
        if main["op"] == "conv":
            weight, positions = main["weight"], program.values[out][1] * program.values[out][2]
            groups = main.get("groups", 1)
            taps = weight[0, 0].numel() if weight.dim() == 4 else 1
            inputs = np.ones(len(rows), np.int64) if _depthwise(main) else kept(main["inputs"][0]).sum(1) // groups
            starts = np.flatnonzero((agree < depends) | (np.arange(len(rows)) == 0))
            union = np.logical_or.reduceat(on, starts, axis=0).sum(1)
            macs[:] = (
                len(rows) * weight.numel() * positions,
                (on.sum(1) * inputs).sum() * taps * positions,
                (union * inputs[starts]).sum() * taps * positions,
            )
        kernel = " + ".join([_described(main), *(n.get("name", n["op"]) for n in nodes[1:])])
        yield Work(program.name[main["output"]], kernel, program.values[out][:3], float(on.sum(1).mean()), macs)


def explanation(engine: Engine, masks: Tensor, rate: float) -> str:
    """The text of :meth:`fastkd.PopulationEvaluator.explain`."""
    masks = masks[distinct(masks).first]
    lines: list[tuple[str, ...]] = [("operation", "kernel", "result", "kept", "whole", "masked", "shared")]
    totals = np.zeros(3, np.int64)
    for step in work(engine, masks):
        totals += step.macs
        numbers = [f"{n:,}" if n else "" for n in step.macs]
        lines.append((step.name, step.kernel, "x".join(map(str, step.shape)), f"{step.kept:.1f}", *numbers))
    lines.append(("total", "", "", "", *(f"{n:,}" for n in totals.tolist())))
    wide = [max(len(line[i]) for line in lines) for i in range(7)]
    text = [
        "  ".join(
            cell.ljust(width) if i < 2 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, wide, strict=True))
        ).rstrip()
        for line in lines
    ]
    full, masked, shared = (max(int(n), 1) for n in totals)
    threads = torch.get_num_threads()
    text += [
        f"{len(masks)} distinct individuals; saved by masks {full / masked:.2f}x, by sharing "
        f"{masked / shared:.2f}x, together {full / shared:.2f}x",
        f"predicted: {shared / (rate * threads) * 1e3:.3g} ms per image, at {rate / 1e9:g} G multiplications "
        f"per second on each of {threads} threads",
    ]
    if engine.last is not None:
        call = engine.last
        text.append(
            f"last call: {call.individuals} individuals, {call.images} images, {call.seconds:.3g} s, "
            f"{call.macs / max(call.seconds, 1e-9) / 1e9:.3g} G multiplications per second (masked)"
        )
    return "\n".join(text)


def _depthwise(node: dict[str, Any]) -> bool:
    return bool(node.get("groups", 1) > 1 and node["weight"].shape[1] == 1)


def _described(node: dict[str, Any]) -> str:
    if node["op"] == "conv":
        if node["weight"].dim() == 2:
            return "linear"
        size = "x".join(map(str, node["weight"].shape[2:]))
        stride = f" / {node['stride'][0]}" if node["stride"] != (1, 1) else ""
        return f"{'depthwise' if _depthwise(node) else 'conv'} {size}{stride}"
    if node["op"] in ("select", "flatten"):
        return "no work"
    name: str = node.get("name", node["op"])
    return name
