"""The physically smaller network of a mask, its file, and ONNX."""

from __future__ import annotations

import copy
import inspect
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from ..reference import masked_forward
from ..runtime import atomic, tensorfile
from .operations import at_positions
from .space import GeneSpace, Op
from .trace import space_of

__all__ = ["Arrange", "compact", "export_onnx", "load", "save"]


class Arrange(nn.Module):
    """Channels put where they are expected: what is left of an option-A shortcut, of a slice or a shuffle.

    Args:
        index: int64 [C']; channel j of the result is channel index[j] of x [N, C, ...], or zeros for -1.
        positions: slices of H and W that are taken.
    """

    index: Tensor

    def __init__(self, index: Tensor, positions: tuple[Any, ...] = ()) -> None:
        super().__init__()
        # Made anew from the mask, so that the names of the tensors in a file stay the model's own.
        self.register_buffer("index", index, persistent=False)
        self.positions = positions

    def forward(self, x: Tensor) -> Tensor:
        if self.positions:
            x = at_positions(x, self.positions)
        zero = F.pad(x, (0, 0) * (x.dim() - 2) + (1, 0))  # channel 0 is zero
        return zero.index_select(1, self.index + 1)


def compact(model: nn.Module, mask: Tensor, example_input: Tensor | GeneSpace) -> nn.Module:
    """The network without the channels whose genes are off: plain torch modules, ready for training.

    It is a copy of the model with smaller weights, of the same class. Where the model's source states numbers
    of channels (a view to a stated width, a slice or shuffle of channels; an option-A shortcut that is not a module by
    itself), it is an fx.GraphModule with the same names of parameters instead, and then has no dropout.

    >>> import torch
    >>> model = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.Flatten(), torch.nn.Linear(64, 3)).eval()
    >>> compact(model, torch.tensor([True, False, True, False]), torch.zeros(1, 1, 6, 6))
    Sequential(
      (0): Conv2d(1, 2, kernel_size=(3, 3), stride=(1, 1))
      (1): Flatten(start_dim=1, end_dim=-1)
      (2): Linear(in_features=32, out_features=3, bias=True)
    )

    Args:
        model: in evaluation mode, as for :func:`trace`. Not changed.
        mask: bool [num_genes].
        example_input: [N, C, ...], or what :func:`trace` gave for this model.

    Raises:
        TypeError, ValueError: as :func:`trace`; a mask of wrong length or dtype, or one that leaves a value
            without channels (repair it).
    """
    space = space_of(model, example_input)
    if not isinstance(mask, Tensor) or mask.dim() != 1:
        got = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(f"mask must be a tensor of shape [{space.num_genes}], got {got}")
    space.check(mask)
    mask = mask.cpu()
    small = copy.deepcopy(model)
    with torch.no_grad():
        for op in space.ops:
            if op.module is not None:
                _shrink(small.get_submodule(op.name), op, space, mask)
    same = _with_shortcuts(small, space, mask)
    if same is not None and _agrees(same, space, mask):
        return same
    return _graph_module(small, space, mask)


def _shrink(m: nn.Module, op: Op, space: GeneSpace, mask: Tensor) -> None:
    rows, cols = space.kept(op.output, mask), space.kept(op.inputs[0], mask)
    if isinstance(m, nn.Conv2d):
        m.in_channels, m.out_channels = len(cols), len(rows)
        if op.depthwise:
            m.groups, cols = len(cols), torch.zeros(1, dtype=torch.int64)
        else:  # every group keeps the same positions
            cols = cols[cols < op.module.weight.shape[1]]  # type: ignore[union-attr, index]
    elif isinstance(m, nn.Linear):
        m.in_features, m.out_features = len(cols), len(rows)
    elif isinstance(m, nn.PReLU):
        if m.num_parameters == 1:
            return
        m.num_parameters = len(rows)
    else:
        m.num_features = len(rows)  # type: ignore[assignment]
    for name, p in m.named_parameters(recurse=False):
        cut = p.detach()[rows.to(p.device)]
        if name == "weight" and isinstance(m, nn.Conv2d | nn.Linear):
            cut = cut[:, cols.to(p.device)]
        setattr(m, name, nn.Parameter(cut.clone(), requires_grad=p.requires_grad))
    for name, b in m.named_buffers(recurse=False):
        if b.dim() == 1:
            setattr(m, name, b[rows.to(b.device)].clone())


def _arranged(space: GeneSpace, mask: Tensor, value: int, add: Op) -> Tensor:
    """Where the channels of an addition are in one of its inputs: int64, -1 for nowhere."""
    have, want = space.kept(value, mask), space.kept(add.output, mask)
    at = torch.searchsorted(have, want).clamp(max=len(have) - 1)
    return torch.where(have[at] == want, at, -1)


def _with_shortcuts(small: nn.Module, space: GeneSpace, mask: Tensor) -> nn.Module | None:
    """The same class, with its option-A modules replaced; None if it has other channel numbers in its source."""
    for op in space.ops:
        if op.kind != "pad":
            if op.fixed:
                return None
            continue
        inside = [o for o in space.ops if o.scope == op.scope and o.module is None]
        sums = [o for o in space.ops if op.output in o.inputs]
        sliced = len(inside) == 2 and inside[0].function is at_positions and op.inputs == (inside[0].output,)
        if not op.scope or not (sliced or len(inside) == 1) or any(o.kind != "add" for o in sums) or not sums:
            return None
        index = [_arranged(space, mask, op.output, o) for o in sums]
        if any(not torch.equal(i, index[0]) for i in index):
            return None
        positions = inside[0].attributes["index"] if sliced else ()
        parent, _, name = op.scope.rpartition(".")
        device = next(small.parameters()).device
        setattr(small.get_submodule(parent), name, Arrange(index[0].to(device), positions))
    return small


def _agrees(small: nn.Module, space: GeneSpace, mask: Tensor) -> bool:
    """Whether the model's own forward gives what the masked network gives, on one image of noise."""
    p = next(small.parameters())
    x = torch.randn(1, *space.values[0].shape, generator=torch.Generator().manual_seed(0)).to(p)
    with torch.no_grad():
        expected = masked_forward(space, mask, x)
        try:
            result = small(x)
        except (RuntimeError, ValueError, IndexError):
            return False
    return result.shape == expected.shape and torch.allclose(
        result, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max())
    )


def _graph_module(small: nn.Module, space: GeneSpace, mask: Tensor) -> fx.GraphModule:
    graph = fx.Graph()
    at = {0: graph.placeholder("x")}

    def arranged(name: str, x: fx.Node, index: Tensor) -> fx.Node:
        small.add_module(name, Arrange(index.to(next(small.parameters()).device)))
        return graph.call_module(name, (x,))

    for op in space.ops:
        inputs = [at[i] for i in op.inputs]
        if op.kind == "pad":
            at[op.output] = inputs[0]
            continue
        if op.kind == "add":
            for k, value in enumerate(op.inputs):
                index = _arranged(space, mask, value, op)
                if not torch.equal(index, torch.arange(len(space.kept(value, mask)))):
                    inputs[k] = arranged(f"arrange_{op.output}_{k}", inputs[k], index)
        if op.kind == "take":
            wanted = torch.tensor(op.attributes["index"])[space.kept(op.output, mask)]
            index = torch.searchsorted(space.kept(op.inputs[0], mask), wanted)
            at[op.output] = arranged(f"arrange_{op.output}", inputs[0], index)
        elif op.module is not None:
            at[op.output] = graph.call_module(op.name, tuple(inputs))
        else:
            assert op.function is not None
            at[op.output] = graph.call_function(op.function, tuple(inputs), op.attributes)
    graph.output(at[space.output])
    return fx.GraphModule(small, graph, type(small).__name__)


# --- files -----------------------------------------------------------------------------------------------

_MASK = "fastkd.mask"


def save(
    path: str | Path, model: nn.Module, mask: Tensor, *, config: dict[str, Any], input_shape: Sequence[int]
) -> None:
    """Writes a compact network as safetensors with a checksum, whole or not at all.

    >>> import tempfile
    >>> import fastkd.population, torch
    >>> from fastkd.models import build_cnn
    >>> full, image = build_cnn("lenet").eval(), torch.randn(1, 1, 28, 28)
    >>> space = fastkd.population.trace(full, image)
    >>> mask = space.repair(space.random(1, 0.1))[0]
    >>> small = compact(full, mask, space)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(f"{folder}/small.safetensors", small, mask, config={"name": "lenet"}, input_shape=(1, 28, 28))
    ...     again = load(f"{folder}/small.safetensors", build_cnn)
    >>> torch.equal(again(image), small(image))
    True

    Args:
        model: from :func:`compact`, as it is now (after fine-tuning, say).
        mask: bool [num_genes] from which it was made.
        config: the arguments with which the full network is built; anything that JSON holds.
        input_shape: of one image, (C, ...).

    Raises:
        ImportError: safetensors is not installed.
        OSError: the disk is full, or whatever else the system says.
    """
    state = model.state_dict()
    if _MASK in state:
        raise ValueError(f"model has a tensor {_MASK}, which is the name of the mask in the file")
    text = json.dumps({"config": config, "input_shape": list(input_shape)})
    atomic.replace(Path(path), lambda part: tensorfile.write(part, {**state, _MASK: mask.cpu()}, text))


def load(path: str | Path, build: Callable[..., nn.Module]) -> nn.Module:
    """The compact network of a file that :func:`save` wrote, or ``fastkd compress``, in evaluation mode.

    Args:
        build: gives the full network; called with the config of the file, such as
            ``fastkd.models.build_cnn``.

    Raises:
        FileNotFoundError, ValueError: no such file, or not one of these, a damaged one, or one that `build` does not
            fit.
    """
    path = Path(path)
    try:
        tensors, text = tensorfile.read(path)
    except tensorfile.DamagedFile as error:
        raise ValueError(f"{error}: put a copy in its place, or save the network again") from None
    if text is None or _MASK not in tensors:
        raise ValueError(f"{path} was not written by fastkd.population.save: it has no mask")
    mask = tensors.pop(_MASK)
    dtype = next((x.dtype for x in tensors.values() if x.is_floating_point()), torch.float32)
    try:
        state = json.loads(text)
        config, shape = _arguments(state["config"], build), [int(n) for n in state["input_shape"]]
    except (ValueError, TypeError, KeyError):
        raise ValueError(
            f"{path} is damaged (what it says of its network cannot be read): put a copy in its place, or save the "
            "network again"
        ) from None
    try:
        model = compact(build(**config).eval(), mask, torch.zeros(1, *shape)).to(dtype)
        model.load_state_dict(tensors)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{path} does not fit the network built with {config}: {error}") from error
    return model


def _arguments(config: dict[str, Any], build: Callable[..., nn.Module]) -> dict[str, Any]:
    """What `build` is called with. Files of ``fastkd compress`` hold {"name": ..., "args": {...}}: a function that has
    no argument `args` gets what is in it, and `name` if it takes one, as ``build_cnn`` does."""
    if set(config) != {"name", "args"} or not isinstance(config["args"], dict):
        return config
    taken = inspect.signature(build).parameters
    if "args" in taken:
        return config
    return {**({"name": config["name"]} if "name" in taken else {}), **config["args"]}


def export_onnx(model: nn.Module, path: str | Path, example_input: Tensor) -> None:
    """Writes ONNX with any number of images: input ``images`` [N, C, ...], output ``logits``.

    Needs the packages onnx and onnxscript: pip install "fastkd[compress]".
    """
    batch = torch.export.Dim("N")
    x = example_input if len(example_input) > 1 else torch.cat((example_input, example_input))  # 1 would be a constant
    torch.onnx.export(
        model,
        (x,),
        str(path),
        input_names=["images"],
        output_names=["logits"],
        dynamo=True,
        dynamic_shapes=({0: batch},),
        external_data=False,
        verbose=False,
    )
