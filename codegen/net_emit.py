"""Phases 60 and 70 for ONNX: the final graphs -> one library -> one artifact, self-tested."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..ir.errors import IRError
from ..ir.graph import Graph, Op, Value
from ..ir.interp import WeightSource
from ..runtime.artifact import (
    FORMAT,
    ArenaFacts,
    Artifact,
    ArtifactWriter,
    KernelChoice,
    Manifest,
    NetFacts,
    PhaseFacts,
    SelfTest,
    TargetFacts,
    WeightsFile,
)
from .build import Built, Options, build
from .compiler import Compiler
from .emit import Request, glibc_features, late_phases
from .kernels_net import BUCKETS
from .net_plan import SYMBOLS, NetPlan, make_net_plan, net_sources
from .net_selftest import NetSession, net_selftest
from .weights import Known, Layout, evaluated, lay_out, weight_facts

TARGET = "cpu"
LIBRARY = "kernels-cpu.so"


@dataclass(frozen=True, slots=True)
class NetLibrary:
    """Phase 60: the plan, the library built of it, and by which compiler for which ISAs."""

    plan: NetPlan
    built: Built
    compiler: Compiler
    sources: Mapping[str, str]
    seconds: float

    @property
    def isas(self) -> tuple[str, ...]:
        return tuple(isa.name for isa in self.compiler.isas)


@dataclass(frozen=True, slots=True)
class NetBuild:
    """What phase 70 writes down of the phases before."""

    graphs: tuple[Graph, ...]
    library: NetLibrary
    kernels: tuple[KernelChoice, ...]
    phases: tuple[PhaseFacts, ...]
    recipe: str
    facts: NetFacts


def compile_net_library(
    graphs: Sequence[Graph], compiler: Compiler, options: Options
) -> NetLibrary:
    """Phase 60. TargetError: the compiler fails. IRError: a graph is not ready for it."""
    start = time.perf_counter()
    plan = make_net_plan(graphs)
    sources = net_sources(plan, compiler.isas)
    built = build(sources, SYMBOLS, compiler, options)
    texts = {unit.name: unit.text for unit in sources}
    return NetLibrary(plan, built, compiler, texts, time.perf_counter() - start)


def joint_weights(graphs: Sequence[Graph]) -> Graph:
    """The constants of all graphs as one graph: a weight image has no bodies."""
    ops: list[Op] = []
    for graph in graphs:
        prefix = "" if graph is graphs[0] else f"{graph.name}."
        by: dict[Value, Value] = {}
        for op in graph.ops:
            if op.name != "weight" and not (op.args and all(v in by for v in op.args)):
                continue
            if op.name.startswith("onnx_"):
                continue
            outs = tuple(Value(prefix + v.name, v.type, v.place) for v in op.outs)
            by.update(zip(op.outs, outs, strict=True))
            ops.append(replace(op, args=tuple(by[v] for v in op.args), outs=outs))
    return Graph(graphs[0].name, (), tuple(ops), ())


def write_net_artifact(
    out: Path, made: NetBuild, weights: WeightSource, request: Request
) -> Artifact:
    """Phase 70: weights, library, files and manifest, in place once the self-test has passed.

    ModelError: `out` is something else's. TargetError: the disk is full, or a kernel is wrong.
    """
    with ArtifactWriter(out) as writer:
        facts = _write_target(writer, made, weights, request)
        for name, text in request.files.items():
            writer.add_bytes(name, text)
        manifest = Manifest(
            format=FORMAT,
            producer=request.producer,
            created=request.created,
            model=request.model,
            targets={TARGET: facts},
            parts=writer.parts,
            net=made.facts,
        )
        return writer.commit(manifest)


def _write_target(
    writer: ArtifactWriter, made: NetBuild, weights: WeightSource, request: Request
) -> TargetFacts:
    start = time.perf_counter()
    library, joint = made.library, joint_weights(made.graphs)
    layout = lay_out(joint, TARGET, Known(), on_device=False)
    size = sum(run.bytes for run in layout.runs)
    if size != library.plan.weights_bytes:
        raise IRError(f"weights: planned {library.plan.weights_bytes}, found {size} bytes")
    if layout.own:
        with writer.weights(layout.image, layout.file) as file:
            for name, part in evaluated(layout.own, joint, weights):
                file.add(name, part)
    request.tell("weights", start)
    part = writer.add_file(LIBRARY, library.built.path)
    tests = _selftest(writer, layout, made, weights, request)
    ops = sum(len(program.nodes) for program in library.plan.programs)
    return TargetFacts(
        library=LIBRARY,
        library_sha256=part.sha256,
        isas=library.isas,
        features=("x86-64", *glibc_features(library.built)),
        buckets=BUCKETS,
        arena=ArenaFacts(0, 0, 0),
        kernels=made.kernels,
        weights=weight_facts(joint),
        image=layout.runs,
        recipe=made.recipe,
        selftest=tests,
        phases=(*made.phases, *late_phases(ops, library.seconds, start)),
    )


def _selftest(
    writer: ArtifactWriter,
    layout: Layout,
    made: NetBuild,
    weights: WeightSource,
    request: Request,
) -> tuple[SelfTest, ...]:
    start = time.perf_counter()
    mapped = WeightsFile(writer.folder / layout.file) if layout.own else None
    image = mapped.image if mapped else None
    try:
        with NetSession(made.library.built.path, image, request.threads) as session:
            tests = net_selftest(made.library.plan, made.graphs, session, weights)
    finally:
        if mapped:
            mapped.close()
    request.tell("self-test", start)
    return tests
