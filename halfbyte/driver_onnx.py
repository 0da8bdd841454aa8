"""The compiler for ONNX graphs: the same phases over a graph and the bodies of its control flow."""

from __future__ import annotations

import platform
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from . import __version__
from .codegen.build import ffi_options
from .codegen.emit import Request, kernel_choice
from .codegen.kernels import LINEAR_OPS
from .codegen.kernels_net import BUCKETS, serves
from .codegen.kernels_net import declarations as net_declarations
from .codegen.kernels_net_cuda import declarations as cuda_declarations
from .codegen.kernels_net_cuda import serves as cuda_serves
from .codegen.net_emit import NetBuild, NetLibrary, compile_net_library, write_net_artifact
from .codegen.table import declarations
from .compile_report import CompileReport, report_of
from .driver import (
    ARTIFACT,
    CODEGEN,
    IMPORT,
    Options,
    Run,
    for_each,
    is_late,
    phase_facts,
    recipe_of,
    sha256_of,
    targets_of,
    toolchain_of,
    without_sources,
)
from .environment import cache_folder
from .frontend.onnx_importer import OnnxImported, import_onnx
from .frontend.onnx_inputs import Port
from .ir.errors import IRError, ModelError, TargetError
from .ir.graph import Graph
from .ir.ops import lookup
from .ir.target import Target
from .ir.text import from_text, to_text
from .passes import pipeline
from .passes.context import Context
from .passes.onnx_lifetimes import KIND
from .passes.p35_select_kernels import select
from .passes.pipeline import Report
from .passes.unserved import UnservedError
from .runtime.artifact import PASSES, Artifact, KernelChoice, ModelFacts, NetFacts, PortFacts

IMPORT_WHY = "the graph as read, in the spelling of the newest opset"
FAMILY = "onnx"


def compile_onnx(options: Options) -> CompileReport:
    """Compile an ONNX file for one target or several; the artifact is there when this returns, or
    not at all.

    Raises ModelError, TargetError, and IRError for a bug of ours.
    """
    start = time.perf_counter()
    targets = tuple(map(for_graphs, targets_of(options)))
    tables = {is_cuda(chosen): cuda_serves if is_cuda(chosen) else serves for chosen in targets}
    imported = import_onnx(
        options.model,
        dims=dict(options.dims),
        serves=lambda op: all(table(op) for table in tables.values()),
    )
    for note in imported.notes:
        options.progress(f"{IMPORT:22} note: {note}")
    made = for_each(targets, options, lambda run: compile_target(run, imported))
    artifact = _write(made, imported, options)
    seconds = time.perf_counter() - start if artifact else 0.0
    first, *others = (_report(m, artifact, seconds) for m in made)
    return replace(first, others=tuple(others))


@dataclass(frozen=True, slots=True)
class Made:
    """What was compiled for one target; no library where it was not asked for."""

    run: Run
    graphs: tuple[Graph, ...]
    context: Context
    library: NetLibrary | None


def is_cuda(chosen: Target) -> bool:
    return "cuda" in chosen.features


def for_graphs(chosen: Target) -> Target:
    """A target as ONNX graphs see it: values keep their dtypes, a run is walked, and activations
    that the graph does not quantise are not quantised.
    """
    return replace(
        chosen, buckets=BUCKETS, sequences=1, activation="f32", graph_capture=False,
        w4a4_native=False,
    )  # fmt: skip


def compile_target(run: Run, imported: OnnxImported) -> Made:
    """Phases 00 to 60 for one target. Raises ModelError for operators that no kernel computes."""
    options, context = run.options, _context(run, imported)
    graphs = _phases(run, imported, context)
    if options.compile_to is not None and not is_late(options.compile_to):
        return Made(run, graphs, context, None)
    cache = cache_folder()
    toolchain = toolchain_of(run.target, cache)
    library = compile_net_library(graphs, run.target, toolchain, ffi_options(cache, run.built))
    run.tell(CODEGEN, f"{library.kinds} kernel families for {', '.join(library.isas)}")
    run.dumps.files |= {f"{CODEGEN}/{n}": t.encode() for n, t in library.sources.items()}
    return Made(run, graphs, context, library)


def _report(made: Made, artifact: Artifact | None, seconds: float) -> CompileReport:
    first, *_ = made.graphs
    whole = first.with_ops([op for graph in made.graphs for op in graph.ops])  # to be counted
    report = report_of(whole, made.run.dumps, made.context, artifact, seconds)
    return replace(report, text="\n".join(map(to_text, made.graphs)))


def _context(run: Run, imported: OnnxImported) -> Context:
    options, name = run.options, run.target.name
    is_cpu = "cpu" in run.target.features
    return Context(
        target=run.target,
        kernels=(*declarations(name), *net_declarations()) if is_cpu else cuda_declarations(name),
        weights=imported.weights, recipe=options.recipe, quantize=options.quantize,
        allow_fallback=options.allow_fallback,
    )  # fmt: skip


def _phases(run: Run, imported: OnnxImported, context: Context) -> tuple[Graph, ...]:
    """Phases 00 to 50. Raises ModelError for operators that no kernel computes: all of them."""
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
    where = f"{options.model} (opset {imported.opset})"
    try:
        return pipeline.run_all(graphs, context, phases, run.hook)
    except UnservedError as error:
        if "cpu" in run.target.features:
            raise ModelError(f"{where}: {error}") from error
        raise ModelError(f"{where}: {_unserved(error, run.target)}") from error
    except TargetError as error:
        raise ModelError(f"{where}: {error}") from error


def _unserved(error: UnservedError, chosen: Target) -> str:
    """All operators that a device has no kernel for, with their nodes, and where else they run."""
    nodes: dict[tuple[str, str], list[str]] = {}
    for op, refused in error.ops:
        named = op.name.removeprefix("onnx_")
        why = next((r.reason for r in refused if r.kernel == named), "")
        nodes.setdefault((lookup(op).onnx or op.name, why), []).append(op.loc or str(op.out))
    lines = [
        f"  {operator}{f' {why}' if why else ''}: {', '.join(names)}"
        for (operator, why), names in nodes.items()
    ]
    count = len({operator for operator, _ in nodes})
    return (
        f"{count} operator(s) without a kernel for {chosen.name}; --target cpu has them all:\n"
        + "\n".join(lines)
    )


def _read_back(file: Path) -> tuple[Graph, ...]:
    """The graphs of a dumped text."""
    try:
        parts = file.read_text().split("\ngraph @")
        return tuple(from_text(p if i == 0 else f"graph @{p}") for i, p in enumerate(parts))
    except OSError as error:
        raise ModelError(f"{file}: cannot be read: {error.strerror}") from error
    except (IRError, UnicodeDecodeError) as error:
        raise ModelError(f"{file}: not the IR of a phase: {error}") from error


def _write(made: Sequence[Made], imported: OnnxImported, options: Options) -> Artifact | None:
    """Phase 70, where an artifact was asked for and compilation went that far."""
    builds = [_build(m, m.library) for m in made if m.library is not None]
    if options.out is None or not builds:
        return None
    run = made[-1].run
    run.lap()
    request = _request(made, builds, imported, options)
    net = net_facts(imported)
    artifact = write_net_artifact(options.out, builds, net, imported.weights, request)
    run.tell(ARTIFACT, f"{artifact.folder}")
    return artifact


def _build(made: Made, library: NetLibrary) -> NetBuild:
    choices: list[KernelChoice] = []
    for graph in made.graphs:
        for c in select(graph, made.context):
            if c.op.name in LINEAR_OPS or c.bucket == BUCKETS[-1]:
                choices.append(kernel_choice(c.op, c.bucket, c.kernel, c.refused))
    recipes = Counter(recipe for g in made.graphs if (recipe := recipe_of(g)))
    return NetBuild(
        graphs=made.graphs,
        library=library,
        kernels=tuple(choices),
        phases=tuple(phase_facts(line) for line in made.run.dumps.lines),
        recipe=recipes.most_common(1)[0][0] if recipes else "",
    )


def net_facts(imported: OnnxImported) -> NetFacts:
    """What a graph takes and gives, as the manifest tells it."""
    return NetFacts(
        imported.opset, tuple(map(_port, imported.inputs)), tuple(map(_port, imported.outputs))
    )


def _port(port: Port) -> PortFacts:
    dims = None if port.dims is None else tuple(map(str, port.dims))
    return PortFacts(port.name, port.dtype, dims)


def _request(
    made: Sequence[Made], builds: Sequence[NetBuild], imported: OnnxImported, options: Options
) -> Request:
    files: dict[str, bytes] = {}
    for m, build in zip(made, builds, strict=True):
        plan = {f"{CODEGEN}/plan.cc": build.library.sources["net_plan.cc"].encode()}
        record = {**without_sources(m.run.dumps.finish()), **plan}
        folder = f"{PASSES}/{m.run.target.name}"
        files |= {f"{folder}/{name}": data for name, data in record.items()}
    compilers = " and ".join(dict.fromkeys(str(b.library.compiler) for b in builds))
    return Request(
        model=ModelFacts(
            family=FAMILY, name=options.model.stem, vocab=0, context=0, bos=None, eos=(),
            sources={f.name: sha256_of(f) for f in imported.files},
        ),
        producer=f"halfbyte {__version__} ({compilers}, {platform.machine()})",
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        files=files,
        progress=lambda what, seconds: options.progress(
            f"{ARTIFACT:22} {seconds * 1e3:9.1f} ms  {what}"
        ),
    )  # fmt: skip
