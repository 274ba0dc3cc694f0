"""Networks of a user's own: ``module:function`` in a configuration.

A configuration may come from a file that somebody else has written, and whatever it names would be run. Names are
therefore taken from the working directory's own modules alone, unless the user has given them on the command line.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable, Collection
from typing import Any

from torch import nn

from .settings import ConfigError

__all__ = ["build_module"]


def build_module(name: str, args: dict[str, Any], key: str, trusted: Collection[str] = ()) -> nn.Module:
    """The network that ``module:function`` returns, or that is an instance of ``module:Class``.

    Args:
        args: arguments of the call.
        key: of the configuration, for messages: "model", with its name and args.
        trusted: names that the user has given on the command line: from any module that can be imported.

    Raises:
        ConfigError: there is no such module or function, it is not a class or function of a module in the working
            directory and not trusted, it does not take the arguments, or it returns no network.
    """
    make = _function(name, key, name in trusted)
    try:
        network = make(**args)
    except TypeError as error:
        raise ConfigError(f"{key}.args = {args}: {name} says: {error}") from None
    if not isinstance(network, nn.Module):
        raise ConfigError(f"{key}.name = {name!r} must return a torch.nn.Module, got {type(network).__name__}")
    return network


def _function(name: str, key: str, trusted: bool) -> Callable[..., Any]:
    module, _, function = name.partition(":")
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    top = module.partition(".")[0]
    refusal = ConfigError(
        f"{key}.name = {name!r} is no class or function of a module in the working directory, {os.getcwd()}: a name "
        f"from elsewhere must be given on the command line, --set {key}.name={name}, since it is run"
    )
    try:
        if not trusted and importlib.util.find_spec(top) is not None and not _is_here(top):
            raise refusal
        found: Any = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        if error is refusal:
            raise
        raise ConfigError(f"{key}.name = {name!r} cannot be imported: {error}") from None
    if not trusted:
        made_here = (getattr(found, "__module__", None) or "").partition(".")[0] == top
        if not made_here or not (inspect.isclass(found) or inspect.isfunction(found)):
            raise refusal
    if not callable(found):
        raise ConfigError(f"{key}.name = {name!r} must be a class or function, got {type(found).__name__}")
    make: Callable[..., Any] = found
    return make


def _is_here(top: str) -> bool:
    """Whether the import system takes a module of this name from the working directory."""
    here = importlib.machinery.PathFinder.find_spec(top, [os.getcwd()])
    taken = importlib.util.find_spec(top)
    return here is not None and taken is not None and here.origin == taken.origin is not None
