"""The compiler from end to end: the only file that sees every room.

import (00) → phases (05 … 50) → library (60) → artifact (70), each step with a progress line.
"""

from __future__ import annotations

import hashlib
import json
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import cast

from . import __version__
from .codegen.build import Event, Toolchain, ffi_options
from .codegen.compiler import find_compiler
from .codegen.emit import (
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
from .frontend.config import read_config
from .frontend.container import Checkpoint
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
from .runtime.artifact import ModelFacts, PhaseFacts

DEFAULT_CONTEXT = 4096
IMPORT, CODEGEN, ARTIFACT = "00_import", "60_codegen", "70_artifact"
IMPORT_WHY = "the checkpoint as read, every dialect normalised once"


def _quiet(line: str) -> None:
    pass


@dataclass(frozen=True, slots=True)
class Options:
    """What the user asked for. `out` may be missing only with `compile_to`.

    progress: takes a line of progress. print_ir: takes the IR text behind each phase.
    start_from: a phase's id and the file with the text behind it.
    """

    model: Path
    out: Path | None
    target: str = "cpu"
    quantize: str | None = None
    recipe: str = "auto"
    context: int | None = None
    allow_fallback: frozenset[str] = frozenset()
    dump: Path | None = None
    compile_to: str | None = None
    start_from: tuple[str, Path] | None = None
    progress: Callable[[str], None] = _quiet
    print_ir: Callable[[str], None] | None = None


class _Run:
    """One compilation under way: the options, its dumps, and the clock."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.dumps = Dumps()
        self.start = self.mark = time.perf_counter()

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
    _check(options)
    run = _Run(options)
    chosen = target(options.target)
    checkpoint = open_checkpoint(options.model)
    imported = import_model(checkpoint, context=_context(checkpoint, options))
    context = Context(
        target=chosen, kernels=declarations(chosen.name), weights=imported.weights,
        recipe=options.recipe, quantize=options.quantize, allow_fallback=options.allow_fallback,
    )  # fmt: skip
    text = pipeline.check(imported.graph, IMPORT)
    run.hook(Report(IMPORT, IMPORT_WHY, imported.graph, "", text, _import_log(imported)))
    for note in imported.notes:
        options.progress(f"{IMPORT:22} note: {note}")
    run.dumps.files["scales.json"] = json.dumps(_scales(imported, context), indent=0).encode()
    try:
        graph = _phases(run, imported.graph, context)
        if options.compile_to and not _is_late(options.compile_to):
            return report_of(graph, run.dumps, context)
        return _build(run, graph, context, imported, options)
    finally:
        if options.dump:
            run.dumps.write(options.dump)


def _import_log(imported: Imported) -> tuple[LogEntry, ...]:
    """What import left out, and what it wants to say."""
    excused = (LogEntry("excused", name, True, why) for name, why in imported.excused.items())
    return (*excused, *(LogEntry("note", "", True, note) for note in imported.notes))


def _check(options: Options) -> None:
    if options.recipe not in RECIPES:
        raise ModelError(f"recipe {options.recipe!r}: unknown, expected {', '.join(RECIPES)}")
    if options.quantize not in (None, "nvfp4"):
        raise ModelError(f"quantize {options.quantize!r}: unknown, expected nvfp4")
    names = {k.name for k in declarations(options.target) if k.fallback}
    for name in sorted(options.allow_fallback - names):
        raise ModelError(f"allow_fallback {name!r}: no fallback kernel, expected {sorted(names)}")
    if options.out is None and options.compile_to is None:
        raise ModelError("out: the path of the artifact is missing")


def _is_late(phase: str) -> bool:
    return phase in (CODEGEN, ARTIFACT, "60", "70")


def _context(checkpoint: Checkpoint, options: Options) -> int:
    if options.context is not None:
        return options.context
    made_for = read_config(checkpoint.config, checkpoint.path).max_positions
    return min(DEFAULT_CONTEXT, made_for or DEFAULT_CONTEXT)


def _phases(run: _Run, graph: Graph, context: Context) -> Graph:
    start, to = IMPORT, run.options.compile_to
    if run.options.start_from:
        start, file = run.options.start_from
        try:
            graph = from_text(file.read_text())
        except OSError as error:
            raise ModelError(f"{file}: cannot be read: {error.strerror}") from error
        except (IRError, UnicodeDecodeError) as error:
            raise ModelError(f"{file}: not the IR of a phase: {error}") from error
    try:
        phases = pipeline.after(start, None if to is None or _is_late(to) else to)
    except IRError as error:
        raise ModelError(str(error)) from error
    return pipeline.run(graph, context, phases, run.hook)


def _build(
    run: _Run, graph: Graph, context: Context, imported: Imported, options: Options
) -> CompileReport:
    """Phases 60 and 70."""
    cache, chosen = cache_folder(), context.target
    built = ffi_options(cache, run.built)
    library = compile_library(graph, chosen, _toolchain(chosen, cache), built)
    run.tell(CODEGEN, f"{len(library.plan.kernels)} kernels for {', '.join(library.isas)}")
    run.dumps.files |= {f"{CODEGEN}/{n}": t.encode() for n, t in library.sources.items()}
    if options.out is None:
        return report_of(graph, run.dumps, context)
    request = _request(run, graph, context, imported, library)
    artifact = write_artifact(options.out, graph, library, imported.weights, request)
    run.tell(ARTIFACT, f"{artifact.folder}")
    seconds = time.perf_counter() - run.start
    return report_of(graph, run.dumps, context, artifact, seconds)


def _toolchain(target: Target, cache: Path) -> Toolchain:
    """What builds the library of a target on this machine."""
    compiler = find_compiler(compiler_command(), cache)
    if "cuda" not in target.features:
        return compiler
    return find_cuda_compiler(compiler, arch_of(target), cuda_home())


def _request(
    run: _Run, graph: Graph, context: Context, imported: Imported, library: Library
) -> Request:
    choices = tuple(
        kernel_choice(c.op, c.bucket, c.kernel, c.refused) for c in select(graph, context)
    )
    plan = {f"{CODEGEN}/plan.cc": library.sources["plan.cc"].encode()}
    passes = {**_without_sources(run.dumps.finish()), **plan}
    return Request(
        model=_facts(graph, imported, run.options),
        producer=f"halfbyte {__version__} ({library.compiler}, {platform.machine()})",
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        kernels=choices,
        phases=tuple(_phase_facts(line) for line in run.dumps.lines),
        files={**imported.tokenizer, **{f"passes/{n}": d for n, d in passes.items()}},
        generation=imported.generation,
        progress=lambda what, seconds: run.options.progress(
            f"{ARTIFACT:22} {seconds * 1e3:9.1f} ms  {what}"
        ),
    )


def _without_sources(files: Mapping[str, bytes]) -> dict[str, bytes]:
    """Kernel sources are this package's own templates: only the plan is the model's."""
    return {n: d for n, d in files.items() if not n.startswith(f"{CODEGEN}/")}


def _phase_facts(line: PhaseLine) -> PhaseFacts:
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
        sources={f.name: _sha256(f) for f in imported.files},
        parameters=_parameters(graph),
        recipe=recipe_of(graph),
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


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _scales(imported: Imported, context: Context) -> list[dict[str, object]]:
    """Global and input scales of every NVFP4 linear, as multipliers, for `inspect --scales`."""
    dialects = {fact.loc: fact.dialect for fact in imported.linears}
    graph, found = imported.graph, list[dict[str, object]]()
    for op in graph.ops:
        if op.get("format", "") != "nvfp4":
            continue
        role = "weight_global" if op.name == "dequantize" else "input"
        value = float(context.constant(graph, op.args[-1]).reshape(()))
        dialect = dialects.get(op.loc, "")
        found.append({"module": op.loc, "dialect": dialect, "role": role, "value": value})
    return found
