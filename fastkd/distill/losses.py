"""Losses that bring a student's node features or logits to a teacher's.

All share one call, ``loss(student, teacher, graph, generator, teacher_graph)``, so that a trainer need
not know which one it has; :func:`build` makes them by name. The weight of a loss, and the schedule
of the weight, belong to the trainer. "efficient-gnns" below is the code of arXiv:2111.04964.
"""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Iterable
from dataclasses import fields, replace
from typing import Any, ClassVar, Literal
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..graph import Graph
from ..kernels import Kernel
from ..lsp import Divergence, LSPLoss, TeacherStructure, teacher_structure

__all__ = [
    "GCRD",
    "KD",
    "LOSSES",
    "LSP",
    "PKT",
    "RKD",
    "AttentionTransfer",
    "DistillationLoss",
    "FitNet",
    "RepresentationMatching",
    "SimilarityPreserving",
    "build",
    "kind",
]


class DistillationLoss(nn.Module):
    """Base class: subclasses write :meth:`compare`.

    Attributes:
        name: the name in :data:`LOSSES`.
        uses: what student and teacher are: the models' "logits", or the "features" of a layer.
        rowwise: whether it is a mean over nodes that looks at each one alone, so that several processes
            can share the nodes.
        max_nodes: the most nodes that are compared in one call, or None for all.
    """

    name: ClassVar[str]
    uses: ClassVar[Literal["logits", "features"]] = "features"
    rowwise: ClassVar[bool] = False
    max_nodes: int | None = None

    def forward(
        self,
        student: Tensor,
        teacher: Tensor | TeacherStructure,
        graph: Graph | None = None,
        generator: torch.Generator | None = None,
        teacher_graph: Graph | None = None,
    ) -> Tensor:
        """The loss, a scalar in float32 (float64 if either side is float64).

        Args:
            student: [N, Ds], the gradient flows to it.
            teacher: [N, Dt], detached; for :class:`LSP` also a :class:`fastkd.TeacherStructure`.
            graph: the student's graph; only :class:`LSP` looks at it.
            generator: draws the nodes where N > max_nodes; None takes torch's global one.
            teacher_graph: the teacher's own graph, where it differs; only :class:`LSP` looks at it.
        """
        for side, x in (("student", student), ("teacher", teacher)):
            if not isinstance(x, Tensor) or not x.is_floating_point():
                got = x.dtype if isinstance(x, Tensor) else type(x).__name__
                raise TypeError(f"{side} must be a floating-point tensor [N, D], got {got}")
            if x.dim() != 2 or not x.shape[0]:
                raise ValueError(f"{side} must have shape [N, D] with N >= 1, got {tuple(x.shape)}")
        assert isinstance(teacher, Tensor)
        if student.shape[0] != teacher.shape[0]:
            raise ValueError(
                f"student and teacher must have the same nodes, got {student.shape[0]} and {teacher.shape[0]} rows"
            )
        teacher = teacher.detach()
        if self.max_nodes is not None:
            student, teacher = _sample(self.max_nodes, generator, student, teacher)
        dtype = torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)
        with torch.autocast(student.device.type, enabled=False):  # it would multiply in half precision
            return self.compare(student.to(dtype), teacher.to(dtype), generator)

    def prepare(
        self, teacher: Tensor, graph: Graph | None = None, generator: torch.Generator | None = None
    ) -> Tensor | TeacherStructure:
        """What :meth:`forward` may be given in place of the same teacher features on the same graph, so
        that the teacher's share of the work is done once."""
        return teacher

    def compare(self, student: Tensor, teacher: Tensor, generator: torch.Generator | None) -> Tensor:
        """The loss of student [n, Ds] and teacher [n, Dt], n <= max_nodes, of one dtype."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        arguments = inspect.signature(type(self)).parameters
        return ", ".join(f"{a}={getattr(self, a)!r}" for a in arguments if hasattr(self, a))


class LSP(DistillationLoss):
    """Local structure preserving loss (Yang et al. 2020, arXiv:2003.10477): :class:`fastkd.LSPLoss`.

    Args:
        kernel: a name or :class:`fastkd.kernels.Kernel`; None means "rbf", or the preset's own.
        kernel_args: constants of the kernel to change, such as ``{"sigma": 10.0, "scale": "mean"}``.
        divergence: None means "student||teacher". None with a preset.
        reduction: "mean", "mean_active", "mean_edges" or "sum"; None means "mean". None with a preset.
        preset: "paper", "distillgcn" or "efficient_gnns", see :meth:`fastkd.LSPLoss.preset`.
        graph: with a ``teacher_graph``, compare over the union of both graphs ("union"), or over the
            student's own only ("student").
        shuffle: the control: compare over the wrong graph of :meth:`shuffled`.
    """

    name = "lsp"

    def __init__(
        self,
        *,
        kernel: str | Kernel | None = None,
        kernel_args: dict[str, Any] | None = None,
        divergence: Divergence | None = None,
        reduction: Literal["mean", "mean_active", "mean_edges", "sum"] | None = None,
        preset: Literal["paper", "distillgcn", "efficient_gnns"] | None = None,
        graph: Literal["student", "union"] = "union",
        shuffle: bool = False,
    ) -> None:
        super().__init__()
        _one_of("graph", graph, ("student", "union"))
        if reduction is not None:
            _one_of("reduction", reduction, ("mean", "mean_active", "mean_edges", "sum"))
        if preset is None:
            self.criterion = LSPLoss(
                "rbf" if kernel is None else kernel,
                divergence=divergence or "student||teacher",
                reduction=reduction or "mean",
            )
        else:
            for argument, value in (("divergence", divergence), ("reduction", reduction)):
                if value is not None:
                    raise ValueError(f"{argument} must be None with preset={preset!r}, got {value!r}")
            if isinstance(kernel, Kernel):
                raise ValueError(f"kernel must be a name or None with preset={preset!r}, got {kernel!r}")
            self.criterion = LSPLoss.preset(preset, kernel)
        if kernel_args:
            changed = _with_constants(self.criterion.kernel, kernel_args)
            self.criterion.kernel = self.criterion.teacher_kernel = changed
        self.graph = graph
        self.shuffle = _flag("shuffle", shuffle)
        if shuffle:
            # In the state_dict, so that a resumed run goes on with the same wrong graph.
            self.shuffle_seed: Tensor
            self.register_buffer("shuffle_seed", torch.tensor(-1))
            self._shuffled: WeakKeyDictionary[Graph, Graph] = WeakKeyDictionary()

    def forward(
        self,
        student: Tensor,
        teacher: Tensor | TeacherStructure,
        graph: Graph | None = None,
        generator: torch.Generator | None = None,
        teacher_graph: Graph | None = None,
    ) -> Tensor:
        """As :meth:`DistillationLoss.forward`; a TeacherStructure must be of the graph compared over."""
        if not isinstance(graph, Graph):
            raise TypeError(f"graph must be a fastkd.Graph for lsp, got {type(graph).__name__}")
        if self.graph == "student" or teacher_graph is graph:
            teacher_graph = None
        if self.shuffle:
            if isinstance(teacher, TeacherStructure) and teacher.graph is graph:
                raise ValueError(
                    "teacher must be features with shuffle=True, or a TeacherStructure of "
                    "shuffled(graph), got one of the graph itself"
                )
            graph = self.shuffled(graph if teacher_graph is None else graph.union(teacher_graph), generator)
            teacher_graph = None
        return self.criterion(student, teacher, graph, teacher_graph=teacher_graph)

    def prepare(
        self, teacher: Tensor, graph: Graph | None = None, generator: torch.Generator | None = None
    ) -> Tensor | TeacherStructure:
        assert graph is not None
        return teacher_structure(
            teacher, self.shuffled(graph, generator) if self.shuffle else graph, self.criterion.teacher_kernel
        )

    def shuffled(self, graph: Graph, generator: torch.Generator | None = None) -> Graph:
        """A wrong graph with as many in-edges and out-edges at every node: the sources permuted among
        all edges. Self-loops and repeated edges may arise.

        The generator is used once in the life of the loss; from then on a graph of the same edges
        has the same wrong graph, also after a state_dict is loaded.
        """
        found = self._shuffled.get(graph)
        if found is None:
            if self.shuffle_seed < 0:
                device = None if generator is None else generator.device
                self.shuffle_seed.copy_(torch.randint(2**62, (), generator=generator, device=device))
            own = torch.Generator().manual_seed(int(self.shuffle_seed))
            order = torch.randperm(graph.num_edges, generator=own).to(graph.device)
            found = self._shuffled[graph] = Graph.from_csr(graph.rowptr, graph.col[order], graph.num_src)
        return found


class KD(DistillationLoss):
    """Soft labels (Hinton et al. 2015, arXiv:1503.02531): ``T^2 KL(teacher || student)`` at temperature T.

    The classes of a node are one softmax, and the loss is a mean over nodes. With ``multilabel`` each
    label is a Bernoulli variable of its own, and the loss a mean over nodes and labels: binary
    cross-entropy with the teacher's soft labels, less their entropy, so that equal logits give 0.
    The soft labels of GLNN (Zhang et al. 2022, arXiv:2110.08727) are temperature 1.
    """

    name = "kd"
    uses = "logits"
    rowwise = True

    def __init__(self, *, temperature: float = 2.0, multilabel: bool = False) -> None:
        super().__init__()
        self.temperature = _number("temperature", temperature)
        self.multilabel = _flag("multilabel", multilabel)

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
        self.regressor = nn.Linear(_integer("student_dim", student_dim, 1), _integer("teacher_dim", teacher_dim, 1))

    def compare(self, student: Tensor, teacher: Tensor, generator: torch.Generator | None) -> Tensor:
        return F.mse_loss(_apply(self.regressor, student, "student"), _width(self.regressor.out_features, teacher))


class AttentionTransfer(DistillationLoss):
    """Attention transfer (Zagoruyko & Komodakis 2017, arXiv:1612.03928) with nodes in place of pixels.

    The attention of a node is ``sum_d |z_d|^p``; the vector of all nodes is scaled to length 1, and
    the loss is the squared distance of the two vectors: in [0, 2] whatever N. efficient-gnns has the
    mean square instead, which is 1/N of this.
    """

    name = "at"

    def __init__(self, *, p: float = 2.0) -> None:
        super().__init__()
        self.p = _number("p", p, low=1.0)

    def compare(self, student: Tensor, teacher: Tensor, generator: torch.Generator | None) -> Tensor:
        s, t = (_unit(z.abs().pow(self.p).sum(1)) for z in (student, teacher))
        return (s - t).square().sum()


class RKD(DistillationLoss):
    """Relational knowledge distillation (Park et al. 2019, arXiv:1904.05068).

    ``distance_weight`` times the Huber loss of all pairwise distances, each side's divided by their
    mean, plus ``angle_weight`` times the Huber loss of the cosines of all angles of three nodes.
    Both are means over distinct nodes; the authors' code also counts the pairs and triples that
    repeat a node, whose loss is 0. The weights are the defaults of RepDistiller; the authors' example
    for metric learning has 1 and 2.

    Memory, backward included: about 9 max_nodes^2 and 3 max_angle_nodes^2 (max_angle_nodes + Ds + Dt) floats.
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
        self.distance_weight = _number("distance_weight", distance_weight, low=0.0)
        self.angle_weight = _number("angle_weight", angle_weight, low=0.0)
        self.max_nodes = _integer("max_nodes", max_nodes, 2)
        self.max_angle_nodes = _integer("max_angle_nodes", max_angle_nodes, 3)

    def compare(self, student: Tensor, teacher: Tensor, generator: torch.Generator | None) -> Tensor:
        n = student.shape[0]
        distance = F.smooth_l1_loss(_relative_distances(student), _relative_distances(teacher), reduction="sum")
        student, teacher = _sample(self.max_angle_nodes, generator, student, teacher)
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
        max_nodes: the most nodes compared. Memory, backward included: about 7 max_nodes^2 floats,
            4 with "cosine".
    """

    name = "gsp"

    def __init__(self, *, kernel: Literal["linear", "cosine"] = "linear", max_nodes: int = 4096) -> None:
        super().__init__()
        _one_of("kernel", kernel, ("linear", "cosine"))
        self.kernel = kernel
        self.max_nodes = _integer("max_nodes", max_nodes, 2)

    def compare(self, student: Tensor, teacher: Tensor, generator: torch.Generator | None) -> Tensor:
        similarity = _cosines if self.kernel == "cosine" else lambda z: _unit(z @ z.T)
        return F.mse_loss(similarity(student), similarity(teacher))


class PKT(DistillationLoss):
    """Probabilistic knowledge transfer (Passalis & Tefas 2018, arXiv:1803.10837).

    ``p_ij = K_ij / sum_j K_ij`` with ``K = (1 + cosine) / 2``, j = i included as in the authors' code;
    the loss is the mean over the n nodes of ``KL(p_teacher || p_student)``. The authors' code divides by
    n^2, which is 1/n of this.

    Memory, backward included: about 7 max_nodes^2 floats.
    """

    name = "pkt"

    def __init__(self, *, max_nodes: int = 4096) -> None:
        super().__init__()
        self.max_nodes = _integer("max_nodes", max_nodes, 2)

    def compare(self, student: Tensor, teacher: Tensor, generator: torch.Generator | None) -> Tensor:
        def log_prob(z: Tensor) -> Tensor:
            similarity = ((1 + _cosines(z)) / 2).clamp_min(1e-7)  # opposite nodes: log 0
            return similarity.log() - similarity.sum(1, keepdim=True).log()

        return F.kl_div(log_prob(student), log_prob(teacher), reduction="batchmean", log_target=True)


class GCRD(DistillationLoss):
    """Contrastive representation distillation (G-CRD, Joshi et al. 2021, arXiv:2111.04964).

    Both sides are projected (trained linear maps) and scaled to length 1; the loss is InfoNCE: the
    cross-entropy of a student's node for the same node among the teacher's n nodes, its logits being
    cosines / temperature. Not 0 at its minimum. efficient-gnns projects by a graph convolution, batch
    normalisation and ReLU, this by a linear map alone.

    Memory, backward included: about 4 max_nodes^2 floats.
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
        self.temperature = _number("temperature", temperature)
        self.max_nodes = _integer("max_nodes", max_nodes, 2)
        self.proj_dim = _integer("proj_dim", proj_dim, 1)
        self.student_proj = nn.Linear(_integer("student_dim", student_dim, 1), self.proj_dim)
        self.teacher_proj = nn.Linear(_integer("teacher_dim", teacher_dim, 1), self.proj_dim)

    def compare(self, student: Tensor, teacher: Tensor, generator: torch.Generator | None) -> Tensor:
        s = _unit(_apply(self.student_proj, student, "student"))
        t = _unit(_apply(self.teacher_proj, teacher, "teacher"))
        same = torch.arange(s.shape[0], device=s.device)
        return F.cross_entropy(s @ (t / self.temperature).T, same)


class RepresentationMatching(DistillationLoss):
    """Representational similarity distillation of NOSMOG (Tian et al. 2023, arXiv:2208.10010).

    ``mean_ij (M^t_ij - M^s_ij)^2`` with ``M = H H^T``; H is the teacher's features, and ``W s + b`` (trained)
    for the student, every row scaled to length 1. ``normalize=False`` leaves out the scaling, as
    NOSMOG does. NOSMOG also has a ReLU after W, which is left out here.

    Memory, backward included: about 4 max_nodes^2 floats.
    """

    name = "rsd"

    def __init__(self, *, student_dim: int, teacher_dim: int, normalize: bool = True, max_nodes: int = 4096) -> None:
        super().__init__()
        self.normalize = _flag("normalize", normalize)
        self.max_nodes = _integer("max_nodes", max_nodes, 2)
        self.proj = nn.Linear(_integer("student_dim", student_dim, 1), _integer("teacher_dim", teacher_dim, 1))

    def compare(self, student: Tensor, teacher: Tensor, generator: torch.Generator | None) -> Tensor:
        similarity = _cosines if self.normalize else lambda h: h @ h.T
        projected = _apply(self.proj, student, "student")
        return F.mse_loss(similarity(projected), similarity(_width(self.proj.out_features, teacher)))


LOSSES: dict[str, type[DistillationLoss]] = {
    loss.name: loss
    for loss in (LSP, KD, FitNet, AttentionTransfer, RKD, SimilarityPreserving, PKT, GCRD, RepresentationMatching)
}


def kind(name: str) -> type[DistillationLoss]:
    """The class of that name in :data:`LOSSES`."""
    if name not in LOSSES:
        raise ValueError(f"name must be one of {_listed(LOSSES)}, got {name!r}{_did_you_mean(name, LOSSES)}")
    return LOSSES[name]


def build(
    name: str, *, student_dim: int | None = None, teacher_dim: int | None = None, **hyperparameters: Any
) -> DistillationLoss:
    """The loss of that name in :data:`LOSSES`.

    Args:
        student_dim, teacher_dim: the widths of what it compares. Needed by the losses that project,
            and ignored by the others.
        hyperparameters: of the loss's class.
    """
    loss = kind(name)
    valid = set(inspect.signature(loss).parameters)
    dims = {"student_dim": student_dim, "teacher_dim": teacher_dim}
    if dims.keys() <= valid:
        for argument, value in dims.items():
            if value is None:
                raise ValueError(f"{argument} must be given for loss {name!r}, which projects the features")
        hyperparameters.update(dims)
    known = sorted(valid - dims.keys())
    for argument in hyperparameters:
        if argument not in valid:
            raise TypeError(
                f"loss {name!r} has no hyperparameter {argument!r}{_did_you_mean(argument, known)}; "
                f"it has {_listed(known) or 'none'}"
            )
    return loss(**hyperparameters)


def _sample(most: int, generator: torch.Generator | None, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """The same ``most`` rows of both, drawn without replacement; all rows where there are no more."""
    n = student.shape[0]
    if n <= most:
        return student, teacher
    device = None if generator is None else generator.device
    rows = torch.randperm(n, generator=generator, device=device)[:most].to(student.device)
    return student[rows], teacher[rows]


def _unit(x: Tensor) -> Tensor:
    """x / ||x|| over the last dimension. Vectors of (nearly) 0 become 0 with gradient 0: a ReLU makes
    such rows, and F.normalize has a gradient of 1e12 there."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x / norm.masked_fill(norm < 1e-12, torch.inf)


def _cosines(z: Tensor) -> Tensor:
    """[n, n] cosines of the rows of z [n, D]."""
    z = _unit(z)
    return z @ z.T


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
    direction = _unit(z - z[:, None])
    return direction @ direction.mT


def _apply(linear: nn.Linear, x: Tensor, side: str) -> Tensor:
    """linear(x) in x's precision."""
    _width(linear.in_features, x, side)
    return F.linear(x, linear.weight.to(x.dtype), linear.bias.to(x.dtype))


def _width(expected: int, x: Tensor, side: str = "teacher") -> Tensor:
    if x.shape[1] != expected:
        raise ValueError(f"{side} must have shape [N, {expected}] ({side}_dim), got {tuple(x.shape)}")
    return x


def _with_constants(kernel: Kernel, constants: dict[str, Any]) -> Kernel:
    known = [f.name for f in fields(kernel)]
    for constant in constants:
        if constant not in known:
            raise ValueError(f"kernel_args must be of {_listed(known)} for kernel {kernel.name!r}, got {constant!r}")
    return replace(kernel, **constants)


def _number(argument: str, value: Any, low: float | None = None) -> float:
    """A finite number > 0, or >= low."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not number or (value <= 0 if low is None else value < low):
        interval = "(0, inf)" if low is None else f"[{low:g}, inf)"
        raise ValueError(f"{argument} must be a number in {interval}, got {value!r}")
    return float(value)


def _integer(argument: str, value: Any, low: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise ValueError(f"{argument} must be an int >= {low}, got {value!r}")
    return value


def _flag(argument: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"{argument} must be True or False, got {value!r}")
    return value


def _one_of(argument: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{argument} must be one of {_listed(choices)}, got {value!r}")


def _listed(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names))


def _did_you_mean(name: object, names: Iterable[str]) -> str:
    near = difflib.get_close_matches(str(name), list(names), n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""
