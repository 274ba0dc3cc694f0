"""The structures of the native core as tuples, field by field; the headers in csrc say what a field means.

They are read by position. So that a field that moves is not taken for another one, their names are compared
once with those that the core was built with.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, ParamSpec, TypeVar

from .. import _C

_P = ParamSpec("_P")
_T = TypeVar("_T")

Address = int  # of memory of the device, or 0 for none
Pair = tuple[int, int]  # rows and columns


class Features(NamedTuple):
    data: Address
    rows: int
    cols: int
    stride: int
    dtype: int


class Csr(NamedTuple):
    rowptr: Address
    col: Address
    rows: int
    cols: int
    edges: int
    wide: bool


class Kernel(NamedTuple):
    metric: int
    shape: int
    root: int
    degree: int
    scale: float
    param: float


class InverseNorm(NamedTuple):
    x: Features
    inv_norm: Address


class Similarity(NamedTuple):
    graph: Csr
    src: Features
    dst: Features
    src_inv_norm: Address
    dst_inv_norm: Address
    metric: int
    reverse: Address
    r: Address


class KernelValues(NamedTuple):
    edges: int
    kernel: Kernel
    acc: int
    r: Address
    values: Address


class Divergences(NamedTuple):
    graph: Csr
    student: Kernel
    teacher: Kernel
    divergence: int
    reduction: int
    teacher_is_values: bool
    acc: int
    r_s: Address
    r_t: Address
    weight: Address
    src_inv_norm: Address
    dst_inv_norm: Address
    coef: Address
    rows: Address
    loss: Address
    diagnostics: Address
    max_degree: int
    workspace: Address


class Incidence(NamedTuple):
    graph: Csr
    perm: Address
    mirrored: bool
    other: Features


class Gradient(NamedTuple):
    self: Features
    lists: tuple[Incidence, ...]
    metric: int
    coef: Address
    grad: Address
    grad_per_row: bool
    inv_norm: Address
    out: Address
    max_degree: int
    workspace: Address


class Value(NamedTuple):
    channels: int
    height: int
    width: int
    genes: tuple[int, ...]


class Node(NamedTuple):
    kind: int
    inputs: tuple[int, ...]
    output: int
    kernel: Pair
    stride: Pair
    padding: Pair
    dilation: Pair
    groups: int
    count_padding: bool
    batch: bool
    activation: int
    param: float
    weight: Address
    bias: Address
    scale: Address
    shift: Address
    select: tuple[int, ...]


class Affine(NamedTuple):
    scale: Address
    shift: Address
    stride: int


class Moments(NamedTuple):
    mean: Address
    variance: Address


class NetworkRun(NamedTuple):
    masks: Address
    individuals: int
    x: Address
    x_dtype: int
    x_stride: int
    images: int
    out: Address
    out_dtype: int
    affines: tuple[Affine, ...]
    moments: tuple[Moments, ...]
    affines_agree: bool


class ConvBackward(NamedTuple):
    acc: int
    dtype: int
    individuals: int
    images: int
    channels: int
    outputs: int
    groups: int
    size: Pair
    out_size: Pair
    kernel: Pair
    stride: Pair
    padding: Pair
    dilation: Pair
    in_mask: Address
    out_mask: Address
    grad: Address
    x: Address
    shared: bool
    weight: Address
    grad_x: Address
    grad_weight: Address
    grad_bias: Address


def by_name(structure: Callable[_P, _T]) -> Callable[_P, _T]:
    """The constructor of a NamedTuple for keyword arguments, in a fifth of its time: to call a class with keywords
    makes a dictionary of them, and a loss of a small graph makes 15 structures."""
    cls: Any = structure
    names = ", ".join(cls._fields)
    constructor: Callable[_P, _T] = eval(f"lambda *, {names}: new(cls, ({names},))", {"new": tuple.__new__, "cls": cls})
    return constructor


def fields() -> dict[str, tuple[str, ...]]:
    """The fields of every structure of this file."""
    classes = {name: value for name, value in globals().items() if isinstance(value, type)}
    return {name: cls._fields for name, cls in classes.items() if hasattr(cls, "_fields")}


def compare(native: dict[str, tuple[str, ...]]) -> None:
    """Raises ImportError unless a native module has these structures."""
    here = fields()
    for name in sorted(here.keys() | native.keys()):
        if here.get(name) != native.get(name):
            raise ImportError(
                f"the native core of fastkd was built for other sources, build it again: {name} has the fields "
                f"{native.get(name)} there and {here.get(name)} here"
            )


compare(_C.fields)
