"""The native core: the structures of fastkd/_ops/structs.py, by address. tests/test_border.py compares this with it."""

from enum import IntEnum
from typing import Protocol

from ._ops import structs
from ._ops.native import Memory

__version__: str
compiler: str
cuda_version: str
cuda_architectures: str
fields: dict[str, tuple[str, ...]]
ALWAYS: int
NEVER: int
cpu: Host
cuda: Backend

class DType(IntEnum):
    f16 = 0
    bf16 = 1
    f32 = 2
    f64 = 3

class Metric(IntEnum):
    dot = 0
    cosine = 1
    sqdist = 2
    l1 = 3

class Shape(IntEnum):
    linear = 0
    power = 1
    exponential = 2

class Divergence(IntEnum):
    student_teacher = 0
    teacher_student = 1

class Reduction(IntEnum):
    none = 0
    sum = 1
    mean = 2
    mean_active = 3
    mean_edges = 4

class Operation(IntEnum):
    conv = 0
    norm = 1
    activation = 2
    max_pool = 3
    avg_pool = 4
    add = 5
    multiply = 6
    select = 7
    flatten = 8

class Activation(IntEnum):
    none = 0
    relu = 1
    relu6 = 2
    leaky_relu = 3
    sigmoid = 4
    silu = 5
    hardsigmoid = 6
    hardswish = 7
    tanh = 8
    gelu = 9
    gelu_tanh = 10

def isa() -> str: ...

class Network:
    def __init__(
        self, *, dtype: int, genes: int, values: tuple[structs.Value, ...], nodes: tuple[structs.Node, ...], output: int
    ) -> None: ...
    def outline(self) -> tuple[list[int], list[int], list[int]]: ...
    def bytes(self, images: int, recalibrate: bool, individuals: int, threads: int) -> int: ...
    def run(self, op: structs.NetworkRun, where: int, tf32: bool, memory: Memory) -> int: ...

class Backend(Protocol):
    """What cpu and cuda have in common. ``where`` is a number of threads, or a stream."""

    uses_workspace: bool
    Network: type[Network]
    def inverse_norm(self, op: structs.InverseNorm, where: int) -> None: ...
    def similarity(self, op: structs.Similarity, where: int) -> None: ...
    def kernel_values(self, op: structs.KernelValues, where: int) -> None: ...
    def divergences(self, op: structs.Divergences, where: int) -> None: ...
    def divergences_bytes(self, op: structs.Divergences) -> int: ...
    def gradient(self, op: structs.Gradient, where: int) -> None: ...
    def gradient_bytes(self, op: structs.Gradient) -> int: ...

class Host(Backend, Protocol):
    def advise_huge_pages(self, begin: int, bytes: int) -> None: ...
    def conv_backward(self, op: structs.ConvBackward, where: int) -> None: ...
    def csr_from_coo(
        self,
        *,
        src: int,
        dst: int,
        wide_in: bool,
        edges: int,
        num_src: int,
        num_dst: int,
        wide_out: bool,
        rowptr: int,
        col: int,
        perm: int,
        threads: int,
    ) -> int: ...
    def csr_first_wrong(self, graph: structs.Csr) -> int: ...
    def csr_transpose(self, graph: structs.Csr, *, rowptr: int, col: int, perm: int, threads: int) -> None: ...
    def csr_union(self, a: structs.Csr, b: structs.Csr, *, rowptr: int, col: int, threads: int) -> None: ...
