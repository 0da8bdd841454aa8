"""The kernel table of each target."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ..ir.kernel import KernelDecl
from ..ir.target import Target, target
from . import kernels, kernels_cuda, kernels_sm120
from .kernels import Kernel


@dataclass(frozen=True, slots=True)
class Table:
    """Kernels in order of preference, and by name."""

    kernels: tuple[Kernel, ...]
    by_name: Mapping[str, Kernel]


def _table(found: Iterable[Kernel]) -> Table:
    """Of two kernels of one name, the first."""
    by_name: dict[str, Kernel] = {}
    for kernel in found:
        by_name.setdefault(kernel.name, kernel)
    return Table(tuple(by_name.values()), by_name)


def _cuda(found: Target) -> Table:
    own = kernels_sm120.kernels(found.shared_bytes) if "mma_nvfp4" in found.features else ()
    return _table((*own, *kernels_cuda.KERNELS))


CPU = _table(kernels.KERNELS)


def table_of(name: str) -> Table:
    """The table of a target. Raises TargetError for an unknown one."""
    found = target(name)
    return _cuda(found) if "cuda" in found.features else CPU


def declarations(name: str = "cpu") -> tuple[KernelDecl, ...]:
    """The table of a target as phase 35 reads it. Raises TargetError for an unknown one."""
    return tuple(kernel.decl for kernel in table_of(name).kernels)
