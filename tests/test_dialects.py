"""One normal form for every producer's quantised weight, and no weight with a part missing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from halfbyte.frontend.container import Checkpoint, open_checkpoint
from halfbyte.frontend.dialects import QuantizedWeight, check_finite, quantized_weight
from halfbyte.ir.errors import ModelError
from tests.checkpoint_files import (
    BF16,
    E4M3,
    HIDDEN,
    LINEARS,
    Q,
    Tensors,
    compressed_weights,
    dense_weights,
    llama_config,
    modelopt_weights,
    write_checkpoint,
)

Find = Callable[[Tensors], QuantizedWeight | None]
N, K = LINEARS["self_attn.q_proj"]


def opened(tmp_path: Path, tensors: Tensors) -> Checkpoint:
    return open_checkpoint(write_checkpoint(tmp_path / "m", tensors, llama_config()))


@pytest.fixture
def find(tmp_path: Path) -> Find:
    """The normal form of q_proj in a checkpoint of these tensors."""

    def look(tensors: Tensors) -> QuantizedWeight | None:
        checkpoint = opened(tmp_path, tensors)
        return quantized_weight(checkpoint, Q, frozenset(checkpoint.names()))

    return look


def fp8_weights(scale_shape: tuple[int, ...], suffix: str = "weight_scale") -> Tensors:
    tensors = dense_weights()
    tensors[f"{Q}.weight"] = tensors[f"{Q}.weight"].astype(E4M3)
    tensors[f"{Q}.{suffix}"] = np.full(scale_shape, 0.5, np.float32)
    return tensors


def test_modelopt(find: Find) -> None:
    names = [f"{Q}.{s}" for s in ("weight", "weight_scale", "weight_scale_2", "input_scale")]
    codes, sf, gs, inputs = names
    expected = QuantizedWeight(Q, "modelopt", "nvfp4", (N, K), codes, sf, gs, inputs)
    assert find(modelopt_weights()) == expected
    assert expected.tensors == tuple(names)


def test_compressed_tensors_globals_are_divisors(find: Find) -> None:
    suffixes = ("weight_packed", "weight_scale", "weight_global_scale", "input_global_scale")
    found = find(compressed_weights())
    assert found is not None and found.divisors and found.dialect == "compressed-tensors"
    assert found.tensors == tuple(f"{Q}.{s}" for s in suffixes)


def test_dense_weight_has_no_normal_form(find: Find) -> None:
    assert find(dense_weights()) is None


@pytest.mark.parametrize("shape", [(), (1,), (N,), (N, 1)])
def test_fp8_per_tensor_and_per_channel(find: Find, shape: tuple[int, ...]) -> None:
    found = find(fp8_weights(shape))
    assert found is not None and (found.kind, found.dialect) == ("fp8", "fp8")
    assert found.block_scale == f"{Q}.weight_scale"


def test_fp8_with_mistral_names(find: Find) -> None:
    found = find(fp8_weights((), "weight_scale_inv"))
    assert found is not None and found.dialect == "fp8-inv"


def test_block_scaled_fp8_is_refused_by_name(find: Find) -> None:
    with pytest.raises(ModelError, match="block-scaled FP8 is not supported"):
        find(fp8_weights((1, 1)))


@pytest.mark.parametrize("shape", [(), (1,)])
@pytest.mark.parametrize("dtype", [np.dtype(np.float32), BF16, np.dtype(np.float16)])
def test_scalar_scales_of_either_shape_and_dtype(
    find: Find, shape: tuple[int, ...], dtype: np.dtype[np.float32]
) -> None:
    tensors = modelopt_weights()
    tensors[f"{Q}.weight_scale_2"] = np.full(shape, 0.015625, dtype)
    assert find(tensors) is not None


@pytest.mark.parametrize("suffix", ["weight_scale", "weight_scale_2"])
def test_missing_scale_fails_modelopt(find: Find, suffix: str) -> None:
    tensors = modelopt_weights()
    del tensors[f"{Q}.{suffix}"]
    with pytest.raises(ModelError, match=rf"q_proj\.{suffix}': missing"):
        find(tensors)


@pytest.mark.parametrize("suffix", ["weight_scale", "weight_global_scale"])
def test_missing_scale_fails_compressed_tensors(find: Find, suffix: str) -> None:
    tensors = compressed_weights()
    del tensors[f"{Q}.{suffix}"]
    with pytest.raises(ModelError, match=rf"q_proj\.{suffix}': missing"):
        find(tensors)


@pytest.mark.parametrize("suffix", ["weight_scale_2", "input_scale"])
@pytest.mark.parametrize("value", [0.0, -1.0, np.nan, np.inf, 1e-45])
def test_scalar_scales_are_finite_and_positive(find: Find, suffix: str, value: float) -> None:
    tensors = modelopt_weights()
    tensors[f"{Q}.{suffix}"] = np.array(value, np.float32)
    with pytest.raises(ModelError, match=rf"q_proj\.{suffix}': expected finite scales above 0"):
        find(tensors)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.zeros(2, np.float32), r"expected one number \(\[\] or \[1\]\), found shape \[2\]"),
        (np.array(1, np.int32), "expected f32, bf16 or f16, found i32"),
    ],
)
def test_a_global_scale_is_one_float(find: Find, value: np.ndarray, message: str) -> None:
    tensors = modelopt_weights()
    tensors[f"{Q}.weight_scale_2"] = value
    with pytest.raises(ModelError, match=message):
        find(tensors)


@pytest.mark.parametrize(("byte", "what"), [(0x7F, "NaN"), (0xFF, "NaN"), (0x81, "negative")])
def test_block_scales_are_numbers(find: Find, byte: int, what: str) -> None:
    tensors = modelopt_weights()
    scales = tensors[f"{Q}.weight_scale"].view(np.uint8).copy()
    scales[3, 1] = byte
    tensors[f"{Q}.weight_scale"] = scales.view(E4M3)
    with pytest.raises(ModelError, match=rf"block scale \[3, 1\] is .*{what}"):
        find(tensors)


def test_zero_blocks_of_both_producers_are_fine(find: Find) -> None:
    """compressed-tensors stores 0x20 (0.125) for one, ModelOpt 1.0; a zero byte is legal."""
    tensors = modelopt_weights()
    scales = tensors[f"{Q}.weight_scale"].view(np.uint8).copy()
    scales[0, :2], scales[1, 0] = (0x20, 0x38), 0
    tensors[f"{Q}.weight_scale"] = scales.view(E4M3)
    assert find(tensors) is not None


@pytest.mark.parametrize(
    ("suffix", "value"),
    [
        ("weight_scale", np.zeros((N, K // 16 + 1), E4M3)),
        ("weight_scale", np.zeros((N, K // 16), np.float32)),
        ("weight_scale", np.zeros((N, K // 32), np.uint8)),
        ("weight", np.zeros((N, K // 2, 1), np.uint8)),
        ("weight", np.zeros((N, K // 2 + 1), np.uint8)),
    ],
)
def test_shapes_and_dtypes_belong_together(find: Find, suffix: str, value: np.ndarray) -> None:
    tensors = modelopt_weights()
    tensors[f"{Q}.{suffix}"] = value
    with pytest.raises(ModelError, match="expected"):
        find(tensors)


@pytest.mark.parametrize("suffix", ["weight_scale", "weight_global_scale", "input_scale"])
def test_scales_beside_a_dense_weight_are_orphans(find: Find, suffix: str) -> None:
    tensors = dense_weights()
    tensors[f"{Q}.{suffix}"] = np.ones(1, np.float32)
    with pytest.raises(ModelError, match="a scale without a quantised weight"):
        find(tensors)


def test_other_formats_are_refused_by_name(find: Find) -> None:
    tensors = modelopt_weights()
    tensors[f"{Q}.pre_quant_scale"] = np.ones(HIDDEN, BF16)
    with pytest.raises(ModelError, match="AWQ pre-quantisation scales are not supported"):
        find(tensors)
    packed = dense_weights()
    packed[f"{Q}.weight_packed"] = np.zeros((N, K // 8), np.int32)
    with pytest.raises(ModelError, match="expected u8 NVFP4 codes, found i32"):
        find(packed)


@pytest.mark.parametrize("dtype", [np.dtype(np.float32), np.dtype(np.float16), BF16, E4M3])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_dense_weights_are_finite(
    tmp_path: Path, dtype: np.dtype[np.float32], value: float
) -> None:
    if dtype == E4M3 and np.isinf(value):
        pytest.skip("e4m3fn has no infinity")
    good = np.linspace(-2, 2, 64).astype(dtype).reshape(8, 8)
    bad = good.copy()
    bad[4, 4] = value
    checkpoint = opened(tmp_path, {"good": good, "bad": bad})
    check_finite(checkpoint.info("good"), checkpoint.read("good"))
    with pytest.raises(ModelError, match="element 36 is not finite"):
        check_finite(checkpoint.info("bad"), checkpoint.read("bad"))
