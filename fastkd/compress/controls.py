"""What a search has to be better than: structured pruning without one."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ..evolve import Limits
from ..evolve.limits import largest
from ..lab.settings import ConfigError
from ..population import GeneSpace

__all__ = ["CONTROLS", "control"]

CONTROLS = ("l1", "torch-pruning")


def control(name: str, model: nn.Module, example_input: Tensor, limits: Limits) -> Tensor:
    """The mask of a control at a budget, bool [genes].

    Args:
        name: "l1", the same fraction of every layer, its filters of largest l1 (arXiv:1608.08710); or "torch-pruning",
            DepGraph with the group norm, ranked over the whole network (arXiv:2301.12900), by that package.
        limits: with a budget; what is left of a rounding is repaired to it.

    Raises:
        ConfigError: an unknown name, or no budget.
        ImportError: torch-pruning is not installed.
    """
    if name not in CONTROLS:
        raise ConfigError(f"a control must be one of {', '.join(CONTROLS)}, got {name!r}")
    if not limits.budget:
        raise ConfigError(f"algorithm.name = {name!r} needs a budget, such as budget.macs=0.4: it has no fitness")
    if name == "l1":
        return limits.repair(limits.space.ones(1))[0]

    def ladder(density: float) -> Tensor:
        if density == 0:  # that package leaves something
            return torch.zeros(1, limits.space.num_genes, dtype=torch.bool)
        return _depgraph(model, example_input, limits.space, 1 - density)[None]

    return limits.repair(ladder(largest(limits, ladder)))[0]


def _depgraph(model: nn.Module, example_input: Tensor, space: GeneSpace, ratio: float) -> Tensor:
    """bool [genes]: what is left when Torch-Pruning removes a fraction of all filters."""
    try:
        import torch_pruning as tp
    except ImportError:
        raise ImportError("algorithm.name = 'torch-pruning' needs that package: pip install torch-pruning") from None
    model = copy.deepcopy(model)
    names = {m: name for name, m in model.named_modules()}
    genes = {op.name: space.values[op.output].genes for op in space.ops if op.kind in ("conv", "linear")}
    fixed = set(_fixed(space))
    mask = torch.ones(space.num_genes, dtype=torch.bool)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pruner = tp.pruner.MetaPruner(
            model,
            example_input,
            importance=tp.importance.GroupMagnitudeImportance(p=2),
            global_pruning=True,
            pruning_ratio=ratio,
            ignored_layers=[m for m, name in names.items() if name in fixed],
        )
        for group in pruner.step(interactive=True):
            for dependency, index in group:
                name = names.get(dependency.target.module)
                if name in genes and pruner.DG.is_out_channel_pruning_fn(dependency.handler):
                    removed = genes[name][torch.tensor(index, dtype=torch.int64)]
                    mask[removed[removed >= 0]] = False
            group.prune()
    return mask


def _fixed(space: GeneSpace) -> Iterator[str]:
    """Layers that Torch-Pruning must leave: those without genes, and those that DepGraph does not follow, through the
    padded channels of an option-A shortcut."""
    around = [value for op in space.ops if op.kind == "pad" for value in (*op.inputs, op.output)]
    padded = {gene for value in around for gene in space.values[value].genes.tolist() if gene >= 0}
    for op in space.ops:
        if op.kind in ("conv", "linear"):
            genes = set(space.values[op.output].genes.tolist())
            if genes & padded or max(genes) < 0:
                yield op.name
