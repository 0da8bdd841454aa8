"""The table of phases, and the loop that runs them, checks each and reports on it."""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from ..ir.errors import IRError
from ..ir.graph import Graph
from ..ir.rewrite import LogEntry
from ..ir.text import from_text, to_text
from ..ir.verify import verify
from . import (
    p05_canonicalize,
    p10_promote_nvfp4,
    p15_quantize_weights,
    p20_cutlass_layout,
    p30_fuse,
    p32_activation_dtype,
    p35_select_kernels,
    p40_memory_plan,
    p50_capture,
)
from .context import Context, Phase, nothing
from .unserved import gathered

PHASES: tuple[Phase, ...] = (
    Phase("05_canonicalize", "one spelling for one thing, before any rule looks for it",
          p05_canonicalize.run, p05_canonicalize.ensures),
    Phase("10_promote_nvfp4", "sidecars become typed values: a misread scale is a type error",
          p10_promote_nvfp4.run, p10_promote_nvfp4.ensures),
    Phase("15_quantize_weights", "on request: dense weights to NVFP4, while they still stand alone",
          p15_quantize_weights.run, nothing),
    Phase("20_cutlass_layout", "weights as kernels read them, before fusion joins rows",
          p20_cutlass_layout.run, p20_cutlass_layout.ensures),
    Phase("30_fuse", "fewer launches, fewer trips through memory", p30_fuse.run, nothing),
    Phase("32_activation_dtype", "activations and caches as the target's matrix units read them",
          p32_activation_dtype.run, p32_activation_dtype.ensures),
    Phase("35_select_kernels", "a named kernel for every op and bucket, refusals with reasons",
          p35_select_kernels.run, p35_select_kernels.ensures),
    Phase("40_memory_plan", "a place for every value, so that a step allocates nothing",
          p40_memory_plan.run, p40_memory_plan.ensures),
    Phase("50_capture", "the launch list of a step", p50_capture.run, p50_capture.ensures),
)  # fmt: skip
"""Numbers are permanent; gaps are for the future (25_shard is reserved)."""


@dataclass(frozen=True, slots=True)
class Report:
    """What one phase did: its text before and after, and its decisions."""

    id: str
    why: str
    graph: Graph
    before: str
    after: str
    log: tuple[LogEntry, ...]

    @property
    def changed(self) -> bool:
        return self.before != self.after

    @property
    def digest(self) -> str:
        """Eight hex digits of the text's SHA-256."""
        return hashlib.sha256(self.after.encode()).hexdigest()[:8]

    def diff(self, context: int = 1) -> str:
        """The unified diff of the two texts."""
        lines = difflib.unified_diff(
            self.before.splitlines(), self.after.splitlines(), "before", self.id, n=context,
            lineterm="",
        )  # fmt: skip
        return "\n".join(lines)


def check(graph: Graph, phase: str) -> str:
    """The graph's text, verified and read back. Raises IRError naming the phase."""
    try:
        verify(graph)
        text = to_text(graph)
        if to_text(from_text(text)) != text:
            raise IRError(f"@{graph.name}: the text does not read back the same")
    except IRError as error:
        error.add_note(f"after phase {phase}")
        raise
    return text


def after(start: str, last: str | None = None) -> tuple[Phase, ...]:
    """The phases behind `start` up to `last`, by id or number. Raises IRError."""
    ids = [p.id for p in PHASES]
    first = 0 if start.startswith("00") else _index(ids, start) + 1
    stop = len(PHASES) if last is None else 0 if last.startswith("00") else _index(ids, last) + 1
    return PHASES[first:stop]


def _index(ids: list[str], wanted: str) -> int:
    for i, id_ in enumerate(ids):
        if wanted in (id_, id_.partition("_")[0], id_.partition("_")[2]):
            return i
    raise IRError(f"phase {wanted!r}: unknown, expected one of {', '.join(ids)}")


def run(
    graph: Graph,
    context: Context,
    phases: Sequence[Phase] = PHASES,
    hook: Callable[[Report], None] = lambda report: None,
) -> Graph:
    """The graph through the phases, each result verified, read back, checked and reported.

    Raises IRError with the phase in its notes; ModelError and TargetError as the phases do.
    """
    return run_all((graph,), context, phases, hook)[0]


def run_all(
    graphs: tuple[Graph, ...],
    context: Context,
    phases: Sequence[Phase] = PHASES,
    hook: Callable[[Report], None] = lambda report: None,
) -> tuple[Graph, ...]:
    """A graph and the bodies it names, each phase over all before the next; reported as one."""
    before = texts(graphs, "00_import")
    for phase in phases:
        graphs, log = _run_phase(phase, graphs, context)
        after = texts(graphs, phase.id)
        for graph in graphs:
            phase.ensures(graph, context)
        hook(Report(phase.id, phase.why, graphs[0], before, after, log))
        before = after
    return graphs


def _run_phase(
    phase: Phase, graphs: Sequence[Graph], context: Context
) -> tuple[tuple[Graph, ...], tuple[LogEntry, ...]]:
    """One phase over all graphs; the constants of each lie behind those of the ones before."""
    done: list[Graph] = []
    log: list[LogEntry] = []

    def run_one(graph: Graph) -> None:
        start = max((p40_memory_plan.space_bytes(g, "weights") for g in done), default=0)
        outcome = phase.run(graph, replace(context, weights_start=start))
        done.append(outcome.graph)
        log.extend(outcome.log)

    gathered(graphs, run_one)
    return tuple(done), tuple(log)


def texts(graphs: Sequence[Graph], phase: str) -> str:
    """The text of all graphs, each verified and read back."""
    return "\n".join(check(graph, phase) for graph in graphs)
