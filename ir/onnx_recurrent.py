"""ONNX operators that repeat a cell over a sequence: RNN, GRU, LSTM."""

from __future__ import annotations

from .graph import Op
from .onnx_ops import dtype, onnx, shape, typed
from .opdef import Infer, OpDef
from .types import UNKNOWN, Dim, TensorType

_ATTRS = {
    "activation_alpha": "for the functions that have an alpha, in order",
    "activation_beta": "for the functions that have a beta, in order",
    "activations": "functions of the gates, for each direction, separated by commas",
    "clip": "bound of what goes into activations",
    "direction": "forward, reverse or bidirectional",
    "hidden_size": "elements of a state",
    "layout": "1: batch first",
}


def _known(found: tuple[Dim, ...] | None, axis: int) -> Dim:
    return found[axis] if found is not None and len(found) == 3 else UNKNOWN


def _recurrent(results: int) -> Infer:
    def infer(op: Op) -> tuple[TensorType, ...]:
        x, r, batch_first = shape(op, 0), shape(op, 2), op.get("layout", 0) == 1
        first, second = _known(x, 0), _known(x, 1)
        steps, batch = (second, first) if batch_first else (first, second)
        directions, hidden = _known(r, 0), _known(r, 2)
        states = (batch, directions, hidden) if batch_first else (directions, batch, hidden)
        y = (
            (batch, steps, directions, hidden)
            if batch_first
            else (steps, directions, batch, hidden)
        )
        return (typed(dtype(op, 0), y), *([typed(dtype(op, 0), states)] * (results - 1)))

    return infer


OPS: dict[str, OpDef] = {
    "onnx_rnn": onnx("RNN", "h = f(x W + h R + biases), step by step", 3, 6, _recurrent(2), _ATTRS),
    "onnx_gru": onnx(
        "GRU", "gated recurrent units", 3, 6, _recurrent(2),
        _ATTRS | {"linear_before_reset": "1: the reset gate follows the product with R"},
    ),
    "onnx_lstm": onnx(
        "LSTM", "long short-term memory", 3, 8, _recurrent(3),
        _ATTRS | {"input_forget": "1: the forget gate is one minus the input gate"},
    ),
}  # fmt: skip
