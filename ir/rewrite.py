"""Rewriting: a rule looks at one op and answers with a rewrite, a reason why not, or nothing.

Rules keep no state. Reasons ("near misses") are kept: `inspect` shows them, since the question
users ask is not what fired but what did not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from .errors import IRError
from .graph import Attr, Graph, Op, Value, substitute
from .ops import infer
from .types import TensorType


@dataclass(frozen=True, slots=True)
class LogEntry:
    """One decision of a phase: at which op, by which rule, taken or refused, and why."""

    rule: str
    at: str
    fired: bool
    detail: str

    def __str__(self) -> str:
        return (
            f"{'fired ' if self.fired else 'missed'} {self.rule:24} {self.at or '-'}: {self.detail}"
        )


class View:
    """What a rule may ask of the graph: producers, uses, fresh names. Never changes it."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self._producers = graph.producers()
        self._uses = graph.uses()
        self._names = {v.name for v in graph.values()}

    def producer(self, v: Value, name: str = "") -> Op | None:
        """The op that makes v, if there is one and it is called `name`."""
        op = self._producers.get(v)
        return op if op is not None and name in ("", op.name) else None

    def uses(self, v: Value) -> list[Op]:
        return self._uses.get(v, [])

    def only_use(self, v: Value) -> Op | None:
        """The single op that reads v, or None; a result of the graph has an unseen reader."""
        uses = self.uses(v)
        return uses[0] if len(uses) == 1 and v not in self.graph.outs else None

    def make(
        self, name: str, *args: Value, loc: str = "", hint: str = "f", **attrs: Attr
    ) -> tuple[Op, Value]:
        """A new op, typed, with a fresh name for its first result."""
        op = Op(name, args, (), dict(attrs), loc)
        op.outs = tuple(Value(self._fresh(hint), t) for t in infer(op))
        return op, op.out

    def typed(
        self, name: str, *args: Value, type_: TensorType, loc: str = "", hint: str = "f",
        **attrs: Attr,
    ) -> tuple[Op, Value]:  # fmt: skip
        """A new op whose one result has a type that is known to say more than its rule, or that
        has no rule (a weight).
        """
        op = Op(name, args, (Value(self._fresh(hint), type_),), dict(attrs), loc)
        return op, op.out

    def _fresh(self, hint: str) -> str:
        i = 0
        while (name := f"{hint}.{i}" if i else hint) in self._names:
            i += 1
        self._names.add(name)
        return name


@dataclass(frozen=True, slots=True)
class Rewrite:
    """Ops to drop and to put in, and which value now stands for which. `detail` is for the log."""

    detail: str
    insert: tuple[Op, ...]
    replace: Mapping[Value, Value]
    drop: tuple[Op, ...] = ()
    misses: tuple[str, ...] = field(default=())


Answer = Rewrite | str | None
"""A rewrite; or the reason for a near miss; or None, the op is not of this rule's kind."""


@dataclass(frozen=True, slots=True)
class Rule:
    """`apply` is asked at every op named in `roots`."""

    name: str
    roots: tuple[str, ...]
    apply: Callable[[Op, View], Answer]


def ordered(ops: Sequence[Op]) -> tuple[Op, ...]:
    """The ops with every definition before its use, otherwise in the order given."""
    producers = {v: op for op in ops for v in op.outs}
    done: set[Op] = set()
    out: list[Op] = []

    for start in ops:
        stack = [(start, iter(start.args))]
        if start in done:
            continue
        done.add(start)
        while stack:
            op, operands = stack[-1]
            needed = (producers.get(v) for v in operands)
            before = next((p for p in needed if p is not None and p not in done), None)
            if before is None:
                out.append(op)
                stack.pop()
            else:
                done.add(before)
                stack.append((before, iter(before.args)))
    return tuple(out)


def without_dead(graph: Graph) -> Graph:
    """The graph without ops whose results nobody reads."""
    live: set[Value] = set(graph.outs)
    kept: list[Op] = []
    for op in reversed(graph.ops):
        if any(v in live for v in op.outs):
            kept.append(op)
            live.update(op.args)
    return graph.with_ops(kept[::-1])


def _edit(graph: Graph, rewrites: Mapping[Op, Rewrite]) -> Graph:
    """The graph with every rewrite done, its new ops where the root of the match stood."""
    dropped = {op for r in rewrites.values() for op in r.drop}
    by: dict[Value, Value] = {}
    for r in rewrites.values():
        by.update(r.replace)
    edited: list[Op] = []
    for op in graph.ops:
        if r := rewrites.get(op):  # its own ops go on reading what it replaces for everybody else
            others = {old: new for old, new in by.items() if old not in r.replace}
            edited.extend(substitute(new, others) for new in r.insert)
        if op not in dropped:
            edited.append(substitute(op, by))
    return without_dead(graph.with_ops(ordered(edited), [by.get(v, v) for v in graph.outs]))


def _sweep(graph: Graph, rule: Rule) -> tuple[Graph, list[LogEntry], bool]:
    """Every match of one rule that does not touch another's ops."""
    view, touched, replaced = View(graph), set[Op](), set[Value]()
    rewrites: dict[Op, Rewrite] = {}
    log: list[LogEntry] = []
    for op in graph.ops:
        if op.name not in rule.roots or op in touched:
            continue
        answer = rule.apply(op, view)
        if isinstance(answer, str):
            log.append(LogEntry(rule.name, op.loc, False, answer))
        elif answer is not None and not (
            touched.intersection(answer.drop) or replaced.intersection(answer.replace)
        ):
            touched.update(answer.drop, [op])
            replaced.update(answer.replace)
            rewrites[op] = answer
            log.append(LogEntry(rule.name, op.loc, True, answer.detail))
            log.extend(LogEntry(rule.name, op.loc, False, m) for m in answer.misses)
    return (_edit(graph, rewrites) if rewrites else graph), log, bool(rewrites)


MOST_SWEEPS = 20


def apply_rules(graph: Graph, rules: Sequence[Rule]) -> tuple[Graph, list[LogEntry]]:
    """Each rule in turn, swept until it fires no more. Near misses of the last sweep only."""
    log: list[LogEntry] = []
    for rule in rules:
        for _ in range(MOST_SWEEPS):
            graph, entries, changed = _sweep(graph, rule)
            log.extend(e for e in entries if e.fired or not changed)
            if not changed:
                break
        else:
            raise IRError(f"rule {rule.name} still fires after {MOST_SWEEPS} sweeps")
    return graph, log
