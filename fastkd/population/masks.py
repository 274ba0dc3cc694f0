"""The one codec of masks: bits, bytes, hexadecimal digits, names; and which of them are equal.

Records and checkpoints hold these bytes, digits and names, so they never change.
"""

from __future__ import annotations

import hashlib
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

__all__ = ["Distinct", "digests", "distinct", "duplicates", "from_hex", "mask_id", "packed", "to_hex", "unpacked"]


def packed(masks: Tensor) -> Tensor:
    """uint8 [P, genes / 8], rounded up, on the CPU, of masks bool [P, genes]: eight genes in a byte, the first one
    highest.

    >>> packed(torch.tensor([[True, False, False, False, False, False, False, True, True]]))
    tensor([[129, 128]], dtype=torch.uint8)
    """
    return torch.from_numpy(np.packbits(masks.cpu().numpy(), axis=1))


def unpacked(rows: Tensor, genes: int) -> Tensor:
    """Masks bool [P, genes], on the CPU, of what :func:`packed` gave.

    >>> unpacked(torch.tensor([[129, 128]], dtype=torch.uint8), 9).nonzero()[:, 1]
    tensor([0, 7, 8])
    """
    return torch.from_numpy(np.unpackbits(rows.numpy(), axis=1, count=genes)).bool()


def to_hex(mask: Tensor) -> str:
    """The bytes of a mask bool [genes], two digits each: how records hold it.

    >>> to_hex(torch.tensor([True, False, True]))
    'a0'
    """
    return packed(mask[None]).numpy().tobytes().hex()


def from_hex(text: str, genes: int) -> Tensor:
    """The mask bool [genes], on the CPU, of what :func:`to_hex` gave.

    Raises:
        ValueError: the text is not of so many genes.

    >>> from_hex("a0", 3)
    tensor([ True, False,  True])
    """
    try:
        row = bytes.fromhex(text)
    except ValueError:
        raise ValueError(f"a mask must be hexadecimal digits, got {text[:40]!r}") from None
    if len(row) != -(-genes // 8):
        raise ValueError(f"a mask of {genes} genes has {-(-genes // 8)} bytes, got {len(row)}")
    return unpacked(torch.tensor([list(row)], dtype=torch.uint8), genes)[0]


def digests(masks: Tensor) -> list[bytes]:
    """16 bytes for each mask bool [P, genes], by which it is remembered."""
    return [_digest(row.tobytes()) for row in packed(masks).numpy()]


def mask_id(mask: Tensor) -> str:
    """The name of a mask bool [genes] in messages and records: the first 12 hexadecimal digits of its digest.

    >>> mask_id(torch.ones(5, dtype=torch.bool))
    'ee82c91d9989'
    """
    return digests(mask[None])[0].hex()[:12]


def _digest(row: bytes) -> bytes:
    return hashlib.blake2b(row, digest_size=16).digest()


class Distinct(NamedTuple):
    """The different rows of a population, in the order of their genes, so that neighbours agree on many first genes
    (and share the work of the first layers)."""

    keys: list[bytes]
    """The digest of each; see :func:`digests`."""
    first: Tensor
    """int64 [D]: where each is in the population, for the first time."""
    inverse: Tensor
    """int64 [P]: which one each individual is."""


def distinct(masks: Tensor) -> Distinct:
    """Of masks bool [P, genes].

    >>> distinct(torch.tensor([[True, True], [False, True], [True, True]])).first
    tensor([1, 0])
    """
    rows = [row.tobytes() for row in packed(masks).numpy()]
    first: dict[bytes, int] = {}
    for p, row in enumerate(rows):
        first.setdefault(row, p)
    ordered = sorted(first)
    place = {row: k for k, row in enumerate(ordered)}
    return Distinct(
        [_digest(row) for row in ordered],
        torch.tensor([first[row] for row in ordered], dtype=torch.int64),
        torch.tensor([place[row] for row in rows], dtype=torch.int64),
    )


def duplicates(masks: Tensor) -> Tensor:
    """bool [P], on the masks' device: whether an individual equals an earlier one.

    >>> duplicates(torch.tensor([[True], [False], [True]]))
    tensor([False, False,  True])
    """
    _, first, inverse = distinct(masks)
    return (first[inverse] < torch.arange(len(masks))).to(masks.device)
