"""What the importer makes of sound graphs: names, functions, folding, control flow, old opsets.

Each is compared with onnx's evaluator on the file as it was, or with numpy where that errs (scans).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import GraphProto, NodeProto, TensorProto, helper, numpy_helper

import halfbyte
from halfbyte.frontend.onnx_evaluator import run_model
from halfbyte.frontend.onnx_importer import import_onnx
from halfbyte.frontend.onnx_names import OP_OF
from halfbyte.ir.errors import ModelError
from halfbyte.ir.text import from_text, to_text
from tests.onnx_files import agrees, imported, model, names, node, with_every_operator
from tests.onnx_meaning import run

F, I64, BOOL = TensorProto.FLOAT, TensorProto.INT64, TensorProto.BOOL
X = np.arange(12, dtype=np.float32).reshape(3, 4) / 7


@pytest.fixture(autouse=True)
def every_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    with_every_operator(monkeypatch)


def body(name: str, nodes: list[NodeProto], outputs: list[str]) -> GraphProto:
    return helper.make_graph(
        nodes, name, [], [helper.make_tensor_value_info(n, F, None) for n in outputs]
    )


# ---- names, constants, ports ---------------------------------------------------------------------


def test_a_graph_is_typed_named_and_reads_back(tmp_path: Path) -> None:
    nodes = [node("Add", ["x:0", "w/b"], ["y 1"], name="layer/add"), node("Relu", ["y 1"], ["out"])]
    proto = model(nodes, {"x:0": (F, ["batch size", 4])}, ["out"], {"w/b": X[0]})
    found = imported(proto, tmp_path)
    assert to_text(found.graphs[0]).splitlines() == [
        "graph @main(%x_0: tensor<D0x4, f32>) {",
        '  %w_b = weight {source="w/b"} : tensor<4, f32>',
        "  %y_1 = onnx_add(%x_0, %w_b) : tensor<D0x4, f32>  // layer/add",
        "  %out = onnx_relu(%y_1) : tensor<D0x4, f32>  // out",
        "  return %out",
        "}",
    ]
    assert found.symbols == {"D0": "batch size"}
    (port,) = found.inputs
    assert (port.name, port.dtype, port.dims, port.value) == (
        "x:0", "f32", ("batch size", 4), "x_0",
    )  # fmt: skip
    agrees(proto, tmp_path, {"x:0": X})


def test_weights_stay_in_the_file(tmp_path: Path) -> None:
    w = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)
    found = imported(
        model([node("Add", ["x", "w"], ["y"])], {"x": (F, [64])}, ["y"], {"w": w}), tmp_path
    )
    np.testing.assert_array_equal(found.weights("w"), w)
    assert found.files == (tmp_path / "model.onnx",)
    with pytest.raises(ModelError, match="constant 'nope'"):
        found.weights("nope")


def test_external_data_are_mapped(tmp_path: Path) -> None:
    w = np.arange(1024, dtype=np.float32)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "w.bin").write_bytes(b"\0" * 64 + w.tobytes())
    tensor = numpy_helper.from_array(w[:0], "w")
    tensor.dims[:] = [1024]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in {"location": "data/w.bin", "offset": "64", "length": "4096"}.items():
        tensor.external_data.add(key=key, value=value)
    proto = model([node("Add", ["x", "w"], ["y"])], {"x": (F, [1])}, ["y"], {"w": tensor})
    found = imported(proto, tmp_path)
    np.testing.assert_array_equal(found.weights("w"), w)
    assert found.weights("w").base is not None and not found.weights("w").flags.writeable
    assert [f.name for f in found.files] == ["model.onnx", "w.bin"]


@pytest.mark.parametrize("dtype", ["INT4", "UINT4", "INT2", "UINT2", "FLOAT4E2M1"])
def test_packed_types_unpack_as_onnx_does(tmp_path: Path, dtype: str) -> None:
    kind = TensorProto.DataType.Value(dtype)
    packed = np.random.default_rng(1).integers(0, 256, 2048, np.uint8).tobytes()
    count = 2048 * (4 if dtype.endswith("2") else 2) - 1
    tensor = helper.make_tensor("w", kind, [count], packed, raw=True)
    nodes = [node("Cast", ["w"], ["f"], to=F), node("Add", ["f", "x"], ["y"])]
    agrees(model(nodes, {"x": (F, [1])}, ["y"], {"w": tensor}), tmp_path, {"x": X[0, :1]})


def test_extents_are_bound(tmp_path: Path) -> None:
    proto = model([node("Relu", ["x"], ["y"])], {"x": (F, ["n", None, "n"])}, ["y"])
    found = imported(proto, tmp_path, **{"n": 3, "x.1": 5})
    assert found.inputs[0].dims == (3, 5, 3)
    with pytest.raises(ModelError, match="dimension 'm' is none that varies, expected one of n, x"):
        import_onnx(tmp_path / "model.onnx", dims={"m": 3})
    with pytest.raises(ModelError, match="dimension n=-1"):
        import_onnx(tmp_path / "model.onnx", dims={"n": -1})


# ---- folding -------------------------------------------------------------------------------------


def test_shape_arithmetic_folds_where_extents_are_known(tmp_path: Path) -> None:
    """Flatten as exporters write it: only the batch varies."""
    nodes = [
        node("Shape", ["x"], ["s"]), node("Gather", ["s", "one"], ["d1"], axis=0),
        node("Slice", ["s", "two", "three"], ["d2"]), node("Unsqueeze", ["d1", "zero"], ["u"]),
        node("Mul", ["u", "d2"], ["m"]), node("Concat", ["minus", "m"], ["t"], axis=0),
        node("Reshape", ["x", "t"], ["y"]),
    ]  # fmt: skip
    given = {"one": np.int64(1), "two": np.array([2]), "three": np.array([3]),
             "zero": np.array([0]), "minus": np.array([-1])}  # fmt: skip
    x = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    found = agrees(model(nodes, {"x": (F, ["n", 3, 4])}, ["y"], given), tmp_path, {"x": x})
    assert names(found) == ["onnx_reshape"]
    assert found.graphs[0].outs[0].type.shape[1] == 12


def test_random_numbers_are_never_folded(tmp_path: Path) -> None:
    nodes = [node("RandomNormal", [], ["r"], shape=[2]), node("Add", ["r", "x"], ["y"])]
    found = imported(model(nodes, {"x": (F, [2])}, ["y"]), tmp_path)
    assert len(names(found)) == 2


def test_a_scalar_is_not_folded_into_a_gigabyte(tmp_path: Path) -> None:
    nodes = [node("Expand", ["c", "shape"], ["big"]), node("Add", ["big", "x"], ["y"])]
    given = {"c": np.float32(1), "shape": np.array([2**14, 2**14])}
    found = imported(model(nodes, {"x": (F, [1])}, ["y"], given), tmp_path)
    assert len(names(found)) == 2


def test_int8_weights_become_dense_and_activations_keep_their_operators(tmp_path: Path) -> None:
    w = np.random.default_rng(0).integers(-128, 128, (8, 4), np.int8)
    nodes = [
        node("QuantizeLinear", ["x", "s", "z"], ["q"]), node("DequantizeLinear", ["q", "s",
            "z"], ["xd"]),
        node("DequantizeLinear", ["w", "ws"], ["wd"], axis=0), node("MatMul", ["xd", "wd"], ["y"]),
    ]  # fmt: skip
    given = {
        "s": np.float32(0.05),
        "z": np.int8(3),
        "w": w,
        "ws": np.linspace(0.01, 0.02, 8, dtype=np.float32),
    }
    proto = model(nodes, {"x": (F, ["n", 8])}, ["y"], given)
    found = agrees(
        proto, tmp_path, {"x": np.random.default_rng(1).standard_normal((5, 8), np.float32)}
    )
    assert [n for n in names(found) if "linear" in n and "quantize" in n.replace("_", "")]
    assert str(found.graphs[0].ops[-1].args[1].type.enc) == "f32"


# ---- control flow --------------------------------------------------------------------------------


def test_a_decided_if_is_the_branch_it_takes(tmp_path: Path) -> None:
    then = body("t", [node("Mul", ["x", "two"], ["a"]), node("Add", ["a", "a"], ["r"])], ["r"])
    other = body("e", [node("Neg", ["x"], ["a"])], ["a"])
    nodes = [
        node("Shape", ["x"], ["s"]), node("Size", ["s"], ["rank"]),
        node("Equal", ["rank", "two_i"], ["c"]),
        node("If", ["c"], ["y"], then_branch=then, else_branch=other), node("Add", ["y", "x"],
            ["out"]),
    ]  # fmt: skip
    given = {"two": np.float32(2), "two_i": np.int64(2)}
    found = agrees(model(nodes, {"x": (F, ["n", 4])}, ["out"], given), tmp_path, {"x": X})
    assert len(found.graphs) == 1 and names(found) == ["onnx_mul", "onnx_add", "onnx_add"]


@pytest.mark.parametrize("taken", [True, False])
def test_an_open_if_takes_what_it_captures(tmp_path: Path, taken: bool) -> None:
    then = body("t", [node("Mul", ["h", "w"], ["r"])], ["r"])
    other = body("e", [node("Sub", ["x", "h"], ["r"]), node("Add", ["r", "w"], ["q"])], ["q"])
    nodes = [
        node("Relu", ["x"], ["h"]), node("If", ["c"], ["y"], then_branch=then, else_branch=other),
    ]  # fmt: skip
    proto = model(nodes, {"x": (F, [3, 4]), "c": (BOOL, [])}, ["y"], {"w": X[1]})
    found = agrees(proto, tmp_path, {"x": X, "c": np.array(taken)})
    assert [g.name for g in found.graphs] == ["main", "then_1", "else_2"]
    op = found.graphs[0].ops[-1]
    assert (
        op.name == "onnx_if" and op.get("then", "") == "then_1" and op.get("else", "") == "else_2"
    )
    assert [v.name for v in op.args] == ["c", "h", "x"]
    assert (op.ints("then_captures"), op.ints("else_captures")) == ((1,), (2, 1))
    for graph in found.graphs:
        assert to_text(from_text(to_text(graph))) == to_text(graph)


def test_a_loop_carries_scans_and_captures(tmp_path: Path) -> None:
    infos = [helper.make_tensor_value_info("i", I64, []), helper.make_tensor_value_info("c",
        BOOL, []),
             helper.make_tensor_value_info("s", F, [3, 4])]  # fmt: skip
    turn = helper.make_graph(
        [node("Identity", ["c"], ["go"]), node("Add", ["s", "x"], ["t"]), node("Mul", ["t",
            "w"], ["row"])],
        "b", infos,
        [helper.make_tensor_value_info(n, F if n != "go" else BOOL, None) for n in ("go", "t",
            "row")],
    )  # fmt: skip
    given = {"w": X[1], "true": np.array(True)}
    nodes = [node("Loop", ["n", "true", "x"], ["last", "rows"], body=turn)]
    proto = model(nodes, {"x": (F, [3, 4]), "n": (I64, [])}, ["last", "rows"], given)
    found = imported(proto, tmp_path)
    last, rows = run(found, {"x": X, "n": np.array(3)})
    np.testing.assert_allclose(last, 4 * X)
    np.testing.assert_allclose(rows, np.stack([2 * X, 3 * X, 4 * X]) * X[1])
    op = found.graphs[0].ops[-1]
    assert op.get("carried", 0) == 1 and op.get("body", "") == "body_1" and len(op.args) == 4
    assert [len(g.args) for g in found.graphs] == [2, 4]


def test_a_scan_states_its_axes(tmp_path: Path) -> None:
    infos = [helper.make_tensor_value_info("s", F, [4]), helper.make_tensor_value_info("e", F, [4])]
    turn = helper.make_graph(
        [node("Add", ["s", "e"], ["t"]), node("Mul", ["t", "e"], ["row"])], "b", infos,
        [helper.make_tensor_value_info(n, F, None) for n in ("t", "row")],
    )  # fmt: skip
    nodes = [
        node(
            "Scan",
            ["z", "x"],
            ["last", "rows"],
            body=turn,
            num_scan_inputs=1,
            scan_input_directions=[1],
        )
    ]
    proto = model(nodes, {"x": (F, [3, 4]), "z": (F, [4])}, ["last", "rows"])
    found = imported(proto, tmp_path)
    last, rows = run(found, {"x": X, "z": X[0]})
    np.testing.assert_allclose(last, X[0] + X.sum(0), rtol=1e-6)
    np.testing.assert_allclose(rows, (X[0] + X[::-1].cumsum(0)) * X[::-1], rtol=1e-6)
    op = found.graphs[0].ops[-1]
    assert op.get("states", 0) == 1 and op.ints("scan_input_directions") == (1,)
    assert op.ints("scan_input_axes") == op.ints("scan_output_axes") == (0,)


# ---- functions -----------------------------------------------------------------------------------


def test_functions_are_inlined_at_their_own_opset(tmp_path: Path) -> None:
    """A function of opset 12 (Squeeze by attribute) that calls another, its attribute handed on."""
    scale = helper.make_function(
        "mine", "Scale", ["a"], ["b"],
        [node("Constant", [], ["k"]), node("Mul", ["a", "k"], ["b"])], [helper.make_opsetid("",
            13)],
        ["by"],
    )  # fmt: skip
    scale.node[0].attribute.add(name="value_float", ref_attr_name="by", type=1)
    outer = helper.make_function(
        "mine", "Outer", ["a"], ["b"],
        [node("Scale", ["a"], ["s"], domain="mine", by=3.0), node("Unsqueeze", ["s"], ["u"],
            axes=[0]),
         node("Squeeze", ["u"], ["b"], axes=[0])],
        [helper.make_opsetid("", 12), helper.make_opsetid("mine", 1)],
    )  # fmt: skip
    nodes = [node("Outer", ["x"], ["y"], domain="mine"), node("Outer", ["y"], ["z"], domain="mine")]
    proto = model(nodes, {"x": (F, [3, 4])}, ["z"], functions=[scale, outer], domains=["mine"])
    found = agrees(proto, tmp_path, {"x": X})
    assert names(found) == ["onnx_mul", "onnx_unsqueeze", "onnx_squeeze"] * 2


def test_an_operator_without_entry_is_its_function_body(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("Elu", "LayerNormalization", "CastLike"):
        monkeypatch.delitem(OP_OF, name)
    nodes = [node("Elu", ["x"], ["e"]), node("LayerNormalization", ["e", "g"], ["y"])]
    found = agrees(model(nodes, {"x": (F, ["n", 4])}, ["y"], {"g": X[1]}), tmp_path, {"x": X})
    assert "onnx_elu" not in names(found) and len(names(found)) > 6


# ---- older opsets --------------------------------------------------------------------------------

V = X.reshape(1, 3, 4)
OLD: dict[str, tuple[int, list[NodeProto]]] = {
    "squeeze": (11, [node("Squeeze", ["x"], ["y"], axes=[0])]),
    "unsqueeze": (11, [node("Unsqueeze", ["x"], ["y"], axes=[0, 4])]),
    "reduce mean": (13, [node("ReduceMean", ["x"], ["y"], axes=[1], keepdims=0)]),
    "reduce sum": (11, [node("ReduceSum", ["x"], ["y"], axes=[-1])]),
    "clip": (6, [node("Clip", ["x"], ["y"], min=0.2, max=1.0)]),
    "slice": (9, [node("Slice", ["x"], ["y"], starts=[1], ends=[3], axes=[2])]),
    "split": (11, [node("Split", ["x"], ["a", "y"], axis=2, split=[1, 3])]),
    "split evenly": (13, [node("Split", ["x"], ["a", "y"], axis=2)]),
    "pad": (10, [node("Pad", ["x"], ["y"], pads=[0, 1, 0, 0, 0, 2], value=0.5)]),
    "top k": (9, [node("TopK", ["x"], ["y", "i"], k=2)]),
    "dropout": (10, [node("Dropout", ["x"], ["y"], ratio=0.3)]),
    "selu": (6, [node("Selu", ["x"], ["y"])]),
}  # fmt: skip


@pytest.mark.parametrize("case", OLD, ids=str)
def test_older_opsets_mean_the_same(tmp_path: Path, case: str) -> None:
    opset, nodes = OLD[case]
    agrees(model(nodes, {"x": (F, [1, 3, 4])}, ["y"], opset=opset), tmp_path, {"x": V})


def test_softmax_before_13_is_over_all_axes_from_its_own(tmp_path: Path) -> None:
    """onnx's evaluator does not know this any more."""
    proto = model([node("Softmax", ["x"], ["y"], axis=1)], {"x": (F, [1, 3, 4])}, ["y"], opset=11)
    (found,) = run(imported(proto, tmp_path), {"x": V})
    np.testing.assert_allclose(found, np.exp(V) / np.exp(V).sum(), rtol=1e-6)


@pytest.mark.parametrize("opset", [1, 6, 7])
@pytest.mark.parametrize("shape", [(2, 3, 4), (2, 3, 3), (2, 3, 3, 3), (2, 3)], ids=str)
def test_prelu_before_7_has_a_slope_for_each_channel(
    tmp_path: Path, opset: int, shape: tuple[int, ...]
) -> None:
    """Its axis is 1; from opset 7 on a slope broadcasts as everything does."""
    slope = np.array([0.5, -1, 2], np.float32)
    x = np.random.default_rng(4).standard_normal(shape).astype(np.float32)
    if opset == 7:
        slope = slope.reshape(3, *(1,) * (len(shape) - 2))
    for free in (list(shape), [None] * len(shape)):
        proto = model(
            [node("PRelu", ["x", "s"], ["y"])], {"x": (F, free)}, ["y"], {"s": slope}, opset
        )
        columns = slope.reshape(3, *(1,) * (len(shape) - 2))
        (found,) = run(imported(proto, tmp_path), {"x": x})
        np.testing.assert_allclose(found, np.where(x < 0, x * columns, x), rtol=1e-6)


def test_prelu_before_7_as_the_evaluator_reads_it(tmp_path: Path) -> None:
    slope = {"s": np.array([0.5, -1, 2], np.float32)}
    proto = model([node("PRelu", ["x", "s"], ["y"])], {"x": (F, [1, 3, 4])}, ["y"], slope, 6)
    agrees(proto, tmp_path, {"x": V - 0.5})
    one = model([node("PRelu", ["x", "s"], ["y"])], {"x": (F, [1, 3, 4])}, ["y"],
                {"s": np.array([0.5], np.float32)}, 6)  # fmt: skip
    agrees(one, tmp_path, {"x": V - 0.5})


def test_upsample_and_resize_10_are_resize(tmp_path: Path) -> None:
    given = {"s": np.array([1, 1, 2, 3], np.float32)}
    x = np.arange(4, dtype=np.float32).reshape(1, 1, 2, 2)
    wanted = np.repeat(np.repeat(x, 2, 2), 3, 3)
    for kind, opset in (("Upsample", 9), ("Resize", 10)):
        proto = model(
            [node(kind, ["x", "s"], ["y"])], {"x": (F, [1, 1, 2, 2])}, ["y"], given, opset
        )
        found = imported(proto, tmp_path)
        np.testing.assert_array_equal(run(found, {"x": x})[0], wanted)


# ---- operators whose kernel does not take the types ----------------------------------------------


def test_a_body_stands_in_where_no_kernel_takes_the_types(tmp_path: Path) -> None:
    """Attention adds an integer mask; our kernel takes floats and bool."""
    rng = np.random.default_rng(5)
    feed: dict[str, Any] = {n: rng.standard_normal((1, 2, 3, 8), np.float32) for n in "qkv"}
    feed["m"] = rng.integers(-2, 2, (3, 3)).astype(np.int32)
    inputs: dict[str, tuple[int, Any]] = {n: (F, [1, 2, "t", 8]) for n in "qkv"}
    inputs["m"] = (TensorProto.INT32, ["t", "t"])
    proto = model([node("Attention", [*feed], ["y"])], inputs, ["y"])
    (tmp_path / "net.onnx").write_bytes(proto.SerializeToString())
    halfbyte.compile(tmp_path / "net.onnx", tmp_path / "net.hb")
    with halfbyte.load(tmp_path / "net.hb") as net:
        found = net.run(feed)["y"]
    np.testing.assert_allclose(found, run_model(proto, feed)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("other", [TensorProto.DOUBLE, TensorProto.FLOAT16])
def test_a_body_that_cannot_be_typed_either_does_not(tmp_path: Path, other: int) -> None:
    proto = model([node("Clip", ["x", "low"], ["y"])], {"x": (F, [3]), "low": (other, [])}, ["y"])
    (tmp_path / "net.onnx").write_bytes(proto.SerializeToString())
    with pytest.raises(halfbyte.ModelError, match="Clip|clip"):
        halfbyte.compile(tmp_path / "net.onnx", tmp_path / "net.hb")
