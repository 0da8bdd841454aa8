"""The kernel table of each target."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..ir.kernel import KernelDecl
from ..ir.target import target
from . import kernels, kernels_cuda
from .kernels import Kernel


@dataclass(frozen=True, slots=True)
class Table:
    """Kernels in order of preference, and by name."""

    kernels: tuple[Kernel, ...]
    by_name: Mapping[str, Kernel]


def _table(found: tuple[Kernel, ...]) -> Table:
    return Table(found, {kernel.name: kernel for kernel in found})


CPU = _table(kernels.KERNELS)
CUDA = _table(kernels_cuda.KERNELS)


def table_of(name: str) -> Table:
    """The table of a target. Raises TargetError for an unknown one."""
    return CUDA if "cuda" in target(name).features else CPU


def declarations(name: str = "cpu") -> tuple[KernelDecl, ...]:
    """The table of a target as phase 35 reads it. Raises TargetError for an unknown one."""
    return tuple(kernel.decl for kernel in table_of(name).kernels)
