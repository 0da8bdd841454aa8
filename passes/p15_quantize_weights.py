"""15: on request, dense and GGUF weights become NVFP4; the log says what, and why not."""

from __future__ import annotations

from ..ir.errors import IRError
from ..ir.graph import Graph, Op, Value, const_values
from ..ir.numerics import BLOCK
from ..ir.rewrite import Answer, Rewrite, Rule, View, apply_rules
from ..ir.types import Gguf, Nvfp4, Plain
from .context import Context, Outcome

HEAD = "lm_head"


def _f32(w: Value, view: View) -> tuple[tuple[Op, ...], Value]:
    """w as f32, with the op it takes."""
    if w.type.enc == Plain("f32"):
        return (), w
    op, value = view.make("cast", w, to="f32", hint="w32")
    return (op,), value


def _reason_against(op: Op, view: View, const: set[Value]) -> str | None:
    w = op.args[1]
    if w not in const:
        return "its weight is computed at run time"
    if w.type.last % BLOCK:
        return f"K = {w.type.last} is not a multiple of {BLOCK}: stays dense"
    if any(u.name == "embed" for u in view.uses(w)):
        return "the weight is also the embedding table (tied): stays dense"
    if op.loc.rsplit(".", 1)[-1] == HEAD:
        return "the language-model head keeps its precision"
    return None


def _quantize(const: set[Value]) -> Rule:
    def apply(op: Op, view: View) -> Answer:
        w = op.args[1]
        if isinstance(w.type.enc, Nvfp4):
            return None
        if isinstance(w.type.enc, Gguf):
            return f"no way from {w.type.enc} to nvfp4"
        if why := _reason_against(op, view, const):
            return why
        casts, dense = _f32(w, view)
        quantize, wq = view.make("quantize_weight", dense, hint="q", loc=op.loc)
        linear, y = view.make("linear", op.args[0], wq, *op.args[2:], hint="y", loc=op.loc)
        return Rewrite(f"{w.type} to {wq.type}", (*casts, quantize, linear), {op.out: y}, (op,))

    return Rule("quantise weight", ("linear",), apply)


def run(graph: Graph, context: Context) -> Outcome:
    if context.quantize is None:
        return Outcome(graph)
    if context.quantize != "nvfp4":
        raise IRError(f"15_quantize_weights: unknown encoding {context.quantize!r}, expected nvfp4")
    graph, log = apply_rules(graph, [_quantize(const_values(graph))])
    return Outcome(graph, tuple(log))
