"""What entries of ONNX operators in the op table are made of: type rules that know as much as they
can, and the reference that is onnx's own.

An op `onnx_add` stands for the operator Add in the spelling of the newest opset; the importer has
rewritten older ones. Attributes keep their ONNX names. A tensor that ONNX writes as an attribute
(the value of ConstantOfShape) is an operand behind the others. An optional operand that is left out
between others is the result of `absent`.

A rule types every result that the operator can have; an op may list fewer. It gives `?` for an
extent and `*` for a shape that only a run knows; a value's own type may then say more (verify.py),
since onnx's shape inference sees further.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from .errors import IRError
from .graph import Op
from .opdef import Data, Infer, OpDef
from .types import UNKNOWN, UNRANKED, Dim, Plain, TensorType

ABSENT = "absent"
"""The op whose result stands for an operand that is left out."""

MANY = 1 << 16
"""Operands that a variadic operator may have."""

Shape = tuple[Dim, ...]

DTYPES: dict[int, str] = {
    1: "f32", 2: "u8", 3: "i8", 4: "u16", 5: "i16", 6: "i32", 7: "i64", 9: "bool", 10: "f16",
    11: "f64", 12: "u32", 13: "u64", 16: "bf16", 17: "f8e4m3", 18: "f8e4m3fnuz", 19: "f8e5m2",
    20: "f8e5m2fnuz", 21: "u4", 22: "i4", 23: "f4e2m1", 24: "f8e8m0", 25: "u2", 26: "i2",
}  # fmt: skip
"""Our dtypes by their numbers in onnx.TensorProto.DataType (`to` of Cast)."""


def by_evaluator(op: Op, args: list[Data]) -> Data:
    """Raises IRError: the meaning of ONNX operators is not written down here a second time."""
    raise IRError(f"{op.name}: its reference is onnx.reference (codegen/onnx_oracle.py)")


def onnx(
    operator: str,
    doc: str,
    least: int,
    most: int,
    infer: Infer,
    attrs: Mapping[str, str] | None = None,
) -> OpDef:
    """The entry of an ONNX operator. `most`: of operands, tensors among the attributes included."""
    return OpDef(doc, least, most, infer, by_evaluator, attrs=dict(attrs or {}), onnx=operator)


# --- facts that rules ask for ---------------------------------------------------------------------


def dtype(op: Op, i: int) -> str:
    """The dtype of operand i. Raises IRError for a compound encoding."""
    enc = op.args[i].type.enc
    if not isinstance(enc, Plain):
        raise IRError(f"{op.name}: operand {i} is {op.args[i].type}, expected a plain encoding")
    return enc.dtype


def shape(op: Op, i: int) -> Shape | None:
    """The shape of operand i, None where its rank is not known."""
    found = op.args[i].type.shape
    return None if found == UNRANKED else found


def is_given(op: Op, i: int) -> bool:
    """Whether operand i is there: listed, and not the result of `absent`."""
    return i < len(op.args) and op.args[i].type != NOTHING


def typed(dtype_: str, found: Shape | None) -> TensorType:
    """A plain type; of unknown rank where `found` is None."""
    return TensorType(UNRANKED if found is None else found, Plain(dtype_))


NOTHING = TensorType((0,), Plain("u8"))
"""The type of `absent`."""


def numbered(op: Op, attr: str, otherwise: str) -> str:
    """The dtype whose number the attribute is; `otherwise` where it is absent or 0."""
    number = op.get(attr, 0)
    if number and number not in DTYPES:
        raise IRError(f"{op.name}: {attr} is {number}, expected one of {sorted(DTYPES)}")
    return DTYPES.get(number, otherwise)


# --- rules that many operators share --------------------------------------------------------------


def broadcast(shapes: list[Shape | None]) -> Shape | None:
    """The shape that all broadcast to, as far as it is known. Raises IRError where they do not."""
    if any(s is None for s in shapes):
        return None
    known = [s for s in shapes if s is not None]
    rank = max(map(len, known), default=0)
    padded = [(1,) * (rank - len(s)) + s for s in known]
    return tuple(_joint(dims, shapes) for dims in zip(*padded, strict=True))


def _joint(dims: tuple[Dim, ...], shapes: list[Shape | None]) -> Dim:
    others = {d for d in dims if d != 1}
    numbers = {d for d in others if isinstance(d, int)}
    if len(numbers) > 1:
        raise IRError(f"shapes {shapes} do not broadcast")
    if numbers:
        return numbers.pop()
    return others.pop() if len(others) == 1 else UNKNOWN if others else 1


def elementwise(result: str | None = None) -> Callable[[Op], TensorType]:
    """All operands broadcast; the result has `result` as dtype, or that of operand 0."""

    def infer(op: Op) -> TensorType:
        shapes = [shape(op, i) for i in range(len(op.args)) if is_given(op, i)]
        return typed(result or dtype(op, 0), broadcast(shapes))

    return infer


def like(i: int = 0, result: str | None = None) -> Callable[[Op], TensorType]:
    """The shape of operand i, and its dtype unless `result` says another."""

    def infer(op: Op) -> TensorType:
        return typed(result or dtype(op, i), shape(op, i))

    return infer


def of_rank(i: int = 0, result: str | None = None) -> Callable[[Op], TensorType]:
    """Of operand i's rank, every extent unknown."""

    def infer(op: Op) -> TensorType:
        found = shape(op, i)
        known = None if found is None else (UNKNOWN,) * len(found)
        return typed(result or dtype(op, i), known)

    return infer


def unranked(i: int = 0, result: str | None = None) -> Callable[[Op], TensorType]:
    """The dtype of operand i, or `result`; of the shape nothing is known."""

    def infer(op: Op) -> TensorType:
        return typed(result or dtype(op, i), None)

    return infer


def refines(found: TensorType, inferred: TensorType) -> bool:
    """Whether a value's type says the same as a rule's, or more where the rule knows nothing."""
    if found.enc != inferred.enc:
        return False
    if inferred.shape == UNRANKED or found.shape == UNRANKED:
        return True
    pairs = zip(found.shape, inferred.shape, strict=False)
    return len(found.shape) == len(inferred.shape) and all(
        a == b or isinstance(a, str) or isinstance(b, str) for a, b in pairs
    )
