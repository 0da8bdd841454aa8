"""Phase 30 on ONNX graphs: what is proven of extents, and what is computed together then."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import ModelProto, TensorProto

import halfbyte
from halfbyte.codegen.kernels_net import declarations
from halfbyte.codegen.table import CPU
from halfbyte.ir.graph import Graph, Op, Value
from halfbyte.ir.interp import evaluate
from halfbyte.ir.ops import infer
from halfbyte.ir.target import target
from halfbyte.ir.types import tensor
from halfbyte.passes.context import Context
from halfbyte.passes.onnx_extents import ExtentTable, quotient
from halfbyte.passes.pipeline import PHASES, Report, run
from tests.onnx_files import imported, with_every_operator
from tests.onnx_networks import Writer, bert, bert_weights

FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64
RNG = np.random.default_rng(3)


@pytest.fixture(autouse=True)
def every_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    with_every_operator(monkeypatch)


def fused(proto: ModelProto, folder: Path) -> tuple[Graph, list[str]]:
    """The graph after phase 30, and what that phase decided."""
    found = imported(proto, folder)
    log: list[str] = []

    def keep(report: Report) -> None:
        log.extend(str(entry) for entry in report.log)

    cpu = target("cpu")
    kernels = (*(k.decl for k in CPU.kernels), *declarations())
    context = Context(cpu, kernels, found.weights)
    phases = [phase for phase in PHASES if phase.id < "31"]
    return run(found.graphs[0], context, phases, keep), log


def launched(graph: Graph) -> list[str]:
    return [op.name for op in graph.ops if op.name not in ("weight", "relayout")]


def test_a_layer_of_bert_is_seven_launches(tmp_path: Path) -> None:
    graph, _ = fused(bert(bert_weights(layers=1), 1, 4), tmp_path)
    linear, norm = "fused_linear", "onnx_layer_normalization"
    layer = [linear, linear, linear, "onnx_attention", linear, norm, linear, linear, norm]
    names = launched(graph)
    assert [n for n in names if n in (linear, norm, "onnx_attention")] == [norm, *layer]
    assert "onnx_transpose" not in names and "onnx_gelu" not in names
    assert names.count("onnx_add") == 2  # of the embeddings
    roles = [op.strs("roles") for op in graph.ops if op.name == linear]
    assert [r[-1] == "residual" for r in roles] == [False] * 3 + [True, False, True]
    assert [op.get("epilogue", "none") for op in graph.ops if op.name == linear][4] == "gelu"


def heads_network(target_of: str) -> ModelProto:
    """Attention over heads, whose Reshape takes its leading extents from `target_of`."""
    w = Writer()
    shape = w.op("Slice", w.op("Shape", target_of), w.ints(0), w.ints(2))
    target_ = w.op("Concat", shape, w.ints(4, 8), axis=0)
    q, k, v = (
        w.op("Transpose", w.op("Reshape", name, target_), perm=[0, 2, 1, 3]) for name in "xkv"
    )
    zero = w.op("Cast", w.op("Unsqueeze", "mask", w.ints(1, 2)), to=FLOAT)
    y = w.attention(q, k, v, zero, 8)
    turned = w.op("Transpose", y, perm=[0, 2, 1, 3])
    y = w.op("Reshape", turned, w.ints(0, 0, 32))
    rows: tuple[int, list[Any]] = (FLOAT, ["b", "t", 32])
    mask: tuple[int, list[Any]] = (INT64, ["b", "t"])
    other: tuple[int, list[Any]] = (FLOAT, ["c", "s", 2])
    inputs: dict[str, tuple[int, list[Any]]] = {"x": rows, "k": rows, "v": rows, "mask": mask}
    inputs["z"] = other
    return w.model(inputs, y)


def test_attention_takes_rows_only_where_heads_are_proven(tmp_path: Path) -> None:
    graph, _ = fused(heads_network("x"), tmp_path)
    attention = next(op for op in graph.ops if op.name == "onnx_attention")
    assert attention.get("q_num_heads", 0) == attention.get("kv_num_heads", 0) == 4
    assert [str(v) for v in attention.args[:3]] == ["%x", "%k", "%v"]
    assert "onnx_transpose" not in launched(graph)

    graph, log = fused(heads_network("z"), tmp_path)
    assert launched(graph).count("onnx_transpose") == 4
    assert any("attention over rows" in line and "q is not made of rows" in line for line in log)


def test_attention_over_rows_gives_what_it_gave(tmp_path: Path) -> None:
    halfbyte.compile(save(heads_network("x"), tmp_path), tmp_path / "net.hb")
    x, k, v = (RNG.standard_normal((2, 5, 32)).astype(np.float32) for _ in range(3))
    mask = np.zeros((2, 5), np.int64)
    split = [a.reshape(2, 5, 4, 8).transpose(0, 2, 1, 3).astype(np.float64) for a in (x, k, v)]
    scores = np.exp(split[0] @ split[1].swapaxes(2, 3) / 8**0.5)
    wanted = (scores / scores.sum(-1, keepdims=True) @ split[2]).transpose(0, 2, 1, 3)
    with halfbyte.load(tmp_path / "net.hb") as net:
        feed = {"x": x, "k": k, "v": v, "mask": mask, "z": np.zeros((1, 1, 2), np.float32)}
        found = net.run(feed)["output"]
    np.testing.assert_allclose(found, wanted.reshape(2, 5, 32), rtol=1e-4, atol=1e-5)


def save(proto: ModelProto, folder: Path) -> Path:
    file = folder / "net.onnx"
    file.write_bytes(proto.SerializeToString())
    return file


def sum_network(rows: list[Any]) -> ModelProto:
    w = Writer()
    weights = {"fc.weight": RNG.standard_normal((16, 16)).astype(np.float32)}
    y = w.op("Add", w.linear("x", "fc", weights), "r")
    return w.model({"x": (FLOAT, ["b", "t", 16]), "r": (FLOAT, rows)}, y)


def test_a_sum_is_fused_only_with_a_term_of_the_same_shape(tmp_path: Path) -> None:
    graph, _ = fused(sum_network(["b", "t", 16]), tmp_path)
    assert launched(graph)[0] == "fused_linear" and "onnx_add" not in launched(graph)
    for rows in (["b", "s", 16], [1, 1, 16], [16]):
        graph, log = fused(sum_network(rows), tmp_path)
        assert "onnx_add" in launched(graph), rows
        assert any("is not known to be of the shape" in line for line in log), rows


def test_a_symbol_that_a_run_breaks_is_an_error_and_no_read_out_of_bounds(tmp_path: Path) -> None:
    halfbyte.compile(save(sum_network(["b", "t", 16]), tmp_path), tmp_path / "net.hb")
    x, r = np.zeros((2, 3, 16), np.float32), np.zeros((2, 1, 16), np.float32)
    with halfbyte.load(tmp_path / "net.hb") as net, pytest.raises(halfbyte.ModelError):
        net.run({"x": x, "r": r})


def test_extents_follow_shape_arithmetic(tmp_path: Path) -> None:
    graph = imported(heads_network("x"), tmp_path).graphs[0]
    context = Context(target("cpu"), (), imported(heads_network("x"), tmp_path).weights)
    table = ExtentTable(graph, context)
    split = next(op for op in graph.ops if op.name == "onnx_reshape")
    b, t, _ = graph.args[0].type.shape
    assert table.of(split.out) == (b, t, 4, 8)
    assert table.same(graph.args[0], graph.args[1])
    assert not table.same(graph.args[0], graph.args[4])


def test_the_rest_of_a_reshape() -> None:
    assert quotient(("b", "t", 32), ("b", 4, 8)) == "t"
    assert quotient((2, 6), (4,)) == 3
    assert quotient(("b", 32), ("t", 32)) is None
    assert quotient(("b", 30), (4,)) is None
    assert quotient(("b", "t", 8), (8,)) is None


def test_gelu_is_its_definition_and_comes_before_the_residual() -> None:
    x, w, r = (RNG.standard_normal(s).astype(np.float32) for s in ((5, 8), (4, 8), (5, 4)))
    types = {
        "x": tensor("f32", "T", 8),
        "w": tensor("f32", 4, 8),
        "residual": tensor("f32", "T", 4),
    }
    args = tuple(Value(name, type_) for name, type_ in types.items())
    op = Op("fused_linear", args, (), {"roles": tuple(types), "epilogue": "gelu"})
    op.outs = tuple(Value("y", t) for t in infer(op))
    product = x.astype(np.float64) @ w.T.astype(np.float64)
    wanted = product / 2 * (1 + np.vectorize(math.erf)(product / 2**0.5)) + r
    found = evaluate(op, [x, w, r])[0]
    np.testing.assert_allclose(np.asarray(found), wanted, rtol=1e-6, atol=1e-6)
