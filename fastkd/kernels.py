"""Similarity kernels of the local structure preserving loss (arXiv:2003.10477, section 3.2).

A kernel maps the features ``a``, ``b`` of an edge's two end points, each of width D, to a number.
With ``scale="mean"`` every sum over the D features becomes a mean, so that teacher and student of
different widths sit at the same point of the kernel; ``scale="sum"`` is the published form.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import ClassVar, Literal

from ._ops import Metric, Shape, kernel_spec

__all__ = ["RBF", "Cosine", "Euclidean", "Kernel", "Laplacian", "Linear", "Poly", "resolve"]


@dataclass(frozen=True)
class Kernel:
    """Base class. Kernels are immutable and compare by value."""

    name: ClassVar[str]

    def __post_init__(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            if f.name == "scale":
                if value not in ("sum", "mean"):
                    raise ValueError(f"scale must be 'sum' or 'mean', got {value!r}")
            elif f.name == "sigma":
                if not _is_number(value):
                    raise TypeError(f"sigma must be a number, got {type(value).__name__}")
                if not (math.isfinite(value) and value > 0):
                    raise ValueError(f"sigma must be finite and in (0, inf), got {value!r}")
            elif f.name == "sign":
                if value not in (-1, 1):
                    raise ValueError(f"sign must be -1 or 1, got {value!r}")
            elif f.name == "degree":
                if isinstance(value, bool) or not isinstance(value, int):
                    raise TypeError(f"degree must be an int, got {type(value).__name__}")
                if not 1 <= value <= 16:
                    raise ValueError(f"degree must be in [1, 16], got {value}")
            elif f.name == "c":
                if not _is_number(value):
                    raise TypeError(f"c must be a number, got {type(value).__name__}")
                if not math.isfinite(value):
                    raise ValueError(f"c must be finite, got {value!r}")
            elif not isinstance(value, bool):
                raise TypeError(f"{f.name} must be a bool, got {type(value).__name__}")

    def spec(self, dim: int) -> tuple[list[int], list[float]]:
        """``([metric, shape, root, degree], [scale, param])`` as the operators take them."""
        raise NotImplementedError

    def _scale(self, dim: int) -> float:
        return 1.0 / max(dim, 1) if getattr(self, "scale", "sum") == "mean" else 1.0


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


@dataclass(frozen=True)
class RBF(Kernel):
    """``exp(-||a - b||^2 / (2 sigma))``: note ``2 sigma``, not ``2 sigma^2``.

    Args:
        sigma: finite, > 0, in units of the squared distance.
        scale: ``"sum"`` or ``"mean"`` over the features.
    """

    name: ClassVar[str] = "rbf"
    sigma: float = 100.0
    scale: Literal["sum", "mean"] = "sum"

    def spec(self, dim: int) -> tuple[list[int], list[float]]:
        return kernel_spec(
            metric=Metric.sqdist, shape=Shape.exponential, scale=self._scale(dim), param=0.5 / self.sigma
        )


@dataclass(frozen=True)
class Euclidean(Kernel):
    """``sign * ||a - b||^2``. The paper writes it without a sign; -1 makes close nodes similar.

    Args:
        sign: -1 (default) or 1.
        scale: ``"sum"`` or ``"mean"`` over the features.
        squared: ``False`` for ``sign * ||a - b||``, whose gradient at 0 is taken to be 0.
    """

    name: ClassVar[str] = "euclidean"
    sign: int = -1
    scale: Literal["sum", "mean"] = "sum"
    squared: bool = True

    def spec(self, dim: int) -> tuple[list[int], list[float]]:
        return kernel_spec(
            metric=Metric.sqdist,
            shape=Shape.linear,
            root=not self.squared,
            scale=self._scale(dim),
            param=float(self.sign),
        )


@dataclass(frozen=True)
class Linear(Kernel):
    """``a . b``."""

    name: ClassVar[str] = "linear"
    scale: Literal["sum", "mean"] = "sum"

    def spec(self, dim: int) -> tuple[list[int], list[float]]:
        return kernel_spec(metric=Metric.dot, shape=Shape.linear, scale=self._scale(dim))


@dataclass(frozen=True)
class Poly(Kernel):
    """``(a . b + c)^degree``.

    Args:
        c: finite.
        degree: int in [1, 16].
        scale: ``"sum"`` or ``"mean"`` over the features.
        normalize: ``True`` for ``(cos(a, b) + c)^degree``, the form used by efficient-gnns.
    """

    name: ClassVar[str] = "poly"
    c: float = 0.0
    degree: int = 2
    scale: Literal["sum", "mean"] = "sum"
    normalize: bool = False

    def spec(self, dim: int) -> tuple[list[int], list[float]]:
        return kernel_spec(
            metric=Metric.cosine if self.normalize else Metric.dot,
            shape=Shape.power,
            degree=self.degree,
            scale=1.0 if self.normalize else self._scale(dim),
            param=float(self.c),
        )


@dataclass(frozen=True)
class Laplacian(Kernel):
    """``exp(-||a - b||_1 / sigma)``, the kernel in the authors' code."""

    name: ClassVar[str] = "laplacian"
    sigma: float = 100.0
    scale: Literal["sum", "mean"] = "sum"

    def spec(self, dim: int) -> tuple[list[int], list[float]]:
        return kernel_spec(metric=Metric.l1, shape=Shape.exponential, scale=self._scale(dim), param=1.0 / self.sigma)


@dataclass(frozen=True)
class Cosine(Kernel):
    """``a . b / (||a|| ||b||)``, 0 where a norm is 0. ``scale`` has no effect on it."""

    name: ClassVar[str] = "cosine"
    scale: Literal["sum", "mean"] = "sum"

    def spec(self, dim: int) -> tuple[list[int], list[float]]:
        return kernel_spec(metric=Metric.cosine, shape=Shape.linear)


_BY_NAME: dict[str, Kernel] = {k.name: k() for k in (RBF, Euclidean, Linear, Poly, Laplacian, Cosine)}


def resolve(kernel: str | Kernel, argument: str = "kernel") -> Kernel:
    """A kernel from its name (with the default constants), or the kernel itself."""
    if isinstance(kernel, Kernel):
        return kernel
    if not isinstance(kernel, str):
        raise TypeError(f"{argument} must be a name or a fastkd.kernels.Kernel, got {type(kernel).__name__}")
    if kernel not in _BY_NAME:
        raise ValueError(f"{argument} must be one of {', '.join(_BY_NAME)}, got {kernel!r}")
    return _BY_NAME[kernel]
