"""ONNX operators that compute each element by itself: arithmetic, comparison, activation."""

from __future__ import annotations

from .graph import Op
from .onnx_ops import MANY, elementwise, like, onnx, shape, typed
from .opdef import OpDef
from .types import TensorType


def _binary(operator: str, doc: str, **attrs: str) -> OpDef:
    return onnx(operator, doc, 2, 2, elementwise(), attrs)


def _compare(operator: str, doc: str) -> OpDef:
    return onnx(operator, doc, 2, 2, elementwise("bool"))


def _unary(operator: str, doc: str, **attrs: str) -> OpDef:
    return onnx(operator, doc, 1, 1, like(), attrs)


def _test(operator: str, doc: str, **attrs: str) -> OpDef:
    return onnx(operator, doc, 1, 1, like(result="bool"), attrs)


def _variadic(operator: str, doc: str) -> OpDef:
    return onnx(operator, doc, 1, MANY, elementwise())


def _where(op: Op) -> TensorType:
    chosen = elementwise()(op)
    return TensorType(chosen.shape, op.args[1].type.enc)


def _dropout(op: Op) -> tuple[TensorType, TensorType]:
    return op.args[0].type, typed("bool", shape(op, 0))


_ARITHMETIC: dict[str, OpDef] = {
    "onnx_add": _binary("Add", "a + b"),
    "onnx_sub": _binary("Sub", "a - b"),
    "onnx_mul": _binary("Mul", "a * b"),
    "onnx_div": _binary("Div", "a / b; of integers toward zero, 0 where b is 0"),
    "onnx_mod": _binary(
        "Mod", "a - b * floor(a / b)", fmod="1: the sign is the dividend's, not the divisor's"
    ),
    "onnx_pow": _binary("Pow", "a to the power of b, in the dtype of a"),
    "onnx_prelu": _binary("PRelu", "x, or x * slope where x < 0"),
    "onnx_max": _variadic("Max", "the largest of all operands"),
    "onnx_min": _variadic("Min", "the smallest of all operands"),
    "onnx_sum": _variadic("Sum", "the sum of all operands"),
    "onnx_mean": _variadic("Mean", "the mean of all operands"),
    "onnx_clip": onnx("Clip", "x between the scalars min and max, each optional", 1, 3, like()),
    "onnx_abs": _unary("Abs", "|x|"),
    "onnx_neg": _unary("Neg", "-x"),
    "onnx_sign": _unary("Sign", "-1, 0 or 1"),
}

_LOGIC: dict[str, OpDef] = {
    "onnx_equal": _compare("Equal", "a == b"),
    "onnx_greater": _compare("Greater", "a > b"),
    "onnx_greater_or_equal": _compare("GreaterOrEqual", "a >= b"),
    "onnx_less": _compare("Less", "a < b"),
    "onnx_less_or_equal": _compare("LessOrEqual", "a <= b"),
    "onnx_and": _compare("And", "a and b"),
    "onnx_or": _compare("Or", "a or b"),
    "onnx_xor": _compare("Xor", "a != b of truth values"),
    "onnx_not": _unary("Not", "not x"),
    "onnx_bitwise_and": _binary("BitwiseAnd", "a & b"),
    "onnx_bitwise_or": _binary("BitwiseOr", "a | b"),
    "onnx_bitwise_xor": _binary("BitwiseXor", "a ^ b"),
    "onnx_bitwise_not": _unary("BitwiseNot", "~x"),
    "onnx_bit_shift": _binary(
        "BitShift", "a shifted by b bits", direction="LEFT, or RIGHT (of signed a: arithmetic)"
    ),
    "onnx_where": onnx("Where", "a where the condition holds, else b", 3, 3, _where),
    "onnx_is_nan": _test("IsNaN", "x is NaN"),
    "onnx_is_inf": _test(
        "IsInf", "x is infinite", detect_positive="whether +inf counts", detect_negative="or -inf"
    ),
}

_FUNCTIONS: dict[str, OpDef] = {
    f"onnx_{operator.lower()}": _unary(operator, f"{operator.lower()}(x)")
    for operator in (
        "Exp", "Log", "Sqrt", "Sin", "Cos", "Tan", "Asin", "Acos", "Atan", "Sinh", "Cosh", "Tanh",
        "Asinh", "Acosh", "Atanh", "Erf",
    )
}  # fmt: skip

_ACTIVATIONS: dict[str, OpDef] = {
    "onnx_floor": _unary("Floor", "the integer below x"),
    "onnx_ceil": _unary("Ceil", "the integer above x"),
    "onnx_round": _unary("Round", "the nearest integer, halves to even"),
    "onnx_reciprocal": _unary("Reciprocal", "1 / x"),
    "onnx_relu": _unary("Relu", "max(x, 0)"),
    "onnx_leaky_relu": _unary("LeakyRelu", "x, or alpha x where x < 0", alpha="slope below 0"),
    "onnx_thresholded_relu": _unary(
        "ThresholdedRelu", "x where x > alpha, else 0", alpha="the threshold"
    ),
    "onnx_elu": _unary("Elu", "x, or alpha (e^x - 1) where x < 0", alpha="limit below 0"),
    "onnx_selu": _unary(
        "Selu", "gamma times Elu", alpha="limit below 0, before gamma", gamma="slope above 0"
    ),
    "onnx_celu": _unary(
        "Celu", "max(x, 0) + min(alpha (e^(x/alpha) - 1), 0)", alpha="limit below 0"
    ),
    "onnx_gelu": _unary("Gelu", "x times the normal distribution", approximate="none or tanh"),
    "onnx_sigmoid": _unary("Sigmoid", "1 / (1 + e^-x)"),
    "onnx_hard_sigmoid": _unary(
        "HardSigmoid", "alpha x + beta between 0 and 1", alpha="slope", beta="value at 0"
    ),
    "onnx_hard_swish": _unary("HardSwish", "x times HardSigmoid with alpha 1/6"),
    "onnx_swish": _unary("Swish", "x sigmoid(alpha x)", alpha="steepness"),
    "onnx_mish": _unary("Mish", "x tanh(softplus(x))"),
    "onnx_softplus": _unary("Softplus", "log(1 + e^x)"),
    "onnx_softsign": _unary("Softsign", "x / (1 + |x|)"),
    "onnx_shrink": _unary(
        "Shrink", "0 within lambd of 0, else nearer to 0 by bias", lambd="limit", bias="shift"
    ),
    "onnx_dropout": onnx(
        "Dropout", "x and which of it is kept: all but in training", 1, 3, _dropout,
        {"seed": "of the generator in training"},
    ),
}  # fmt: skip

OPS: dict[str, OpDef] = {**_ARITHMETIC, **_LOGIC, **_FUNCTIONS, **_ACTIVATIONS}
