"""20: every weight into the layout its target's kernels read: a byte permutation, once.

Prequantised weights, weights quantised on request, dense weights and the head go through the same
two rules, so that none can be forgotten: phase 35 refuses a linear whose weight is in another
layout.
"""

from __future__ import annotations

from ..ir.errors import IRError
from ..ir.graph import Graph, Op, Value
from ..ir.rewrite import Answer, Rewrite, Rule, View, apply_rules
from ..ir.types import LINEAR, Nvfp4, Plain
from .context import Context, Outcome

READERS: dict[str, int] = {"linear": 1, "fused_linear": 1, "embed": 1}
"""Ops that read a weight matrix, and as which operand."""


def _storage(w: Value, view: View) -> tuple[tuple[Op, ...], Value]:
    """A dense weight as it is stored: GGUF blocks, once decoded, as f16 (closest at 2 bytes)."""
    source = view.producer(w)
    while source is not None and source.name in ("unpermute_rows", "cast"):
        source = view.producer(source.args[0])
    if w.type.enc != Plain("f32") or source is None or source.name != "dequantize":
        return (), w
    op, value = view.make("cast", w, to="f16", hint="w16")
    return (op,), value


def _relayout(layout_of: dict[type, str]) -> Rule:
    def apply(op: Op, view: View) -> Answer:
        i = READERS[op.name]
        w = op.args[i]
        enc = w.type.enc
        if not isinstance(enc, Nvfp4 | Plain):
            return f"no layout for {enc}"
        layout = layout_of[type(enc)]
        if enc.layout == layout:
            return None
        if enc.layout != LINEAR:
            return f"{enc} is already in another layout than {layout}"
        stored, dense = _storage(w, view)
        relayout, value = view.make("relayout", dense, layout=layout, hint="p", loc=op.loc)
        detail = f"{w.type.enc} to {value.type.enc}, {value.type.nbytes} bytes"
        readers = [u for u in view.uses(w) if READERS.get(u.name) is not None]
        if len(readers) > 1:
            detail += f" (one copy for {len(readers)} readers)"
        return Rewrite(detail, (*stored, relayout), {w: value})

    return Rule("relayout", tuple(READERS), apply)


def layouts_of(context: Context) -> dict[type, str]:
    """The layout of each kind of encoding on the target."""
    return {Nvfp4: context.target.nvfp4_layout, Plain: context.target.dense_layout}


def run(graph: Graph, context: Context) -> Outcome:
    graph, log = apply_rules(graph, [_relayout(layouts_of(context))])
    return Outcome(graph, tuple(log))


def ensures(graph: Graph, context: Context) -> None:
    """Exactly one layout per weight, the target's."""
    for op in graph.ops:
        if op.name not in READERS:
            continue
        enc = op.args[READERS[op.name]].type.enc
        if isinstance(enc, Nvfp4 | Plain) and enc.layout != layouts_of(context)[type(enc)]:
            raise IRError(f"20_cutlass_layout: {op.loc} reads {enc}, not in a kernel's layout")
