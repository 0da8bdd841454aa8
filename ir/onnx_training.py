"""ONNX operators of training and chance: losses, optimizers, random numbers."""

from __future__ import annotations

from .errors import IRError
from .graph import Op
from .onnx_ops import MANY, dtype, like, numbered, onnx, shape, typed
from .opdef import Infer, OpDef
from .types import UNKNOWN, Dim, TensorType

_LOSS = {"ignore_index": "the target that counts for nothing", "reduction": "none, sum or mean"}
_SEEDED = {"dtype": "number of the result's dtype", "seed": "of the generator; none: the clock"}
_UNIFORM = {**_SEEDED, "low": "least value", "high": "bound of values"}
_NORMAL = {**_SEEDED, "mean": "of the values", "scale": "their standard deviation"}


def _loss(op: Op) -> TensorType:
    """A scalar, or the targets' shape where nothing is reduced."""
    return typed(dtype(op, 0), shape(op, 1) if op.get("reduction", "mean") == "none" else ())


def _loss_and_logs(op: Op) -> tuple[TensorType, TensorType]:
    return _loss(op), like()(op)


def _optimizer(states: int) -> Infer:
    """Parameters, then each of their states, as the operands behind rate and count list them."""

    def infer(op: Op) -> tuple[TensorType, ...]:
        n, left = divmod(len(op.args) - 2, 2 + states)
        if left:
            raise IRError(f"{op.name}: {len(op.args)} operands are no whole number of parameters")
        sources = (*range(2, 2 + n), *range(2 + 2 * n, 2 + (2 + states) * n))
        return tuple(like(i)(op) for i in sources)

    return infer


def _stated(op: Op) -> TensorType:
    return typed(numbered(op, "dtype", "f32"), op.ints("shape"))


def _same_shape(op: Op) -> TensorType:
    return typed(numbered(op, "dtype", dtype(op, 0)), shape(op, 0))


def _multinomial(op: Op) -> TensorType:
    x = shape(op, 0)
    rows: Dim = x[0] if x else UNKNOWN
    return typed(numbered(op, "dtype", "i32"), (rows, op.get("sample_size", 1)))


OPS: dict[str, OpDef] = {
    "onnx_negative_log_likelihood_loss": onnx(
        "NegativeLogLikelihoodLoss", "minus the targets' log probabilities", 2, 3, _loss, _LOSS
    ),
    "onnx_softmax_cross_entropy_loss": onnx(
        "SoftmaxCrossEntropyLoss", "that of log_softmax(scores)", 2, 3, _loss_and_logs, _LOSS
    ),
    "onnx_adagrad": onnx(
        "Adagrad", "one step of Adagrad", 2, MANY, _optimizer(1),
        {
            "decay_factor": "of the rate",
            "epsilon": "added to roots",
            "norm_coefficient": "of the L2 penalty",
        },
    ),
    "onnx_adam": onnx(
        "Adam", "one step of Adam", 2, MANY, _optimizer(2),
        {
            "alpha": "decay of the first moment",
            "beta": "decay of the second moment",
            "epsilon": "added to roots",
            "norm_coefficient": "of the L2 penalty",
            "norm_coefficient_post": "of the shrinking behind the step",
        },
    ),
    "onnx_momentum": onnx(
        "Momentum", "one step of gradient descent with momentum", 2, MANY, _optimizer(1),
        {
            "alpha": "decay of the momentum",
            "beta": "of the gradient",
            "mode": "standard or nesterov",
            "norm_coefficient": "of the L2 penalty",
        },
    ),
    "onnx_random_uniform": onnx(
        "RandomUniform", "uniform in [low, high)", 0, 0, _stated, _UNIFORM | {"shape": "to make"}
    ),
    "onnx_random_uniform_like": onnx(
        "RandomUniformLike", "uniform, of x's shape", 1, 1, _same_shape, _UNIFORM
    ),
    "onnx_random_normal": onnx(
        "RandomNormal", "normally distributed", 0, 0, _stated, _NORMAL | {"shape": "to make"}
    ),
    "onnx_random_normal_like": onnx(
        "RandomNormalLike", "normally distributed, of x's shape", 1, 1, _same_shape, _NORMAL
    ),
    "onnx_bernoulli": onnx("Bernoulli", "1 with probability x", 1, 1, _same_shape, _SEEDED),
    "onnx_multinomial": onnx(
        "Multinomial", "classes by their log probabilities", 1, 1, _multinomial,
        _SEEDED | {"sample_size": "classes drawn for each row"},
    ),
}  # fmt: skip
