"""`inspect --phases`, `--phase ID` and `--diff A B`: what the compiler did to the whole graph."""

from __future__ import annotations

import difflib
import hashlib
import re
from collections import Counter
from dataclasses import dataclass

from .inspect_format import short, table, wrapped
from .inspect_source import Decision, Source
from .ir.graph import Graph

CONTEXT = 2
"""Unchanged lines around a difference."""

_LOC = re.compile(r"  // (.+)$")


@dataclass(frozen=True, slots=True)
class PhaseRow:
    """One phase: its time, and what its record and its log come to."""

    id: str
    why: str
    ms: float | None
    ops: int
    changed: bool
    digest: str
    fired: int
    missed: int


@dataclass(frozen=True, slots=True)
class PhaseRecord:
    """The IR after a phase, and its decisions."""

    id: str
    text: str
    decisions: tuple[Decision, ...]


@dataclass(frozen=True, slots=True)
class Difference:
    """The IR of two phases, compared. `counts`: op name -> (before, after), where they differ."""

    before: str
    after: str
    counts: dict[str, tuple[int, int]]
    lines: tuple[str, ...]


def phase_rows(source: Source) -> tuple[PhaseRow, ...]:
    """A row for each phase of the manifest, and for each record it does not mention."""
    facts = source.phase_facts
    rows: list[PhaseRow] = []
    before = ""
    for id_ in sorted({*facts, *source.phases}):
        text = source.text(id_) if id_ in source.phases else ""
        log = [d for d in source.decisions if d.phase == id_]
        fired = sum(d.fired for d in log)
        fact = facts.get(id_)
        rows.append(
            PhaseRow(
                id_,
                fact.why if fact else "",
                fact.ms if fact else None,
                fact.ops if fact else len(source.graph(id_).ops),
                fact.changed if fact else text != before,
                hashlib.sha256(text.encode()).hexdigest()[:8] if text else "",
                fired,
                len(log) - fired,
            )
        )
        before = text or before
    return tuple(rows)


def phase_table(rows: tuple[PhaseRow, ...]) -> list[str]:
    """The phases as a table; below each line what the phase is for."""
    head = ("phase", "ms", "ops", "", "IR sha256", "did", "did not")
    cells = [
        (r.id, "" if r.ms is None else f"{r.ms:.1f}", str(r.ops),
         "changed" if r.changed else "unchanged", r.digest, str(r.fired), str(r.missed))
        for r in rows
    ]  # fmt: skip
    lines = table(cells, head, right=(1, 2, 5, 6))
    whys = [f"  {r.id:20}  {r.why}" for r in rows if r.why]
    return [*lines, *(["", "what each is for", *whys] if whys else [])]


def phase_record(source: Source, wanted: str) -> PhaseRecord:
    """One phase's record. Raises ModelError for a phase that has none."""
    id_ = source.phase(wanted)
    log = tuple(d for d in source.decisions if d.phase == id_)
    return PhaseRecord(id_, source.text(id_), log)


def record_text(record: PhaseRecord) -> list[str]:
    """The IR, then the decisions as comments: the whole parses as IR."""
    lines = [f"// ---- after {record.id}", *record.text.splitlines()]
    if record.decisions:
        lines += ["", f"// ---- decisions of {record.id}"]
    for d in record.decisions:
        verb = "did" if d.fired else "not"
        lines.append(f"// {verb}  {d.rule}  {short(d.at) or '-'}: {d.detail}")
    return lines


def difference(source: Source, a: str, b: str) -> Difference:
    """The IR of two phases, compared line by line. Raises ModelError for an unknown phase."""
    first, second = source.phase(a), source.phase(b)
    counts = _counts(source.graph(first), source.graph(second))
    old, new = source.text(first).splitlines(), source.text(second).splitlines()
    lines: list[str] = []
    matcher = difflib.SequenceMatcher(None, old, new, autojunk=False)
    for group in matcher.get_grouped_opcodes(CONTEXT):
        lines += _hunk(group, old, new)
    return Difference(first, second, counts, tuple(lines))


def _counts(before: Graph, after: Graph) -> dict[str, tuple[int, int]]:
    a, b = (Counter(op.name for op in g.ops) for g in (before, after))
    return {name: (a[name], b[name]) for name in sorted(a | b) if a[name] != b[name]}


def _hunk(
    group: list[tuple[str, int, int, int, int]] | tuple[tuple[str, int, int, int, int], ...],
    old: list[str],
    new: list[str],
) -> list[str]:
    """One hunk; its header says which modules it is about."""
    (_, a, _, c, _), (_, _, b, _, d) = group[0], group[-1]
    body: list[str] = []
    locs: dict[str, None] = {}
    for kind, i, j, k, m in group:
        if kind == "equal":
            body += [f" {line}" for line in old[i:j]]
            continue
        body += [f"-{line}" for line in old[i:j]] + [f"+{line}" for line in new[k:m]]
        for line in old[i:j] + new[k:m]:
            if found := _LOC.search(line):
                locs[short(found[1])] = None
    about = ", ".join(list(locs)[:3]) + (", …" if len(locs) > 3 else "")
    return [f"@@ -{a + 1},{b - a} +{c + 1},{d - c} @@ {about}".rstrip(), *body]


def difference_text(diff: Difference) -> list[str]:
    """A unified diff, with what it comes to before it."""
    lines = [f"--- {diff.before}", f"+++ {diff.after}"]
    if not diff.lines:
        return [*lines, "no difference"]
    changes = [f"{name} {a} -> {b}" for name, (a, b) in diff.counts.items()]
    if changes:
        lines += wrapped(", ".join(changes), "    ops: ")
    return [*lines, *diff.lines]
