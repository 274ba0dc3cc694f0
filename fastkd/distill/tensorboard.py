"""Curves for TensorBoard, of the numbers that are in the records too."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

__all__ = ["TensorBoard"]


class TensorBoard:
    """A progress callback that writes every look at the validation part as scalars: the loss and its terms
    (unweighted), the validation score and the learning rate, by epoch. One folder per network.

    >>> curves = TensorBoard("runs/cora/tensorboard")
    >>> runs.distil(config, 0, Path("runs/cora/seed0"), progress=curves)
    >>> Distiller(student, teacher, task).fit(lambda epoch, latest: curves("student", epoch, 0, latest))

    After a resume, one made anew for the same folder goes on with the same curves.

    Raises:
        ImportError: there is no tensorboard.
    """

    def __init__(self, folder: str | Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ImportError(f"curves for TensorBoard need the package tensorboard: pip install tensorboard "
                              f"({error})") from None
        self.folder = Path(folder)
        self._open = SummaryWriter
        self._writers: dict[str, Any] = {}

    def __call__(self, what: str, epoch: int, epochs: int, latest: dict[str, Any]) -> None:
        if what not in self._writers:
            # A run that was killed may have written more than its checkpoint knew: dropped from here on.
            name = re.sub(r"\W+", "-", what)
            self._writers[what] = self._open(str(self.folder / name), purge_step=epoch - 1)
        if not latest or latest["epoch"] != epoch - 1:
            return  # nothing new
        writer = self._writers[what]
        scalars = {"loss/total": latest["loss"], "val": latest["val"], "lr": latest["lr"]}
        scalars |= {f"loss/{name}": value for name, value in latest["terms"].items()}
        for tag, value in scalars.items():
            writer.add_scalar(tag, value, latest["epoch"])
        writer.flush()  # so that a checkpoint never knows more than is on the curves
