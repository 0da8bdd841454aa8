"""RNN, GRU and LSTM where onnx's reference evaluator ignores what they are told."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto

from tests.onnx_node import run_node

Array = np.ndarray[Any, Any]
FUNCTIONS: dict[str, Callable[[Array], Array]] = {
    "Sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "Tanh": np.tanh,
    "Relu": lambda x: np.maximum(x, 0),
    "HardSigmoid": lambda x: np.clip(0.3 * x + 0.4, 0, 1),
    "Softsign": lambda x: x / (1 + np.abs(x)),
    "LeakyRelu": lambda x: np.where(x < 0, 0.1 * x, x),
}
GATES = {"RNN": 1, "GRU": 3, "LSTM": 4}
DEFAULTS = {"RNN": ("Tanh",), "GRU": ("Sigmoid", "Tanh"), "LSTM": ("Sigmoid", "Tanh", "Tanh")}


class Cell:
    """One direction of a recurrence in float64, by the equations of the standard."""

    def __init__(self, kind: str, w: Array, r: Array, b: Array, p: Array, **attrs: Any) -> None:
        self.kind, self.w, self.r, self.p, self.attrs = kind, w, r, p, attrs
        self.wb, self.rb = np.split(b, 2)
        names = attrs.get("activations", DEFAULTS[kind])
        self.functions = [FUNCTIONS[name] for name in names]

    def gate(self, which: int, x: Array) -> Array:
        clip = self.attrs.get("clip", np.inf)
        return self.functions[which](np.clip(x, -clip, clip))

    def step(self, x: Array, h: Array, c: Array) -> tuple[Array, Array]:
        return {"RNN": self.rnn, "GRU": self.gru, "LSTM": self.lstm}[self.kind](x, h, c)

    def rnn(self, x: Array, h: Array, c: Array) -> tuple[Array, Array]:
        return self.gate(0, self.w @ x + self.r @ h + self.wb + self.rb), c

    def gru(self, x: Array, h: Array, c: Array) -> tuple[Array, Array]:
        wz, wr, wh = np.split(self.w @ x + self.wb, 3)
        rz, rr, rh = np.split(self.r, 3)
        bz, br, bh = np.split(self.rb, 3)
        z = self.gate(0, wz + rz @ h + bz)
        r = self.gate(0, wr + rr @ h + br)
        linear = self.attrs.get("linear_before_reset", 0)
        past = r * (rh @ h + bh) if linear else rh @ (r * h) + bh
        return (1 - z) * self.gate(1, wh + past) + z * h, c

    def lstm(self, x: Array, h: Array, c: Array) -> tuple[Array, Array]:
        i, o, f, g = np.split(self.w @ x + self.wb + self.r @ h + self.rb, 4)
        pi, po, pf = np.split(self.p, 3)
        i = self.gate(0, i + pi * c)
        f = 1 - i if self.attrs.get("input_forget") else self.gate(0, f + pf * c)
        c = f * c + i * self.gate(1, g)
        return self.gate(0, o + po * c) * self.functions[2](c), c


def recur(cell: Cell, x: Array, lengths: Array, reverse: bool) -> tuple[Array, Array, Array]:
    """All states [steps, batch, hidden], and the last ones; zeros behind a sequence's end."""
    steps, batch, _ = x.shape
    hidden = cell.r.shape[1]
    y, h, c = np.zeros((steps, batch, hidden)), np.zeros((batch, hidden)), np.zeros((batch, hidden))
    for b in range(batch):
        order = range(lengths[b])
        for t in reversed(order) if reverse else order:
            h[b], c[b] = cell.step(x[t, b], h[b], c[b])
            y[t, b] = h[b]
    return y, h, c


CASES: list[tuple[str, str, dict[str, Any]]] = [
    ("RNN", "forward", {"activations": ["Relu"], "clip": 0.5}),
    ("RNN", "bidirectional", {"activations": ["Tanh", "Softsign"]}),
    ("GRU", "forward", {"linear_before_reset": 1}),
    ("GRU", "reverse", {"activations": ["HardSigmoid", "Relu"], "clip": 0.7}),
    ("LSTM", "forward", {}),
    ("LSTM", "reverse", {"input_forget": 1, "clip": 0.4}),
    ("LSTM", "bidirectional", {"activations": ["Sigmoid", "LeakyRelu", "Softsign"] * 2}),
]


@pytest.mark.parametrize(("kind", "direction", "attrs"), CASES)
@pytest.mark.parametrize("steps", [1, 6])
def test_as_the_standard_says(
    tmp_path: Path, kind: str, direction: str, attrs: dict[str, Any], steps: int
) -> None:
    batch, width, hidden, gates = 3, 5, 19, GATES[kind]
    directions = 2 if direction == "bidirectional" else 1
    rng = np.random.default_rng(7)
    w, r, b, p = (
        rng.standard_normal((directions, *shape)).astype(np.float32) * 0.5
        for shape in ((gates * hidden, width), (gates * hidden, hidden), (2 * gates * hidden,),
                      (3 * hidden,))
    )  # fmt: skip
    x = rng.standard_normal((steps, batch, width)).astype(np.float32)
    lengths = np.array([steps, max(1, steps - 2), 1], np.int32)
    names = attrs.get("activations", list(DEFAULTS[kind]) * directions)
    told = {**attrs, "hidden_size": hidden, "direction": direction}
    if "HardSigmoid" in names:
        told |= {"activation_alpha": [0.3], "activation_beta": [0.4]}
    if "LeakyRelu" in names:
        told |= {"activation_alpha": [0.1] * directions}
    operands = [x, w, r, b, lengths, *([None, None, p] if kind == "LSTM" else [])]
    results = 3 if kind == "LSTM" else 2
    found = run_node(tmp_path, kind, operands, [TensorProto.FLOAT] * results, **told)
    each = len(names) // directions
    for d in range(directions):
        own = {**attrs, "activations": names[d * each : (d + 1) * each]}
        cell = Cell(kind, w[d], r[d], b[d], p[d], **own)
        expected = recur(cell, x, lengths, direction == "reverse" or d == 1)
        parts = (found[0][:, d], *(state[d] for state in found[1:]))
        for ours, theirs in zip(parts, expected, strict=False):
            np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)
