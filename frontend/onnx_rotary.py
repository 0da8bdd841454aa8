"""Rotary positions as they are written out before opset 23: x cos + rotate_half(x) sin.

Exporters make cosines of both halves at once, of angles concatenated with themselves. The first
rule turns that around (cosines, concatenated with themselves), step by step through what comes
between, so that the second finds the half tables that RotaryEmbedding takes.
"""

from __future__ import annotations

import numpy as np

from ..ir.graph import Op, Value
from ..ir.rewrite import Answer, Rewrite, Rule, View
from .onnx_match import Known, dtype, last_extent, made_by, other, rank, same_extent, source
from .onnx_names import OP_OF
from .onnx_tensors import Constant

Table = tuple[Op | None, Value]
"""A table, and the op to insert that makes it, if there is none yet."""


def rotary_rules(known: Known) -> list[Rule]:
    each = tuple(OP_OF[n] for n in ("Cos", "Sin", "Cast", "Mul") if n in OP_OF)
    return [
        Rule("halves of a table", each, lambda op, v: _halved(op, v, known)),
        Rule("rotary", (OP_OF.get("Add", ""),), lambda op, v: _rotary(op, v, known)),
    ]


def _twice(v: Value, view: View) -> Value | None:
    """x where v is x behind itself, along the last axis."""
    both = made_by(v, "Concat", view)
    if both is None or len(both.args) != 2 or both.args[0] is not both.args[1]:
        return None
    last = (rank(both.args[0]) or 0) - 1
    return both.args[0] if both.get("axis", 0) in (-1, last) else None


def _halved(op: Op, view: View, known: Known) -> Answer:
    """f(x, x) is (f(x), f(x)) for what looks at each element alone."""
    at = 0 if op.name != OP_OF.get("Mul") or known.scalar(op.args[1], view) is not None else 1
    x = _twice(op.args[at], view)
    if x is None or (len(op.args) == 2 and known.scalar(op.args[1 - at], view) is None):
        return None
    if any(use.name == OP_OF["Concat"] for use in view.uses(op.out)):
        return None
    half_type = op.out.type.with_shape(*x.type.shape)
    operands = [x if i == at else v for i, v in enumerate(op.args)]
    half, value = view.typed(
        op.name, *operands, type_=half_type, loc=op.loc, hint=f"{op.out.name}.half", **op.attrs
    )
    both, y = view.typed(
        OP_OF["Concat"], value, value, type_=op.out.type, loc=op.loc, hint=op.out.name, axis=-1
    )
    return Rewrite(f"{op.name} of one half", (half, both), {op.out: y}, (op,))


def _rotary(op: Op, view: View, known: Known) -> Answer:
    if "RotaryEmbedding" not in OP_OF:
        return None
    for straight in op.args:
        crossed = other(op, straight)
        found = _sides(straight, crossed, view, known)
        if found is not None:
            return _embedding(op, *found, view) if not isinstance(found, str) else found
    return None


def _sides(
    straight: Value, crossed: Value, view: View, known: Known
) -> tuple[Value, Table, Table] | str | None:
    """x, cosines and sines of x cos + rotate_half(x) sin."""
    turned = made_by(crossed, "Mul", view)
    plain = made_by(straight, "Mul", view)
    if turned is None or plain is None:
        return None
    for rotated in turned.args:
        x = _unrotated(rotated, view, known)
        if x is None or x not in plain.args:
            continue
        cos = _table(other(plain, x), x, view, known)
        sin = _table(other(turned, rotated), x, view, known)
        if cos is None or sin is None:
            return "its tables are not cosines and sines of halves, the same for all heads"
        return x, cos, sin
    return None


def _unrotated(v: Value, view: View, known: Known) -> Value | None:
    """x where v is (-x's upper half, x's lower half) along the last axis."""
    both = made_by(v, "Concat", view)
    if both is None or len(both.args) != 2:
        return None
    negative = made_by(both.args[0], "Neg", view)
    high = made_by(negative.args[0], "Slice", view) if negative is not None else None
    low = made_by(both.args[1], "Slice", view)
    if high is None or low is None or high.args[0] is not low.args[0]:
        return None
    x = low.args[0]
    d, dims = last_extent(x), rank(x)
    if d is None or d % 2 or dims != 4 or both.get("axis", 0) not in (-1, 3):
        return None
    halves = _range(low, view, known), _range(high, view, known)
    ends = halves[1] is not None and halves[1][1] >= d
    return x if halves[0] == (0, d // 2) and halves[1] and halves[1][0] == d // 2 and ends else None


def _range(op: Op, view: View, known: Known) -> tuple[int, int] | None:
    """Start and stop of a slice of the last of four axes, in steps of one."""
    numbers = [known.scalar(v, view) for v in op.args[1:]]
    if len(numbers) < 3 or any(n is None for n in numbers):
        return None
    start, stop, axis, *step = (int(n) for n in numbers if n is not None)
    return (start, stop) if axis in (-1, 3) and step in ([], [1]) else None


def _table(v: Value, x: Value, view: View, known: Known) -> Table | None:
    """The half of a table [B, 1, T, D] that is two equal halves, as [B, T, D / 2]."""
    constant = known.constant(v, view)
    if constant is not None:
        half = _constant_half(constant, x)
        if half is None:
            return None
        return known.weight(half, f"{source(v, view)}.half.{half.shape[0]}", view)
    wide = made_by(v, "Unsqueeze", view)
    if wide is None or known.scalar(wide.args[1], view) not in (1, -3):
        return None
    half = _twice(wide.args[0], view)
    return None if half is None else (None, half)


def _constant_half(table: Constant, x: Value) -> Constant | None:
    """Of a table [1, 1, T, D] known at compile time, for as many sequences as x has."""
    batch, d = x.type.shape[0], table.shape[-1] if table.shape else 0
    if len(table.shape) != 4 or table.shape[:2] != (1, 1) or not isinstance(batch, int) or d % 2:
        return None
    data = table.load()
    if not np.array_equal(data[..., : d // 2], data[..., d // 2 :]):
        return None
    shape = (batch, table.shape[2], d // 2)
    return Constant(
        table.dtype, shape, lambda: np.broadcast_to(table.load()[0, :, :, : d // 2], shape).copy()
    )


def _embedding(op: Op, x: Value, cos: Table, sin: Table, view: View) -> Answer:
    tables = (cos[1], sin[1])
    if any(rank(t) != 3 or dtype(t) != dtype(x) for t in tables):
        return f"its tables are {cos[1].type} and {sin[1].type}, x is {x.type}"
    batches = [t.type.shape[0] for t in tables]
    if not all(same_extent(b, x.type.shape[0]) for b in batches):
        return f"its tables are for {batches[0]} sequences, x has {x.type.shape[0]}"
    rotary, y = view.typed(
        OP_OF["RotaryEmbedding"], x, *tables, type_=op.out.type, loc=op.loc, hint=op.out.name,
        interleaved=0, num_heads=0, rotary_embedding_dim=0,
    )  # fmt: skip
    made = [made for made, _ in (cos, sin) if made is not None]
    return Rewrite(f"{x.type}", (*made, rotary), {op.out: y}, (op,))
