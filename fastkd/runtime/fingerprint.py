"""Names for tensors, weights and configurations: equal ones have equal names, whatever made them.

Checkpoints, records and the names of folders hold them, so what goes into one never changes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["of_config", "of_tensors", "of_weights"]


def of_tensors(*parts: Tensor | str) -> str:
    """16 hexadecimal digits of the values of tensors (any shape, dtype and device), and of text between them, in order.

    Values alone count: shapes, dtypes and names do where they are among the text.

    >>> of_tensors(torch.arange(3)) == of_tensors(torch.tensor([0, 1, 2]))
    True
    >>> of_tensors("bias", torch.zeros(2)) == of_tensors(torch.zeros(2))
    False
    """
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, str):
            digest.update(part.encode())
        else:
            digest.update(part.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def of_weights(module: nn.Module) -> str:
    """16 hexadecimal digits of a module's parameters and buffers, with their names.

    >>> of_weights(torch.nn.ReLU())
    'e3b0c44298fc1c14'
    """
    return of_tensors(*(part for name, x in sorted(module.state_dict().items()) for part in (name, x)))


def of_config(config: Mapping[str, Any]) -> str:
    """12 hexadecimal digits of what JSON can hold, whatever the order of its keys.

    >>> of_config({"a": 1, "b": [2.5]}) == of_config({"b": [2.5], "a": 1})
    True
    """
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:12]
