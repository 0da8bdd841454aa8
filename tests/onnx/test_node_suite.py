"""onnx's own backend node cases on the cpu: a fast subset always, all of them by `make test-onnx`.

A case passes, or is refused by a ModelError while it is compiled; it is never silently wrong and
never fails otherwise. How many are refused, and why: docs/onnx.md.
"""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("onnx")

from tests.onnx.node_cases import PASSED, REFUSED, cases, run_case  # noqa: E402

FAST = (
    "test_add_bcast", "test_relu", "test_transpose_default", "test_reduce_sum_keepdims_example",
    "test_gather_0", "test_layer_normalization_2d_axis1", "test_softmax_axis_1", "test_matmul_2d",
    "test_conv_with_strides_padding", "test_cast_FLOAT_to_BFLOAT16", "test_if", "test_loop11",
    "test_lstm_defaults", "test_attention_4d", "test_slice_negative_axes", "test_concat_2d_axis_1",
    "test_scan9_sum",
)  # fmt: skip


@pytest.mark.parametrize("name", FAST)
def test_a_subset_passes(name: str, tmp_path: Path) -> None:
    outcome = run_case(name, tmp_path)
    assert outcome.kind == PASSED, outcome


@pytest.mark.onnx
@pytest.mark.parametrize("name", list(cases()))
def test_a_case_passes_or_is_refused(name: str, tmp_path: Path) -> None:
    outcome = run_case(name, tmp_path)
    assert outcome.kind in (PASSED, REFUSED), outcome
    if outcome.kind == REFUSED:
        pytest.skip(outcome.words)
