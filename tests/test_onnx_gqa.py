"""GroupQueryAttention beside onnxruntime: sequences of different lengths in one batch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

import halfbyte

ort = pytest.importorskip("onnxruntime")

HEADS, KV_HEADS, SIZE = 4, 2, 16
RNG = np.random.default_rng(9)


def network(window: int) -> ModelProto:
    angles = np.arange(32)[:, None] * (100.0 ** (-np.arange(SIZE // 2) / (SIZE // 2)))[None]
    stored = {"cos": np.cos(angles), "sin": np.sin(angles)}
    cache = ["b", KV_HEADS, "p", SIZE]
    inputs: dict[str, tuple[int, list[Any]]] = {
        "q": (TensorProto.FLOAT, ["b", "s", HEADS * SIZE]),
        "k": (TensorProto.FLOAT, ["b", "s", KV_HEADS * SIZE]),
        "v": (TensorProto.FLOAT, ["b", "s", KV_HEADS * SIZE]),
        "past_k": (TensorProto.FLOAT, cache),
        "past_v": (TensorProto.FLOAT, cache),
        "last": (TensorProto.INT32, ["b"]),
        "total": (TensorProto.INT32, []),
    }
    node = helper.make_node(
        "GroupQueryAttention", [*inputs, *stored], ["y", "keys", "values"], domain="com.microsoft",
        num_heads=HEADS, kv_num_heads=KV_HEADS, do_rotary=1, local_window_size=window,
    )  # fmt: skip
    graph = helper.make_graph(
        [node], "g",
        [helper.make_tensor_value_info(n, t, d) for n, (t, d) in inputs.items()],
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in node.output],
        [numpy_helper.from_array(a.astype(np.float32), n) for n, a in stored.items()],
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=9)


@pytest.fixture(scope="module", params=[-1, 2], ids=["all keys", "a window"])
def engines(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Any, Any]]:
    """onnxruntime and halfbyte."""
    folder, proto = tmp_path_factory.mktemp("gqa"), network(request.param)
    (folder / "net.onnx").write_bytes(proto.SerializeToString())
    halfbyte.compile(folder / "net.onnx", folder / "net.hb")
    with halfbyte.load(folder / "net.hb") as ours:
        yield ort.InferenceSession(proto.SerializeToString()), ours


CASES: dict[str, tuple[int, int, tuple[int, ...]]] = {
    "one sequence, two new rows": (2, 3, (5,)),
    "decoding, lengths differ": (1, 6, (4, 7)),
    "a buffer with room": (1, 12, (4, 7)),
    "a prompt, one row padded": (4, 0, (4, 2)),
    "decoding, lengths alike": (1, 5, (6, 6, 6)),
}
"""New rows, rows of the cache, and the lengths of the sequences with the new rows."""


@pytest.mark.parametrize("case", CASES, ids=str)
def test_each_sequence_has_its_own_length(engines: tuple[Any, Any], case: str) -> None:
    rows, past, lengths = CASES[case]
    batch, kv = len(lengths), KV_HEADS * SIZE
    shapes = {"q": (batch, rows, HEADS * SIZE), "k": (batch, rows, kv), "v": (batch, rows, kv),
              "past_k": (batch, KV_HEADS, past, SIZE),
              "past_v": (batch, KV_HEADS, past, SIZE)}  # fmt: skip
    feed: dict[str, Any] = {n: RNG.standard_normal(s, np.float32) for n, s in shapes.items()}
    feed["last"] = np.array(lengths, np.int32) - 1
    feed["total"] = np.array(max(lengths), np.int32)
    theirs, ours = engines
    wanted, found = theirs.run(None, feed), ours.run(feed)
    for expected, name in zip(wanted, ("y", "keys", "values"), strict=True):
        assert found[name].shape == expected.shape
        for b, length in enumerate(lengths):  # of what stands behind it neither says anything
            part = np.s_[b, : min(length, rows)] if name == "y" else np.s_[b, :, :length]
            np.testing.assert_allclose(found[name][part], expected[part], rtol=1e-4, atol=1e-5)
