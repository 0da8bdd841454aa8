"""Kernels of CUDA targets on an emulated device: a subset of the node cases always, all of them by
`pytest -m emulated tests/onnx`, which takes half an hour."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import halfbyte

pytest.importorskip("onnx")

from onnx import TensorProto, helper  # noqa: E402

from halfbyte.runtime.net import Net  # noqa: E402
from tests.emulated_cuda import emulate  # noqa: E402
from tests.onnx.node_cases import PASSED, REFUSED, cases, run_case  # noqa: E402

pytestmark = pytest.mark.slow
TARGET, DEVICE = "sm_90a", "cuda:0"
FAST = (
    "test_add_bcast", "test_gelu_default_1", "test_transpose_all_permutations_5",
    "test_reduce_log_sum_exp_keepdims_random", "test_scatternd_add", "test_cumsum_2d_axis_1",
    "test_layer_normalization_4d_axis1", "test_softmax_axis_1", "test_nonzero_example",
    "test_top_k", "test_dequantizelinear_blocked", "test_slice_neg_steps",
)  # fmt: skip

_TENSOR_CORES = "a large product of bf16, by dense_gemm.cu: its PTX has no emulation"
OF_THE_HOST = {
    "test_attention_4d_padded_kv_bf16": "e^x of the host's libm: one rounding of bf16",
    "test_attention_3d_causal_bf16_expanded": _TENSOR_CORES,
    "test_attention_4d_attn_mask_causal_bf16_expanded": _TENSOR_CORES,
    "test_attention_4d_causal_bf16_expanded": _TENSOR_CORES,
    "test_attention_4d_causal_padded_kv_bf16_expanded": _TENSOR_CORES,
    "test_attention_4d_padded_kv_bf16_expanded": _TENSOR_CORES,
}
"""Cases that pass on a device."""


@pytest.fixture(autouse=True)
def emulated(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    emulate(monkeypatch, tmp_path)


@pytest.mark.parametrize("name", FAST)
def test_a_subset_passes(name: str, tmp_path: Path) -> None:
    outcome = run_case(name, tmp_path, TARGET, DEVICE)
    assert outcome.kind == PASSED, outcome


def test_an_index_out_of_range_fails_the_run(tmp_path: Path) -> None:
    node = helper.make_node("Gather", ["x", "i"], ["y"], "look_up")
    ports = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, [3, 4]),
        helper.make_tensor_value_info("i", TensorProto.INT64, [2]),
        helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, 4]),
    ]
    graph = helper.make_graph([node], "g", ports[:2], ports[2:])
    file, out = tmp_path / "net.onnx", tmp_path / "net.hb"
    file.write_bytes(helper.make_model(graph).SerializeToString())
    halfbyte.compile(file, out, target=TARGET)
    x = np.arange(12, dtype=np.float32).reshape(3, 4)
    with halfbyte.load(out, DEVICE) as net:
        assert isinstance(net, Net)
        for wrong in (3, -4, 2**40, -(2**63)):
            with pytest.raises(halfbyte.ModelError, match=r"look_up \(Gather\).*out of range"):
                net.run({"x": x, "i": np.array([0, wrong])})
        found = net.run({"x": x, "i": np.array([-1, 0])})
    assert np.array_equal(found["y"], x[[2, 0]])


@pytest.mark.emulated
@pytest.mark.parametrize("name", list(cases()))
def test_a_case_passes_or_is_refused(name: str, tmp_path: Path) -> None:
    if name in OF_THE_HOST:
        pytest.skip(OF_THE_HOST[name])
    outcome = run_case(name, tmp_path, TARGET, DEVICE)
    assert outcome.kind in (PASSED, REFUSED), outcome
    if outcome.kind == REFUSED:
        pytest.skip(outcome.words)
