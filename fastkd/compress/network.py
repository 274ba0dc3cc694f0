"""The full network of a compression: how it is built, and where its weights are."""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path

from torch import nn

from ..data.files import cache_folder
from ..lab.imports import build_module
from ..lab.settings import ConfigError
from ..models.cnn import CNNS, build_cnn
from .config import CompressConfig, ModelConfig

__all__ = ["build", "weights_file"]


def build(model: ModelConfig, trusted: Collection[str] = ()) -> nn.Module:
    """The full network of a configuration, with new weights.

    Args:
        trusted: names ``module:function`` that the user has given on the command line; others must be of the
            working directory (:func:`fastkd.lab.imports.build_module`).

    Raises:
        ConfigError: no such network, module or function, or arguments that it does not take.
    """
    if ":" in model.name:
        return build_module(model.name, model.args, "model", trusted)
    try:
        return build_cnn(model.name, **model.args)
    except (ValueError, TypeError) as error:
        hint = "" if model.name in CNNS else "; your own is module:function, such as nets:small"
        raise ConfigError(f"model.{error}{hint}") from None


def weights_file(config: CompressConfig) -> Path | None:
    """Where the given weights are; None where the network is trained.

    Raises:
        ConfigError: neither weights nor epochs.
        FileNotFoundError: a name for which there is no file.
    """
    name = config.weights
    if name is None:
        if not config.train.epochs:
            raise ConfigError("weights = None and train.epochs = 0: give trained weights (--weights), or epochs")
        return None
    if Path(name).suffix:
        return Path(name)
    root = os.environ.get("FASTKD_DATA")
    folders = [folder / "weights" for folder in (*([Path(root)] if root else []), cache_folder())]
    for path in (folder / f"{name}{suffix}" for folder in folders for suffix in (".npz", ".safetensors")):
        if path.is_file():
            return path
    raise FileNotFoundError(
        f"weights = {name!r}: no {name}.npz or .safetensors in {' or '.join(map(str, folders))}: give a file with "
        "--weights, or train with --set weights=null --set train.epochs=100"
    )
