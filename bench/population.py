"""Populations of masked networks, evaluated by fastkd and in the ways in which it is done without; layers of them."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastkd import PopulationEvaluator, _ops, data, masked_conv2d
from fastkd.models import build_cnn, load_weights
from fastkd.population import GeneSpace, compact

from .cases import SEED, Absent

Sides = dict[str, Callable[[], Tensor]]

FORMATS = {"torch": torch.contiguous_format, "torch_last": torch.channels_last}


@dataclass(frozen=True)
class Case:
    network: str
    population: int
    images: int
    shape: tuple[int, ...]
    asked: tuple[float, float | None]  # the sequential loop and the best baseline, over fastkd


CASES = {
    "lenet": Case("lenet", 64, 1000, (1, 28, 28), (10, 3)),
    "resnet20": Case("resnet20", 32, 256, (3, 32, 32), (5, 2)),
    "resnet56": Case("resnet56", 32, 256, (3, 32, 32), (5, 2)),
    "vgg16_cifar": Case("vgg16_cifar", 16, 128, (3, 32, 32), (4, 1.3)),
    "mobilenet_v1": Case("mobilenet_v1", 8, 8, (3, 224, 224), (3, None)),
}


def new_network(network: str) -> nn.Module:
    torch.manual_seed(SEED)
    return build_cnn(network).eval()


class Masked:
    """A network whose activations are multiplied by a mask, once before each layer that mixes channels."""

    def __init__(self, space: GeneSpace, device: torch.device) -> None:
        self.space = space
        mixing = [op for op in space.ops if op.kind in ("conv", "linear") and not op.depthwise]
        self.genes = {v: space.values[v].genes.to(device) for v in {op.inputs[0] for op in mixing} - {0}}
        self.last = {i: op for op in space.ops for i in op.inputs}

    def __call__(self, mask: Tensor, x: Tensor) -> Tensor:
        """mask of x.dtype [genes], or [P, genes] with x [P * N, ...]."""
        lookup = torch.cat((mask, mask.new_zeros((*mask.shape[:-1], 1)), mask.new_ones((*mask.shape[:-1], 1))), -1)
        values = {0: x}
        for op in self.space.ops:
            y = op.run(*(values[i] for i in op.inputs))
            if op.output in self.genes:
                m = lookup[..., self.genes[op.output]]
                if m.dim() == 1:
                    y = y * m.reshape(-1, *(1,) * (y.dim() - 2))
                else:
                    m = m.reshape(len(m), 1, -1, *(1,) * (y.dim() - 2))
                    y = y.unflatten(0, (len(m), -1)).mul_(m).flatten(0, 1)
            values[op.output] = y
            for i in op.inputs:
                if self.last[i] is op:
                    del values[i]
        return values[self.space.output]


def sides(e: PopulationEvaluator, model: nn.Module, masks: Tensor, x: Tensor) -> Sides:
    """All logits of a population, by every side. The masks of fastkd are on the CPU, as those of a search are."""
    masked, floats = Masked(e.space, x.device), masks.to(x.device, x.dtype)
    small = [compact(model, mask, e.space) for mask in masks]
    last = [compact(model, mask, e.space).to(memory_format=torch.channels_last) for mask in masks]
    x_last = x.contiguous(memory_format=torch.channels_last)
    return {
        "fastkd": lambda: e.logits(masks, x),
        "sequential": lambda: torch.stack([masked(m, x) for m in floats]),
        "dense": lambda: masked(floats, x.repeat(len(masks), 1, 1, 1)).unflatten(0, (len(masks), -1)),
        "compact": lambda: torch.stack([m(x) for m in small]),
        "compact_last": lambda: torch.stack([m(x_last) for m in last]),
        "vmap": lambda: torch.func.vmap(lambda m: masked(m, x))(floats),
    }


# --- single layers ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layer:
    """Stride 1; `kept` of twice as many channels, before and after."""

    kind: str  # 3x3, 1x1, depthwise
    kept: int
    size: int
    images: int
    asked: float | None = None  # multiplications per second over those of a square product

    def __str__(self) -> str:
        return f"{self.kind}-{self.kept}-{self.size}x{self.size}"

    @property
    def kernel(self) -> int:
        return 1 if self.kind == "1x1" else 3

    def macs(self, images: int) -> int:
        """Of two individuals."""
        return 2 * images * self.size**2 * self.kernel**2 * self.kept * (1 if self.kind == "depthwise" else self.kept)


_ASKED = {64: 1.2, 63: 1.2, 16: 0.8, 15: 0.8, 17: 0.8, 8: 0.4, 7: 0.4, 9: 0.4}
LAYERS = [
    *(Layer("3x3", kept, size, 256, asked) for size in (32, 16, 8) for kept, asked in _ASKED.items()),
    *(Layer("3x3", kept, size, 128) for kept, size in ((128, 8), (256, 4), (256, 2))),  # VGG-16, CIFAR
    *(Layer("1x1", kept, size, 8) for kept, size in ((64, 56), (128, 28), (256, 14), (512, 7))),  # MobileNet, 224
    *(Layer("depthwise", kept, size, 8) for kept, size in ((16, 112), (64, 56), (128, 28), (256, 14), (512, 7))),
]
DEPTH = 5  # layers in a row


def layer_sides(layer: Layer, images: int, device: torch.device, dtype: torch.dtype) -> Sides:
    """Two individuals, one keeps what the other lacks, so that there is work for two threads however few the images.
    On the CPU `fastkd` is DEPTH such layers in a row and `alone` is one: what their difference leaves out is the
    gathering of the kept channels and the writing of the result, which only the ends of a network have. On a GPU
    `fastkd` is one call of `masked_conv2d`, and `dense` torch's convolution of all channels.

    What the first one has: from `alone` (`fastkd` on a GPU) all channels, from the others the kept ones.
    """
    channels, kernel = 2 * layer.kept, layer.kernel
    g = torch.Generator().manual_seed(SEED)
    mask = torch.zeros(channels, dtype=torch.bool)
    mask[torch.randperm(channels, generator=g)[: layer.kept]] = True
    masks = torch.stack((mask, ~mask))
    depthwise = layer.kind == "depthwise"
    rows = 1 if depthwise else channels
    x = torch.randn(images, channels, layer.size, layer.size, generator=g).to(device, dtype)
    weight = torch.randn(channels, rows, kernel, kernel, generator=g).to(device, dtype)
    weight /= math.sqrt(kernel**2 * (1 if depthwise else layer.kept))  # in a row, activations keep their size
    kept = [m.nonzero()[:, 0].to(device) for m in masks]
    compacted = [(x[:, at], weight[at] if depthwise else weight[at][:, at]) for at in kept]

    def conv(pairs: list[tuple[Tensor, Tensor]], form: torch.memory_format) -> Callable[[], Tensor]:
        pairs = [(x.contiguous(memory_format=form), w.contiguous(memory_format=form)) for x, w in pairs]

        def run() -> Tensor:
            every = [F.conv2d(x, w, padding=kernel // 2, groups=len(w) if depthwise else 1) for x, w in pairs]
            return every[0]

        return run

    every: Sides = {side: conv(compacted, form) for side, form in FORMATS.items()}
    if device.type == "cpu":

        def chain(depth: int) -> Callable[[], Tensor]:
            value = (channels, layer.size, layer.size, list(range(channels)))
            nodes = [
                {
                    "op": "conv",
                    "inputs": (k,),
                    "output": k + 1,
                    "weight": weight,
                    "groups": channels // rows,
                    "padding": (kernel // 2,) * 2,
                }
                for k in range(depth)
            ]
            network = _ops.Network([value] * (depth + 1), nodes, channels, dtype)
            return lambda: network(masks, x)[0]

        return {"fastkd": chain(DEPTH), "alone": chain(1), **every}
    masks = masks.to(device)
    dense = {f"dense{side.removeprefix('torch')}": conv([(x, weight)] * 2, form) for side, form in FORMATS.items()}
    return {
        "fastkd": lambda: masked_conv2d(
            x, weight, in_mask=masks, out_mask=masks, padding=kernel // 2, groups=channels // rows
        )[0],
        **every,
        **dense,
    }


# --- a population that converges ----------------------------------------------------------------------


def trained(share: float, device: torch.device) -> tuple[nn.Module, Tensor, Tensor]:
    """ResNet-20 with published weights, and images of CIFAR-10's validation part with their labels."""
    weights = Path(os.environ.get("FASTKD_DATA", "")) / "weights" / "cifar10_resnet20.npz"
    if not weights.is_file():
        raise Absent("no file weights/cifar10_resnet20.npz in $FASTKD_DATA")
    model = build_cnn("resnet20")
    load_weights(model, weights)
    images, count = data.images.load("cifar10"), max(1, round(256 * share))
    x, y = images.normalised(images.images["val"][:count]), images.labels["val"][:count]
    return model.eval().to(device), x.to(device), y.to(device)


def generations(e: PopulationEvaluator, x: Tensor, y: Tensor, count: int, size: int) -> list[Tensor]:
    """The populations of a plain genetic algorithm with the published probabilities: roulette, one elite, copies
    0.2, two-point crossover 0.7, a flipped segment 0.1; fitness is accuracy plus half the removed share of genes."""
    g = torch.Generator().manual_seed(SEED)
    masks, seen = e.space.repair(e.space.random(size, 0.5, g)), []
    cuts = lambda: torch.randint(e.space.num_genes + 1, (2,), generator=g).sort().values.tolist()
    for _ in range(count):
        seen.append(masks)
        fitness = e.accuracy(masks, (x, y)).cpu() + 0.5 * (1 - masks.double().mean(1))
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
