"""Phases 60 and 70 for ONNX: the final graphs -> one library -> one artifact, self-tested."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..ir.graph import Graph, Op, Value
from ..ir.interp import WeightSource
from ..ir.target import Target
from ..runtime.artifact import (
    ArenaFacts,
    Artifact,
    ArtifactWriter,
    KernelChoice,
    KernelCode,
    NetFacts,
    PhaseFacts,
    SelfTest,
    TargetFacts,
    WeightsFile,
)
from .build import Built, Options, Toolchain, build
from .compiler import Compiler
from .emit import (
    Request,
    arch_features,
    finish,
    glibc_features,
    late_phases,
    store_weights,
)
from .kernel_code import compiled_kernels
from .kernels_net import BUCKETS
from .net_plan import NetPlan, make_net_plan
from .net_selftest import NetSession, net_selftest
from .net_sources import net_cuda_sources, net_sources, symbols
from .nvcc import DRIVER_MIN, CudaCompiler
from .plan_cuda import arch_of
from .weights import Known, Layout, lay_out, weight_facts


@dataclass(frozen=True, slots=True)
class NetLibrary:
    """Phase 60: the plan, the library built of it, and by which compiler for which ISAs.

    `code`: what each kernel of a device takes of it.
    """

    plan: NetPlan
    built: Built
    compiler: Toolchain
    isas: tuple[str, ...]
    sources: Mapping[str, str]
    seconds: float
    code: tuple[KernelCode, ...] = ()

    @property
    def target(self) -> Target:
        return self.plan.target

    @property
    def name(self) -> str:
        """Its file in the artifact."""
        return f"kernels-{self.target.name}.so"

    @property
    def kinds(self) -> int:
        """Families and variants of kernels, on either side."""
        return len({(k.family, k.variant, k.side) for k in self.plan.kernels})


@dataclass(frozen=True, slots=True)
class NetBuild:
    """What one target contributes to an artifact."""

    graphs: tuple[Graph, ...]
    library: NetLibrary
    kernels: tuple[KernelChoice, ...]
    phases: tuple[PhaseFacts, ...]
    recipe: str


def compile_net_library(
    graphs: Sequence[Graph], target: Target, compiler: Toolchain, options: Options
) -> NetLibrary:
    """Phase 60. TargetError: the compiler fails. IRError: a graph is not ready for it."""
    start = time.perf_counter()
    plan = make_net_plan(graphs, target)
    if isinstance(compiler, Compiler):
        sources, isas = net_sources(plan, compiler.isas), compiler.isas
        names = tuple(isa.name for isa in isas)
    else:
        arch = compiler.arch if isinstance(compiler, CudaCompiler) else arch_of(target)
        sources, names = net_cuda_sources(plan, arch), (target.name,)
    built = build(sources, symbols(plan), compiler, options)
    texts = {unit.name: unit.text for unit in sources}
    code = tuple(c.code for c in compiled_kernels(built))
    seconds = time.perf_counter() - start
    return NetLibrary(plan, built, compiler, names, texts, seconds, code)


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
    out: Path, builds: Sequence[NetBuild], net: NetFacts, weights: WeightSource, request: Request
) -> Artifact:
    """Phase 70: weights, libraries, files and manifest, in place once self-tests have passed.

    ModelError: `out` is something else's. TargetError: the disk is full, or a kernel is wrong.
    """
    known = Known()
    with ArtifactWriter(out) as writer:
        targets = {
            made.library.target.name: _write_target(writer, made, weights, known, request)
            for made in builds
        }
        return finish(writer, targets, request, net)


def _write_target(
    writer: ArtifactWriter, made: NetBuild, weights: WeightSource, known: Known, request: Request
) -> TargetFacts:
    start = time.perf_counter()
    library, joint = made.library, joint_weights(made.graphs)
    target, on_device = library.target, library.plan.on_device
    layout = lay_out(joint, target.name, known, on_device)
    store_weights(writer, layout, library.plan.weights_bytes, joint, weights)
    request.tell(f"weights for {target.name}", start)
    part = writer.add_file(library.name, library.built.path)
    tests = () if on_device else _selftest(writer, layout, made, weights, request)
    ops = sum(len(program.nodes) for program in library.plan.programs)
    return TargetFacts(
        library=library.name,
        library_sha256=part.sha256,
        isas=library.isas,
        features=("x86-64", *glibc_features(library.built), *arch_features(target)),
        buckets=BUCKETS,
        arena=ArenaFacts(0, 0, 0),
        kernels=made.kernels,
        weights=weight_facts(joint),
        image=layout.runs,
        recipe=made.recipe,
        driver_min=DRIVER_MIN if on_device else None,
        code=library.code,
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
