"""Features of a network's inner layers, by module name."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from torch import Tensor, nn

from .._text import suggestion

__all__ = ["Taps"]


class _Enough(Exception):
    """Ends a forward pass whose taps have all caught something."""


class Taps:
    """Forward hooks that keep what named modules return.

    >>> import torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
    >>> taps = Taps(model, ["1"], role="student")
    >>> logits = model(torch.randn(5, 3))
    >>> taps["1"].shape  # of what that module returned, with its graph for autograd
    torch.Size([5, 4])
    >>> print(taps)
    1: ReLU -> [5, 4] float32

    Args:
        model: any module.
        names: as in ``dict(model.named_modules())``.
        role: names the model in messages.

    Raises:
        ValueError: no module of that name; the message lists all.
    """

    def __init__(self, model: nn.Module, names: list[str], role: str = "model") -> None:
        modules = {name: module for name, module in model.named_modules() if name}
        for name in names:
            if name not in modules:
                hint = suggestion(name, modules)
                raise ValueError(f"the {role} has no layer {name!r}{hint}: its layers are {', '.join(modules)}")
        self.role = role
        self._modules = {name: modules[name] for name in names}
        self._hooks = [module.register_forward_hook(self._keep(name)) for name, module in self._modules.items()]
        self._caught: dict[str, Tensor] = {}
        self._stop = self._repeated = False

    def _keep(self, name: str) -> Callable[[nn.Module, object, object], None]:
        def hook(module: nn.Module, args: object, output: object) -> None:
            value = output[0] if isinstance(output, tuple) else output
            if not isinstance(value, Tensor):
                raise TypeError(
                    f"layer {name!r} of the {self.role} returned {type(value).__name__}, which is "
                    "no tensor: tap a module that returns one"
                )
            self._repeated |= name in self._caught
            self._caught[name] = value
            if self._stop and len(self._caught) == len(self._modules):
                raise _Enough

        return hook

    @contextlib.contextmanager
    def stopping(self) -> Iterator[None]:
        """Ends the forward pass within as soon as every layer was called, so that nothing is computed that
        nobody looks at. Not where a layer was seen to be called twice in a pass: its last output counts."""
        self._stop = bool(self._modules) and not self._repeated
        try:
            yield
        except _Enough:
            pass
        finally:
            self._stop = False

    def __getitem__(self, name: str | None) -> Tensor:
        """[N, D], the last output of the module."""
        if name not in self._caught:
            raise RuntimeError(f"layer {name!r} of the {self.role} was not called in the forward pass")
        value = self._caught[name]
        return value.flatten(0, -2) if value.dim() > 2 else value

    def clear(self) -> None:
        self._caught.clear()

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def __str__(self) -> str:
        lines = []
        for name, module in self._modules.items():
            value = self._caught.get(name)
            shown = "not called yet" if value is None else f"{list(value.shape)} {str(value.dtype)[6:]}"
            lines.append(f"{name}: {type(module).__name__} -> {shown}")
        return "; ".join(lines) or "none"
