"""Phases 60 and 70: the final graph -> one shared library -> one artifact, self-tested.

The driver calls `compile_library` and then `write_artifact`. Weights are evaluated and written one
at a time, in the order in which a step meets them; the artifact appears under its name only when
the library's kernels agree with the interpreter on the bytes just written.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from ..ir.errors import IRError
from ..ir.graph import Graph, Op, Value
from ..ir.interp import WeightSource, fold
from ..ir.kernel import KernelDecl, Refused
from ..ir.numerics import Array
from ..ir.opdef import Data
from ..ir.target import Target
from ..runtime.artifact import (
    FORMAT,
    WEIGHTS,
    ArenaFacts,
    Artifact,
    ArtifactWriter,
    KernelChoice,
    KernelCode,
    Manifest,
    ModelFacts,
    PhaseFacts,
    Refusal,
    SelfTest,
    TargetFacts,
    TensorSpec,
    WeightFacts,
    WeightImage,
    WeightsFile,
    place,
)
from .build import Built, Options, Toolchain, build
from .compiler import Compiler
from .lower import place_of
from .nvcc import DRIVER_MIN, CudaCompiler
from .plan import EXPORTS, Plan, buckets_of, cpu_sources, make_plan, manifest_shape
from .plan_cuda import SYMBOLS, arch_of, cuda_sources
from .ptxas import resources
from .sass import census, find_tools, matrix_instruction
from .selftest import Session, selftest

# Weights evaluated at once, ahead of the writer; numpy works without the GIL. Each takes some times
# its weight of memory, so there are never many.
_WORKERS = max(2, min(8, os.cpu_count() or 1))
_DTYPES = {
    "f32": "F32", "bf16": "BF16", "f16": "F16", "f8e4m3": "F8_E4M3", "f8e8m0": "F8_E8M0",
    "u8": "U8", "i8": "I8", "i32": "I32", "i64": "I64", "bool": "BOOL", "f64": "F64",
}  # fmt: skip


LATE_PHASES = (
    ("60_codegen", "C++ from templates, one library, every export found"),
    ("70_artifact", "weights in kernel layout, manifest, kernels tested against the interpreter"),
)
"""The phases behind those of passes/pipeline.py, and why."""


@dataclass(frozen=True, slots=True)
class Library:
    """Phase 60: the plan, the library built of it, and by which compiler for which ISAs.

    `code`: what each kernel of a CUDA target takes of the device; the cpu's has nothing to say.
    """

    target: Target
    plan: Plan
    built: Built
    compiler: Toolchain
    isas: tuple[str, ...]
    sources: Mapping[str, str]
    seconds: float
    code: tuple[KernelCode, ...] = ()

    @property
    def name(self) -> str:
        """Its file in the artifact."""
        return f"kernels-{self.target.name}.so"

    @property
    def on_device(self) -> bool:
        """Whether it runs on a device of its own."""
        return "cuda" in self.target.features


@dataclass(frozen=True, slots=True)
class Request:
    """What phase 70 writes besides weights and code; all of it decided by the driver.

    `files` are small parts by name (tokenizer.json, passes/05_canonicalize.ir, …). `kernels` is the
    table of choices (see `kernel_choice`), `phases` what the phases before 60 took.
    """

    model: ModelFacts
    producer: str
    created: str
    kernels: tuple[KernelChoice, ...]
    phases: tuple[PhaseFacts, ...]
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
    seconds = time.perf_counter() - start
    return Library(target, plan, built, compiler, isas, texts, seconds, kernel_code(built))


def kernel_code(built: Built) -> tuple[KernelCode, ...]:
    """What the assembler said of each kernel of a library, and what a census of it shows."""
    found = [(unit, k) for unit, words in built.words.items() for k in resources(words)]
    tools = find_tools() if found else None
    counted = census(built.path, tools) if tools else {}
    return tuple(
        KernelCode(
            unit,
            k.name,
            k.registers,
            k.stack,
            k.spill_stores + k.spill_loads,
            k.shared,
            matrix_instruction(counted.get(k.symbol, {})),
        )
        for unit, k in found
    )


def kernel_choice(
    op: Op, bucket: int, kernel: KernelDecl, refused: Sequence[Refused]
) -> KernelChoice:
    """A choice of phase 35 as the manifest tells it."""
    n, k = manifest_shape(op)
    reasons = tuple(Refusal(r.kernel, r.reason) for r in refused)
    loc = op.loc or str(op.out)
    return KernelChoice(loc, op.name, bucket, kernel.name, n, k, reasons, kernel.fallback)


def write_artifact(
    out: Path, graph: Graph, library: Library, weights: WeightSource, request: Request
) -> Artifact:
    """Phase 70: weights, library, files and manifest, put in place once the self-test has passed.

    ModelError: `out` is something else's, or a checkpoint tensor cannot be read. TargetError: the
    disk is full, or a kernel is wrong on this machine.
    """
    start = time.perf_counter()
    stored = stored_values(graph)
    image = weight_image(stored)
    if image.nbytes != library.plan.weights_bytes:
        raise IRError(f"weights: planned {library.plan.weights_bytes}, found {image.nbytes} bytes")
    with ArtifactWriter(out) as writer:
        with writer.weights(image) as file:
            for value, data in _evaluated(stored, graph, weights):
                for name, part in _named_parts(value, data):
                    file.add(name, part)
        request.tell("weights", start)
        part = writer.add_file(library.name, library.built.path)
        for name, text in request.files.items():
            writer.add_bytes(name, text)
        tests = () if library.on_device else _selftest(writer, library, request)
        phases = (*request.phases, *_own_phases(library, start))
        features = ("x86-64", *_glibc(library), *_device_features(library))
        target = TargetFacts(library.name, part.sha256, library.isas, features)
        manifest = Manifest(
            format=FORMAT,
            producer=request.producer,
            created=request.created,
            model=request.model,
            targets={library.target.name: target},
            parts=writer.parts,
            buckets=buckets_of(graph),
            arena=_arena(library.plan, request.threads),
            kernels=request.kernels,
            weights=weight_facts(stored, graph),
            driver_min=DRIVER_MIN if library.on_device else None,
            code=library.code,
            selftest=tests,
            phases=phases,
            generation=request.generation,
        )
        return writer.commit(manifest)


# --- weights --------------------------------------------------------------------------------------


def stored_values(graph: Graph) -> list[Value]:
    """The constants that launches read, in the order of the weight file."""
    found = [v for v in graph.values() if v.place is not None and v.place.space == "weights"]
    return sorted(found, key=lambda v: place_of(v).offset)


def weight_image(stored: Sequence[Value]) -> WeightImage:
    """The layout of the weight file. IRError: it is not where phase 40 put the values."""
    specs: list[TensorSpec] = []
    planned: list[int] = []
    for value in stored:
        for offset, part in value.type.placed_parts():
            specs.append(
                TensorSpec(_part_name(value, part.suffix), _DTYPES[part.dtype], part.shape)
            )
            planned.append(place_of(value).offset + offset)
    image = place(specs)
    if list(image.offsets) != planned:
        wrong = next(i for i, at in enumerate(planned) if image.offsets[i] != at)
        found, wanted = image.offsets[wrong], planned[wrong]
        raise IRError(f"{specs[wrong].name}: planned at {wanted}, stands at {found}")
    return image


def _part_name(value: Value, suffix: str) -> str:
    return f"{value.name}:{suffix}" if suffix else value.name


def _named_parts(value: Value, data: Data) -> Iterator[tuple[str, Array]]:
    for part in value.type.enc.parts(value.type.static):
        array = data[part.suffix] if isinstance(data, dict) else data
        if array.shape != part.shape:
            raise IRError(f"{value}: part {part} came out as {array.shape}")
        yield _part_name(value, part.suffix), array


def _evaluated(
    stored: Sequence[Value], graph: Graph, weights: WeightSource
) -> Iterator[tuple[Value, Data]]:
    """Each value with its data, in order, evaluated a few ahead."""
    with ThreadPoolExecutor(_WORKERS) as pool:
        ahead: deque[tuple[Value, Future[list[Data]]]] = deque()
        for value in stored:
            ahead.append((value, pool.submit(fold, [value], graph, weights)))
            if len(ahead) > _WORKERS:
                first, future = ahead.popleft()
                yield first, future.result()[0]
        for value, future in ahead:
            yield value, future.result()[0]


def weight_facts(stored: Sequence[Value], graph: Graph) -> tuple[WeightFacts, ...]:
    """One line per stored value: its IR name, the checkpoint tensors it is made of, its place."""
    producers = graph.producers()

    def sources(value: Value) -> list[str]:
        op = producers[value]
        if op.name == "weight":
            return [op.get("source", "")]
        return list(dict.fromkeys(name for arg in op.args for name in sources(arg)))

    return tuple(
        WeightFacts(v.name, tuple(sources(v)), str(v.type), place_of(v).offset, v.type.nbytes)
        for v in stored
    )


# --- facts ----------------------------------------------------------------------------------------


def _selftest(writer: ArtifactWriter, library: Library, request: Request) -> tuple[SelfTest, ...]:
    start = time.perf_counter()
    mapped = WeightsFile(writer.folder / WEIGHTS)
    try:
        with Session(library.built.path, mapped.image, threads=request.threads) as session:
            tests = tuple(selftest(library.plan, session))
    finally:
        mapped.close()
    request.tell("self-test", start)
    return tests


def _own_phases(library: Library, start: float) -> tuple[PhaseFacts, ...]:
    ops = len(library.plan.ops)
    took = (time.perf_counter() - start) * 1e3
    times = (library.seconds * 1e3, took)
    return tuple(
        PhaseFacts(id_, ms, ops, False, why)
        for (id_, why), ms in zip(LATE_PHASES, times, strict=True)
    )


def _arena(plan: Plan, threads: int) -> ArenaFacts:
    workspace = plan.workspace_bytes + threads * plan.workspace_bytes_per_thread
    return ArenaFacts(plan.arena_bytes_per_token, workspace, plan.state_bytes)


def _device_features(library: Library) -> tuple[str, ...]:
    """The compute capability that the machine code of a CUDA target is for."""
    if not library.on_device:
        return ()
    arch = arch_of(library.target)
    return (f"compute capability {arch.major}.{arch.minor}",)


def _glibc(library: Library) -> tuple[str, ...]:
    """The newest C library the linked code asks for, as "glibc>=2.34"."""
    found = [name.removeprefix("GLIBC_") for name in library.built.versions if "GLIBC_2" in name]
    newest = max((tuple(map(int, name.split("."))) for name in found), default=())
    return (f"glibc>={'.'.join(map(str, newest))}",) if newest else ()
