"""`inspect --kernels`: which kernel each launch takes in each bucket, and which ones it did not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from .inspect_format import layer_of, pattern_of, short, table, token_spans, with_layers, wrapped
from .inspect_graph import COLUMNS, RIGHT, Node, node, node_cells, record
from .inspect_source import Source
from .runtime.graph_record import GraphRecord
from .runtime.manifest import KernelChoice, KernelCode, Refusal

LINEARS = ("linear", "fused_linear")


@dataclass(frozen=True, slots=True)
class Choice:
    """The kernel of a launch in one bucket."""

    bucket: int
    kernel: str
    fallback: bool
    refused: tuple[Refusal, ...]


@dataclass(frozen=True, slots=True)
class Row:
    """Launches that differ only in their layer: where, what, and their kernel in each bucket."""

    where: str
    locs: tuple[str, ...]
    op: str
    n: int
    k: int
    choices: tuple[Choice, ...]


@dataclass(frozen=True, slots=True)
class Compiled:
    """The compiled kernels of a row (counted from 1) in buckets in which they are the same."""

    row: int
    buckets: tuple[int, ...]
    nodes: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Kernels:
    """The kernel table of a target. `fallbacks`: launches on a slow kernel, in any bucket.

    `compiled`: what each linear enqueues in each bucket, where the target is a CUDA device; grids
    are those of a card of `sms` multiprocessors. `code`: every kernel of a device, where nothing is
    known of what a launch enqueues (ONNX graphs).
    """

    buckets: tuple[int, ...]
    linears: tuple[Row, ...]
    others: tuple[Row, ...]
    fallbacks: int
    compiled: tuple[Compiled, ...] = ()
    sms: int = 0
    code: tuple[KernelCode, ...] = ()


def kernels(source: Source) -> Kernels:
    """The manifest's choices, alike layers collapsed."""
    by_launch: dict[tuple[str, str], list[KernelChoice]] = {}
    for c in source.facts.kernels:
        by_launch.setdefault((c.loc, c.op), []).append(c)
    groups: dict[tuple[object, ...], list[list[KernelChoice]]] = {}
    for (loc, op), chosen in by_launch.items():
        choices = tuple((c.bucket, c.kernel, c.fallback, c.refused) for c in chosen)
        key = pattern_of(loc), op, chosen[0].n, chosen[0].k, choices
        groups.setdefault(key, []).append(chosen)
    rows = [_row(group) for group in groups.values()]
    linears = tuple(r for r in rows if r.op in LINEARS)
    found = record(source)
    return Kernels(
        source.facts.buckets,
        linears,
        tuple(r for r in rows if r.op not in LINEARS),
        len({(c.loc, c.op) for c in source.facts.kernels if c.fallback}),
        _compiled(source, linears, found) if found else (),
        found.sms if found else 0,
        () if found else source.facts.code,
    )


def _compiled(source: Source, rows: Sequence[Row], found: GraphRecord) -> tuple[Compiled, ...]:
    """What the first launch of each row enqueues, bucket by bucket."""
    index: dict[tuple[str, str, int], int] = {}
    seen: dict[int, int] = {}
    for c in source.facts.kernels:  # per bucket: one per launch, in launch order
        index[c.loc, c.op, c.bucket] = seen.get(c.bucket, 0)
        seen[c.bucket] = seen.get(c.bucket, 0) + 1
    compiled: list[Compiled] = []
    for number, row in enumerate(rows, 1):
        for choice in row.choices:
            graph, launch = found.of(choice.bucket), index[row.locs[0], row.op, choice.bucket]
            if graph is None or launch >= len(graph.launches):
                continue
            kinds = (found.kinds[i] for i in graph.launches[launch])
            nodes = tuple(node(kind, source.facts.code) for kind in kinds)
            last = compiled[-1] if compiled else None
            if last and last.row == number and last.nodes == nodes:
                compiled[-1] = replace(last, buckets=(*last.buckets, choice.bucket))
            else:
                compiled.append(Compiled(number, (choice.bucket,), nodes))
    return tuple(compiled)


def _row(group: Sequence[Sequence[KernelChoice]]) -> Row:
    first = group[0]
    locs = tuple(chosen[0].loc for chosen in group)
    layers = [layer for loc in locs if (layer := layer_of(loc)) is not None]
    return Row(
        where=with_layers(short(pattern_of(first[0].loc)), layers),
        locs=locs,
        op=first[0].op,
        n=first[0].n,
        k=first[0].k,
        choices=tuple(Choice(c.bucket, c.kernel, c.fallback, c.refused) for c in first),
    )


def kernels_text(facts: Kernels) -> list[str]:
    """Linears first, with the refused candidates; then everything else."""
    rows = [*facts.linears, *facts.others]
    linears = _table(facts.linears, 1, facts.buckets, "linear")
    others = _table(facts.others, 1 + len(facts.linears), facts.buckets, "other launch")
    lines = [*linears, "", *others, "", "refused, and why (# is the row above)"]
    lines += _refusals(rows) or ["  nothing: every launch took the first kernel of its kind"]
    slow = [f"{r.where}: {c.kernel} in bucket {c.bucket}" for r in rows for c in r.choices
            if c.fallback]  # fmt: skip
    lines += ["", f"fallbacks: {facts.fallbacks}", *(f"  {line}" for line in slow)]
    if facts.compiled:
        return [*lines, "", *_compiled_table(facts)]
    return [*lines, "", *_code_table(facts.code)] if facts.code else lines


def _code_table(code: Sequence[KernelCode]) -> list[str]:
    """A line per unit of a device's code: its kernels, and the most that one of them takes."""
    units: dict[str, list[KernelCode]] = {}
    for c in code:
        units.setdefault(c.unit, []).append(c)
    head = ("unit", "kernels", "registers", "spilled", "shared")
    cells = [
        (unit, str(len(own)), str(max(c.registers for c in own)), str(max(c.spilled for c in own)),
         str(max(c.shared for c in own)))
        for unit, own in units.items()
    ]  # fmt: skip
    title = "machine code: the most registers of a thread, bytes spilled and bytes of shared memory"
    return [title, *table(cells, head, right=(1, 2, 3, 4))]


def _compiled_table(facts: Kernels) -> list[str]:
    """A line per compiled kernel of each linear and bucket; bytes spilled should be none."""
    head = ("#", "T", *COLUMNS)
    cells = [
        (str(c.row) if i == 0 else "", token_spans(c.buckets, facts.buckets) if i == 0 else "",
         *node_cells(n))
        for c in facts.compiled
        for i, n in enumerate(c.nodes)
    ]  # fmt: skip
    title = f"compiled (# is the row above; grids are for a card of {facts.sms} multiprocessors)"
    return [title, *table(cells, head, right=(0, *(2 + i for i in RIGHT)))]


def _table(rows: Sequence[Row], first: int, buckets: Sequence[int], what: str) -> list[str]:
    """A row per kind of launch; equal kernels of neighbouring buckets stand in one column."""
    spans = _spans(rows, buckets)
    head = ("#", what, "times", "n x k", *(f"T={token_spans(s, buckets)}" for s in spans))
    cells = [
        (str(number), row.where if row.where != row.op else "", str(len(row.locs)),
         f"{row.n} x {row.k}" if row.n else "-", *(_kernel(row, span[0]) for span in spans))
        for number, row in enumerate(rows, first)
    ]  # fmt: skip
    return table(cells, head, right=(0, 2, 3))


def _spans(rows: Sequence[Row], buckets: Sequence[int]) -> list[list[int]]:
    """Neighbouring buckets in which no row changes its kernel."""
    spans: list[list[int]] = []
    for bucket in buckets:
        if spans and all(_kernel(r, bucket) == _kernel(r, spans[-1][-1]) for r in rows):
            spans[-1].append(bucket)
        else:
            spans.append([bucket])
    return spans


def _kernel(row: Row, bucket: int) -> str:
    return next((c.kernel for c in row.choices if c.bucket == bucket), "-")


def _refusals(rows: Sequence[Row]) -> list[str]:
    """Each refused kernel with its reason once, and the rows and buckets it was refused in."""
    found: dict[tuple[str, str], dict[int, list[int]]] = {}
    for number, row in enumerate(rows, 1):
        for choice in row.choices:
            for r in choice.refused:
                where = found.setdefault((r.kernel, r.reason), {})
                where.setdefault(number, []).append(choice.bucket)
    lines: list[str] = []
    for (kernel, reason), where in found.items():
        numbers = ", ".join(f"#{number}" for number in where)
        buckets = sorted({b for bs in where.values() for b in bs})
        at = f"  [{numbers}; bucket {', '.join(map(str, buckets))}]"
        lines += wrapped(f"{kernel}: {reason}{at}", "  ", "      ")
    return lines
