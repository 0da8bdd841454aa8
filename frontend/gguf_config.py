"""GGUF metadata and tensor names in the words of Hugging Face: importers know one language."""

from __future__ import annotations

import re

from ..ir.errors import ModelError
from .bounded_json import Object
from .gguf_header import GgufFile

FAMILIES: dict[str, tuple[str, str]] = {
    "llama": ("llama", "LlamaForCausalLM"),
    "mistral": ("mistral", "MistralForCausalLM"),
    "qwen2": ("qwen2", "Qwen2ForCausalLM"),
    "qwen3": ("qwen3", "Qwen3ForCausalLM"),
}
PERMUTED = ("llama", "mistral")
"""Architectures whose q and k rows llama.cpp's converter puts in interleaved-RoPE order."""

_GLOBAL_NAMES = {
    "token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head",
}  # fmt: skip
_BLOCK_NAMES = {
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}  # fmt: skip
_NAME = re.compile(r"(?:blk\.(\d{1,6})\.)?([a-z_]+)\.(weight|bias|scale|input_scale)")
_QK = re.compile(r"model\.layers\.\d+\.self_attn\.([qk])_proj\.(weight|bias|weight_scale)")


def hf_name(name: str) -> str:
    """`blk.3.attn_q.weight` -> `model.layers.3.self_attn.q_proj.weight`; unknown names stay."""
    match = _NAME.fullmatch(name)
    if match is None:
        return name
    layer, stem, suffix = match.groups()
    if layer is None:
        return f"{_GLOBAL_NAMES[stem]}.{suffix}" if stem in _GLOBAL_NAMES else name
    known = _BLOCK_NAMES.get(stem)
    return f"model.layers.{int(layer)}.{known}.{suffix}" if known else name


def hf_config(file: GgufFile) -> Object:
    """A config.json for the file's architecture. Raises ModelError for a missing or odd key."""
    arch = file.text("general.architecture")
    family, architecture = FAMILIES.get(arch, (arch, arch))
    if arch not in FAMILIES:
        return {"model_type": arch, "architectures": [architecture]}
    heads = _integer(file, f"{arch}.attention.head_count")
    hidden = _integer(file, f"{arch}.embedding_length")
    head_dim = file.number(f"{arch}.attention.key_length", hidden // max(heads, 1))
    window = file.number(f"{arch}.attention.sliding_window", 0)
    if file.number(f"{arch}.expert_count", 0):
        family = architecture = f"{arch} with experts"
    elif family == "llama" and window:
        family, architecture = FAMILIES["mistral"]
    embedding = file.tensors.get("token_embd.weight")
    vocab = embedding.shape[0] if embedding and embedding.shape else 0
    return {
        "model_type": family,
        "architectures": [architecture],
        "hidden_size": hidden,
        "intermediate_size": _integer(file, f"{arch}.feed_forward_length"),
        "num_hidden_layers": _integer(file, f"{arch}.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": _uniform(file, f"{arch}.attention.head_count_kv", heads),
        "head_dim": head_dim,
        "rms_norm_eps": _real(file, f"{arch}.attention.layer_norm_rms_epsilon", 1e-5),
        "vocab_size": vocab,
        "max_position_embeddings": file.number(f"{arch}.context_length", 0),
        "sliding_window": window or None,
        "use_sliding_window": bool(window),
        "max_window_layers": 0,
        "hidden_act": "silu",
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "attention_bias": "blk.0.attn_q.bias" in file.tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in file.tensors,
        "rope_parameters": _rope(file, arch, head_dim),
        **_special_tokens(file),
    }


def permuted_heads(config: Object, arch: str, name: str) -> int:
    """Heads of a q/k tensor whose rows llama.cpp permuted; 0 for every other tensor."""
    match = _QK.fullmatch(name) if arch in PERMUTED else None
    if match is None:
        return 0
    key = "num_attention_heads" if match[1] == "q" else "num_key_value_heads"
    heads = config.get(key)
    return heads if isinstance(heads, int) else 0


def _rope(file: GgufFile, arch: str, head_dim: int) -> Object:
    rope: Object = {
        "rope_type": "default",
        "rope_theta": _real(file, f"{arch}.rope.freq_base", 1e4),
    }
    rotary = file.number(f"{arch}.rope.dimension_count", head_dim)
    if rotary != head_dim:
        rope["partial_rotary_factor"] = rotary / max(head_dim, 1)
    scaling = file.text(f"{arch}.rope.scaling.type", "none")
    if scaling == "none":
        return rope
    rope["rope_type"] = scaling
    for key, ours in (("factor", "factor"), ("yarn_beta_fast", "beta_fast"),
                      ("yarn_beta_slow", "beta_slow")):  # fmt: skip
        if f"{arch}.rope.scaling.{key}" in file.fields:
            rope[ours] = _real(file, f"{arch}.rope.scaling.{key}", 1.0)
    original = file.number(f"{arch}.rope.scaling.original_context_length", 0)
    if original:
        rope["original_max_position_embeddings"] = original
    return rope


def _special_tokens(file: GgufFile) -> Object:
    """BOS and every token that ends a reply: end of text, of turn, of message."""
    ids = {
        key: file.number(f"tokenizer.ggml.{key}_token_id", -1)
        for key in ("bos", "eos", "eot", "eom")
    }
    found: Object = {"bos_token_id": ids["bos"]} if ids["bos"] >= 0 else {}
    ends = [ids[key] for key in ("eos", "eot", "eom") if ids[key] >= 0]
    return {**found, "eos_token_id": list(dict.fromkeys(ends))}


def _integer(file: GgufFile, key: str) -> int:
    value = file.number(key, -1)
    if value < 0:
        raise ModelError(f"{file.path}: metadata {key!r} is missing; convert the model again")
    return value


def _real(file: GgufFile, key: str, default: float) -> float:
    value = file.scalar(key)
    if value is None:
        return default
    if isinstance(value, str):
        raise ModelError(f"{file.path}: metadata {key!r} is text, expected a number; convert again")
    return float(value)


def _uniform(file: GgufFile, key: str, default: int) -> int:
    """A number, or an array that says the same number for every layer."""
    if key not in file.fields:
        return default
    values = set(file.items(key))
    if len(values) != 1 or not all(isinstance(v, int) for v in values):
        raise ModelError(
            f"{file.path}: metadata {key!r} differs between layers, expected one number; no "
            "family of halfbyte has that, take another model"
        )
    return int(values.pop())
