"""Whole networks through the importer: every spelling found, and equal to onnxruntime."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import ModelProto, TensorProto

from tests.onnx_files import imported, names, with_every_operator
from tests.onnx_meaning import run
from tests.onnx_networks import Writer, bert, bert_weights, llama, rotated

ort = pytest.importorskip("onnxruntime")


@pytest.fixture(autouse=True)
def every_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    with_every_operator(monkeypatch)


def by_runtime(proto: ModelProto, inputs: dict[str, Any]) -> Any:
    session = ort.InferenceSession(proto.SerializeToString())
    return session.run(None, inputs)[0]


def ids(vocab: int) -> Any:
    return np.random.default_rng(0).integers(0, vocab, (2, 7))


@pytest.mark.parametrize("bound", [{}, {"batch": 2, "sequence": 7}], ids=["free", "bound"])
def test_bert(tmp_path: Path, bound: dict[str, int]) -> None:
    proto = bert(bert_weights(), layers=2, heads=4)
    found = imported(proto, tmp_path, **bound)
    inputs = {"input_ids": ids(50), "attention_mask": np.ones((2, 7), np.int64)}
    inputs["attention_mask"][1, 4:] = 0
    np.testing.assert_allclose(
        run(found, inputs)[0], by_runtime(proto, inputs), rtol=1e-4, atol=1e-5
    )
    count = Counter(names(found))
    wanted = {"linear": 12, "onnx_layer_normalization": 5, "onnx_gelu": 2, "onnx_attention": 2}
    assert {n: count[n] for n in wanted} == wanted
    assert not count["onnx_mat_mul"] and not count["onnx_softmax"] and not count["onnx_sqrt"]
    if bound:
        assert not count["onnx_shape"]


@pytest.mark.parametrize("bound", [{}, {"batch": 2, "sequence": 7}], ids=["free", "bound"])
def test_llama(tmp_path: Path, bound: dict[str, int]) -> None:
    proto = llama()
    found = imported(proto, tmp_path, **bound)
    inputs = {"input_ids": ids(60)}
    np.testing.assert_allclose(
        run(found, inputs)[0], by_runtime(proto, inputs), rtol=1e-3, atol=1e-4
    )
    count = Counter(names(found))
    wanted = {"linear": 15, "onnx_rms_normalization": 5, "onnx_swish": 2, "onnx_attention": 2}
    assert {n: count[n] for n in wanted} == wanted
    assert count["onnx_rotary_embedding"] == (4 if bound else 0)
    missed = {e.detail for e in found.log if e.rule == "rotary" and not e.fired}
    assert missed == (set() if bound else {"its tables are for 1 sequences, x has D0"})


def test_rotary_positions_of_each_sequence(tmp_path: Path) -> None:
    """Tables by position_ids [B, T], as transformers writes them."""
    w = Writer()
    x: tuple[int, list[Any]] = (TensorProto.FLOAT, ["b", 2, "t", 8])
    column = w.op("Cast", w.op("Unsqueeze", "positions", w.ints(2)), to=TensorProto.FLOAT)
    angles = w.op("Mul", column, w.const(np.array([[[1, 0.3, 0.1, 0.03]]], np.float32)))
    both = w.op("Concat", angles, angles, axis=-1)
    cos, sin = (w.op("Mul", w.op(kind, both), w.number(1.5)) for kind in ("Cos", "Sin"))
    wide = [w.op("Unsqueeze", table, w.ints(1)) for table in (cos, sin)]
    y = rotated(w, "x", wide[0], wide[1], 8)
    proto = w.model({"x": x, "positions": (TensorProto.INT64, ["b", "t"])}, y)
    found = imported(proto, tmp_path)
    inputs = {"x": np.random.default_rng(1).standard_normal((3, 2, 5, 8)).astype(np.float32),
              "positions": np.random.default_rng(2).integers(0, 99, (3, 5))}  # fmt: skip
    np.testing.assert_allclose(
        run(found, inputs)[0], by_runtime(proto, inputs), rtol=1e-4, atol=1e-4
    )
    assert names(found)[-1] == "onnx_rotary_embedding" and "onnx_neg" not in names(found)
