"""Losses that look at each node alone."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import DistillationLoss, flag, integer, number, of_width, projected

__all__ = ["KD", "FitNet"]


class KD(DistillationLoss):
    """Soft labels (Hinton et al. 2015, arXiv:1503.02531): ``T^2 KL(teacher || student)`` at temperature T.

    The classes of a node are one softmax, and the loss is a mean over nodes. With ``multilabel`` each
    label is a Bernoulli variable of its own, and the loss a mean over nodes and labels: binary
    cross-entropy with the teacher's soft labels, less their entropy, so that equal logits give 0.
    The soft labels of GLNN (Zhang et al. 2022, arXiv:2110.08727) are temperature 1.

    Args:
        temperature: of both sides' logits, > 0.
        multilabel: each label by itself.
    """

    name = "kd"
    uses = "logits"
    rowwise = True

    def __init__(self, *, temperature: float = 2.0, multilabel: bool = False) -> None:
        super().__init__()
        self.temperature = number("temperature", temperature)
        self.multilabel = flag("multilabel", multilabel)

    def compare(self, student: Tensor, teacher: Tensor, generator: torch.Generator | None) -> Tensor:
        if student.shape != teacher.shape:
            raise ValueError(
                f"student and teacher must have the same classes, got {student.shape[1]} and {teacher.shape[1]} columns"
            )
        s, t = student / self.temperature, teacher / self.temperature
        if self.multilabel:
            loss = (
                t.sigmoid() * (F.logsigmoid(t) - F.logsigmoid(s))
                + (-t).sigmoid() * (F.logsigmoid(-t) - F.logsigmoid(-s))
            ).mean()
        else:
            loss = F.kl_div(s.log_softmax(1), t.log_softmax(1), reduction="batchmean", log_target=True)
        return self.temperature**2 * loss


class FitNet(DistillationLoss):
    """Hints (Romero et al. 2015, arXiv:1412.6550): mean square of ``W s + b - t`` over nodes and features.

    The regressor W is trained with the student. The paper has half the sum; efficient-gnns projects
    both sides and normalises the rows.
    """

    name = "fitnet"
    rowwise = True

    def __init__(self, *, student_dim: int, teacher_dim: int) -> None:
        super().__init__()
        self.regressor = nn.Linear(integer("student_dim", student_dim, 1), integer("teacher_dim", teacher_dim, 1))

    def compare(self, student: Tensor, teacher: Tensor, generator: torch.Generator | None) -> Tensor:
        return F.mse_loss(projected(self.regressor, student, "student"), of_width(self.regressor.out_features, teacher))
