"""The native core. Arguments are addresses and tuples of integers; see csrc/bindings.cpp."""

from typing import Any

__version__: str
compiler: str
cuda_version: str
cuda_architectures: str

def isa() -> str: ...

class cpu:
    uses_workspace: bool
    @staticmethod
    def inverse_norm(x: tuple[int, ...], out: int, where: int) -> None: ...
    @staticmethod
    def similarity(
        graph: tuple[int, ...],
        src: tuple[int, ...],
        dst: tuple[int, ...],
        src_inv_norm: int,
        dst_inv_norm: int,
        metric: int,
        reverse: int,
        r: int,
        where: int,
    ) -> None: ...
    @staticmethod
    def kernel_values(edges: int, kernel: tuple[float, ...], acc: int, r: int, values: int, where: int) -> None: ...
    @staticmethod
    def divergences(*args: Any) -> int: ...
    @staticmethod
    def gradient(*args: Any) -> int: ...
    @staticmethod
    def advise_huge_pages(begin: int, bytes: int) -> None: ...
    @staticmethod
    def csr_from_coo(
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
    @staticmethod
    def csr_transpose(graph: tuple[int, ...], rowptr: int, col: int, perm: int, threads: int) -> None: ...
    @staticmethod
    def csr_union(a: tuple[int, ...], b: tuple[int, ...], rowptr: int, col: int, threads: int) -> None: ...
    @staticmethod
    def conv_backward(*args: Any) -> None: ...
    class Network:
        def __init__(
            self, dtype: int, genes: int, values: tuple[tuple[int, ...], ...], nodes: tuple[tuple, ...], output: int
        ) -> None: ...
        def outline(self) -> tuple[list[int], list[int], list[int]]: ...
        def bytes(self, images: int, recalibrate: bool, threads: int) -> int: ...
        def run(
            self,
            masks: int,
            individuals: int,
            x: int,
            x_dtype: int,
            x_stride: int,
            images: int,
            out: int,
            out_dtype: int,
            affines: tuple,
            moments: tuple,
            threads: int,
        ) -> None: ...
