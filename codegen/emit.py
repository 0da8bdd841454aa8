"""Phases 60 and 70: the final graph -> one shared library -> one artifact, self-tested.

The driver calls `compile_library` and then `write_artifact`. Weights are evaluated and written one
at a time, in the order in which a step meets them; the artifact appears under its name only when
the library's kernels agree with the interpreter on the bytes just written.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from ..ir.errors import IRError
from ..ir.graph import Graph, Op
from ..ir.interp import WeightSource
from ..ir.kernel import KernelDecl, Refused
from ..ir.target import Target
from ..runtime.artifact import (
    FORMAT,
    ArenaFacts,
    Artifact,
    ArtifactWriter,
    GraphRecord,
    KernelChoice,
    KernelCode,
    Manifest,
    ModelFacts,
    NetFacts,
    PhaseFacts,
    Refusal,
    SelfTest,
    TargetFacts,
    WeightsFile,
)
from .build import Built, Options, Toolchain, build, run_program
from .compiler import Compiler
from .graphs import graphs_of
from .kernel_code import compiled_kernels
from .nvcc import DRIVER_MIN, CudaCompiler
from .plan import EXPORTS, Plan, buckets_of, cpu_sources, make_plan, manifest_shape
from .plan_cuda import SYMBOLS, arch_of, cuda_sources, record_sources
from .selftest import Session, selftest
from .weights import Known, Layout, evaluated, lay_out, weight_facts

LATE_PHASES = (
    ("60_codegen", "C++ from templates, one library, every export found"),
    ("70_artifact", "weights in kernel layout, manifest, kernels tested against the interpreter"),
)
"""The phases behind those of passes/pipeline.py, and why."""


@dataclass(frozen=True, slots=True)
class Library:
    """Phase 60: the plan, the library built of it, and by which compiler for which ISAs.

    `code`: what each kernel of a CUDA target takes of the device, `graphs`: what a step enqueues;
    the cpu's has nothing to say.
    """

    target: Target
    plan: Plan
    built: Built
    compiler: Toolchain
    isas: tuple[str, ...]
    sources: Mapping[str, str]
    seconds: float
    code: tuple[KernelCode, ...] = ()
    graphs: GraphRecord | None = None

    @property
    def name(self) -> str:
        """Its file in the artifact."""
        return f"kernels-{self.target.name}.so"

    @property
    def on_device(self) -> bool:
        """Whether it runs on a device of its own."""
        return "cuda" in self.target.features


@dataclass(frozen=True, slots=True)
class Build:
    """What one target contributes to an artifact.

    `kernels` is the table of choices (see `kernel_choice`), `phases` what those before 60 took,
    `recipe` how its NVFP4 linears run.
    """

    graph: Graph
    library: Library
    kernels: tuple[KernelChoice, ...] = ()
    phases: tuple[PhaseFacts, ...] = ()
    recipe: str = ""


@dataclass(frozen=True, slots=True)
class Request:
    """What phase 70 writes besides weights and code; all of it decided by the driver.

    `files` are small parts by name (tokenizer.json, passes/cpu/05_canonicalize.ir, …).
    """

    model: ModelFacts
    producer: str
    created: str
    files: Mapping[str, bytes] = field(default_factory=dict[str, bytes])
    generation: Mapping[str, object] = field(default_factory=dict[str, object])
    threads: int = 2
    progress: Callable[[str, float], None] | None = None

    def tell(self, what: str, start: float) -> None:
        """Report a step that began at `start` (time.perf_counter) and has ended."""
        if self.progress is not None:
            self.progress(what, time.perf_counter() - start)


def compile_library(graph: Graph, target: Target, compiler: Toolchain, options: Options) -> Library:
    """Phase 60. TargetError: the compiler fails. IRError: the graph is not ready for it."""
    start = time.perf_counter()
    for name, why in compiler.refused:
        options.tell(f"the {name} variants ({why})", "left out")
    plan = make_plan(graph, target)
    if isinstance(compiler, Compiler):
        sources, symbols = cpu_sources(plan, compiler.isas), EXPORTS
        isas = tuple(isa.name for isa in compiler.isas)
    else:
        arch = compiler.arch if isinstance(compiler, CudaCompiler) else None
        sources, symbols, isas = cuda_sources(plan, target, arch), SYMBOLS, (target.name,)
    built = build(sources, symbols, compiler, options)
    texts = {unit.name: unit.text for unit in sources}
    compiled = compiled_kernels(built)
    graphs = None
    if isinstance(compiler, CudaCompiler):
        recorded = record_sources(sources, target)
        quiet = replace(options, progress=None)
        said = run_program(recorded, compiler.program_flags, compiler, quiet)
        graphs = graphs_of(said, compiled, target)
    seconds = time.perf_counter() - start
    code = tuple(c.code for c in compiled)
    return Library(target, plan, built, compiler, isas, texts, seconds, code, graphs)


def kernel_choice(
    op: Op, bucket: int, kernel: KernelDecl, refused: Sequence[Refused]
) -> KernelChoice:
    """A choice of phase 35 as the manifest tells it."""
    n, k = manifest_shape(op)
    reasons = tuple(Refusal(r.kernel, r.reason) for r in refused)
    loc = op.loc or str(op.out)
    return KernelChoice(loc, op.name, bucket, kernel.name, n, k, reasons, kernel.fallback)


def write_artifact(
    out: Path, builds: Sequence[Build], weights: WeightSource, request: Request
) -> Artifact:
    """Phase 70: weights, libraries, files and manifest, put in place once self-tests have passed.

    ModelError: `out` is something else's, or a checkpoint tensor cannot be read. TargetError: the
    disk is full, or a kernel is wrong on this machine.
    """
    known = Known()
    with ArtifactWriter(out) as writer:
        targets = {
            build.library.target.name: _write_target(writer, build, weights, known, request)
            for build in builds
        }
        return finish(writer, targets, request)


def finish(
    writer: ArtifactWriter,
    targets: Mapping[str, TargetFacts],
    request: Request,
    net: NetFacts | None = None,
) -> Artifact:
    """Files and manifest behind weights and libraries; the artifact is in place."""
    for name, text in request.files.items():
        writer.add_bytes(name, text)
    manifest = Manifest(
        format=FORMAT,
        producer=request.producer,
        created=request.created,
        model=request.model,
        targets=targets,
        parts=writer.parts,
        generation=request.generation,
        net=net,
    )
    return writer.commit(manifest)


def store_weights(
    writer: ArtifactWriter, layout: Layout, planned: int, graph: Graph, weights: WeightSource
) -> None:
    """Write what of a target's weights no target before it has stored.

    IRError: they do not take the `planned` bytes.
    """
    size = sum(run.bytes for run in layout.runs)
    if size != planned:
        raise IRError(f"weights: planned {planned}, found {size} bytes")
    if layout.own:
        with writer.weights(layout.image, layout.file) as file:
            for name, part in evaluated(layout.own, graph, weights):
                file.add(name, part)


def _write_target(
    writer: ArtifactWriter, build: Build, weights: WeightSource, known: Known, request: Request
) -> TargetFacts:
    """The weights and the library of one target, tested where it runs here."""
    start = time.perf_counter()
    graph, library = build.graph, build.library
    layout = lay_out(graph, library.target.name, known, library.on_device)
    store_weights(writer, layout, library.plan.weights_bytes, graph, weights)
    request.tell(f"weights for {library.target.name}", start)
    part = writer.add_file(library.name, library.built.path)
    tests = () if library.on_device else _selftest(writer, layout, library, request)
    return TargetFacts(
        library=library.name,
        library_sha256=part.sha256,
        isas=library.isas,
        features=("x86-64", *glibc_features(library.built), *arch_features(library.target)),
        buckets=buckets_of(graph),
        arena=_arena(library.plan, request.threads),
        kernels=build.kernels,
        weights=weight_facts(graph),
        image=layout.runs,
        recipe=build.recipe,
        driver_min=DRIVER_MIN if library.on_device else None,
        code=library.code,
        selftest=tests,
        phases=(*build.phases, *late_phases(len(library.plan.ops), library.seconds, start)),
    )


# --- facts ----------------------------------------------------------------------------------------


def _selftest(
    writer: ArtifactWriter, layout: Layout, library: Library, request: Request
) -> tuple[SelfTest, ...]:
    start = time.perf_counter()
    mapped = WeightsFile(writer.folder / layout.file)
    try:
        with Session(library.built.path, mapped.image, threads=request.threads) as session:
            tests = tuple(selftest(library.plan, session))
    finally:
        mapped.close()
    request.tell("self-test", start)
    return tests


def late_phases(ops: int, built: float, start: float) -> tuple[PhaseFacts, ...]:
    """Phase 60, which took `built` seconds, and 70, begun at `start`, over `ops` launches."""
    times = (built * 1e3, (time.perf_counter() - start) * 1e3)
    return tuple(
        PhaseFacts(id_, ms, ops, False, why)
        for (id_, why), ms in zip(LATE_PHASES, times, strict=True)
    )


def _arena(plan: Plan, threads: int) -> ArenaFacts:
    workspace = plan.workspace_bytes + threads * plan.workspace_bytes_per_thread
    return ArenaFacts(plan.arena_bytes_per_token, workspace, plan.state_bytes)


def arch_features(target: Target) -> tuple[str, ...]:
    """The compute capability that the machine code of a CUDA target is for."""
    if "cuda" not in target.features:
        return ()
    arch = arch_of(target)
    return (f"compute capability {arch.major}.{arch.minor}",)


def glibc_features(built: Built) -> tuple[str, ...]:
    """The newest C library the linked code asks for, as "glibc>=2.34"."""
    found = [name.removeprefix("GLIBC_") for name in built.versions if "GLIBC_2" in name]
    newest = max((tuple(map(int, name.split("."))) for name in found), default=())
    return (f"glibc>={'.'.join(map(str, newest))}",) if newest else ()
