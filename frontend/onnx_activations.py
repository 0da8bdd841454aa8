"""Gelu and Silu in the spellings that exporters write."""

from __future__ import annotations

import math

from ..ir.graph import Op, Value
from ..ir.rewrite import Answer, Rewrite, Rule, View
from .onnx_match import Known, made_by, only_use, other
from .onnx_names import OP_OF

SQRT_2_BY_PI = math.sqrt(2 / math.pi)
CUBIC = 0.044715


def activation_rules(known: Known) -> list[Rule]:
    return [
        Rule("gelu", (OP_OF.get("Erf", ""),), lambda op, v: _erf(op, v, known)),
        Rule("gelu, tanh", (OP_OF.get("Tanh", ""),), lambda op, v: _tanh(op, v, known)),
        Rule("silu", (OP_OF.get("Sigmoid", ""),), lambda op, v: _silu(op, v, known)),
    ]


def _scaled(v: Value, by: float, view: View, known: Known) -> Value | None:
    """x where v is x * by or x / (1 / by)."""
    if (product := made_by(v, "Mul", view)) is not None:
        for x in product.args:
            if known.is_near(other(product, x), by, view):
                return x
    quotient = made_by(v, "Div", view)
    if quotient is not None and known.is_near(quotient.args[1], 1 / by, view):
        return quotient.args[0]
    return None


def _erf(op: Op, view: View, known: Known) -> Answer:
    """x / 2 * (1 + erf(x / sqrt 2)), whatever is multiplied first."""
    x = _scaled(op.args[0], math.sqrt(0.5), view, known)
    if x is None:
        return "its argument is not x / sqrt(2)"
    return _gelu(op, x, "none", view, known)


def _tanh(op: Op, view: View, known: Known) -> Answer:
    """x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3)))."""
    inner = _scaled(op.args[0], SQRT_2_BY_PI, view, known)
    total = made_by(inner, "Add", view) if inner is not None else None
    if total is None:
        return None
    for x in total.args:
        cube = _scaled(other(total, x), CUBIC, view, known)
        if cube is not None and _is_cube(cube, x, view, known):
            return _gelu(op, x, "tanh", view, known)
    return "its argument is not x + 0.044715 x^3"


def _is_cube(v: Value, x: Value, view: View, known: Known) -> bool:
    power = made_by(v, "Pow", view)
    if power is not None:
        return power.args[0] is x and known.is_near(power.args[1], 3.0, view)
    product = made_by(v, "Mul", view)
    if product is None or x not in product.args:
        return False
    square = made_by(other(product, x), "Mul", view)
    return square is not None and square.args[0] is x and square.args[1] is x


def _gelu(op: Op, x: Value, approximate: str, view: View, known: Known) -> Answer:
    """The tail of both: 1 + op, times x, times a half."""
    if "Gelu" not in OP_OF:
        return "there is no Gelu"
    plus = only_use(op.out, "Add", view)
    if plus is None or not known.is_near(other(plus, op.out), 1.0, view):
        return "1 is not added to it, or it is read elsewhere too"
    first = only_use(plus.out, "Mul", view)
    if first is None:
        return "1 + it is not a factor, or it is read elsewhere too"
    factor = other(first, plus.out)
    if _scaled(factor, 0.5, view, known) is x:
        return _replaced(op, x, approximate, first, view)
    second = only_use(first.out, "Mul", view)
    left = other(second, first.out) if second is not None else None
    halves = factor if left is x else left if factor is x else None
    if second is None or halves is None or not known.is_near(halves, 0.5, view):
        return "it is not multiplied by x and a half"
    return _replaced(op, x, approximate, second, view)


def _replaced(op: Op, x: Value, approximate: str, last: Op, view: View) -> Rewrite:
    gelu, y = view.typed(
        OP_OF["Gelu"], x, type_=last.out.type, loc=last.loc or op.loc, hint=last.out.name,
        approximate=approximate,
    )  # fmt: skip
    return Rewrite(f"approximate={approximate}", (gelu,), {last.out: y}, (op, last))


def _silu(op: Op, view: View, known: Known) -> Answer:
    """x * sigmoid(x), and sigmoid(a x) for a number a."""
    last = only_use(op.out, "Mul", view)
    if last is None or "Swish" not in OP_OF:
        return None
    x = other(last, op.out)
    alpha = 1.0
    if op.args[0] is not x:
        inner = made_by(op.args[0], "Mul", view)
        found = known.scalar(other(inner, x), view) if inner and x in inner.args else None
        if found is None:
            return None
        alpha = found
    swish, y = view.typed(
        OP_OF["Swish"], x, type_=last.out.type, loc=op.loc, hint=last.out.name, alpha=alpha
    )
    return Rewrite(f"alpha={alpha:g}", (swish,), {last.out: y}, (op, last))
