"""What a step enqueues on a CUDA device, launch by launch: said by the library's own launchers.

`record` (templates/cuda/record.cc) is linked from the library's objects and run where it was
compiled. With what the assembler said of each kernel and a census of its machine code, that tells
for every op and bucket which compiled kernels run, on what grid, with what resources.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..ir.errors import IRError
from ..ir.target import Target
from ..runtime.artifact import BucketGraph, Enqueued, GraphRecord, KernelCode
from .tiles import tile_of

_PLAIN = 48 * 1024  # bytes of shared memory that a block gets without asking


@dataclass(frozen=True, slots=True)
class Compiled:
    """A compiled kernel: its symbol, and what the manifest says of it."""

    symbol: str
    code: KernelCode


def graphs_of(said: str, compiled: Sequence[Compiled], target: Target) -> GraphRecord:
    """The lines of `record`. IRError: a kernel that nobody compiled, or that cannot be launched."""
    by_symbol = {c.symbol: i for i, c in enumerate(compiled)}
    kinds: dict[Enqueued, int] = {}
    launches: dict[int, list[list[int]]] = {}
    for line in said.splitlines():
        bucket, launch, grid, block, shared, allowed, cluster, symbol = line.split(" ")
        if symbol not in by_symbol:
            raise IRError(f"{target.name}: {symbol} is launched, but was not compiled")
        index = by_symbol[symbol]
        _check_shared(compiled[index].code, int(shared), int(allowed), target)
        tile = tile_of(compiled[index].code)
        kind = Enqueued(index, _three(grid), _three(block), int(shared), int(cluster), tile)
        found = launches.setdefault(int(bucket), [])
        while len(found) <= int(launch):
            found.append([])
        found[int(launch)].append(kinds.setdefault(kind, len(kinds)))
    graphs = (BucketGraph(b, tuple(map(tuple, found))) for b, found in launches.items())
    return GraphRecord(target.sms, tuple(kinds), tuple(graphs))


def _check_shared(code: KernelCode, shared: int, allowed: int, target: Target) -> None:
    """A block has 48 KB, static variables included, unless the launcher asked for more."""
    most = min(allowed, target.shared_bytes - code.shared) if allowed else _PLAIN - code.shared
    if shared > most:
        raise IRError(
            f"{target.name}: {code.kernel} of {code.unit} asks for {shared} bytes of shared memory "
            f"beside {code.shared}, may have {most}"
        )


def _three(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(",")))
