"""A small artifact made by hand: real phases over a small graph, real weights, no compiler."""

from __future__ import annotations

import json
from pathlib import Path

from halfbyte.codegen import declarations
from halfbyte.codegen.emit import kernel_choice
from halfbyte.codegen.weights import Known, Layout, evaluated, lay_out, weight_facts
from halfbyte.dumps import Dumps
from halfbyte.ir.graph import Graph
from halfbyte.ir.target import target
from halfbyte.ir.text import op_text, to_text
from halfbyte.passes import pipeline
from halfbyte.passes.context import Context
from halfbyte.passes.p35_select_kernels import select
from halfbyte.passes.p40_memory_plan import STATE, arena_bytes, space_bytes
from halfbyte.passes.pipeline import Report
from halfbyte.runtime.artifact import (
    FORMAT,
    ArenaFacts,
    ArtifactWriter,
    KernelChoice,
    Manifest,
    ModelFacts,
    PhaseFacts,
    SelfTest,
    TargetFacts,
)

from .graphs import Decoder, decoder


def write(path: Path, made: Decoder | None = None, recipe: str = "auto") -> Path:
    """An artifact of `made` (default: the small W4A16 decoder) at `path`."""
    made = made or decoder()
    context = Context(target("cpu"), declarations(), made.data.__getitem__, recipe=recipe)
    dumps = Dumps()
    text = to_text(made.graph)
    dumps.add(Report("00_import", "the checkpoint as read", made.graph, "", text, ()), 1.0)
    graph = pipeline.run(made.graph, context, hook=lambda report: _add(dumps, report))
    chosen = select(graph, context)
    choices = tuple(kernel_choice(c.op, c.bucket, c.kernel, c.refused) for c in chosen)
    files = dumps.finish()
    files["scales.json"] = json.dumps(_scales(made)).encode()
    files["60_codegen/plan.cc"] = "".join(f"// {op_text(op)}\n" for op in graph.ops).encode()
    with ArtifactWriter(path) as out:
        for name, data in files.items():
            out.add_bytes(f"passes/cpu/{name}", data)
        library = out.add_bytes("kernels-cpu.so", b"no library")
        layout = lay_out(graph, "cpu", Known(), on_device=False)
        with out.weights(layout.image) as file:
            for name, part in evaluated(layout.own, graph, made.data.__getitem__):
                file.add(name, part)
        facts = _facts(library.sha256, graph, layout, choices, dumps)
        out.commit(_manifest(out, facts))
    return path


def _add(dumps: Dumps, report: Report) -> None:
    dumps.add(report, 1.0)


def _facts(
    digest: str, graph: Graph, layout: Layout, choices: tuple[KernelChoice, ...], dumps: Dumps
) -> TargetFacts:
    return TargetFacts(
        "kernels-cpu.so",
        digest,
        ("scalar", "avx2"),
        ("x86-64",),
        buckets=target("cpu").buckets,
        arena=ArenaFacts(arena_bytes(graph), 4096, space_bytes(graph, STATE)),
        kernels=choices,
        weights=weight_facts(graph),
        image=layout.runs,
        recipe="w4a16",
        selftest=_selftest(choices),
        phases=tuple(PhaseFacts(x.id, x.ms, x.ops, x.changed, x.why) for x in dumps.lines),
    )


def _manifest(out: ArtifactWriter, facts: TargetFacts) -> Manifest:
    return Manifest(
        format=FORMAT,
        producer="halfbyte by hand",
        created="2026-01-01T00:00:00+00:00",
        model=ModelFacts("llama", "tiny", 37, 32, 1, (2,), {"model.safetensors": "0" * 64}, 9000),
        targets={"cpu": facts},
        parts=out.parts,
        generation={"temperature": 0.6},
    )


def _selftest(choices: tuple[KernelChoice, ...]) -> tuple[SelfTest, ...]:
    """One test per kernel, bucket and shape, as code generation does."""
    first: dict[tuple[object, ...], KernelChoice] = {}
    for c in choices:
        first.setdefault((c.op, c.kernel, c.bucket, c.n, c.k), c)
    return tuple(SelfTest(c.loc, c.kernel, c.bucket, 2e-6, 1e-5) for c in first.values())


def _scales(made: Decoder) -> list[dict[str, object]]:
    """As the driver writes them; the last is an outlier."""
    rows: list[dict[str, object]] = []
    for op in made.graph.ops:
        if op.name == "dequantize":
            name = f"{op.loc}.weight_scale_2"
            rows.append({"module": op.loc, "dialect": "modelopt", "role": "weight_global",
                         "value": float(made.data[name])})  # fmt: skip
        if op.name == "quantize_dequantize":
            rows.append({"module": op.loc, "dialect": "modelopt", "role": "input",
                         "value": float(made.data[f"{op.loc}.input_scale"])})  # fmt: skip
    rows.append({"module": "model.layers.2.q_proj", "role": "weight_global", "value": 1.5})
    return rows
