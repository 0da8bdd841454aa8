"""30: what is computed together is launched together. Every fused op means what it replaced.

Order matters: attention and the gated MLP first find their linears unfused; then every linear takes
in what stands before it (norm, activation quantiser) and behind it (residual).
"""

from __future__ import annotations

from ..ir.graph import ONNX, Graph, Op
from ..ir.ops_fused import role
from ..ir.rewrite import Answer, Rewrite, Rule, View, apply_rules
from .context import Context, Outcome
from .linears import Fused, concat_linears
from .onnx_fuse import fuse_onnx


def _qkv_rule(context: Context, graph: Graph) -> Rule:
    """q, k and v of one input as one linear, then norm, rope and append in one op."""

    def apply(op: Op, view: View) -> Answer:
        q_rope, k_append = view.producer(op.args[0], "rope"), view.producer(op.args[1], "kv_append")
        v_append = view.producer(op.args[2], "kv_append")
        if q_rope is None or k_append is None or v_append is None:
            return None
        k_rope = view.producer(k_append.args[1], "rope")
        if k_rope is None or q_rope.get("scale", 1.0) != k_rope.get("scale", 1.0):
            return "q and k are not rotated alike"
        q_norm, k_norm = (view.producer(r.args[0], "head_rmsnorm") for r in (q_rope, k_rope))
        if (q_norm is None) != (k_norm is None):
            return "only one of q and k is normed"
        sources = [(q_norm or q_rope).args[0], (k_norm or k_rope).args[0], v_append.args[1]]
        linears = [view.producer(v, "linear") for v in sources]
        found = [linear for linear in linears if linear is not None]
        if len(found) != 3:
            return "q, k or v is not made by a linear"
        middle = [o for o in (q_norm, k_norm, q_rope, k_rope, k_append, v_append) if o is not None]
        if any(view.only_use(o.out) is None for o in [*found, *middle]):
            return "q, k or v is read by something else"
        scales = {
            name: append.get("cache_scale", 0.0)
            for name, append in (("k_scale", k_append), ("v_scale", v_append))
            if "cache_scale" in append.attrs
        }
        joint = concat_linears(found, view, context, graph)
        if isinstance(joint, str):
            return joint
        gammas = (q_norm.args[1], k_norm.args[1]) if q_norm and k_norm else ()
        operands = (joint.out, k_append.args[0], v_append.args[0], *q_rope.args[1:], *gammas)
        rope, _ = view.make(
            "rope_append", *operands, hint="q", loc=op.loc,
            heads=op.get("heads", 0), kv_heads=op.get("kv_heads", 0),
            head_dim=op.get("head_dim", 0), scale=q_rope.get("scale", 1.0),
            eps=(q_norm or op).get("eps", 1e-6), **scales,
        )  # fmt: skip
        by = dict(zip((q_rope.out, k_append.out, v_append.out), rope.outs, strict=True))
        return Rewrite(joint.detail, (*joint.ops, rope), by, (*found, *middle))

    return Rule("qkv + rope + append", ("attention",), apply)


def _taken_in(op: Op, view: View) -> Fused:
    """A linear as a fused_linear that quantises its own f32 input, where it had a quantiser."""
    quantize = view.producer(op.args[0], "quantize_nvfp4")
    roles = {"x": quantize.args[0] if quantize else op.args[0], "w": op.args[1]}
    if len(op.args) == 3:
        roles["bias"] = op.args[2]
    if quantize is None:
        return Fused(roles, "none", "f32", 0.0, op.loc)
    return Fused({**roles, "input_scale": quantize.args[1]}, "none", "nvfp4", 0.0, op.loc)


def _gate_up_rule(context: Context, graph: Graph) -> Rule:
    """gate and up as one linear; silu(gate) * up while the down linear reads it."""

    def apply(op: Op, view: View) -> Answer:
        down = _taken_in(op, view)
        mul = view.producer(down.x, "silu_mul")
        if mul is None:
            return None
        found = [o for o in (view.producer(v, "linear") for v in mul.args) if o is not None]
        if len(found) != 2:
            return "gate or up is not made by a linear"
        if any(view.only_use(o.out) is None for o in (*found, mul)):
            return "gate, up or their product is read by something else"
        joint = concat_linears(found, view, context, graph)
        if isinstance(joint, str):
            return joint
        fused, y = down.with_x(joint.out, prologue="silu_mul").make(view)
        return Rewrite(joint.detail, (*joint.ops, fused), {op.out: y}, (*found, mul, op))

    return Rule("gate·up + silu·mul", ("linear",), apply)


def _own_quantizer(op: Op, view: View) -> Answer:
    """A linear quantises its own input: the f32 activation is what travels."""
    fused = _taken_in(op, view)
    linear, y = fused.make(view)
    detail = "quantises its own input" if fused.act == "nvfp4" else "reads f32"
    return Rewrite(detail, (linear,), {op.out: y}, (op,))


def _norm(op: Op, view: View) -> Answer:
    """The norm before a linear, computed while the linear prepares its input."""
    fused = Fused.of(op)
    norm = view.producer(fused.x, "rmsnorm")
    if norm is None or fused.prologue != "none":
        return None
    if view.only_use(norm.out) is None:
        readers = sorted({u.loc for u in view.uses(norm.out)})
        return f"the norm has {len(readers)} readers: {', '.join(readers)}"
    grown = fused.with_x(norm.args[0], prologue="rmsnorm", gamma=norm.args[1])
    linear, y = grown.with_eps(norm.get("eps", 1e-6)).make(view)
    return Rewrite(f"takes in {norm.loc}", (linear,), {op.out: y}, (norm, op))


def _residual(op: Op, view: View) -> Answer:
    """residual + linear(x): the sum is made where the product is written."""
    for i in (1, 0):
        linear = view.producer(op.args[i], "fused_linear")
        if linear is None:
            continue
        if role(linear, "residual") is not None or view.only_use(linear.out) is None:
            return f"{linear.loc} has a residual already, or other readers"
        grown = Fused.of(linear).with_role("residual", op.args[1 - i])
        fused, y = grown.make(view)
        return Rewrite(f"adds into {linear.loc}", (fused,), {op.out: y}, (linear, op))
    return "neither term is made by a linear"


def run(graph: Graph, context: Context) -> Outcome:
    rules = [
        _qkv_rule(context, graph),
        _gate_up_rule(context, graph),
        Rule("linear + quantiser", ("linear",), _own_quantizer),
        Rule("norm + linear", ("fused_linear",), _norm),
        Rule("linear + residual", ("add",), _residual),
    ]
    graph, log = apply_rules(graph, rules)
    if any(op.name.startswith(ONNX) for op in graph.ops):
        graph, more = fuse_onnx(graph, context)
        log.extend(more)
    return Outcome(graph, tuple(log))
