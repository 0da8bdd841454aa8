"""What a compilation came to: counts, bytes, memory, floor. The closing summary prints it."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from .dumps import Dumps, PhaseLine
from .ir.graph import Graph, Value
from .ir.text import to_text
from .kv_cache_words import kv_cache_words
from .passes.context import Context
from .passes.launches import launched
from .passes.onnx_lifetimes import is_onnx
from .passes.p40_memory_plan import ARENA, STATE, WEIGHTS, space_bytes
from .roofline import Floor, read_bandwidth
from .runtime.artifact import Artifact
from .untested import untested


@dataclass(frozen=True, slots=True)
class CompileReport:
    """Facts of a finished (or, with compile_to, stopped) compilation. Sizes in bytes.

    `artifact` is None where no artifact was asked for; `text` is the last IR. `is_net`: of an
    ONNX graph. `others`: the same of
    further targets.
    """

    target: str
    artifact: Path | None
    artifact_bytes: int
    seconds: float
    phases: tuple[PhaseLine, ...]
    launches: int
    buckets: tuple[int, ...]
    kernels: Mapping[str, int]
    fallbacks: int
    bytes_by_format: Mapping[str, int]
    arena: int
    workspace: int
    state: int
    kv_cache: str
    context: int
    selftests: int
    worst_selftest: float
    untested: tuple[str, ...]
    floor: Floor
    text: str
    is_net: bool = False
    others: tuple[CompileReport, ...] = ()

    def to_json(self) -> dict[str, object]:
        """Everything but the IR text, as plain data."""
        facts = asdict(self)
        del facts["text"]
        facts["others"] = [other.to_json() for other in self.others]
        facts["artifact"] = None if self.artifact is None else str(self.artifact)
        facts["floor"]["tokens_per_second"] = self.floor.tokens_per_second
        return facts


def report_of(
    graph: Graph,
    dumps: Dumps,
    context: Context,
    artifact: Artifact | None = None,
    seconds: float = 0.0,
) -> CompileReport:
    """The report; without an artifact, what is not known yet is zero."""
    buckets = context.target.buckets
    ops = launched(graph)
    facts = artifact.target(context.target.name) if artifact else None
    tests = facts.selftest if facts else ()
    parts = artifact.manifest.parts.values() if artifact else ()
    slow = {k.name for k in context.kernels if k.fallback}
    is_net = is_onnx(graph)  # a run of it is no step of a decoder
    is_here = "cpu" in context.target.features  # a device's memory is not this machine's
    return CompileReport(
        target=context.target.name,
        artifact=artifact.folder if artifact else None,
        artifact_bytes=sum(p.bytes for p in parts),
        seconds=seconds,
        phases=tuple(dumps.lines),
        launches=len(ops),
        buckets=buckets,
        kernels=dict(Counter(op.strs("kernels")[0] for op in ops if op.strs("kernels"))),
        fallbacks=sum(name in slow for op in ops for name in op.strs("kernels")),
        bytes_by_format=_bytes_by_format(graph),
        arena=space_bytes(graph, ARENA) * buckets[-1],
        workspace=facts.arena.workspace if facts else 0,
        state=space_bytes(graph, STATE),
        kv_cache=kv_cache_words(graph),
        context=artifact.manifest.model.context if artifact else 0,
        selftests=len(tests),
        untested=untested({n for op in ops for n in op.strs("kernels")}, tests) if tests else (),
        worst_selftest=max((t.max_abs / t.tolerance for t in tests if t.tolerance), default=0.0),
        floor=Floor(
            _bytes_per_token(graph), _bandwidth() if artifact and is_here and not is_net else 0.0
        ),
        text=to_text(graph),
        is_net=is_net,
    )


def _stored(graph: Graph) -> list[Value]:
    return [v for v in graph.values() if v.place is not None and v.place.space == WEIGHTS]


def _bytes_by_format(graph: Graph) -> dict[str, int]:
    found: Counter[str] = Counter()
    for v in _stored(graph):
        found[str(v.type.enc)] += v.type.nbytes
    return dict(found)


def _bytes_per_token(graph: Graph) -> int:
    """Bytes a decode step must read: all weights, but of a table that only embeds one row."""
    readers = graph.uses()
    total = 0
    for v in _stored(graph):
        only_embeds = {op.name for op in readers.get(v, [])} == {"embed"}
        total += v.type.nbytes // v.type.static[0] if only_embeds else v.type.nbytes
    return total


def _bandwidth() -> float:
    return read_bandwidth(len(os.sched_getaffinity(0)))
