"""05: one spelling for one thing: equal constants become one value, idle casts and dead ops go."""

from __future__ import annotations

from ..ir.errors import IRError
from ..ir.graph import Graph, Op, Value, const_values, substitute
from ..ir.rewrite import LogEntry, Rewrite, Rule, View, apply_rules, without_dead
from ..ir.types import Plain
from .context import Context, Outcome


def _idle_cast(op: Op, view: View) -> Rewrite | None:
    enc = op.args[0].type.enc
    if isinstance(enc, Plain) and enc.dtype == op.get("to", ""):
        return Rewrite(f"{enc} to itself", (), {op.out: op.args[0]}, (op,))
    return None


def merge_constants(graph: Graph) -> tuple[Graph, list[LogEntry]]:
    """Equal ops on equal constants are one op: a tied head shares its table through every phase."""
    const = const_values(graph)
    known: dict[object, Op] = {}
    by: dict[Value, Value] = {}
    log: list[LogEntry] = []
    kept: list[Op] = []
    for old in graph.ops:
        op = substitute(old, by)
        key = (op.name, op.args, tuple(sorted(op.attrs.items())))
        if op.out in const and key in known:
            first = known[key]
            by.update(zip(op.outs, first.outs, strict=True))
            log.append(LogEntry("merge constants", op.loc or str(op.out), True, f"is {first.out}"))
            continue
        if op.out in const:
            known[key] = op
        kept.append(op)
    return graph.with_ops(kept, [by.get(v, v) for v in graph.outs]), log


def run(graph: Graph, context: Context) -> Outcome:
    graph, log = apply_rules(graph, [Rule("idle cast", ("cast",), _idle_cast)])
    graph, merged = merge_constants(graph)
    live = without_dead(graph)
    dead = [op for op in graph.ops if op not in set(live.ops)]
    log.extend(LogEntry("dead op", op.loc or str(op.out), True, op.name) for op in dead)
    return Outcome(live, (*log, *merged))


def ensures(graph: Graph, context: Context) -> None:
    """No dead op is left."""
    if len(without_dead(graph).ops) != len(graph.ops):
        raise IRError("05_canonicalize: a dead op is left")
