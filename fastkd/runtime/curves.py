"""Scalars for TensorBoard."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

__all__ = ["Curves"]


class Curves:
    """Writes scalars by step, in one folder per name.

    Raises:
        ImportError: there is no tensorboard.
    """

    def __init__(self, folder: str | Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ImportError(
                f"curves for TensorBoard need the package tensorboard: pip install tensorboard ({error})"
            ) from None
        self.folder = Path(folder)
        self._open = SummaryWriter
        self._writers: dict[str, Any] = {}

    def begin(self, name: str, step: int) -> None:
        """From this step on, unless it was begun: what a run that was killed wrote beyond its checkpoint is dropped."""
        if name not in self._writers:
            self._writers[name] = self._open(str(self.folder / re.sub(r"\W+", "-", name)), purge_step=step)

    def write(self, name: str, step: int, scalars: dict[str, float]) -> None:
        self.begin(name, step)
        for tag, value in scalars.items():
            self._writers[name].add_scalar(tag, value, step)
        self._writers[name].flush()  # so that a checkpoint never knows more than is on the curves
