"""Curves of training for TensorBoard, of the numbers that are in the records too."""

from __future__ import annotations

from typing import Any

from ..runtime.curves import Curves

__all__ = ["TensorBoard"]


class TensorBoard(Curves):
    """A progress callback that writes every look at the validation part as scalars: the loss and its terms
    (unweighted), the validation score and the learning rate, by epoch. One folder per network.

    >>> curves = TensorBoard("runs/cora/tensorboard")  # doctest: +SKIP
    >>> runs.distil(config, 0, Path("runs/cora/seed0"), progress=curves)  # doctest: +SKIP
    >>> Distiller(student, teacher, task).fit(lambda k, latest: curves("student", k, 0, latest))  # doctest: +SKIP

    After a resume, one made anew for the same folder goes on with the same curves.

    Raises:
        ImportError: there is no tensorboard.
    """

    def __call__(self, what: str, epoch: int, epochs: int, latest: dict[str, Any]) -> None:
        if "generation" in latest:
            return  # a search has curves of its own
        self.begin(what, epoch - 1)
        if not latest or latest["epoch"] != epoch - 1:
            return  # nothing new
        scalars = {"loss/total": latest["loss"], "val": latest["val"], "lr": latest["lr"]}
        scalars |= {f"loss/{name}": value for name, value in latest.get("terms", {}).items()}
        self.write(what, latest["epoch"], scalars)
