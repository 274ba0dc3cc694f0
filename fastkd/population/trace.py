"""From a PyTorch network to its genes: operations by torch.fx, then which channels must go together.

The network is run once on one image, operation by operation, and compared with the model's own result:
a trace that is not the model is refused.
"""

from __future__ import annotations

import traceback

import numpy as np
import torch
from torch import Tensor, nn

from .interpreter import Interpreter
from .space import KEPT, ZERO, GeneSpace, Group, UnsupportedModelError, Value, filter_norms
from .tracer import Tracer, of_torch

__all__ = ["check_model", "space_of", "trace"]


def trace(model: nn.Module, example_input: Tensor) -> GeneSpace:
    """The genes of a model.

    Channels that are added are one channel, a depthwise convolution's are its input's, those at the same
    position in the groups of a grouped convolution go together, and every channel of a convolution or
    linear layer that is not tied to the network's input or output is a gene. Channels may be concatenated, cut
    (slices, chunk, split) and shuffled; those that only some values hold are groups of their own.

    >>> model = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.Flatten(), torch.nn.Linear(64, 3)).eval()
    >>> print(trace(model, torch.zeros(1, 1, 6, 6)))
    group  genes  modules
    0          4  0
    4 of 4 genes, 235 parameters, 768 MACs

    Args:
        model: in evaluation mode.
        example_input: [N, C, ...] of the dtype and on the device of the model; one image is looked at.

    Raises:
        ValueError, TypeError: training mode, a wrong input, weights that are not finite.
        UnsupportedModelError: control flow that depends on data, or an operation whose channels are not
            known; the message names it and the line of the model.
    """
    x = _checked(model, example_input)
    tracer = Tracer()
    try:
        graph = tracer.trace(model)
    except Exception as error:
        frames = [f for f in traceback.extract_tb(error.__traceback__) if not of_torch(f.filename)][1:]
        at = f"{frames[-1].filename}:{frames[-1].lineno}: {frames[-1].line}" if frames else "an unknown line"
        raise UnsupportedModelError(
            f"{type(model).__name__} cannot be traced: {error} (at {at}). Control flow must not depend on the data"
        ) from error
    interpreter = Interpreter(model, x)
    with torch.no_grad():
        for node in graph.nodes:
            interpreter.run(node)
        expected = model(x.clone())
    result = interpreter.tensors[interpreter.output]
    near = 1e-4 * float(expected.abs().max())
    if result.shape != expected.shape or not torch.allclose(result, expected, 1e-3, near, equal_nan=True):
        raise UnsupportedModelError(
            f"{type(model).__name__} computes something else than its operations in a row: "
            "a tensor is changed in place while another name refers to it, or a hook acts"
        )
    return _gene_space(interpreter)


def space_of(model: nn.Module, example_input: Tensor | GeneSpace) -> GeneSpace:
    """The trace of a model: what :func:`trace` gave for it, or gives now."""
    if not isinstance(example_input, GeneSpace):
        return trace(model, example_input)
    example_input.require(model)
    return example_input


def _gene_space(traced: Interpreter) -> GeneSpace:
    """Numbers the sets of channels that go together, group by group."""
    root = np.array([traced.find(e) for e in range(len(traced.parent))])
    # By set of channels, what makes it, and how often each does.
    makers: dict[int, list[tuple[str, int]]] = {}
    for op in traced.ops:
        if op.kind in ("conv", "linear") and not op.depthwise:
            sets, counts = np.unique(root[traced.channels[op.output]], return_counts=True)
            for r, count in zip(sets.tolist(), counts.tolist(), strict=True):
                if r != 0:
                    makers.setdefault(r, []).append((op.name, count))
    # How many channels a value has must follow from how many genes of each group are on, so that those which only
    # some of the values hold, or hold more often, are groups of their own.
    parts = [traced.channels[op.output] for op in traced.ops if op.kind in ("take", "mul")]
    often = np.array([np.bincount(root[c[c != ZERO]], minlength=len(root)) for c in parts]).T.tolist()
    of_group: dict[tuple[tuple[tuple[str, int], ...], tuple[int, ...]], list[int]] = {}
    for r in sorted(makers):
        of_group.setdefault((tuple(makers[r]), tuple(often[r]) if parts else ()), []).append(r)
    gene = np.full(len(root), KEPT)
    groups: list[Group] = []
    start = 0
    names: dict[str, int] = {}
    for (made_by, _), roots in of_group.items():
        gene[roots] = np.arange(start, start + len(roots))
        modules = tuple(name for name, _ in made_by)
        names[modules[0]] = names.get(modules[0], 0) + 1
        again = f" ({names[modules[0]]})" if names[modules[0]] > 1 else ""
        groups.append(Group(modules[0] + again, modules, start, len(roots)))
        start += len(roots)
    values = [
        Value(name, tuple(x.shape[1:]), torch.from_numpy(np.where(c == ZERO, ZERO, gene[root[c.clip(0)]])))
        for name, x, c in zip(traced.names, traced.tensors, traced.channels, strict=True)
    ]
    l1 = filter_norms(traced.ops, values, start)
    return GeneSpace(traced.ops, values, traced.output, groups, l1, sum(p.numel() for p in traced.model.parameters()))


def _checked(model: nn.Module, x: Tensor) -> Tensor:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    _check_mode(model)
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise TypeError(
            f"example_input must be a floating-point tensor, got "
            f"{x.dtype if isinstance(x, Tensor) else type(x).__name__}"
        )
    if x.dim() < 2 or x.shape[0] < 1:
        raise ValueError(f"example_input must have shape [N, C, ...] with N >= 1, got {list(x.shape)}")
    _check_weights(model, x)
    return x[:1].detach()


def check_model(model: nn.Module, x: Tensor) -> None:
    """Raises an error if a model that was traced before is in training mode, not of the dtype and on the device of x,
    holds values that are not finite, or shares weights."""
    _check_mode(model)
    _check_weights(model, x)


def _check_mode(model: nn.Module) -> None:
    for path, module in model.named_modules():
        if module.training:
            raise ValueError(
                f"model must be in evaluation mode, but {path or 'it'} is in training mode: call model.eval()"
            )


def _check_weights(model: nn.Module, x: Tensor) -> None:
    seen: dict[int, str] = {}
    for path, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.dtype != x.dtype or parameter.device != x.device:
            raise TypeError(
                f"example_input must be {parameter.dtype} on {parameter.device} as {path} is, got "
                f"{x.dtype} on {x.device}"
            )
        if parameter.numel() and not all(bool(v.isfinite()) for v in parameter.detach().aminmax()):
            raise ValueError(f"{path} holds values that are not finite")
        if seen.setdefault(id(parameter), path) != path:
            raise UnsupportedModelError(
                f"{path} and {seen[id(parameter)]} are the same tensor: shared weights are not supported"
            )
