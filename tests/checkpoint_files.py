"""Writes the small checkpoints the reader tests need: SafeTensors folders and GGUF files."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Tensors = dict[str, Array]
Config = dict[str, Any]

SAFETENSORS_NAMES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "uint8": "U8",
    "float8_e4m3fn": "F8_E4M3", "int64": "I64", "int32": "I32", "int8": "I8", "bool": "BOOL",
}  # fmt: skip
HIDDEN, INNER, VOCAB, HEADS, KV_HEADS, HEAD_DIM = 32, 64, 40, 2, 1, 16


def linears(hidden: int = HIDDEN) -> dict[str, tuple[int, int]]:
    """[N, K] of the linears of the one layer."""
    q, kv = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
    attention = {"q_proj": (q, hidden), "k_proj": (kv, hidden), "v_proj": (kv, hidden),
                 "o_proj": (hidden, q)}  # fmt: skip
    mlp = {"gate_proj": (INNER, hidden), "up_proj": (INNER, hidden), "down_proj": (hidden, INNER)}
    named = {f"self_attn.{name}": shape for name, shape in attention.items()}
    return named | {f"mlp.{name}": shape for name, shape in mlp.items()}


LINEARS = linears()
Q = "model.layers.0.self_attn.q_proj"
BF16, E4M3 = np.dtype(ml_dtypes.bfloat16), np.dtype(ml_dtypes.float8_e4m3fn)


def safetensors_bytes(tensors: Mapping[str, Array]) -> bytes:
    """A .safetensors file, in the order given, without any padding."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    payload = b""
    for name, value in tensors.items():
        data = value.tobytes()
        offsets = [len(payload), len(payload) + len(data)]
        dtype = SAFETENSORS_NAMES[value.dtype.name]
        header[name] = {"dtype": dtype, "shape": list(value.shape), "data_offsets": offsets}
        payload += data
    return framed(json.dumps(header).encode(), payload)


def framed(header: bytes, payload: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header + payload


def llama_config(**changes: Any) -> Config:
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN,
        "intermediate_size": INNER, "num_hidden_layers": 1, "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS, "head_dim": HEAD_DIM, "vocab_size": VOCAB,
        "rms_norm_eps": 1e-5, "hidden_act": "silu", "tie_word_embeddings": False,
        "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": [2, 3],
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}, **changes,
    }  # fmt: skip


def modelopt_config(**changes: Any) -> Config:
    quant = {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["lm_head"]}
    return llama_config(quantization_config=quant, **changes)


def dense_weights(seed: int = 0, hidden: int = HIDDEN) -> Tensors:
    """One Llama layer in bf16, as a plain checkpoint has it."""
    rng = np.random.default_rng(seed)

    def random(*shape: int) -> Array:
        return (rng.standard_normal(shape) / 4).astype(BF16)

    ones = np.ones(hidden, BF16)
    norms = ("input_layernorm", "post_attention_layernorm")
    return {
        "model.embed_tokens.weight": random(VOCAB, hidden), "lm_head.weight": random(VOCAB, hidden),
        "model.norm.weight": ones, **{f"model.layers.0.{n}.weight": ones for n in norms},
        **{f"model.layers.0.{name}.weight": random(*nk) for name, nk in linears(hidden).items()},
    }  # fmt: skip


def nvfp4_parts(w: Array) -> tuple[Array, Array, np.float32]:
    """Packed codes, e4m3 block scales, global scale (a multiplier) of a matrix, simply made."""
    n, k = w.shape
    blocks = w.astype(np.float32).reshape(n, k // 16, 16)
    scale = np.float32(np.abs(blocks).max() / 2688)
    sf = (np.abs(blocks).max(-1) / 6 / scale).astype(E4M3)
    grid = np.maximum(sf.astype(np.float32)[..., None] * scale, 1e-20)
    fp4 = (blocks / grid).astype(ml_dtypes.float4_e2m1fn).view(np.uint8).reshape(n, k)
    return fp4[:, ::2] | fp4[:, 1::2] << 4, sf, scale


def modelopt_weights(seed: int = 0) -> Tensors:
    tensors = dense_weights(seed)
    for module in LINEARS:
        at = f"model.layers.0.{module}"
        packed, sf, scale = nvfp4_parts(tensors[f"{at}.weight"])
        tensors[f"{at}.weight"], tensors[f"{at}.weight_scale"] = packed, sf
        tensors[f"{at}.weight_scale_2"] = np.array(scale, np.float32)
        tensors[f"{at}.input_scale"] = np.array(0.25, np.float32)
    return tensors


def compressed_weights(seed: int = 0) -> Tensors:
    """The same model in the words of compressed-tensors: divisors of shape [1]."""
    tensors = modelopt_weights(seed)
    for module in LINEARS:
        at = f"model.layers.0.{module}"
        tensors[f"{at}.weight_packed"] = tensors.pop(f"{at}.weight")
        for theirs, ours in (("weight_scale_2", "weight_global_scale"),
                             ("input_scale", "input_global_scale")):  # fmt: skip
            value = np.float32(1) / tensors.pop(f"{at}.{theirs}")
            tensors[f"{at}.{ours}"] = np.array([value], np.float32)
    return tensors


def write_checkpoint(
    folder: Path, tensors: Mapping[str, Array], config: Config, **files: Config
) -> Path:
    """A folder of one .safetensors file; `files` are further JSON files by stem."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.safetensors").write_bytes(safetensors_bytes(tensors))
    for stem, contents in {"config": config, **files}.items():
        (folder / f"{stem}.json").write_text(json.dumps(contents))
    return folder


# ---- GGUF ----------------------------------

GGUF_TYPES = {"f32": 0, "f16": 1, "q4_0": 2, "q4_1": 3, "q8_0": 8, "q4_k": 12, "q5_k": 13,
              "q6_k": 14, "bf16": 30, "nvfp4": 40}  # fmt: skip
Field = bool | int | float | str | Sequence[str] | Sequence[int] | Sequence[float]


def gguf_string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def gguf_value(value: Field) -> bytes:
    """Type and value: bool, u32, f32, string, or an array of strings, i32 or f32."""
    if isinstance(value, bool):
        return struct.pack("<I?", 7, value)
    if isinstance(value, int):
        return struct.pack("<II", 4, value)
    if isinstance(value, float):
        return struct.pack("<If", 6, value)
    if isinstance(value, str):
        return struct.pack("<I", 8) + gguf_string(value)
    items = list(value)
    kind = 8 if isinstance(items[0], str) else 6 if isinstance(items[0], float) else 5
    head = struct.pack("<IIQ", 9, kind, len(items))
    if kind == 8:
        return head + b"".join(gguf_string(str(item)) for item in items)
    return head + struct.pack(f"<{len(items)}{'f' if kind == 6 else 'i'}", *items)


def gguf_bytes(
    fields: Mapping[str, Field], tensors: Mapping[str, tuple[str, tuple[int, ...], bytes]]
) -> bytes:
    """A GGUF v3 file; a tensor is (type, shape with rows first, bytes)."""
    out = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(fields))
    out += b"".join(gguf_string(key) + gguf_value(value) for key, value in fields.items())
    payload = b""
    for name, (kind, shape, data) in tensors.items():
        out += gguf_string(name) + struct.pack("<I", len(shape))
        out += struct.pack(f"<{len(shape)}Q", *reversed(shape))
        out += struct.pack("<IQ", GGUF_TYPES[kind], len(payload))
        payload += data + bytes(-len(data) % 32)
    return out + bytes(-len(out) % 32) + payload


def gguf_permute(w: Array, heads: int) -> Array:
    """Rows of q or k in llama.cpp's interleaved order (convert_hf_to_gguf's `permute`)."""
    halves = w.reshape(heads, 2, w.shape[0] // heads // 2, *w.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(w.shape)


def gguf_nvfp4(packed: Array, sf: Array) -> bytes:
    """Packed codes [N, K/2] and e4m3 scales [N, K/16] as type-40 blocks (nvfp4-formats.md 12)."""
    n, half = packed.shape
    codes = np.stack([packed & 15, packed >> 4], -1).reshape(n, half * 2 // 64, 4, 16)
    qs = codes[..., :8] | codes[..., 8:] << 4
    scales = sf.view(np.uint8).reshape(n, -1, 4)
    return np.concatenate([scales, qs.reshape(n, -1, 32)], -1).tobytes()
