"""What a network looks like to a population of masks: operations, the channels of every value, genes.

Every channel of every value (the result of an operation) carries one number:

- a gene, 0 .. num_genes - 1. Where the gene is off, the channel does not exist, here and wherever the
  same gene appears: the truth is the physically smaller network;
- ``KEPT``: never removed (the network's input, its outputs);
- ``ZERO``: constantly zero, such as the channels that an option-A shortcut adds. In a compact layout
  these never exist.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .._checks import integer

__all__ = [
    "COSTS",
    "KEPT",
    "ZERO",
    "GeneSpace",
    "Group",
    "Kind",
    "Op",
    "UnsupportedModelError",
    "Value",
    "filter_norms",
]

KEPT, ZERO = -1, -2
COSTS = ("filters", "parameters", "macs")

Kind = Literal[
    "conv",
    "linear",
    "batch_norm",
    "prelu",
    "elementwise",
    "spatial",
    "softmax",
    "flatten",
    "pad",
    "add",
    "mul",
    "concat",
    "take",
]


class UnsupportedModelError(ValueError):
    """The model does something whose channels fastkd cannot follow, or that has no kernel."""


@dataclass(frozen=True, eq=False)
class Value:
    """The result of an operation."""

    name: str
    shape: tuple[int, ...]
    """Without the batch: (C, ...)."""
    genes: Tensor
    """int64 [C]: gene, KEPT or ZERO."""


@dataclass(frozen=True, eq=False)
class Op:
    """One step of the network: ``run(*inputs)`` gives its output.

    ===============  =========================================================================================
    kind             what
    ===============  =========================================================================================
    ``conv``         ``module`` is an nn.Conv2d; ``depthwise`` if each channel has filters of its own
    ``linear``       ``module`` is an nn.Linear, of [C]
    ``batch_norm``   ``module`` is an nn.BatchNorm2d or 1d with running statistics
    ``prelu``        ``module`` is an nn.PReLU
    ``elementwise``  ``function(x, **attributes)``: each number by itself, such as F.relu
    ``spatial``      ``function(x, **attributes)``: each channel by itself, such as F.max_pool2d, torch.mean
                     over positions, :func:`fastkd.population.operations.at_positions` (slices of H and W)
    ``softmax``      over channels, all of them KEPT
    ``flatten``      [C, H, W] -> [C * H * W]: each channel H * W times
    ``pad``          ZERO channels before and after; nothing in a compact layout
    ``add``          of two values; ZERO channels take part as nothing, all others carry the same gene.
                     Compact inputs are aligned by the number of the channel in the full value
    ``mul``          of two values of the same channels; positions broadcast (gating)
    ``concat``       along channels
    ``take``         some channels, in some order: slices, pieces of a chunk or split, shuffles
    ===============  =========================================================================================
    """

    kind: Kind
    name: str
    """Path of the module, or the name of the call."""
    inputs: tuple[int, ...]
    """Into ``GeneSpace.values``."""
    output: int
    module: nn.Module | None = None
    function: Callable[..., Tensor] | None = None
    attributes: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of function; defaults are filled in for modules only, a pooling's stride always."""
    scope: str = ""
    """Path of the module whose forward calls it."""
    line: str = ""
    """Where in the model's source."""
    fixed: bool = False
    """The model's source states a number of channels here, which a smaller network has to change."""

    @property
    def depthwise(self) -> bool:
        m = self.module
        return isinstance(m, nn.Conv2d) and m.groups == m.in_channels and m.groups > 1

    def run(self, *inputs: Tensor) -> Tensor:
        if self.module is not None:
            y: Tensor = self.module(*inputs)
            return y
        assert self.function is not None
        return self.function(*inputs, **self.attributes)


@dataclass(frozen=True)
class Group:
    """Genes that the same modules make and the same values hold, contiguous: start .. start + size - 1."""

    name: str
    modules: tuple[str, ...]
    """The convolutions and linear layers, in the network's order; the first one gives the name."""
    start: int
    size: int


class GeneSpace:
    """The genes of a traced network, and the network as a list of operations; from :func:`trace`.

    A population is a mask bool [P, num_genes]; where one individual makes sense, [num_genes] does too.

    >>> import fastkd.population, torch
    >>> model = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.Flatten(), torch.nn.Linear(64, 3)).eval()
    >>> space = fastkd.population.trace(model, torch.zeros(1, 1, 6, 6))
    >>> masks = space.repair(space.random(5, 0.5), k_min=2)
    >>> bool((masks.sum(1) >= 2).all()), space.macs(space.ones(1))
    (True, tensor([768]))

    Attributes:
        ops: in an order in which they can be run.
        values: value 0 is the network's input, `output` is its output.
        groups: in the network's order.
        num_genes: their total size.
        l1: float64 [num_genes], the sum of the absolute weights of all filters that a gene stands for, when
            the network was traced, or :meth:`refresh` was called.
    """

    def __init__(
        self,
        ops: Sequence[Op],
        values: Sequence[Value],
        output: int,
        groups: Sequence[Group],
        l1: Tensor,
        parameters: int,
    ) -> None:
        self.ops, self.values, self.output, self.groups, self.l1 = tuple(ops), tuple(values), output, tuple(groups), l1
        self.num_genes = sum(group.size for group in groups)
        modules = {id(op.module): op.module for op in ops if op.module is not None}
        self._outside = parameters - sum(p.numel() for m in modules.values() for p in m.parameters())
        rows: dict[bytes, int] = {}
        self._row = [rows.setdefault(value.genes.numpy().tobytes(), len(rows)) for value in values]
        self._first = [self._row.index(row) for row in range(len(rows))]
        # How often each gene occurs; float64 has exact products of matrices of such sizes, and BLAS.
        self._count = torch.zeros(len(rows), self.num_genes, dtype=torch.float64)
        self._kept = torch.zeros(len(rows), dtype=torch.float64)
        for row, value in enumerate(values[i] for i in self._first):
            on = value.genes[value.genes >= 0]
            self._count[row].index_add_(0, on, torch.ones(len(on), dtype=torch.float64))
            self._kept[row] = (value.genes == KEPT).sum()

    # --- the model ---------------------------------------------------------------------------------

    def require(self, model: nn.Module) -> None:
        """Raises ValueError if this is the trace of another model."""
        modules = dict(model.named_modules())
        for op in self.ops:
            if op.module is not None and modules.get(op.name) is not op.module:
                raise ValueError(f"example_input is the trace of another model: its {op.name} is not this model's")

    def refresh(self) -> None:
        """Reads `l1` anew, from the weights as they are now: for weights that were loaded after the trace."""
        self.l1 = filter_norms(self.ops, self.values, self.num_genes)

    # --- populations -------------------------------------------------------------------------------

    def check(self, masks: Tensor, *, empty: bool = False) -> Tensor:
        """The masks as [P, num_genes], if they are a population.

        Args:
            empty: values without any channel are allowed.

        Raises:
            TypeError, ValueError: wrong dtype, shape or P = 0; or a value is left without channels.
        """
        if not isinstance(masks, Tensor) or masks.dtype != torch.bool:
            got = masks.dtype if isinstance(masks, Tensor) else type(masks).__name__
            raise TypeError(f"masks must be a torch.bool tensor, got {got}")
        if masks.dim() not in (1, 2) or masks.shape[-1] != self.num_genes:
            raise ValueError(
                f"masks must have shape [P, {self.num_genes}] or [{self.num_genes}], got {list(masks.shape)}"
            )
        masks = masks[None] if masks.dim() == 1 else masks
        if len(masks) == 0:
            raise ValueError("masks must have at least one individual, got P = 0")
        if not empty:
            self._counts(masks)
        return masks

    def ones(self, population: int) -> Tensor:
        """bool [population, num_genes]: the whole network each time."""
        return torch.ones(integer("population", population, 1), self.num_genes, dtype=torch.bool)

    def random(self, population: int, density: float | Tensor, generator: torch.Generator | None = None) -> Tensor:
        """bool [population, num_genes]: every gene is on with probability `density`, not repaired.

        Args:
            density: in [0, 1], or float [population], one for each individual.
            generator: on the CPU.
        """
        d = torch.as_tensor(density, dtype=torch.float64)
        if d.dim() > 1 or (d.dim() == 1 and len(d) != population):
            raise ValueError(f"density must be a number or have shape [{population}], got {list(d.shape)}")
        if not bool(((d >= 0) & (d <= 1)).all()):
            raise ValueError(f"density must be in [0, 1], got {density}")
        size = (integer("population", population, 1), self.num_genes)
        return torch.rand(size, generator=generator, dtype=torch.float64) < d.reshape(-1, 1)

    def repair(self, masks: Tensor, k_min: int = 1) -> Tensor:
        """A copy in which every value has at least k_min channels, or all it can have.

        Values are looked at in the network's order; the missing channels come back in the order of
        ``l1``, largest first, those of equal norm in the order of genes.
        """
        integer("k_min", k_min, 1)
        population = self.check(masks, empty=True).clone()
        single, masks = masks.dim() == 1, population
        have, count = self._counts(masks, empty=True), self._count.to(masks.device).long()
        most = self._counts(torch.ones_like(masks[:1]))[0]
        order = self.l1.argsort(descending=True, stable=True).to(masks.device)
        for row, need in enumerate(most.clamp(max=k_min).tolist()):
            if not bool((have[:, row] < need).any()):
                continue
            for gene in order[count[row][order] > 0].tolist():
                back = (have[:, row] < need) & ~masks[:, gene]
                masks[:, gene] |= back
                have += back[:, None] * count[:, gene]
                if not bool((have[:, row] < need).any()):
                    break
        return masks[0] if single else masks

    # --- costs -------------------------------------------------------------------------------------

    def channels(self, masks: Tensor) -> Tensor:
        """int64 [P, len(values)]: how many channels of each value exist."""
        return self._counts(self.check(masks, empty=True), empty=True)[:, self._row]

    def macs(self, masks: Tensor) -> Tensor:
        """int64 [P]: multiplications of convolutions and linear layers for one image."""
        return self.cost("macs", self._counts(self.check(masks, empty=True))[:, self._row])

    def parameters(self, masks: Tensor) -> Tensor:
        """int64 [P]: those of the compact network, with modules that take no part."""
        return self.cost("parameters", self._counts(self.check(masks, empty=True))[:, self._row])

    def filters(self, masks: Tensor) -> Tensor:
        """int64 [P]: outputs of all convolutions and linear layers."""
        return self.cost("filters", self._counts(self.check(masks, empty=True))[:, self._row])

    def cost(self, name: str, channels: Tensor) -> Tensor:
        """int64 [P]: "macs", "parameters" or "filters" of networks with so many channels, as of :meth:`channels`."""
        if name not in COSTS:
            raise ValueError(f"a cost must be one of {', '.join(COSTS)}, got {name!r}")
        have = channels
        total = torch.zeros(len(have), dtype=torch.int64, device=have.device)
        if name == "parameters":
            total += self._outside
        for op in self.ops:
            m, out = op.module, have[:, op.output]
            if op.kind in ("conv", "linear"):
                if name == "macs":
                    total += math.prod(self.values[op.output].shape[1:]) * _weights(op, have)
                elif name == "filters":
                    total += out
                else:
                    total += _weights(op, have) + (out if m is not None and m.bias is not None else 0)
            elif name == "parameters" and isinstance(m, nn.PReLU):
                total += out if m.num_parameters > 1 else 1
            elif name == "parameters" and m is not None:
                total += len(list(m.parameters())) * out  # scale and shift
        return total

    def kept(self, value: int, mask: Tensor) -> Tensor:
        """int64, ascending: the channels of a value that exist in the compact network of mask [num_genes].

        A compact value has these channels in this order. Inputs of an addition are aligned by these numbers.
        """
        lookup = torch.cat((mask, mask.new_tensor([False, True])))  # at -2 ZERO, at -1 KEPT
        return lookup[self.values[value].genes.to(mask.device)].nonzero()[:, 0]

    def _counts(self, masks: Tensor, *, empty: bool = False) -> Tensor:
        """How many channels exist, int64 [P, rows]; a row stands for all values with the same genes."""
        have = (masks.double() @ self._count.t().to(masks.device) + self._kept.to(masks.device)).long()
        if not empty and not bool(have.all()):
            p, row = (have == 0).nonzero()[0].tolist()
            raise ValueError(
                f"masks[{p}] leaves {self.values[self._first[row]].name} without any channel: use repair(masks)"
            )
        return have

    # --- printing ----------------------------------------------------------------------------------

    def table(self, mask: Tensor | None = None) -> str:
        """A line per group: its genes (of an individual: how many are on), the first module and how many more."""
        lines = []
        for group in self.groups:
            size = f"{group.size}"
            if mask is not None:
                size = f"{int(mask[group.start : group.start + group.size].sum())} of {size}"
            more = f" and {len(group.modules) - 1} more" if len(group.modules) > 1 else ""
            lines.append((group.name, size, f"{group.modules[0]}{more}"))
        lines.insert(0, ("group", "genes", "modules"))
        wide = [max(len(line[i]) for line in lines) for i in range(2)]
        chosen = self.ones(1) if mask is None else self.check(mask)[:1]
        return "\n".join(
            [
                *(f"{a:<{wide[0]}}  {b:>{wide[1]}}  {c}".rstrip() for a, b, c in lines),
                f"{int(chosen.sum())} of {self.num_genes} genes, "
                f"{int(self.parameters(chosen)):,} parameters, {int(self.macs(chosen)):,} MACs",
            ]
        )

    def __str__(self) -> str:
        return self.table()


def filter_norms(ops: Sequence[Op], values: Sequence[Value], num_genes: int) -> Tensor:
    """float64 [num_genes], the sum of the absolute weights of all filters that a gene stands for."""
    l1 = torch.zeros(num_genes, dtype=torch.float64)
    for op in ops:
        if op.kind not in ("conv", "linear") or op.depthwise:
            continue
        assert isinstance(op.module, (nn.Conv2d, nn.Linear))
        weight = op.module.weight.detach().flatten(1)
        norms = torch.linalg.vector_norm(weight, 1, 1, dtype=torch.float64).cpu()
        on = values[op.output].genes >= 0
        l1.index_add_(0, values[op.output].genes[on], norms[on])
    return l1


def _weights(op: Op, have: Tensor) -> Tensor:
    """int64 [P]: how many weights a convolution or linear layer has left, given the channels [P, values]."""
    a, b, m = have[:, op.inputs[0]], have[:, op.output], op.module
    if not isinstance(m, nn.Conv2d):
        return a * b
    window = m.kernel_size[0] * m.kernel_size[1]
    return b * window if op.depthwise else a * b // m.groups * window
