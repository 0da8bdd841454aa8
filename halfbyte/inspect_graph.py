"""`inspect --graph`: what the CUDA graph of each bucket holds, kernel by kernel.

The compiler let the library's own launchers say it (codegen/graphs.py); grids are those of the
target's usual card. Nothing but kernels can stand in a graph: launchers have no other call.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .inspect_format import layer_of, pattern_of, short, table, with_layers
from .inspect_source import Source
from .ir.errors import ModelError
from .runtime.graph_record import FILE, BucketGraph, Enqueued, GraphRecord
from .runtime.manifest import KernelCode
from .runtime.strict import decode, parse_json


@dataclass(frozen=True, slots=True)
class Node:
    """A compiled kernel where a graph holds it; `shared`: static and dynamic."""

    kernel: str
    tile: str
    grid: tuple[int, ...]
    threads: int
    cluster: int
    registers: int
    spilled: int
    shared: int
    instruction: str


@dataclass(frozen=True, slots=True)
class Row:
    """Launches that differ only in their layer, and their nodes in order."""

    where: str
    op: str
    times: int
    nodes: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Graph:
    """What the CUDA graph of a bucket holds. `sampler`: what its second graph, which chooses the
    next token on the device, holds besides.
    """

    bucket: int
    kernels: int
    rows: tuple[Row, ...]
    sampler: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Graphs:
    """All graphs of a target."""

    target: str
    sms: int
    graphs: tuple[Graph, ...]


def record(source: Source) -> GraphRecord | None:
    """What the compiler recorded; None for a target without graphs."""
    part = f"{source.folder}/{FILE}"
    data = source.artifact.read_optional(part)
    if data is None:
        return None
    where = str(source.artifact.path(part))
    found = decode(GraphRecord, parse_json(data, where), where)
    for graph in found.graphs:
        if any(not 0 <= i < len(found.kinds) for launch in graph.launches for i in launch):
            raise ModelError(f"{where}: bucket {graph.bucket} names a kind that is not there")
    if any(not 0 <= kind.kernel < len(source.facts.code) for kind in found.kinds):
        raise ModelError(f"{where}: not of the manifest's kernels; compile the model again")
    return found


def node(kind: Enqueued, code: Sequence[KernelCode]) -> Node:
    """An enqueued kernel with what its machine code takes."""
    own = code[kind.kernel]
    x, y, z = kind.block
    return Node(own.kernel, kind.tile, kind.grid, x * y * z, kind.cluster, own.registers,
                own.spilled, own.shared + kind.shared, own.instruction)  # fmt: skip


def graphs(source: Source) -> Graphs:
    """The graphs of a target. Raises ModelError where it has none."""
    found = record(source)
    if found is None:
        raise ModelError(
            f"{source.artifact.folder}: {source.target} runs no CUDA graphs; "
            "--kernels shows what it runs"
        )
    return Graphs(source.target, found.sms, tuple(_graph(source, found, g) for g in found.graphs))


def _graph(source: Source, found: GraphRecord, graph: BucketGraph) -> Graph:
    code = source.facts.code
    ops = [c for c in source.facts.kernels if c.bucket == graph.bucket]
    groups: dict[tuple[str, str, tuple[int, ...]], list[str]] = {}
    for op, kinds in zip(ops, graph.launches, strict=False):
        groups.setdefault((op.op, pattern_of(op.loc), kinds), []).append(op.loc)
    rows: list[Row] = []
    for (name, pattern, kinds), locs in groups.items():
        layers = [layer for loc in locs if (layer := layer_of(loc)) is not None]
        nodes = tuple(node(found.kinds[i], code) for i in kinds)
        rows.append(Row(with_layers(short(pattern), layers), name, len(locs), nodes))
    sampler = graph.launches[len(ops)] if len(graph.launches) > len(ops) else ()
    total = sum(len(row.nodes) * row.times for row in rows)
    own = tuple(node(found.kinds[i], code) for i in sampler)
    return Graph(graph.bucket, total, tuple(rows), own)


def graphs_text(facts: Graphs) -> list[str]:
    """A table per bucket."""
    lines = [f"{facts.target}: grids as a card of {facts.sms} multiprocessors gets them"]
    for graph in facts.graphs:
        head = f"bucket {graph.bucket}: {graph.kernels} kernels, no copies, no allocations"
        lines += ["", head, *_table(graph)]
    return lines


def _table(graph: Graph) -> list[str]:
    head = ("launch", "times", *COLUMNS)
    rows = [*graph.rows, Row("", "sampler (second graph)", 1, graph.sampler)]
    cells = [
        (row.where or row.op if i == 0 else "", str(row.times) if i == 0 else "", *node_cells(n))
        for row in rows
        for i, n in enumerate(row.nodes)
    ]
    return table(cells, head, right=(1, *(2 + i for i in RIGHT)))


COLUMNS = ("compiled kernel", "tile", "grid", "threads", "registers", "spilled", "shared",
           "tensor cores")  # fmt: skip
RIGHT = (3, 4, 5, 6)  # of COLUMNS


def node_cells(n: Node) -> tuple[str, ...]:
    """A node under COLUMNS."""
    grid = " x ".join(map(str, n.grid)).removesuffix(" x 1").removesuffix(" x 1")
    clusters = f" in {n.cluster}s" if n.cluster > 1 else ""
    numbers = (n.threads, n.registers, n.spilled, n.shared)
    return n.kernel, n.tile or "-", grid + clusters, *map(str, numbers), n.instruction or "-"
