"""`inspect --memory`: what a step occupies, and the arena drawn: bytes down, launches across."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from .inspect_format import collapsed, heading, pattern_of, short, size, table, wrapped
from .inspect_source import Source
from .ir.graph import Graph, Op, Value

CELL = 4
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
MOST_COLUMNS = 16
LONGEST_PERIOD = 64


@dataclass(frozen=True, slots=True)
class Slot:
    """A value of the arena, alive from launch `first` to launch `last`. Bytes per token."""

    value: str
    offset: int
    bytes: int
    first: int
    last: int


@dataclass(frozen=True, slots=True)
class Launch:
    """One launch of a step."""

    index: int
    op: str
    loc: str


@dataclass(frozen=True, slots=True)
class Repeat:
    """Launches [start, start + period) come `times` times, in the same places."""

    start: int
    period: int
    times: int

    def canonical(self, index: int) -> int:
        """The launch of the first round that `index` is like."""
        inside = self.start <= index < self.start + self.period * self.times
        return self.start + (index - self.start) % self.period if inside else index


@dataclass(frozen=True, slots=True)
class BucketBytes:
    """Bytes of the arena in one bucket, and of everything together."""

    bucket: int
    arena: int
    total: int


@dataclass(frozen=True, slots=True)
class Cache:
    """State of one kind: which, of what type, how many of them, bytes of all."""

    names: tuple[str, ...]
    type: str
    count: int
    bytes: int


@dataclass(frozen=True, slots=True)
class Memory:
    """The memory plan. `unshared_per_token`: what the arena would take if no value shared bytes."""

    weights: int
    weights_by_type: dict[str, int]
    state: int
    caches: tuple[Cache, ...]
    workspace: int
    arena_per_token: int
    unshared_per_token: int
    buckets: tuple[BucketBytes, ...]
    launches: tuple[Launch, ...]
    slots: tuple[Slot, ...]
    repeat: Repeat


def memory(source: Source) -> Memory:
    """The plan as the last phase recorded it, and the manifest's sums."""
    graph, facts = source.last, source.facts
    ops = [op for op in graph.ops if "launch" in op.attrs]
    slots = _slots(ops)
    by_type: Counter[str] = Counter()
    for weight in facts.weights:
        by_type[encoding_of(weight.type)] += weight.bytes
    fixed = sum(by_type.values()) + facts.arena.state + facts.arena.workspace
    arena = facts.arena.per_token
    return Memory(
        weights=sum(by_type.values()),
        weights_by_type=dict(by_type.most_common()),
        state=facts.arena.state,
        caches=_caches(graph),
        workspace=facts.arena.workspace,
        arena_per_token=arena,
        unshared_per_token=sum(s.bytes for s in slots),
        buckets=tuple(BucketBytes(b, arena * b, arena * b + fixed) for b in facts.buckets),
        launches=tuple(Launch(i, op.name, op.loc or str(op.out)) for i, op in enumerate(ops)),
        slots=tuple(slots),
        repeat=_repeat(ops),
    )


def encoding_of(type_: str) -> str:
    """`nvfp4<block=16>` of `tensor<80x48, nvfp4<block=16>>`."""
    return type_.partition(", ")[2].removesuffix(">") or type_


def _caches(graph: Graph) -> tuple[Cache, ...]:
    groups: dict[str, list[Op]] = {}
    for op in graph.ops:
        if op.name == "state":
            groups.setdefault(str(op.out.type), []).append(op)
    return tuple(
        Cache(tuple(collapsed(op.get("source", "") for op in ops)), type_, len(ops),
              sum(op.out.type.nbytes for op in ops))
        for type_, ops in groups.items()
    )  # fmt: skip


def _arena(values: Sequence[Value]) -> list[Value]:
    return [v for v in values if v.place is not None and v.place.space == "arena"]


def _slots(ops: Sequence[Op]) -> list[Slot]:
    last = {v: i for i, op in enumerate(ops) for v in op.args}
    return [
        Slot(str(v), v.place.offset, v.place.nbytes, i, last.get(v, i))
        for i, op in enumerate(ops)
        for v in _arena(op.outs)
        if v.place is not None
    ]


def _repeat(ops: Sequence[Op]) -> Repeat:
    """The longest run of alike launches in alike places: the layers of a model."""
    keys = [
        (op.name, pattern_of(op.loc), *(str(v.place) for v in _arena((*op.args, *op.outs))))
        for op in ops
    ]
    best = Repeat(0, len(keys), 1)
    longest = 0
    for period in range(1, min(LONGEST_PERIOD, len(keys) // 2) + 1):
        start = 0
        for i in range(len(keys) - period + 1):
            if i == len(keys) - period or keys[i] != keys[i + period]:
                if i - start >= period and i - start + period > longest:
                    longest = i - start + period
                    best = Repeat(start, period, longest // period)
                start = i + 1
    return best


# --- as text --------------------------------------------------------------------------------------


def memory_text(m: Memory) -> list[str]:
    """Sums first, then the arena."""
    caches = "; ".join(f"{c.count} x {c.type}" for c in m.caches) or "none"
    rows = [
        ("weights", size(m.weights), _listed(m.weights_by_type)),
        ("KV cache", size(m.state), caches),
        ("workspace", size(m.workspace), "scratch of one launch, the largest of all"),
        ("arena", f"{size(m.arena_per_token)}/token", _sharing(m)),
    ]
    lines = [line for name, n, text in rows for line in wrapped(text, f"{name:9}  {n:>14}  ")]
    cells = [(b.bucket, size(b.arena), size(b.total)) for b in m.buckets]
    lines += ["", *table(cells, ("bucket", "arena", "all together"), right=(0, 1, 2))]
    lines += ["", "A step allocates nothing: what it uses is all here.", ""]
    return lines + _drawing(m)


def _listed(by_type: dict[str, int]) -> str:
    return ", ".join(f"{name} {size(n)}" for name, n in by_type.items())


def _sharing(m: Memory) -> str:
    return f"{len(m.slots)} values share it; apart they would take {size(m.unshared_per_token)}"


def _columns(m: Memory) -> list[int]:
    """The launches drawn: those before the layers, one round of them, those behind."""
    r = m.repeat
    shown = [i for i in range(len(m.launches)) if r.canonical(i) == i]
    return shown[:MOST_COLUMNS]


def _drawing(m: Memory) -> list[str]:
    if not m.slots:
        return []
    columns = _columns(m)
    letters = _letters(m, columns)
    edges = sorted({e for s in m.slots for e in (s.offset, s.offset + s.bytes)} | {0})
    numbers = _across(m, columns, [str(i).ljust(CELL) for i in columns])
    rows = [("offset", "bytes/token", f"launch {numbers}")]
    for low, high in zip(edges, edges[1:], strict=False):
        cells = [_cell(m, letters, low, columns, at) for at in range(len(columns))]
        rows.append((f"{low:#07x}", str(high - low), " " * 7 + _across(m, columns, cells)))
    lines = [*heading("the arena"), *table(rows, right=(1,)), ""]
    r = m.repeat
    if r.times > 1:
        end = r.start + r.period * r.times - 1
        text = (
            f"launches {r.start} to {r.start + r.period - 1}, between bars, come {r.times} times "
            f"in the same places, up to launch {end}: drawn once"
        )
        lines += wrapped(text)
    if len(columns) == MOST_COLUMNS:
        lines.append(f"only the first {MOST_COLUMNS} launches are drawn; --json lists them all")
    return [*lines, *_legend(m, letters, columns)]


def _across(m: Memory, columns: Sequence[int], cells: Sequence[str]) -> str:
    """The cells of a line, with bars around the launches that come several times."""
    r = m.repeat
    bars = {r.start, r.start + r.period * r.times} if r.times > 1 else set[int]()
    pairs = zip(columns, cells, strict=True)
    return "".join(("| " if i in bars else "") + cell for i, cell in pairs).rstrip()


def _letters(m: Memory, columns: Sequence[int]) -> dict[tuple[int, int], str]:
    """A letter for each value drawn, by the launch that makes it and its offset."""
    keys = [_key(m, s) for s in m.slots if s.first in columns]
    return {key: LETTERS[i % len(LETTERS)] for i, key in enumerate(dict.fromkeys(keys))}


def _key(m: Memory, slot: Slot) -> tuple[int, int]:
    return m.repeat.canonical(slot.first), slot.offset


def _alive(m: Memory, low: int, launch: int) -> Slot | None:
    """The value in the band at `low` while a launch runs."""
    return next(
        (s for s in m.slots
         if s.offset <= low < s.offset + s.bytes and s.first <= launch <= s.last), None
    )  # fmt: skip


def _cell(
    m: Memory, letters: dict[tuple[int, int], str], low: int, columns: Sequence[int], at: int
) -> str:
    """The letter of the band's value, joined to the next cell where it lives on."""
    slot = _alive(m, low, columns[at])
    if slot is None:
        return ".".ljust(CELL)
    letter = letters.get(_key(m, slot), "?")
    return letter * CELL if slot.last > columns[at] else (letter * (CELL - 1)).ljust(CELL)


def _legend(m: Memory, letters: dict[tuple[int, int], str], columns: Sequence[int]) -> list[str]:
    rows: list[tuple[str, ...]] = []
    drawn = {_key(m, s): s for s in reversed(m.slots) if s.first in columns}
    made: dict[int, list[str]] = {}
    for key in sorted(drawn, key=lambda k: letters[k]):
        made.setdefault(drawn[key].first, []).append(letters[key])
    for i in columns:
        launch = m.launches[i]
        where = short(launch.loc)
        rows.append((str(i), launch.op, ",".join(made.get(i, [])) or "-", where))
    return table(rows, ("launch", "op", "makes", "at"), right=(0,))
