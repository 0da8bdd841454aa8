"""The compiler for ONNX graphs: the same phases over a graph and the bodies of its control flow."""

from __future__ import annotations

import platform
import time
from collections import Counter
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from . import __version__
from .codegen.build import ffi_options
from .codegen.compiler import find_compiler
from .codegen.emit import Request, kernel_choice
from .codegen.kernels import LINEAR_OPS
from .codegen.kernels_net import BUCKETS
from .codegen.kernels_net import declarations as net_declarations
from .codegen.net_emit import NetBuild, NetLibrary, compile_net_library, write_net_artifact
from .codegen.table import declarations
from .compile_report import CompileReport, report_of
from .driver import (
    ARTIFACT,
    CODEGEN,
    IMPORT,
    Options,
    Run,
    is_late,
    phase_facts,
    recipe_of,
    sha256_of,
    without_sources,
)
from .environment import cache_folder, compiler_command
from .frontend.onnx_importer import OnnxImported, import_onnx
from .frontend.onnx_inputs import Port
from .ir.errors import IRError, ModelError, TargetError
from .ir.graph import Graph
from .ir.target import Target, target
from .ir.text import from_text, to_text
from .passes import pipeline
from .passes.context import Context
from .passes.onnx_lifetimes import KIND
from .passes.p35_select_kernels import select
from .passes.pipeline import Report
from .runtime.artifact import PASSES, KernelChoice, ModelFacts, NetFacts, PortFacts

IMPORT_WHY = "the graph as read, in the spelling of the newest opset"
FAMILY = "onnx"


def compile_onnx(options: Options) -> CompileReport:
    """Compile an ONNX file for the cpu; the artifact is there when this returns, or not at all.

    Raises ModelError, TargetError, and IRError for a bug of ours.
    """
    start = time.perf_counter()
    run = Run(options, _target(options))
    imported = import_onnx(options.model, dims=dict(options.dims))
    for note in imported.notes:
        options.progress(f"{IMPORT:22} note: {note}")
    context = _context(run, imported)
    library = artifact = None
    try:
        graphs = _phases(run, imported, context)
        if options.compile_to is None or is_late(options.compile_to):
            library = _library(run, graphs)
    finally:
        if options.dump:
            run.dumps.write(options.dump)
    if options.out is not None and library is not None:
        made = _made(run, graphs, context, library, imported)
        request = _request(run, made, imported)
        artifact = write_net_artifact(options.out, made, imported.weights, request)
        run.tell(ARTIFACT, f"{artifact.folder}")
    seconds = time.perf_counter() - start if artifact else 0.0
    whole = graphs[0].with_ops([op for graph in graphs for op in graph.ops])  # to be counted
    report = report_of(whole, run.dumps, context, artifact, seconds)
    return replace(report, text="\n".join(map(to_text, graphs)))


def _target(options: Options) -> Target:
    for name in (name.strip() for name in options.target.split(",")):
        if "cpu" not in target(name).features:
            raise TargetError(
                f"{options.model}: target {name} has no executor of ONNX graphs; "
                "compile with --target cpu"
            )
    if options.quantize not in (None, "nvfp4"):
        raise ModelError(f"quantize {options.quantize!r}: unknown, expected nvfp4")
    if options.out is None and options.compile_to is None:
        raise ModelError("out: the path of the artifact is missing")
    return replace(target("cpu"), buckets=BUCKETS)


def _context(run: Run, imported: OnnxImported) -> Context:
    options = run.options
    return Context(
        target=run.target, kernels=(*declarations("cpu"), *net_declarations()),
        weights=imported.weights, recipe=options.recipe, quantize=options.quantize,
        allow_fallback=options.allow_fallback,
    )  # fmt: skip


def _phases(run: Run, imported: OnnxImported, context: Context) -> tuple[Graph, ...]:
    """Phases 00 to 50. Raises ModelError for an operator that no kernel computes."""
    options, start = run.options, IMPORT
    graphs = tuple(g.with_attrs(kind=KIND) for g in imported.graphs)
    text = pipeline.texts(graphs, IMPORT)
    run.hook(Report(IMPORT, IMPORT_WHY, graphs[0], "", text, imported.log))
    run.dumps.files["scales.json"] = b"[]"
    if options.start_from:
        start, graphs = options.start_from[0], _read_back(options.start_from[1])
    try:
        to = options.compile_to
        phases = pipeline.after(start, None if to is None or is_late(to) else to)
    except IRError as error:
        raise ModelError(str(error)) from error
    try:
        return pipeline.run_all(graphs, context, phases, run.hook)
    except TargetError as error:
        raise ModelError(f"{options.model} (opset {imported.opset}): {error}") from error


def _read_back(file: Path) -> tuple[Graph, ...]:
    """The graphs of a dumped text."""
    try:
        parts = file.read_text().split("\ngraph @")
        return tuple(from_text(p if i == 0 else f"graph @{p}") for i, p in enumerate(parts))
    except OSError as error:
        raise ModelError(f"{file}: cannot be read: {error.strerror}") from error
    except (IRError, UnicodeDecodeError) as error:
        raise ModelError(f"{file}: not the IR of a phase: {error}") from error


def _library(run: Run, graphs: tuple[Graph, ...]) -> NetLibrary:
    cache = cache_folder()
    compiler = find_compiler(compiler_command(), cache)
    library = compile_net_library(graphs, compiler, ffi_options(cache, run.built))
    kinds = len(library.plan.families)
    run.tell(CODEGEN, f"{kinds} kernel families for {', '.join(library.isas)}")
    run.dumps.files |= {f"{CODEGEN}/{n}": t.encode() for n, t in library.sources.items()}
    return library


def _made(
    run: Run, graphs: tuple[Graph, ...], context: Context, library: NetLibrary,
    imported: OnnxImported,
) -> NetBuild:  # fmt: skip
    choices: list[KernelChoice] = []
    for graph in graphs:
        for c in select(graph, context):
            if c.op.name in LINEAR_OPS or c.bucket == BUCKETS[-1]:
                choices.append(kernel_choice(c.op, c.bucket, c.kernel, c.refused))
    recipes = Counter(recipe for g in graphs if (recipe := recipe_of(g)))
    return NetBuild(
        graphs=graphs,
        library=library,
        kernels=tuple(choices),
        phases=tuple(phase_facts(line) for line in run.dumps.lines),
        recipe=recipes.most_common(1)[0][0] if recipes else "",
        facts=NetFacts(
            imported.opset,
            tuple(map(_port, imported.inputs)),
            tuple(map(_port, imported.outputs)),
        ),
    )


def _port(port: Port) -> PortFacts:
    dims = None if port.dims is None else tuple(map(str, port.dims))
    return PortFacts(port.name, port.dtype, dims)


def _request(run: Run, made: NetBuild, imported: OnnxImported) -> Request:
    options = run.options
    plan = {f"{CODEGEN}/plan.cc": made.library.sources["net_plan.cc"].encode()}
    record = {**without_sources(run.dumps.finish()), **plan}
    return Request(
        model=ModelFacts(
            family=FAMILY, name=options.model.stem, vocab=0, context=0, bos=None, eos=(),
            sources={f.name: sha256_of(f) for f in imported.files},
        ),
        producer=f"halfbyte {__version__} ({made.library.compiler}, {platform.machine()})",
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        files={f"{PASSES}/{run.target.name}/{n}": d for n, d in record.items()},
        progress=lambda what, seconds: options.progress(
            f"{ARTIFACT:22} {seconds * 1e3:9.1f} ms  {what}"
        ),
    )  # fmt: skip
