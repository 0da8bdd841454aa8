"""What rules ask of a graph of ONNX ops: constants, and trees of operators in any spelling."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from ..ir.graph import Op, Value
from ..ir.rewrite import View
from ..ir.types import UNKNOWN, UNRANKED, Plain
from .onnx_model import Model
from .onnx_names import OP_OF
from .onnx_tensors import Constant

TOLERANCE = 1e-4
"""Relative, for constants like 1 / sqrt(2) that exporters round in their own ways."""


@dataclass(frozen=True, slots=True)
class Known:
    """The constants behind `weight` ops, and new ones; `made`: these, by what they were made of."""

    model: Model
    made: dict[str, str] = field(default_factory=dict[str, str])

    def constant(self, v: Value, view: View) -> Constant | None:
        op = view.producer(v, "weight")
        return None if op is None else self.model.constants.get(op.get("source", ""))

    def scalar(self, v: Value, view: View) -> float | None:
        """The value of a constant of one element."""
        found = self.constant(v, view)
        return None if found is None or found.count != 1 else float(found.load().reshape(()))

    def is_near(self, v: Value, wanted: float, view: View) -> bool:
        found = self.scalar(v, view)
        return found is not None and math.isclose(found, wanted, rel_tol=TOLERANCE)

    def weight(self, constant: Constant, hint: str, view: View) -> tuple[Op, Value]:
        """A `weight` op of a new constant; asked for twice, of the same one."""
        if hint not in self.made:
            self.made[hint] = self.model.names.fresh(hint)
            self.model.constants[self.made[hint]] = constant
        return self.stored(self.made[hint], view)

    def stored(self, name: str, view: View) -> tuple[Op, Value]:
        """A `weight` op of a constant that the model has."""
        type_ = self.model.constants[name].type
        return view.typed("weight", type_=type_, hint="w", source=name)

    def vector(self, v: Value, n: int, view: View) -> Constant | None:
        """A constant of n numbers along the last axis, as [n]."""
        found = self.constant(v, view)
        if found is None or found.count != n or not found.shape or found.shape[-1] != n:
            return None
        return Constant(found.dtype, (n,), lambda: found.load().reshape(n))


def made_by(v: Value, operator: str, view: View) -> Op | None:
    """The op that makes v, if it stands for this ONNX operator."""
    return view.producer(v, OP_OF.get(operator, "-"))


def only_use(v: Value, operator: str, view: View) -> Op | None:
    """The single op that reads v, if it stands for this ONNX operator."""
    use = view.only_use(v)
    return use if use is not None and use.name == OP_OF.get(operator) else None


def other(op: Op, v: Value) -> Value:
    """The operand of a binary op that is not v (v again where it is both)."""
    return op.args[1] if op.args[0] is v else op.args[0]


def last_extent(v: Value) -> int | None:
    shape = v.type.shape
    return shape[-1] if shape and isinstance(shape[-1], int) else None


def rank(v: Value) -> int | None:
    return None if v.type.shape == UNRANKED else len(v.type.shape)


def dtype(v: Value) -> str:
    return v.type.enc.dtype if isinstance(v.type.enc, Plain) else ""


def is_f32(v: Value) -> bool:
    return dtype(v) == "f32"


def same_extent(a: object, b: object) -> bool:
    """Whether two extents are known to be equal: the same number, or the same symbol."""
    return a == b and a != UNKNOWN


def source(v: Value, view: View) -> str:
    """The constant's name in the model, for a value of a `weight` op."""
    op = view.producer(v, "weight")
    return v.name if op is None else op.get("source", "")


def shortest(value: float) -> float:
    """The number with the fewest digits that is the same f32."""
    return float(str(np.float32(value)))
