"""LayerNormalization and RMSNormalization as they are written out before opset 17 and 23."""

from __future__ import annotations

import numpy as np

from ..ir.graph import Op, Value
from ..ir.rewrite import Answer, Rewrite, Rule, View
from .onnx_match import (
    Known,
    dtype,
    is_f32,
    last_extent,
    made_by,
    only_use,
    other,
    rank,
    shortest,
    source,
)
from .onnx_names import OP_OF
from .onnx_tensors import Constant


def norm_rules(known: Known) -> list[Rule]:
    return [Rule("norm", (OP_OF.get("Sqrt", ""),), lambda op, v: _norm(op, v, known))]


def _norm(op: Op, view: View, known: Known) -> Answer:
    """sqrt(mean(d d) + eps) under d, where d is x (RMS) or x - mean(x) (Layer)."""
    total = made_by(op.args[0], "Add", view)
    if total is None:
        return None
    for mean in total.args:
        eps = known.scalar(other(total, mean), view)
        squares = _mean_over_last(mean, view, known)
        d = _squared(squares, view, known) if squares is not None else None
        if eps is not None and d is not None:
            return _of(op, d, eps, view, known)
    return None


def _mean_over_last(v: Value, view: View, known: Known) -> Value | None:
    """x where v is its mean over the last axis, kept as an extent of 1."""
    mean = made_by(v, "ReduceMean", view)
    if mean is None or len(mean.args) != 2 or not mean.get("keepdims", 1):
        return None
    axes = known.scalar(mean.args[1], view)
    last = rank(mean.args[0])
    return mean.args[0] if axes == -1 or (last is not None and axes == last - 1) else None


def _squared(v: Value, view: View, known: Known) -> Value | None:
    power = made_by(v, "Pow", view)
    if power is not None:
        return power.args[0] if known.scalar(power.args[1], view) == 2.0 else None
    product = made_by(v, "Mul", view)
    same = product is not None and product.args[0] is product.args[1]
    return product.args[0] if product is not None and same else None


def _centred(d: Value, view: View, known: Known) -> Value | None:
    """x where d is x - mean(x)."""
    difference = made_by(d, "Sub", view)
    if difference is None:
        return None
    x, mean = difference.args
    return x if _mean_over_last(mean, view, known) is x else None


def _of(op: Op, d: Value, eps: float, view: View, known: Known) -> Answer:
    x = _centred(d, view, known)
    operator = "RMSNormalization" if x is None else "LayerNormalization"
    if operator not in OP_OF:
        return f"there is no {operator}"
    width = last_extent(d)
    if not is_f32(d) or width is None:
        return f"it is over {d.type}, expected f32 with a known last extent"
    last = _divided(op, d, x, view, known)
    if last is None:
        return "what is squared is not divided by the root, or the root is read elsewhere too"
    scale, y = _vector(last.out, "Mul", width, view, known)
    shift, z = _vector(y, "Add", width, view, known) if x is not None else (None, y)
    ones = Constant("f32", (width,), lambda: np.ones(width, np.float32))
    given = [scale or (ones, f"ones.{width}"), *([shift] if shift else [])]
    made = [known.weight(vector, name, view) for vector, name in given]
    operands = [d if x is None else x, *(value for _, value in made)]
    norm, out = view.typed(
        OP_OF[operator], *operands, type_=z.type, loc=last.loc or op.loc, hint=z.name, axis=-1,
        epsilon=shortest(eps), stash_type=1,
    )  # fmt: skip
    made_of = "" if scale is not None else ", scale 1"
    return Rewrite(
        f"{operator} over {width}{made_of}", (*(o for o, _ in made), norm), {z: out}, (op,)
    )


def _divided(op: Op, d: Value, x: Value | None, view: View, known: Known) -> Op | None:
    """The op that divides d by the root: d / root, or d * (1 / root)."""
    use = view.only_use(op.out)
    if use is None:
        return None
    if use.name == OP_OF.get("Reciprocal"):
        product = only_use(use.out, "Mul", view)
        return (
            product
            if product is not None and _is(other(product, use.out), d, x, view, known)
            else None
        )
    if use.name != OP_OF.get("Div"):
        return None
    if use.args[1] is op.out and _is(use.args[0], d, x, view, known):
        return use
    if known.scalar(use.args[0], view) == 1.0:
        product = only_use(use.out, "Mul", view)
        return (
            product
            if product is not None and _is(other(product, use.out), d, x, view, known)
            else None
        )
    return None


def _is(v: Value, d: Value, x: Value | None, view: View, known: Known) -> bool:
    """Whether v is d, or the same difference written a second time."""
    return v is d or (x is not None and _centred(v, view, known) is x)


Named = tuple[Constant, str]


def _vector(
    v: Value, operator: str, n: int, view: View, known: Known
) -> tuple[Named | None, Value]:
    """The constant [n] that the only reader of v multiplies or adds, and that reader's result."""
    use = only_use(v, operator, view)
    found = known.vector(other(use, v), n, view) if use is not None else None
    if use is None or found is None or found.dtype != dtype(v) or rank(use.out) != rank(v):
        return None, v
    return (found, f"{source(other(use, v), view)}.vector"), use.out
