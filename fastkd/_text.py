"""Words of messages: what is valid, what was meant, how many."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

__all__ = ["installs", "joined", "listed", "plural", "slug", "suggestion"]


def listed(names: Iterable[object]) -> str:
    """``'a', 'b'``: the valid values of an argument."""
    return ", ".join(map(repr, names))


def joined(names: list[str]) -> str:
    """``a, b and c``, in a sentence."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def plural(count: int, noun: str) -> str:
    """``1 seed``, ``3 seeds``."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def suggestion(word: object, valid: Iterable[str]) -> str:
    """`` (did you mean 'lsp'?)``, to be appended to a message; empty where nothing is close."""
    close = difflib.get_close_matches(str(word), list(valid), 1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def slug(name: str) -> str:
    """The name of a file or folder for a name in words: small letters and digits, joined by hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def installs(extra: str) -> str:
    """How to install the packages of an extra: by its name where fastkd is on the index, else from its source."""
    return f'pip install "fastkd[{extra}]", or from a clone of fastkd pip install ".[{extra}]"'
