"""The benchmark scripts: random checkpoints as promised, and the arithmetic of the comparison."""

from __future__ import annotations

import json
import math
from pathlib import Path

import gguf
import ml_dtypes
import numpy as np
import pytest
from gguf.quants import dequantize

from benchmarks import compare_llama, make_checkpoint
from benchmarks.make_checkpoint import BLOCKS, SHAPES, Recipe, gguf_blocks
from halfbyte.frontend import import_model, open_checkpoint

KINDS = gguf.GGMLQuantizationType


@pytest.mark.parametrize("kind", sorted(BLOCKS))
def test_random_blocks_have_the_size_of_weights(kind: str) -> None:
    """Finite, and as large as trained weights, by the reading of the gguf package."""
    blocks = gguf_blocks(kind, 64, 2048, np.random.default_rng(0))
    weights = dequantize(blocks, KINDS[kind.upper()])
    assert weights.shape == (64, 2048) and np.isfinite(weights).all()
    assert 0.7 < weights.std() * math.sqrt(2048) < 1.4


def test_random_nvfp4_has_the_size_of_weights(tmp_path: Path) -> None:
    recipe = Recipe(w4a4=True)
    make_checkpoint.write_checkpoint(tmp_path, SHAPES["tiny"], recipe, limit=10**9, seed=0)
    blob = (tmp_path / "model.safetensors").read_bytes()
    end = 8 + int.from_bytes(blob[:8], "little")
    header = json.loads(blob[8:end])

    def part(name: str, dtype: type) -> np.ndarray:
        start, stop = header[name]["data_offsets"]
        return np.frombuffer(blob[end + start : end + stop], dtype).astype(np.float32)

    weight = "model.layers.1.mlp.down_proj.weight"
    scale = part(f"{weight}_scale", ml_dtypes.float8_e4m3fn) * part(f"{weight}_scale_2", np.float32)
    rms = math.sqrt(float(np.mean(scale**2))) * make_checkpoint.E2M1_RMS
    assert 0.9 < rms * math.sqrt(SHAPES["tiny"].ff) < 1.1
    table = part("model.embed_tokens.weight", ml_dtypes.bfloat16)
    assert np.isfinite(table).all() and 0.5 < table.std() * math.sqrt(128) < 2


@pytest.mark.parametrize("limit", [10**9, 200_000])
def test_importer_takes_the_checkpoint_whole(tmp_path: Path, limit: int) -> None:
    recipe = Recipe(w4a4=False, fp8_cache=True)
    make_checkpoint.write_checkpoint(tmp_path, SHAPES["tiny"], recipe, limit=limit, seed=0)
    assert (tmp_path / "model.safetensors.index.json").exists() == (limit < 10**9)
    assert import_model(open_checkpoint(tmp_path), context=64).graph.ops


def test_gguf_reads_back_as_asked(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    make_checkpoint.write_gguf(path, SHAPES["tiny"], "q4_0", "q8_0", seed=0)
    names = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    assert names["blk.1.ffn_down.weight"].tensor_type == KINDS.Q4_0
    assert names["token_embd.weight"].tensor_type == KINDS.Q8_0
    assert list(names["blk.0.attn_k.weight"].shape) == [128, 64]


def test_the_named_shape_is_as_large_as_its_name() -> None:
    shape = SHAPES["0.87b"]
    count = sum(n * k for _, _, n, k in shape.linears()) * shape.layers + shape.vocab * shape.hidden
    assert round(count / 1e9, 2) == 0.87 and shape.tied


def test_both_engines_json_is_read_alike() -> None:
    llama = [
        {"n_prompt": 512, "n_gen": 0, "samples_ts": [1.0, 9.0, 3.0]},
        {"n_prompt": 0, "n_gen": 128, "samples_ts": [5.0]},
    ]
    ours = [
        {"test": "pp512", "samples": [6.0]},
        {"test": "tg128", "samples": [4.0, 20.0, 15.0]},
    ]
    theirs = compare_llama.speeds(json.dumps(llama))
    assert theirs == {"pp512": 3.0, "tg128": 5.0}
    pair = compare_llama.Pair("tiny", Path("a.hb"), Path("a.gguf"))
    for run in range(1, 4):  # both twice and three times as fast: the machine, not the engine
        pair.theirs.append({test: run * speed for test, speed in theirs.items()})
        pair.ours.append(
            {test: run * speed for test, speed in compare_llama.speeds(json.dumps(ours)).items()}
        )
    assert pair.tests() == ["pp512", "tg128"]
    assert pair.row("pp512") == (6.0, 12.0, 2.0)
    assert pair.row("tg128") == (10.0, 30.0, 3.0)
