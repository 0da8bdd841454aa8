"""The compiler from end to end: the only file that sees every room.

import (00) → phases (05 … 50) → library (60) → artifact (70), each step with a progress line.
"""

from __future__ import annotations

import hashlib
import json
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar, cast

from . import __version__
from .codegen.build import Event, Toolchain, ffi_options
from .codegen.compiler import find_compiler
from .codegen.emit import (
    Build,
    Library,
    Request,
    compile_library,
    kernel_choice,
    write_artifact,
)
from .codegen.nvcc import find_cuda_compiler
from .codegen.plan_cuda import arch_of
from .codegen.table import declarations
from .compile_report import CompileReport, report_of
from .dumps import Dumps, PhaseLine
from .environment import cache_folder, compiler_command, cuda_home
from .frontend import Imported, import_model, open_checkpoint
from .frontend.kv_cache import AUTO, CHOICES, FP8
from .ir.errors import IRError, ModelError
from .ir.graph import Graph
from .ir.rewrite import LogEntry
from .ir.target import Target, target
from .ir.text import from_text
from .ir.types import Nvfp4
from .passes import pipeline
from .passes.context import RECIPES, Context
from .passes.p35_select_kernels import select
from .passes.pipeline import Report
from .runtime.artifact import GRAPHS, PASSES, Artifact, ModelFacts, PhaseFacts

ONNX_SUFFIX = ".onnx"  # the format has no magic number
IMPORT, CODEGEN, ARTIFACT = "00_import", "60_codegen", "70_artifact"
IMPORT_WHY = "the checkpoint as read, every dialect normalised once"


Compiled = TypeVar("Compiled")


def _quiet(line: str) -> None:
    pass


@dataclass(frozen=True, slots=True)
class Options:
    """What the user asked for. `out` may be missing only with `compile_to`.

    target: one, or several with commas between; the first stands for all where one is asked for.
    dims: extents of an ONNX graph, by symbol. progress: takes a line of progress.
    print_ir: takes the IR text behind each phase. start_from: a phase's id and the file with the
    text behind it.
    """

    model: Path
    out: Path | None
    target: str = "cpu"
    quantize: str | None = None
    recipe: str = "auto"
    context: int | None = None
    kv_cache: str = AUTO
    allow_fallback: frozenset[str] = frozenset()
    dump: Path | None = None
    compile_to: str | None = None
    start_from: tuple[str, Path] | None = None
    dims: tuple[tuple[str, int], ...] = ()
    progress: Callable[[str], None] = _quiet
    print_ir: Callable[[str], None] | None = None


class Run:
    """The compilation for one target under way: the options, its dumps, and the clock."""

    def __init__(self, options: Options, target: Target) -> None:
        self.options, self.target = options, target
        self.dumps = Dumps()
        self.mark = time.perf_counter()

    def lap(self) -> float:
        """Milliseconds since the last call."""
        now = time.perf_counter()
        took, self.mark = (now - self.mark) * 1e3, now
        return took

    def hook(self, report: Report) -> None:
        """After each phase: keep its files, say its line."""
        line = self.dumps.add(report, self.lap())
        self.options.progress(str(line))
        if self.options.print_ir:
            self.options.print_ir(f"// ---- after {report.id}\n{report.after}")

    def tell(self, id_: str, what: str) -> None:
        self.options.progress(f"{id_:22} {self.lap():9.1f} ms  {what}")

    def built(self, event: Event) -> None:
        took = f"{event.seconds * 1e3:9.1f} ms" if event.seconds else " " * 12
        self.options.progress(f"{CODEGEN:22} {took}  {event.what} {event.name}")


def compile_model(options: Options) -> CompileReport:
    """Compile; the artifact is there when this returns, whole, or not at all.

    Raises ModelError, TargetError, and IRError for a bug of ours.
    """
    if options.model.suffix == ONNX_SUFFIX and options.model.is_file():
        from .driver_onnx import compile_onnx  # onnx is a dependency of its own

        if options.kv_cache != AUTO:
            raise ModelError("kv_cache: for a language model; an ONNX graph types its own caches")
        return compile_onnx(options)
    if options.dims:
        raise ModelError("dims: for an ONNX graph; a language model has no extents to bind")
    targets = targets_of(options)
    start = time.perf_counter()
    checkpoint = open_checkpoint(options.model)
    imported = import_model(checkpoint, context=options.context, kv_cache=options.kv_cache)
    for note in imported.notes:
        options.progress(f"{IMPORT:22} note: {note}")
    made = for_each(targets, options, lambda run: _compile(run, imported))
    artifact = _write(made, imported, options)
    seconds = time.perf_counter() - start if artifact else 0.0
    first, *others = (report_of(m.graph, m.run.dumps, m.context, artifact, seconds) for m in made)
    return replace(first, others=tuple(others))


def for_each(
    targets: Sequence[Target], options: Options, compiled: Callable[[Run], Compiled]
) -> list[Compiled]:
    """What each target's compilation gives; its dumps are written however that ends."""
    made: list[Compiled] = []
    for chosen in targets:
        if len(targets) > 1:
            options.progress(f"target {chosen.name}")
        run = Run(options, chosen)
        try:
            made.append(compiled(run))
        finally:
            if options.dump:
                run.dumps.write(options.dump / chosen.name if len(targets) > 1 else options.dump)
    return made


@dataclass(frozen=True, slots=True)
class _Made:
    """What was compiled for one target; no library where it was not asked for."""

    run: Run
    graph: Graph
    context: Context
    library: Library | None


def _compile(run: Run, imported: Imported) -> _Made:
    """Phases 00 to 60 for one target."""
    options = run.options
    context = Context(
        target=run.target, kernels=declarations(run.target.name), weights=imported.weights,
        recipe=options.recipe, quantize=options.quantize, allow_fallback=options.allow_fallback,
        needs_fp8_cache=options.kv_cache == FP8,
    )  # fmt: skip
    text = pipeline.check(imported.graph, IMPORT)
    run.hook(Report(IMPORT, IMPORT_WHY, imported.graph, "", text, _import_log(imported)))
    run.dumps.files["scales.json"] = json.dumps(_scales(imported, context), indent=0).encode()
    graph = _phases(run, imported.graph, context)
    if options.compile_to and not is_late(options.compile_to):
        return _Made(run, graph, context, None)
    cache = cache_folder()
    toolchain = toolchain_of(run.target, cache)
    library = compile_library(graph, run.target, toolchain, ffi_options(cache, run.built))
    run.tell(CODEGEN, f"{len(library.plan.kernels)} kernels for {', '.join(library.isas)}")
    run.dumps.files |= {f"{CODEGEN}/{n}": t.encode() for n, t in library.sources.items()}
    return _Made(run, graph, context, library)


def targets_of(options: Options) -> tuple[Target, ...]:
    """The targets, each once, in the order given. Raises ModelError and TargetError."""
    names = list(dict.fromkeys(name.strip() for name in options.target.split(",")))
    targets = tuple(target(name) for name in names)
    _check(options, targets)
    return targets


def _import_log(imported: Imported) -> tuple[LogEntry, ...]:
    """What import left out, and what it wants to say."""
    excused = (LogEntry("excused", name, True, why) for name, why in imported.excused.items())
    return (*excused, *(LogEntry("note", "", True, note) for note in imported.notes))


def _check(options: Options, targets: Sequence[Target]) -> None:
    if options.recipe not in RECIPES:
        raise ModelError(f"recipe {options.recipe!r}: unknown, expected {', '.join(RECIPES)}")
    if options.kv_cache not in CHOICES:
        raise ModelError(f"kv_cache {options.kv_cache!r}: unknown, expected {', '.join(CHOICES)}")
    if options.quantize not in (None, "nvfp4"):
        raise ModelError(f"quantize {options.quantize!r}: unknown, expected nvfp4")
    names = {k.name for t in targets for k in declarations(t.name) if k.fallback}
    for name in sorted(options.allow_fallback - names):
        expected = f"expected {', '.join(sorted(names)) or 'none'}"
        raise ModelError(f"allow_fallback {name!r}: no fallback kernel, {expected}")
    if options.start_from and len(targets) > 1:
        raise ModelError("start_from: the IR of a phase is of one target; name only that one")
    if options.out is None and options.compile_to is None:
        raise ModelError("out: the path of the artifact is missing")


def is_late(phase: str) -> bool:
    return phase in (CODEGEN, ARTIFACT, "60", "70")


def _phases(run: Run, imported: Graph, context: Context) -> Graph:
    start, to, graph = IMPORT, run.options.compile_to, imported
    if run.options.start_from:
        start, file = run.options.start_from
        try:
            graph = from_text(file.read_text())
        except OSError as error:
            raise ModelError(f"{file}: cannot be read: {error.strerror}") from error
        except (IRError, UnicodeDecodeError) as error:
            raise ModelError(f"{file}: not the IR of a phase: {error}") from error
        _check_weights(file, graph, imported)
    try:
        phases = pipeline.after(start, None if to is None or is_late(to) else to)
    except IRError as error:
        raise ModelError(str(error)) from error
    return pipeline.run(graph, context, phases, run.hook)


def _check_weights(file: Path, graph: Graph, imported: Graph) -> None:
    """Raises ModelError unless each weight of a dumped graph is one of the checkpoint's."""
    held = {op.get("source", ""): op.out.type for op in imported.ops if op.name == "weight"}
    for op in graph.ops:
        source = op.get("source", "")
        if op.name != "weight" or held.get(source) == op.out.type:
            continue
        found = held.get(source, "no such tensor")
        raise ModelError(
            f"{file}: {source}: expected {op.out.type}, found {found} in the checkpoint; "
            "start from a dump of this very model"
        )


def _write(made: Sequence[_Made], imported: Imported, options: Options) -> Artifact | None:
    """Phase 70, where an artifact was asked for and compilation went that far."""
    builds = [_target_build(m, m.library) for m in made if m.library is not None]
    if options.out is None or not builds:
        return None
    run = made[-1].run
    run.lap()
    request = _request(made, builds, imported, options)
    artifact = write_artifact(options.out, builds, imported.weights, request)
    run.tell(ARTIFACT, f"{artifact.folder}")
    return artifact


def _target_build(made: _Made, library: Library) -> Build:
    choices = tuple(
        kernel_choice(c.op, c.bucket, c.kernel, c.refused) for c in select(made.graph, made.context)
    )
    phases = tuple(phase_facts(line) for line in made.run.dumps.lines)
    return Build(made.graph, library, choices, phases, recipe_of(made.graph))


def toolchain_of(target: Target, cache: Path) -> Toolchain:
    """What builds the library of a target on this machine."""
    compiler = find_compiler(compiler_command(), cache)
    if "cuda" not in target.features:
        return compiler
    return find_cuda_compiler(compiler, arch_of(target), cuda_home())


def _request(
    made: Sequence[_Made], builds: Sequence[Build], imported: Imported, options: Options
) -> Request:
    files = dict(imported.tokenizer)
    for m, build in zip(made, builds, strict=True):
        plan = {f"{CODEGEN}/plan.cc": build.library.sources["plan.cc"].encode()}
        if build.library.graphs is not None:
            plan[GRAPHS] = build.library.graphs.to_json()
        record = {**without_sources(m.run.dumps.finish()), **plan}
        folder = f"{PASSES}/{m.run.target.name}"
        files |= {f"{folder}/{name}": data for name, data in record.items()}
    compilers = " and ".join(dict.fromkeys(str(b.library.compiler) for b in builds))
    return Request(
        model=_facts(builds[0].graph, imported, options),
        producer=f"halfbyte {__version__} ({compilers}, {platform.machine()})",
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        files=files,
        generation=imported.generation,
        progress=lambda what, seconds: options.progress(
            f"{ARTIFACT:22} {seconds * 1e3:9.1f} ms  {what}"
        ),
    )


def without_sources(files: Mapping[str, bytes]) -> dict[str, bytes]:
    """Kernel sources are this package's own templates: only the plan is the model's."""
    return {n: d for n, d in files.items() if not n.startswith(f"{CODEGEN}/")}


def phase_facts(line: PhaseLine) -> PhaseFacts:
    return PhaseFacts(line.id, line.ms, line.ops, line.changed, line.why)


def _facts(graph: Graph, imported: Imported, options: Options) -> ModelFacts:
    bos = imported.generation.get("bos_token_id")
    eos = cast("list[int]", imported.generation.get("eos_token_id") or [])
    config = imported.config
    return ModelFacts(
        family=config.model_type,
        name=options.model.resolve().stem
        if options.model.is_file()
        else options.model.resolve().name,
        vocab=graph.outs[0].type.last,
        context=_capacity(graph),
        bos=bos if isinstance(bos, int) else None,
        eos=tuple(eos),
        sources={f.name: sha256_of(f) for f in imported.files},
        parameters=_parameters(graph),
    )


def _capacity(graph: Graph) -> int:
    return next(op.out.type.static[1] for op in graph.ops if op.name == "state")


def _parameters(graph: Graph) -> int:
    """Numbers in all weights that a step reads."""
    total = 0
    for v in graph.values():
        if v.place is not None and v.place.space == "weights":
            count = 1
            for extent in v.type.static:
                count *= extent
            total += count
    return total


def recipe_of(graph: Graph) -> str:
    """w4a4 or w4a16, as the NVFP4 linears of the graph run; "" where there are none."""
    linears = [op for op in graph.ops if op.name in ("linear", "fused_linear")]
    quantised = [op for op in linears if isinstance(op.args[1].type.enc, Nvfp4)]
    if not quantised:
        return ""
    return "w4a4" if any(op.get("act", "f32") == "nvfp4" for op in quantised) else "w4a16"


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _scales(imported: Imported, context: Context) -> list[dict[str, object]]:
    """Scales of NVFP4 linears and of an FP8 KV cache, as multipliers, for `inspect --scales`."""
    dialects = {fact.loc: fact.dialect for fact in imported.linears}
    graph, found = imported.graph, list[dict[str, object]]()
    for op in graph.ops:
        if scale := op.get("cache_scale", 0.0):
            found.append({"module": op.loc, "dialect": "", "role": "kv_cache", "value": scale})
        if op.get("format", "") != "nvfp4":
            continue
        role = "weight_global" if op.name == "dequantize" else "input"
        value = float(context.constant(graph, op.args[-1]).reshape(()))
        dialect = dialects.get(op.loc, "")
        found.append({"module": op.loc, "dialect": dialect, "role": role, "value": value})
    return found
