"""Attention as it is written out before opset 23: softmax(scale Q K^T + mask) V."""

from __future__ import annotations

from dataclasses import dataclass

from ..ir.graph import Op, Value
from ..ir.rewrite import Answer, Rewrite, Rule, View
from ..ir.types import UNRANKED
from .onnx_match import (
    Known,
    dtype,
    made_by,
    only_use,
    other,
    rank,
    same_extent,
    shortest,
)
from .onnx_names import OP_OF


def attention_rules(known: Known) -> list[Rule]:
    return [Rule("attention", (OP_OF.get("Softmax", ""),), lambda op, v: _attention(op, v, known))]


@dataclass(frozen=True, slots=True)
class _Scores:
    """What a softmax is over: q and the transposed k, each [B, H, .., ..], factor and mask."""

    q: Value
    k_flipped: Value
    scale: float
    mask: Value | None


def _attention(op: Op, view: View, known: Known) -> Answer:
    if "Attention" not in OP_OF or op.get("axis", -1) not in (-1, 3):
        return None
    scores = _scores(op.args[0], view, known)
    if scores is None:
        return None
    product, dropped = _values(op, view, known)
    if product is None:
        return "its result is not the left side of a product"
    v = product.args[1]
    if any(rank(x) != 4 or dtype(x) not in ("f32", "f16") for x in (scores.q, scores.k_flipped, v)):
        return f"q is {scores.q.type}, v {v.type}: expected [B, H, S, D] of floats"
    if why := _mismatch(scores, v):
        return why
    turned = _unflipped(scores.k_flipped, view, known)
    if isinstance(turned, str):
        return turned
    made, k = turned
    operands = [scores.q, k, v, *([scores.mask] if scores.mask is not None else [])]
    attention, y = view.typed(
        OP_OF["Attention"], *operands, type_=product.out.type, loc=product.loc,
        hint=product.out.name, scale=shortest(scores.scale),
    )  # fmt: skip
    what = f"scale {scores.scale:.4g}{', mask' if scores.mask is not None else ''}"
    return Rewrite(what, (*made, attention), {product.out: y}, (op, product, *dropped))


def _scores(v: Value, view: View, known: Known) -> _Scores | None:
    """mask + scale * (q k'), the factor anywhere, also on both sides of the product."""
    mask: Value | None = None
    total = made_by(v, "Add", view)
    if total is not None:
        for product in total.args:
            if (found := _product(product, view, known)) is not None:
                mask = other(total, product)
                return _Scores(*found, mask)
        return None
    found = _product(v, view, known)
    return None if found is None else _Scores(*found, None)


def _product(v: Value, view: View, known: Known) -> tuple[Value, Value, float] | None:
    v, outer = _factor(v, view, known)
    product = made_by(v, "MatMul", view)
    if product is None:
        return None
    q, left = _factor(product.args[0], view, known)
    k, right = _factor(product.args[1], view, known)
    return q, k, outer * left * right


def _factor(v: Value, view: View, known: Known) -> tuple[Value, float]:
    """x and c where v is x * c or x / c for a number c; v itself and 1 otherwise."""
    product = made_by(v, "Mul", view)
    if product is not None:
        for x in product.args:
            c = known.scalar(other(product, x), view)
            if c is not None and rank(x) == rank(v):
                return x, c
    quotient = made_by(v, "Div", view)
    if quotient is not None and rank(quotient.args[0]) == rank(v):
        c = known.scalar(quotient.args[1], view)
        if c:
            return quotient.args[0], 1 / c
    return v, 1.0


def _values(op: Op, view: View, known: Known) -> tuple[Op | None, tuple[Op, ...]]:
    """The product with v, and what stood between: zeros where a row of the softmax is NaN, as
    PyTorch writes for rows that are masked whole. Attention gives zeros there by itself.
    """
    product = only_use(op.out, "MatMul", view)
    if product is not None:
        return (product if product.args[0] is op.out else None), ()
    uses = view.uses(op.out)
    test = next((u for u in uses if u.name == OP_OF.get("IsNaN")), None)
    choice = next((u for u in uses if u.name == OP_OF.get("Where")), None)
    if test is None or choice is None or len(uses) != 2 or view.only_use(test.out) is not choice:
        return None, ()
    if choice.args[0] is not test.out or choice.args[2] is not op.out:
        return None, ()
    product = only_use(choice.out, "MatMul", view)
    if product is None or product.args[0] is not choice.out:
        return None, ()
    return (product if known.scalar(choice.args[1], view) == 0.0 else None), (test, choice)


def _mismatch(scores: _Scores, v: Value) -> str | None:
    """Why the operands are none of Attention's: it broadcasts masks, not heads or batches."""
    q, k = scores.q.type.shape, scores.k_flipped.type.shape
    for axis in (0, 1):
        extents = {s[axis] for s in (q, k, v.type.shape) if isinstance(s[axis], int)}
        if len(extents) > 1:
            return f"extents {sorted(extents)} along axis {axis} differ"
    if scores.mask is None:
        return None
    if scores.mask.type.shape == UNRANKED or not 2 <= len(scores.mask.type.shape) <= 4:
        return f"its mask is {scores.mask.type}, expected two to four dimensions"
    if dtype(scores.mask) != dtype(scores.q):
        return f"its mask is {scores.mask.type.enc}, q is {scores.q.type.enc}"
    return None


def _unflipped(flipped: Value, view: View, known: Known) -> tuple[tuple[Op, ...], Value] | str:
    """k [B, H, T, D] of what the product reads, [B, H, D, T]."""
    direct = made_by(flipped, "Transpose", view)
    if direct is not None:
        perm = list(direct.ints("perm")) or [3, 2, 1, 0]
        perm[-2:] = perm[:-3:-1]
        if perm == [0, 1, 2, 3]:
            return (), direct.args[0]
        return _transposed(direct.args[0], perm, view)
    k = _through_three(flipped, view)
    return ((), k) if k is not None else "its right side is no transpose of the last two axes"


def _transposed(v: Value, perm: list[int], view: View) -> tuple[tuple[Op, ...], Value]:
    type_ = v.type.with_shape(*(v.type.shape[i] for i in perm))
    op, value = view.typed(OP_OF["Transpose"], v, type_=type_, hint=f"{v.name}.t", perm=tuple(perm))
    return (op,), value


def _through_three(flipped: Value, view: View) -> Value | None:
    """k where it is flipped as [B H, T, D], and made four-dimensional again.

    A reshape keeps the order of elements: if the last two extents are those of the transpose, and
    the first is that of k, the second is that of k too.
    """
    out = made_by(flipped, "Reshape", view)
    turn = made_by(out.args[0], "Transpose", view) if out is not None else None
    into = made_by(turn.args[0], "Reshape", view) if turn is not None else None
    if out is None or turn is None or into is None or turn.ints("perm") != (0, 2, 1):
        return None
    k, three, last = into.args[0], into.out.type.shape, out.out.type.shape
    shape = k.type.shape
    if len(shape) != 4 or len(three) != 3 or len(last) != 4:
        return None
    kept = zip(
        (*three[1:], *last[2:], last[0]), (*shape[2:], shape[3], shape[2], shape[0]), strict=True
    )
    return k if all(same_extent(a, b) for a, b in kept) else None
