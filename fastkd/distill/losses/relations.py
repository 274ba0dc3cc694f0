"""Losses that compare nodes with each other."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import DistillationLoss, cosines, flag, integer, number, of_width, one_of, projected, sample, unit

__all__ = ["GCRD", "PKT", "RKD", "AttentionTransfer", "RepresentationMatching", "SimilarityPreserving"]


class AttentionTransfer(DistillationLoss):
    """Attention transfer (Zagoruyko & Komodakis 2017, arXiv:1612.03928) with nodes in place of pixels.

    The attention of a node is ``sum_d |z_d|^p``; the vector of all nodes is scaled to length 1, and
    the loss is the squared distance of the two vectors: in [0, 2] whatever N. efficient-gnns has the
    mean square instead, which is 1/N of this.

    Args:
        p: power of the features, >= 1.
    """

    name = "at"

    def __init__(self, *, p: float = 2.0) -> None:
        super().__init__()
        self.p = number("p", p, low=1.0)

    def compare(self, student: Tensor, teacher: Tensor, generator: torch.Generator | None) -> Tensor:
        s, t = (unit(z.abs().pow(self.p).sum(1)) for z in (student, teacher))
        return (s - t).square().sum()


class RKD(DistillationLoss):
    """Relational knowledge distillation (Park et al. 2019, arXiv:1904.05068).

    ``distance_weight`` times the Huber loss of all pairwise distances, each side's divided by their
    mean, plus ``angle_weight`` times the Huber loss of the cosines of all angles of three nodes.
    Both are means over distinct nodes; the authors' code also counts the pairs and triples that
    repeat a node, whose loss is 0. The weights are the defaults of RepDistiller; the authors' example
    for metric learning has 1 and 2.

    Memory, backward included: about 9 max_nodes^2 and 3 max_angle_nodes^2 (max_angle_nodes + Ds + Dt) floats.

    Args:
        distance_weight: of the distances' part, >= 0.
        angle_weight: of the angles' part, >= 0.
        max_nodes: the most nodes whose distances are compared, >= 2.
        max_angle_nodes: the most nodes whose angles are compared, >= 3.
    """

    name = "rkd"

    def __init__(
        self,
        *,
        distance_weight: float = 25.0,
        angle_weight: float = 50.0,
        max_nodes: int = 1024,
        max_angle_nodes: int = 128,
    ) -> None:
        super().__init__()
        self.distance_weight = number("distance_weight", distance_weight, low=0.0)
        self.angle_weight = number("angle_weight", angle_weight, low=0.0)
        self.max_nodes = integer("max_nodes", max_nodes, 2)
        self.max_angle_nodes = integer("max_angle_nodes", max_angle_nodes, 3)

    def compare(self, student: Tensor, teacher: Tensor, generator: torch.Generator | None) -> Tensor:
        n = student.shape[0]
        distance = F.smooth_l1_loss(_relative_distances(student), _relative_distances(teacher), reduction="sum")
        student, teacher = sample(self.max_angle_nodes, generator, student, teacher)
        m = student.shape[0]
        angle = F.smooth_l1_loss(_angles(student), _angles(teacher), reduction="sum")
        return self.distance_weight * distance / max(n * (n - 1), 1) + self.angle_weight * angle / max(
            m * (m - 1) * (m - 2), 1
        )


class SimilarityPreserving(DistillationLoss):
    """Similarity preserving loss (Tung & Mori 2019, arXiv:1907.09682), in efficient-gnns' name GSP.

    Mean square of the difference of two [n, n] matrices of similarities of all pairs of n nodes.

    Args:
        kernel: "linear", the paper: ``Z Z^T`` with every row scaled to length 1; or "cosine",
            efficient-gnns: the cosines of the rows of Z. (efficient-gnns projects both sides first.)
        max_nodes: the most nodes compared, >= 2. Memory, backward included: about 7 max_nodes^2 floats,
            4 with "cosine".
    """

    name = "gsp"

    def __init__(self, *, kernel: Literal["linear", "cosine"] = "linear", max_nodes: int = 4096) -> None:
        super().__init__()
        one_of("kernel", kernel, ("linear", "cosine"))
        self.kernel = kernel
        self.max_nodes = integer("max_nodes", max_nodes, 2)

    def compare(self, student: Tensor, teacher: Tensor, generator: torch.Generator | None) -> Tensor:
        similarity = cosines if self.kernel == "cosine" else lambda z: unit(z @ z.T)
        return F.mse_loss(similarity(student), similarity(teacher))


class PKT(DistillationLoss):
    """Probabilistic knowledge transfer (Passalis & Tefas 2018, arXiv:1803.10837).

    ``p_ij = K_ij / sum_j K_ij`` with ``K = (1 + cosine) / 2``, j = i included as in the authors' code;
    the loss is the mean over the n nodes of ``KL(p_teacher || p_student)``. The authors' code divides by
    n^2, which is 1/n of this.

    Memory, backward included: about 7 max_nodes^2 floats.

    Args:
        max_nodes: the most nodes compared, >= 2.
    """

    name = "pkt"

    def __init__(self, *, max_nodes: int = 4096) -> None:
        super().__init__()
        self.max_nodes = integer("max_nodes", max_nodes, 2)

    def compare(self, student: Tensor, teacher: Tensor, generator: torch.Generator | None) -> Tensor:
        def log_prob(z: Tensor) -> Tensor:
            similarity = ((1 + cosines(z)) / 2).clamp_min(1e-7)  # opposite nodes: log 0
            return similarity.log() - similarity.sum(1, keepdim=True).log()

        return F.kl_div(log_prob(student), log_prob(teacher), reduction="batchmean", log_target=True)


class GCRD(DistillationLoss):
    """Contrastive representation distillation (G-CRD, Joshi et al. 2021, arXiv:2111.04964).

    Both sides are projected (trained linear maps) and scaled to length 1; the loss is InfoNCE: the
    cross-entropy of a student's node for the same node among the teacher's n nodes, its logits being
    cosines / temperature. Not 0 at its minimum. efficient-gnns projects by a graph convolution, batch
    normalisation and ReLU, this by a linear map alone.

    Memory, backward included: about 4 max_nodes^2 floats.

    Args:
        student_dim, teacher_dim: widths of the two sides.
        proj_dim: width to which both are projected, >= 1.
        temperature: of the cosines, > 0.
        max_nodes: the most nodes compared, >= 2.
    """

    name = "gcrd"

    def __init__(
        self,
        *,
        student_dim: int,
        teacher_dim: int,
        proj_dim: int = 128,
        temperature: float = 0.075,
        max_nodes: int = 4096,
    ) -> None:
        super().__init__()
        self.temperature = number("temperature", temperature)
        self.max_nodes = integer("max_nodes", max_nodes, 2)
        self.proj_dim = integer("proj_dim", proj_dim, 1)
        self.student_proj = nn.Linear(integer("student_dim", student_dim, 1), self.proj_dim)
        self.teacher_proj = nn.Linear(integer("teacher_dim", teacher_dim, 1), self.proj_dim)

    def compare(self, student: Tensor, teacher: Tensor, generator: torch.Generator | None) -> Tensor:
        s = unit(projected(self.student_proj, student, "student"))
        t = unit(projected(self.teacher_proj, teacher, "teacher"))
        same = torch.arange(s.shape[0], device=s.device)
        return F.cross_entropy(s @ (t / self.temperature).T, same)


class RepresentationMatching(DistillationLoss):
    """Representational similarity distillation of NOSMOG (Tian et al. 2023, arXiv:2208.10010).

    ``mean_ij (M^t_ij - M^s_ij)^2`` with ``M = H H^T``; H is the teacher's features, and ``W s + b`` (trained)
    for the student, every row scaled to length 1. ``normalize=False`` leaves out the scaling, as
    NOSMOG does. NOSMOG also has a ReLU after W, which is left out here.

    Memory, backward included: about 4 max_nodes^2 floats.

    Args:
        student_dim, teacher_dim: widths of the two sides.
        normalize: scale every row to length 1.
        max_nodes: the most nodes compared, >= 2.
    """

    name = "rsd"

    def __init__(self, *, student_dim: int, teacher_dim: int, normalize: bool = True, max_nodes: int = 4096) -> None:
        super().__init__()
        self.normalize = flag("normalize", normalize)
        self.max_nodes = integer("max_nodes", max_nodes, 2)
        self.proj = nn.Linear(integer("student_dim", student_dim, 1), integer("teacher_dim", teacher_dim, 1))

    def compare(self, student: Tensor, teacher: Tensor, generator: torch.Generator | None) -> Tensor:
        similarity = cosines if self.normalize else lambda h: h @ h.T
        features = projected(self.proj, student, "student")
        return F.mse_loss(similarity(features), similarity(of_width(self.proj.out_features, teacher)))


def _relative_distances(z: Tensor) -> Tensor:
    """[n, n] distances of the rows of z [n, D], divided by their mean over i != j."""
    n = z.shape[0]
    z = z - z.mean(0)  # keeps the differences of squares small
    gram = z @ z.T
    square = gram.diagonal()[:, None] + gram.diagonal() - 2 * gram
    zero = square <= 0  # there the root's gradient would be infinite
    distance = square.masked_fill(zero, 1).sqrt().masked_fill(zero, 0)
    mean = distance.sum() / max(n * (n - 1), 1)
    return distance / mean.masked_fill(mean == 0, 1)


def _angles(z: Tensor) -> Tensor:
    """[n, n, n]: cosine of the angle at node i between j and k, for rows z [n, D]."""
    direction = unit(z - z[:, None])
    return direction @ direction.mT
