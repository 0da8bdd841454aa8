"""NVFP4 in ONNX, as ModelOpt's exporter writes it, becomes an nvfp4 value in phase 10."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from onnx import NodeProto, TensorProto, helper, numpy_helper

from halfbyte.frontend.onnx_evaluator import run_model
from halfbyte.frontend.onnx_importer import OnnxImported
from halfbyte.ir.errors import ModelError
from halfbyte.ir.target import target
from halfbyte.ir.types import Nvfp4
from halfbyte.passes import p10_promote_nvfp4
from halfbyte.passes.context import Context
from tests.onnx_files import imported, model, names, node, with_every_operator
from tests.onnx_meaning import run

F, F16, BF16 = TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16
N, K = 48, 64
RNG = np.random.default_rng(3)


@pytest.fixture(autouse=True)
def every_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    with_every_operator(monkeypatch)


def normal(*shape: int) -> Any:
    return RNG.standard_normal(shape).astype(np.float32)


def weight(name: str, second: Any) -> dict[str, TensorProto]:
    """The three initialisers of a weight [N, K]."""
    codes = RNG.integers(0, 16, (N, K), np.uint8).reshape(-1)
    packed = codes[::2] | codes[1::2] << 4
    scales = np.abs(normal(N, K // 16) * 50).astype(ml_dtypes.float8_e4m3fn)
    return {
        f"{name}_f4": helper.make_tensor(
            f"{name}_f4", TensorProto.FLOAT4E2M1, [N, K], packed.tobytes(), raw=True
        ),
        f"{name}_f8_scale": helper.make_tensor(
            f"{name}_f8_scale", TensorProto.FLOAT8E4M3FN, [N, K // 16], scales.tobytes(), raw=True
        ),
        f"{name}_f8_scale_f32_scale": numpy_helper.from_array(second, f"{name}_f8_scale_f32_scale"),
    }


def dequantised(name: str) -> list[NodeProto]:
    """The two nodes that the exporter puts in place of the quantiser."""
    scale = f"{name}_f32_scale"
    return [
        node("DequantizeLinear", [f"{name}_f8_scale", f"{name}_f8_scale_f32_scale"], [scale]),
        node("DequantizeLinear", [f"{name}_f4", scale], [f"{name}_dq"], axis=-1, block_size=16),
    ]


def promoted(found: OnnxImported, recipe: str = "auto") -> list[str]:
    context = Context(target("cpu"), (), found.weights, recipe=recipe)
    graph = p10_promote_nvfp4.run(found.graphs[0], context).graph
    p10_promote_nvfp4.ensures(graph, context)
    linear = next(op for op in graph.ops if op.name == "linear")
    assert isinstance(linear.args[1].type.enc, Nvfp4)
    return [op.name for op in graph.ops if op.name != "weight"]


SECOND = {
    "f32 [1]": np.array([0.003], np.float32), "f32 []": np.array(0.003, np.float32),
    "f16": np.array([0.003], np.float16), "bf16": np.array([0.003], ml_dtypes.bfloat16),
}  # fmt: skip


@pytest.mark.parametrize("second", SECOND, ids=str)
def test_a_weight_is_promoted_and_means_the_same(tmp_path: Path, second: str) -> None:
    given = weight("W", SECOND[second])
    nodes = [*dequantised("W"), node("Transpose", ["W_dq"], ["t"], perm=[1, 0])]
    kind = given["W_f8_scale_f32_scale"].data_type
    if kind != F:  # fold_dq_fp32_to_fp16_casts retypes the chain; the product is then half too
        nodes.insert(2, node("Cast", ["W_dq"], ["W_dq32"], to=F))
        nodes[-1].input[0] = "W_dq32"
    nodes.append(node("MatMul", ["x", "t"], ["y"]))
    proto = model(nodes, {"x": (F, ["b", "s", K])}, ["y"], given, opset=23)
    for tensor in given.values():  # the exporter also lists them as inputs
        proto.graph.input.append(
            helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
        )
    x = normal(2, 3, K)
    found = imported(proto, tmp_path)
    assert [p.name for p in found.inputs] == ["x"]
    (y,) = run(found, {"x": x})
    (wanted,) = run_model(proto, {"x": x})
    tolerance = {"f16": 2e-3, "bf16": 2e-2}.get(second, 1e-6)
    np.testing.assert_allclose(y, wanted, rtol=tolerance, atol=tolerance * 50)
    assert names(found) == ["dequantize", "linear"]
    assert promoted(found) == ["pack_nvfp4", "linear"]
    assert found.weights("W_f4.packed").base is not None, "a view of the file"


def test_a_gemm_with_bias_reads_it_transposed(tmp_path: Path) -> None:
    nodes = [*dequantised("W"), node("Gemm", ["x", "W_dq", "b"], ["y"], transB=1)]
    given: dict[str, Any] = {**weight("W", SECOND["f32 []"]), "b": normal(N)}
    proto = model(nodes, {"x": (F, ["b", K])}, ["y"], given, opset=23)
    found, x = imported(proto, tmp_path), normal(3, K)
    np.testing.assert_allclose(
        run(found, {"x": x})[0], run_model(proto, {"x": x})[0], rtol=1e-4, atol=1e-4
    )
    assert names(found) == ["dequantize", "linear"]
    assert len(found.graphs[0].ops[-1].args) == 3
    assert promoted(found) == ["pack_nvfp4", "linear"]


@pytest.mark.parametrize("half", [F16, BF16])
def test_casts_around_the_product_go(tmp_path: Path, half: int) -> None:
    """As in every export of an f32 model: the inputs of the MatMul are cast, its result is not."""
    nodes = [
        *dequantised("W"),
        node("Cast", ["x"], ["x_h"], to=half),
        node("Cast", ["W_dq"], ["w_h"], to=half),
        node("Transpose", ["w_h"], ["t"], perm=[1, 0]),
        node("MatMul", ["x_h", "t"], ["m"]),
        node("Cast", ["m"], ["y"], to=F),
    ]
    proto = model(nodes, {"x": (F, ["b", K])}, ["y"], weight("W", SECOND["f32 []"]), opset=23)
    found, x = imported(proto, tmp_path), normal(3, K)
    assert names(found) == ["dequantize", "linear", "onnx_cast", "onnx_cast"]
    (y,), (wanted,) = run(found, {"x": x}), run_model(proto, {"x": x})
    np.testing.assert_allclose(y, wanted, rtol=2e-2, atol=0.2 if half == BF16 else 0.02)
    assert "pack_nvfp4" in promoted(found)


# ---- activations ---------------------------------------------------------------------------------


def quantised(x: str, scale: str, again: str) -> list[NodeProto]:
    return [
        node(
            "TRT_FP4DynamicQuantize",
            [x, scale],
            ["x_f4", "sx_f8"],
            domain="trt",
            axis=-1,
            block_size=16,
            scale_type=TensorProto.FLOAT8E4M3FN,
        ),
        node("DequantizeLinear", ["sx_f8", again], ["dq_scale"]),
        node("DequantizeLinear", ["x_f4", "dq_scale"], ["xq"], axis=-1, block_size=16),
    ]


def fake_quantised(x: Any, s: float) -> Any:
    """ModelOpt's dynamic quantiser in numpy, by ml_dtypes' rounding."""
    blocks = x.reshape(-1, 16)
    amax = np.abs(blocks).max(-1, keepdims=True)
    scale = (amax / 6 / np.float32(s)).astype(ml_dtypes.float8_e4m3fn).astype(
        np.float32
    ) * np.float32(s)
    codes = (blocks / scale).astype(ml_dtypes.float4_e2m1fn).astype(np.float32)
    return (codes * scale).reshape(x.shape)


@pytest.mark.parametrize("half", [0, F16])
def test_dynamic_activations_are_w4a4(tmp_path: Path, half: int) -> None:
    nodes = [*quantised("x", "s", "s2"), *dequantised("W")]
    left, right = "xq", "W_dq"
    if half:
        nodes += [node("Cast", ["xq"], ["xh"], to=half), node("Cast", ["W_dq"], ["wh"], to=half)]
        left, right = "xh", "wh"
    nodes += [node("Transpose", [right], ["t"], perm=[1, 0]), node("MatMul", [left, "t"], ["m"]),
              node("Cast", ["m"], ["y"], to=F)]  # fmt: skip
    s = 0.002
    given: dict[str, Any] = {
        **weight("W", SECOND["f32 []"]),
        "s": np.float32(s),
        "s2": np.float32(s),
    }
    proto = model(nodes, {"x": (F, ["b", "t", K])}, ["y"], given, opset=23, domains=["trt"])
    found, x = imported(proto, tmp_path), normal(2, 3, K)
    assert [n for n in names(found) if n != "onnx_cast"] == [
        "quantize_dequantize",
        "dequantize",
        "linear",
    ]
    w = run_model(
        model([*dequantised("W"), node("Identity", ["W_dq"], ["y"])], {}, ["y"], given, opset=23),
        {},
    )
    wanted = fake_quantised(x, s) @ np.asarray(w[0]).T  # pyright: ignore[reportUnknownMemberType]
    np.testing.assert_allclose(run(found, {"x": x})[0], wanted, rtol=1e-3, atol=2e-3)
    assert "quantize_nvfp4" in promoted(found, "w4a4")
    assert "quantize_nvfp4" not in promoted(found, "w4a16")


def test_activations_read_back_by_another_scale_are_refused(tmp_path: Path) -> None:
    nodes = [*quantised("x", "s", "s2"), node("Relu", ["xq"], ["y"])]
    given = {"s": np.float32(0.002), "s2": np.float32(0.003)}
    proto = model(nodes, {"x": (F, [2, K])}, ["y"], given, opset=23, domains=["trt"])
    with pytest.raises(ModelError, match="quantised by 0.002.* and read back by 0.003"):
        imported(proto, tmp_path)


# ---- near misses ---------------------------------------------------------------------------------


def test_a_weight_that_is_not_transposed_stays_and_says_why(tmp_path: Path) -> None:
    nodes = [*dequantised("W"), node("MatMul", ["x", "W_dq"], ["y"])]
    proto = model(nodes, {"x": (F, ["b", N])}, ["y"], weight("W", SECOND["f32 []"]), opset=23)
    found, x = imported(proto, tmp_path), normal(3, N)
    missed = [e.detail for e in found.log if e.rule == "nvfp4 weight" and not e.fired]
    assert missed == ["its weight is not transposed: blocks must lie along the inputs"]
    np.testing.assert_allclose(
        run(found, {"x": x})[0], run_model(proto, {"x": x})[0], rtol=1e-4, atol=1e-4
    )


def test_two_products_share_one_weight(tmp_path: Path) -> None:
    nodes = [
        *dequantised("W"),
        node("Transpose", ["W_dq"], ["t"], perm=[1, 0]),
        node("MatMul", ["x", "t"], ["a"]),
        node("MatMul", ["z", "t"], ["b"]),
        node("Add", ["a", "b"], ["y"]),
    ]
    inputs: dict[str, tuple[int, Any]] = {"x": (F, [2, K]), "z": (F, [2, K])}
    found = imported(model(nodes, inputs, ["y"], weight("W", SECOND["f32 []"]), opset=23), tmp_path)
    sources = {op.get("source", "") for op in found.graphs[0].ops if op.name == "weight"}
    assert sources == {"W_f4.packed", "W_f8_scale", "W_f8_scale_f32_scale.f32"}
