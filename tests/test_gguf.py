"""GGUF files: block types, Hugging Face's names and config, q/k rows, NVFP4, hostile headers."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf as gguf_package
import numpy as np
import pytest
from numpy.typing import NDArray

from halfbyte.frontend import import_model, open_checkpoint
from halfbyte.frontend.gguf import GgufCheckpoint
from halfbyte.frontend.gguf_config import hf_name
from halfbyte.ir.errors import ModelError
from halfbyte.ir.interp import run
from halfbyte.ir.types import GGUF_BLOCKS
from halfbyte.ir.verify import verify
from tests.checkpoint_files import (
    E4M3,
    HEAD_DIM,
    HEADS,
    HIDDEN,
    INNER,
    KV_HEADS,
    Field,
    Tensors,
    dense_weights,
    gguf_bytes,
    gguf_nvfp4,
    gguf_permute,
    linears,
    llama_config,
    nvfp4_parts,
    write_checkpoint,
)

F32 = NDArray[np.float32]
GgufTensors = dict[str, tuple[str, tuple[int, ...], bytes]]
NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "q_proj": "attn_q",
    "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output", "gate_proj": "ffn_gate",
    "up_proj": "ffn_up", "down_proj": "ffn_down",
}  # fmt: skip
IDS = np.array([3, 1, 4, 1, 5], np.int32)


def fields(**changes: Field) -> dict[str, Field]:
    """Metadata of the tiny Llama; keys of `changes` use __ for dots."""
    base: dict[str, Field] = {
        "general.architecture": "llama", "llama.block_count": 1, "llama.embedding_length": HIDDEN,
        "llama.feed_forward_length": INNER, "llama.attention.head_count": HEADS,
        "llama.attention.head_count_kv": KV_HEADS, "llama.context_length": 64,
        "llama.attention.layer_norm_rms_epsilon": 1e-5, "llama.rope.freq_base": 10000.0,
        "llama.rope.dimension_count": HEAD_DIM, "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.eot_token_id": 3,
    }  # fmt: skip
    return {**base, **{key.replace("__", "."): value for key, value in changes.items()}}


def gguf_name(name: str) -> str:
    module, _, suffix = name.rpartition(".")
    if module in NAMES:
        return f"{NAMES[module]}.{suffix}"
    layer, stem = module.split(".")[2], module.split(".")[-1]
    return f"blk.{layer}.{NAMES[stem]}.{suffix}"


def converted(
    tensors: Tensors, kind: str, heads: tuple[int, int] = (HEADS, KV_HEADS)
) -> GgufTensors:
    """A Hugging Face checkpoint as llama.cpp's converter writes it, matrices as `kind`."""
    out: GgufTensors = {}
    for name, value in tensors.items():
        w = value.astype(np.float32)
        if "q_proj" in name or "k_proj" in name:
            w = gguf_permute(w, heads[0] if "q_proj" in name else heads[1])
        if kind == "f32" or w.ndim == 1:
            out[gguf_name(name)] = ("f32", w.shape, w.tobytes())
        else:
            qtype = gguf_package.GGMLQuantizationType[kind.upper()]
            out[gguf_name(name)] = (kind, w.shape, gguf_package.quantize(w, qtype).tobytes())
    return out


def write(path: Path, metadata: Mapping[str, Field], tensors: GgufTensors) -> Path:
    path.write_bytes(gguf_bytes(metadata, tensors))
    return path


def logits(path: Path, ids: NDArray[np.int32] = IDS) -> F32:
    model = import_model(open_checkpoint(path), context=64)
    verify(model.graph)
    rows = np.arange(len(ids), dtype=np.int32)
    args = {"ids": ids, "pos": np.array(0, np.int32), "rows": rows}
    found = run(model.graph, args, model.weights)[0]
    assert not isinstance(found, dict)
    return found


@pytest.fixture
def safetensors_logits(tmp_path: Path) -> F32:
    folder = write_checkpoint(tmp_path / "hf", dense_weights(), llama_config())
    return logits(folder)


def test_f32_gguf_is_the_same_model(tmp_path: Path, safetensors_logits: F32) -> None:
    """Names, config and the q/k row order, all at once: one slip and the logits are others."""
    path = write(tmp_path / "m.gguf", fields(), converted(dense_weights(), "f32"))
    np.testing.assert_allclose(logits(path), safetensors_logits, atol=1e-6)


@pytest.mark.parametrize("kind", ["bf16", "f16", "q8_0", "q4_1", "q4_0"])
def test_quantised_types_are_the_model_of_their_values(tmp_path: Path, kind: str) -> None:
    """Against SafeTensors that hold what the gguf package says the blocks mean."""
    qtype = gguf_package.GGMLQuantizationType[kind.upper()]

    def rounded(w: NDArray[Any]) -> F32:
        w = w.astype(np.float32)
        return w if w.ndim == 1 else gguf_package.dequantize(gguf_package.quantize(w, qtype), qtype)

    values: Tensors = {name: rounded(w) for name, w in dense_weights().items()}
    folder = write_checkpoint(tmp_path / "hf", values, llama_config())
    path = write(tmp_path / "m.gguf", fields(), converted(dense_weights(), kind))
    np.testing.assert_allclose(logits(path), logits(folder), atol=1e-5)


@pytest.mark.parametrize("kind", sorted(GGUF_BLOCKS))
def test_blocks_are_handed_on_as_stored(tmp_path: Path, kind: str) -> None:
    elements, nbytes = GGUF_BLOCKS[kind]
    data = np.random.default_rng(0).integers(0, 127, (3, 2 * nbytes)).astype(np.uint8)
    tensors: GgufTensors = {"x": (kind, (3, 2 * elements), data.tobytes())}
    checkpoint = GgufCheckpoint(write(tmp_path / "m.gguf", fields(), tensors))
    assert checkpoint.info("x").dtype == kind and checkpoint.info("x").shape == (3, 2 * elements)
    np.testing.assert_array_equal(checkpoint.read("x"), data)


def test_config_speaks_hugging_face(tmp_path: Path) -> None:
    config = open_checkpoint(
        write(tmp_path / "m.gguf", fields(), converted(dense_weights(), "f32"))
    ).config
    expected = llama_config(eos_token_id=[2, 3])
    for key in ("architectures", "model_type", "hidden_size", "intermediate_size", "head_dim",
                "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size",
                "tie_word_embeddings", "max_position_embeddings", "eos_token_id"):  # fmt: skip
        assert config[key] == expected[key], key


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("blk.3.attn_q.weight", "model.layers.3.self_attn.q_proj.weight"),
        ("blk.11.attn_k_norm.weight", "model.layers.11.self_attn.k_norm.weight"),
        ("blk.0.attn_v.bias", "model.layers.0.self_attn.v_proj.bias"),
        ("blk.0.ffn_down.scale", "model.layers.0.mlp.down_proj.scale"),
        ("output.weight", "lm_head.weight"),
        ("blk.0.ffn_gate_exps.weight", "blk.0.ffn_gate_exps.weight"),
        ("rope_freqs.weight", "rope_freqs.weight"),
    ],
)
def test_names(name: str, expected: str) -> None:
    assert hf_name(name) == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"general__architecture": "gemma3"}, "unknown architecture 'gemma3'"),
        ({"llama__expert_count": 8}, "unknown architecture 'llama with experts'"),
        ({"llama__attention__head_count": "two"}, "expected a whole number"),
        ({"llama__attention__head_count_kv": [1, 2]}, "differs between layers"),
        ({"llama__rope__scaling__type": "longrope"}, "rope type 'longrope'"),
        ({"llama__rope__dimension_count": 8}, "partial_rotary_factor: expected 1"),
        ({"general__architecture": ["llama"]}, "is an array, expected one value"),
    ],
)
def test_models_that_cannot_be_imported_are_named(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    path = write(tmp_path / "m.gguf", fields(**changes), converted(dense_weights(), "f32"))
    with pytest.raises(ModelError, match=message):
        import_model(open_checkpoint(path), context=8)


def test_sliding_window_and_rope_scaling_come_from_metadata(tmp_path: Path) -> None:
    metadata = fields(llama__attention__sliding_window=7, llama__rope__scaling__type="linear",
                      llama__rope__scaling__factor=2.0)  # fmt: skip
    model = import_model(
        open_checkpoint(write(tmp_path / "m.gguf", metadata, converted(dense_weights(), "f32"))),
        context=8,
    )
    assert model.config.windows == (7,) and model.config.model_type == "mistral"
    assert model.weights("rope.inv_freq")[0] == 0.5


def test_rope_factors_divide_the_frequencies(tmp_path: Path) -> None:
    factors = np.arange(1, HEAD_DIM // 2 + 1, dtype=np.float32)
    tensors = converted(dense_weights(), "f32")
    plain = import_model(open_checkpoint(write(tmp_path / "a.gguf", fields(), tensors)), context=8)
    tensors["rope_freqs.weight"] = ("f32", factors.shape, factors.tobytes())
    model = import_model(open_checkpoint(write(tmp_path / "b.gguf", fields(), tensors)), context=8)
    expected = plain.weights("rope.inv_freq") / factors
    np.testing.assert_array_equal(model.weights("rope.inv_freq"), expected)
    assert "rope_freqs.weight" in model.excused


def test_quantised_embedding_serves_the_tied_head(tmp_path: Path) -> None:
    tensors = converted(dense_weights(), "q8_0")
    del tensors["output.weight"]
    model = import_model(open_checkpoint(write(tmp_path / "m.gguf", fields(), tensors)), context=8)
    assert model.config.tied
    embed = next(op for op in model.graph.ops if op.name == "embed")
    assert model.graph.ops[-1].args[1] is embed.args[1]


# ---- NVFP4 blocks -------------------------------------------------------------------------------


def nvfp4_gguf(folder: Path, *, inputs: bool) -> tuple[dict[str, Field], GgufTensors]:
    """The llama_tied checkpoint; rows that blocks of 64 do not divide (K = 96) as f32."""
    checkpoint = open_checkpoint(folder)
    tensors: Tensors = {}
    out: GgufTensors = {}
    for name in checkpoint.names():
        if not name.endswith((".weight", ".bias")):
            continue
        info = checkpoint.info(name)
        if info.dtype != "u8":
            tensors[name] = checkpoint.read(name)
            continue
        module = name.removesuffix(".weight")
        packed, sf, gs = (checkpoint.read(f"{module}.{s}")
                          for s in ("weight", "weight_scale", "weight_scale_2"))  # fmt: skip
        at = gguf_name(name).removesuffix(".weight")
        n, half = packed.shape
        if half * 2 % 64:
            codes = np.stack([packed & 15, packed >> 4], -1).reshape(n, half * 2)
            values = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)[codes & 7]
            signed = np.where(codes & 8, -values, values)
            scale = np.repeat(sf.astype(np.float32), 16, 1) * gs
            tensors[name] = signed * scale
            continue
        out[f"{at}.weight"] = ("nvfp4", (n, half * 2), gguf_nvfp4(packed, sf))
        out[f"{at}.scale"] = ("f32", (1,), np.float32(gs).tobytes())
        if inputs:
            scale = checkpoint.read(f"{module}.input_scale")
            out[f"{at}.input_scale"] = ("f32", (1,), np.float32(scale).tobytes())
    metadata = fields(
        llama__block_count=3, llama__embedding_length=96, llama__feed_forward_length=256,
        llama__attention__head_count=3, llama__attention__head_count_kv=1,
        llama__rope__dimension_count=32, llama__rope__freq_base=100000.0,
    )  # fmt: skip
    return metadata, {**converted(tensors, "f32", (3, 1)), **out}


def test_nvfp4_gguf_gives_the_producers_logits(tmp_path: Path, root: Path) -> None:
    folder = root / "tests/data/llama_tied-modelopt"
    saved: dict[str, Any] = dict(np.load(folder / "reference.npz"))
    path = write(tmp_path / "m.gguf", *nvfp4_gguf(folder, inputs=False))
    model = import_model(open_checkpoint(path), context=64)
    assert {facts.scheme for facts in model.linears} == {"w4a16", "dense"}
    found = logits(path, saved["input_ids"].astype(np.int32))
    np.testing.assert_allclose(found, saved["w4a16_f32_logits"], atol=1e-4)


def test_nvfp4_q_and_k_rows_come_back_in_order(tmp_path: Path) -> None:
    """q, k, v, gate, up as NVFP4 blocks against the same codes in ModelOpt's tensors."""
    dense = dense_weights(hidden=128)
    theirs, blocks = dict(dense), converted(dense, "f32")
    for module, (n, k) in linears(128).items():
        if k != 128:
            continue
        name = f"model.layers.0.{module}.weight"
        packed, sf, gs = nvfp4_parts(dense[name])
        theirs[name], theirs[f"{name}_scale"] = packed, sf
        theirs[f"{name}_scale_2"] = np.array(gs, np.float32)
        heads = HEADS if "q_proj" in module else KV_HEADS if "k_proj" in module else 0
        if heads:
            packed, sf = gguf_permute(packed, heads), gguf_permute(sf, heads)
        at = gguf_name(name)
        blocks[at] = ("nvfp4", (n, k), gguf_nvfp4(packed, sf))
        blocks[at.replace(".weight", ".scale")] = ("f32", (1,), np.float32(gs).tobytes())
    folder = write_checkpoint(tmp_path / "hf", theirs, llama_config(hidden_size=128))
    metadata = fields(llama__embedding_length=128, llama__attention__key_length=HEAD_DIM)
    path = write(tmp_path / "m.gguf", metadata, blocks)
    np.testing.assert_array_equal(logits(path), logits(folder))


def test_nvfp4_gguf_with_input_scales_is_w4a4(tmp_path: Path, root: Path) -> None:
    path = write(
        tmp_path / "m.gguf", *nvfp4_gguf(root / "tests/data/llama_tied-modelopt", inputs=True)
    )
    model = import_model(open_checkpoint(path), context=64)
    down = [facts for facts in model.linears if facts.loc.endswith("down_proj")]
    assert len(down) == 3 and {facts.scheme for facts in down} == {"w4a4"}


@pytest.mark.parametrize("permuted", [True, False])
def test_nvfp4_blocks_unfold_exactly(tmp_path: Path, permuted: bool) -> None:
    """Codes and scales against the gguf package's dequantiser, also for the permuted q rows."""
    rng = np.random.default_rng(4)
    packed = rng.integers(0, 256, (32, 64)).astype(np.uint8)
    sf = rng.integers(0, 127, (32, 8)).astype(np.uint8).view(E4M3)
    name = "blk.0.attn_q" if permuted else "blk.0.ffn_up"
    tensors: GgufTensors = {f"{name}.weight": ("nvfp4", (32, 128), gguf_nvfp4(packed, sf))}
    checkpoint = GgufCheckpoint(write(tmp_path / "m.gguf", fields(), tensors))
    module = hf_name(f"{name}.weight").removesuffix(".weight")
    np.testing.assert_array_equal(checkpoint.read(f"{module}.weight"), packed)
    found = checkpoint.read(f"{module}.weight_scale")
    np.testing.assert_array_equal(found.view(np.uint8), sf.view(np.uint8))
    assert checkpoint.read(f"{module}.weight_scale_2") == 1.0
    assert checkpoint.info(f"{module}.weight_scale").shape == (32, 8)
    for part, heads in (("weight", HEADS), ("weight_scale", HEADS), ("weight_scale_2", 0)):
        assert checkpoint.permuted_heads(f"{module}.{part}") == (heads if permuted else 0)


def test_nvfp4_scale_bytes_mean_what_ggml_means(tmp_path: Path) -> None:
    blocks = np.zeros((1, 36), np.uint8)
    blocks[0, :4] = 0x7F, 0xFF, 0xB8, 0x38
    tensors: GgufTensors = {"blk.0.ffn_up.weight": ("nvfp4", (1, 64), blocks.tobytes())}
    checkpoint = GgufCheckpoint(write(tmp_path / "m.gguf", fields(), tensors))
    found = checkpoint.read("model.layers.0.mlp.up_proj.weight_scale").astype(np.float32)
    np.testing.assert_array_equal(found, [[0, 0, 1, 1]])


# ---- hostile files ------------------------------------------------------------------------------


def header(tensors: int, count: int, rest: bytes = b"") -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, count) + rest


HUGE = struct.pack("<Q", 1 << 60)
KEY = struct.pack("<Q", 1) + b"k"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "cannot be read"),
        (b"GGUX" + bytes(64), "not a GGUF file"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "GGUF version 50331648"),
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "GGUF version 1"),
        (header(1 << 60, 0), "do not fit"),
        (header(0, 1 << 60), "do not fit"),
        (header(3, 0, bytes(8)), "do not fit"),
        (header(0, 1, HUGE + bytes(32)), "expected <= 65535"),
        (header(0, 1, KEY + struct.pack("<I", 99) + bytes(32)), "unknown value type 99"),
        (header(0, 1, KEY + struct.pack("<I", 8) + HUGE + bytes(9)), "past the end"),
        (header(0, 1, KEY + struct.pack("<II", 9, 8) + HUGE + bytes(9)), "the strings of the"),
        (header(0, 1, KEY + struct.pack("<IIQ", 9, 8, 1 << 20) + bytes(99)), "past the end"),
        (header(0, 1, KEY + struct.pack("<II", 9, 4) + HUGE + bytes(9)), "the file is cut short"),
        (header(0, 1, KEY + struct.pack("<II", 9, 9) + bytes(32)), "unknown value type 9"),
        (header(0, 2, 2 * (KEY + struct.pack("<IB", 7, 1)) + bytes(8)), "stands twice"),
    ],
)
def test_hostile_headers(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(data)
    with pytest.raises(ModelError, match=message):
        GgufCheckpoint(path)


def raw_tensor(
    name: str = "x", kind: int = 0, dims: tuple[int, ...] = (8,), offset: int = 0
) -> bytes:
    head = struct.pack("<Q", len(name)) + name.encode() + struct.pack("<I", len(dims))
    return head + struct.pack(f"<{len(dims)}Q", *dims) + struct.pack("<IQ", kind, offset)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ([raw_tensor(kind=6, dims=(32,))], "unsupported type Q5_0"),
        ([raw_tensor(kind=999)], "unsupported type 999"),
        ([raw_tensor(dims=(1,) * 5)], "5 dimensions, expected at most 4"),
        ([raw_tensor(kind=2, dims=(33,))], "rows of a multiple of 32"),
        ([raw_tensor(kind=2, dims=())], "rows of a multiple of 32"),
        ([raw_tensor(dims=(1 << 62, 1 << 62))], "offset 0 and"),
        ([raw_tensor(offset=1)], "expected a multiple of 32"),
        ([raw_tensor(offset=1 << 63)], "an end within"),
        ([raw_tensor(), raw_tensor()], "stands twice in the tensor table"),
        ([raw_tensor("a", dims=(16,)), raw_tensor("b", offset=32)], "overlaps 'a'"),
    ],
)
def test_hostile_tensor_tables(tmp_path: Path, tensors: list[bytes], message: str) -> None:
    path = tmp_path / "m.gguf"
    body = header(len(tensors), 0, b"".join(tensors))
    path.write_bytes(body + bytes(-len(body) % 32) + bytes(128))
    with pytest.raises(ModelError, match=message):
        GgufCheckpoint(path)


@pytest.mark.parametrize("alignment", [0, 3, 1 << 31])
def test_alignment_is_a_small_power_of_two(tmp_path: Path, alignment: int) -> None:
    metadata = fields(general__alignment=alignment)
    with pytest.raises(ModelError, match="not a power of two"):
        GgufCheckpoint(write(tmp_path / "m.gguf", metadata, {}))


def test_unread_tensors_are_named(tmp_path: Path) -> None:
    tensors = converted(dense_weights(), "f32")
    tensors["blk.0.ffn_gate_inp.weight"] = ("f32", (8,), bytes(32))
    path = write(tmp_path / "m.gguf", fields(), tensors)
    with pytest.raises(ModelError, match="'blk.0.ffn_gate_inp.weight'.*does not read"):
        import_model(open_checkpoint(path), context=8)


def test_two_gguf_files_in_a_folder_are_ambiguous(tmp_path: Path) -> None:
    write(tmp_path / "a.gguf", fields(), converted(dense_weights(), "f32"))
    assert isinstance(open_checkpoint(tmp_path), GgufCheckpoint)
    write(tmp_path / "b.gguf", fields(), {})
    with pytest.raises(ModelError, match="holds 2 .gguf files"):
        open_checkpoint(tmp_path)
