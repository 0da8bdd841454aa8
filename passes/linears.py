"""Linears as phase 30 handles them: joining those of one input, growing one by roles."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..ir.graph import Graph, Op, Value
from ..ir.ops_fused import ROLES
from ..ir.rewrite import View
from .context import Context


@dataclass(frozen=True, slots=True)
class Fused:
    """A fused_linear taken apart: operands by role, and its attributes."""

    roles: dict[str, Value]
    prologue: str
    act: str
    eps: float
    loc: str
    epilogue: str = "none"

    @staticmethod
    def of(op: Op) -> Fused:
        roles = dict(zip(op.strs("roles"), op.args, strict=True))
        prologue, act = op.get("prologue", "none"), op.get("act", "f32")
        epilogue = op.get("epilogue", "none")
        return Fused(roles, prologue, act, op.get("eps", 0.0), op.loc, epilogue)

    @property
    def x(self) -> Value:
        return self.roles["x"]

    def with_role(self, name: str, value: Value) -> Fused:
        return replace(self, roles={**self.roles, name: value})

    def with_x(self, x: Value, prologue: str, **roles: Value) -> Fused:
        return replace(self, roles={**self.roles, "x": x, **roles}, prologue=prologue)

    def with_eps(self, eps: float) -> Fused:
        return replace(self, eps=eps)

    def make(self, view: View) -> tuple[Op, Value]:
        """The op, its operands in the order of ROLES, and its result."""
        names = tuple(r for r in ROLES if r in self.roles)
        operands = (self.roles[r] for r in names)
        behind = {} if self.epilogue == "none" else {"epilogue": self.epilogue}
        return view.make(
            "fused_linear", *operands, hint="y", loc=self.loc,
            roles=names, prologue=self.prologue, act=self.act, eps=self.eps, **behind,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Joint:
    """Several linears as one: the ops it takes, its result, and a line for the log."""

    ops: tuple[Op, ...]
    out: Value
    detail: str


def _same_input(linears: list[Op], view: View, context: Context, graph: Graph) -> Value | str:
    """The value that all read, or why they cannot share one."""
    inputs = [op.args[0] for op in linears]
    if all(x is inputs[0] for x in inputs):
        return inputs[0]
    quantizers = [view.producer(x, "quantize_nvfp4") for x in inputs]
    found = [q for q in quantizers if q is not None]
    if len(found) != len(linears) or any(q.args[0] is not found[0].args[0] for q in found):
        return "they read different inputs"
    scales = [float(context.constant(graph, q.args[1]).reshape(())) for q in found]
    if len(set(scales)) != 1:
        return f"input scales differ: {', '.join(f'{s:.6g}' for s in scales)}"
    return inputs[0]


def _unrelaid(op: Op, view: View) -> Op | None:
    return view.producer(op.args[1], "relayout")


def concat_linears(linears: list[Op], view: View, context: Context, graph: Graph) -> Joint | str:
    """Linears of one input as one over the concatenated rows, or the reason why not.

    Each shard keeps its own global scale: nothing is requantised, no maximum is taken.
    """
    x = _same_input(linears, view, context, graph)
    if isinstance(x, str):
        return x
    layouts = [_unrelaid(op, view) for op in linears]
    relaid = [op for op in layouts if op is not None]
    if len(relaid) != len(linears):
        return "a weight is not in a kernel's layout"
    sources = [op.args[0] for op in relaid]
    encodings = sorted({str(v.type.enc) for v in sources})
    if len(encodings) > 1:
        return f"weights differ in encoding: {', '.join(encodings)}"
    biases = [op.args[2] for op in linears if len(op.args) == 3]
    if biases and len(biases) != len(linears):
        return "only some have a bias"
    loc = " + ".join(op.loc for op in linears)
    joined, w = view.make("concat", *sources, hint="wc", loc=loc)
    layout = relaid[0].get("layout", "")
    relayout, p = view.make("relayout", w, layout=layout, hint="p", loc=loc)
    ops = [joined, relayout]
    operands = [x, p]
    if biases:
        bias_op, bias = view.make("concat", *biases, hint="bc", loc=loc)
        ops.append(bias_op)
        operands.append(bias)
    linear, y = view.make("linear", *operands, hint="y", loc=loc)
    return Joint((*ops, linear), y, f"one linear of {y.type.last} rows, {w.type.enc}")
