"""10: prequantised sidecars become one value each; linears learn if activations are 4-bit.

Import left what every producer wrote: `linear(x, dequantize(codes, block scales, global scale))`,
with `quantize_dequantize` around x where the checkpoint was made for 4-bit activations.
"""

from __future__ import annotations

from ..ir.errors import IRError, ModelError
from ..ir.graph import Graph, Op
from ..ir.rewrite import Answer, LogEntry, Rewrite, Rule, View, apply_rules
from ..ir.types import Nvfp4
from .context import W4A4, Context, Outcome


def _other_readers(op: Op, view: View) -> str | None:
    others = sorted({u.name for u in view.uses(op.out)} - {"linear"})
    return f"its f32 value is also read by {', '.join(others)}" if others else None


def _promote(op: Op, view: View) -> Answer:
    """dequantize of codes and scales, read by linears only, is an nvfp4 value."""
    if op.get("format", "") != "nvfp4":
        return None
    if why := _other_readers(op, view):
        return why
    packed, value = view.make("pack_nvfp4", *op.args, hint="q", loc=op.loc)
    return Rewrite(f"{value.type}", (packed,), {op.out: value}, (op,))


def _fp8(op: Op, view: View) -> Answer:
    """An fp8 weight is exact in bf16; its scale moves behind the product, one per output row."""
    weight = view.producer(op.args[1], "dequantize")
    if weight is None or weight.get("format", "") != "fp8":
        return None
    codes, scale = weight.args
    cast, w = view.make("cast", codes, to="bf16", hint="w8", loc=op.loc)
    rows, row_scale = view.make("expand_rows", scale, rows=codes.type.static[0], hint="rs")
    operands = (op.args[0], w, row_scale, *op.args[2:])
    roles = ("x", "w", "row_scale", *(("bias",) if len(op.args) == 3 else ()))
    fused, y = view.make("fused_linear", *operands, roles=roles, hint="y", loc=op.loc)
    return Rewrite(
        "e4m3 codes as bf16, exact; scale per row", (cast, rows, fused), {op.out: y}, (op,)
    )


def _keep_w4a4(op: Op, view: View) -> Answer:
    if view.producer(op.args[0], "quantize_dequantize") is None:
        return "the checkpoint has no input scale (weight-only)"
    if not isinstance(op.args[1].type.enc, Nvfp4):
        return f"its weight is {op.args[1].type.enc}"
    fake = view.producer(op.args[0], "quantize_dequantize")
    assert fake is not None
    quantize, xq = view.make("quantize_nvfp4", *fake.args, hint="xq", loc=op.loc)
    linear, y = view.make("linear", xq, *op.args[1:], hint=op.out.name + "q", loc=op.loc)
    return Rewrite("W4A4: activations quantised", (quantize, linear), {op.out: y}, (op,))


def _drop_w4a4(why: str) -> Rule:
    def apply(op: Op, view: View) -> Answer:
        return Rewrite(f"W4A16: {why}", (), {op.out: op.args[0]}, (op,))

    return Rule("exact activations", ("quantize_dequantize",), apply)


def _is_pending(op: Op, view: View) -> Answer:
    if view.producer(op.args[0], "quantize_nvfp4") is not None:
        return None
    return _keep_w4a4(op, view) if isinstance(op.args[1].type.enc, Nvfp4) else None


def run(graph: Graph, context: Context) -> Outcome:
    rules = [
        Rule("promote nvfp4", ("dequantize",), _promote),
    ]
    if context.keeps_w4a4:
        rules.append(Rule("quantise activations", ("linear",), _is_pending))
    why = (
        "recipe w4a16 asked for"
        if context.recipe != "auto"
        else f"recipe auto: linears for {context.target.name} take exact activations"
        if not context.keeps_w4a4
        else "its weight is not nvfp4"
    )
    rules += [_drop_w4a4(why), Rule("fp8 weight", ("linear",), _fp8)]
    graph, log = apply_rules(graph, rules)
    _check_recipe(graph, context, log)
    return Outcome(graph, tuple(log))


def _check_recipe(graph: Graph, context: Context, log: list[LogEntry]) -> None:
    """Recipe w4a4 asked for by name must apply somewhere. Raises ModelError."""
    if context.recipe != W4A4 or any(op.name == "quantize_nvfp4" for op in graph.ops):
        return
    missed = next((e.detail for e in log if e.rule == "quantise activations"), "no NVFP4 linear")
    raise ModelError(
        f"recipe w4a4: applies to no linear of this model: {missed}; "
        "4-bit activations need calibrated input scales: use a W4A4 checkpoint, or --recipe w4a16"
    )


def ensures(graph: Graph, context: Context) -> None:
    """No linear reads an orphan sidecar; no fake quantisation is left."""
    producers = graph.producers()
    for op in graph.ops:
        if op.name == "quantize_dequantize":
            raise IRError(f"10_promote_nvfp4: {op.out} is still a fake quantisation")
        if op.name == "linear":
            source = producers.get(op.args[1])
            if source is not None and source.get("format", "") == "nvfp4":
                raise IRError(f"10_promote_nvfp4: {op.loc} still reads nvfp4 sidecars")
