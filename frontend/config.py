"""config.json and generation_config.json as frozen facts, in every spelling transformers used."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ..ir.errors import ModelError
from .bounded_json import Object, as_object, as_strings, one_or_many

MAX_INT = 1 << 31
MAX_LAYERS = 4096
REPAIR = "repair the config or download it again"


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """`parameters` holds what the kind needs besides theta (factor, beta_fast ...)."""

    kind: str = "default"
    theta: float = 10000.0
    parameters: Mapping[str, float] = field(default_factory=dict[str, float])


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A decoder's sizes. `windows[i]`: keys that layer i sees, 0 for all of them."""

    architecture: str
    model_type: str
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab_size: int
    rms_norm_eps: float
    hidden_act: str
    tied: bool
    attention_bias: bool
    mlp_bias: bool
    max_positions: int
    windows: tuple[int, ...]
    rope: RopeConfig
    dtype: str


class Fields:
    """Typed access to a JSON object; each error names the file and the key."""

    def __init__(self, values: Object, where: str) -> None:
        self.values, self.where = values, where

    def wrong(self, key: str, expected: str) -> ModelError:
        found = repr(self.values.get(key))[:80]
        return ModelError(f"{self.where}: {key}: expected {expected}, found {found}; {REPAIR}")

    def integer(self, key: str, default: int | None = None, least: int = 0) -> int:
        """A whole number; `default` where absent or null (None: it must be there)."""
        value = self.values.get(key)
        if value is None and default is not None:
            return default
        if type(value) is not int or not least <= value < MAX_INT:
            raise self.wrong(key, f"a whole number from {least} on")
        return value

    def real(self, key: str, default: float) -> float:
        value = self.values.get(key)
        if value is None:
            return default
        if type(value) not in (int, float) or not isinstance(value, int | float):
            raise self.wrong(key, "a number")
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if not math.isfinite(number):
            raise self.wrong(key, "a finite number")
        return number

    def flag(self, key: str, default: bool) -> bool:
        value = self.values.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.wrong(key, "true or false")
        return value

    def text(self, key: str, default: str) -> str:
        value = self.values.get(key)
        if value is None:
            return default
        if not isinstance(value, str):
            raise self.wrong(key, "a string")
        return value


def architecture_of(config: Object, where: str) -> str:
    """`architectures[0]`, or model_type where that is missing."""
    names = as_strings(config.get("architectures"), f"{where}: architectures")
    return names[0] if names else Fields(config, where).text("model_type", "")


def text_config(config: Object, where: str) -> Object:
    """The language model's part of a wrapper's config; the config itself where none is nested."""
    inner = as_object(config.get("text_config"), f"{where}: text_config")
    if not inner:
        return config
    tied = config.get("tie_word_embeddings")
    return {**inner, "tie_word_embeddings": inner.get("tie_word_embeddings", tied)}


def read_config(config: Object, folder: Path) -> ModelConfig:
    """The facts of `config`, a checkpoint's config.json. Raises ModelError naming file and key."""
    where = str(folder / "config.json") if folder.is_dir() else str(folder)
    fields = Fields(text_config(config, where), where)
    layers = fields.integer("num_hidden_layers", least=1)
    if layers > MAX_LAYERS:
        raise fields.wrong("num_hidden_layers", f"at most {MAX_LAYERS}")
    heads = fields.integer("num_attention_heads", least=1)
    hidden = fields.integer("hidden_size", least=1)
    kv_heads = fields.integer("num_key_value_heads", heads, least=1)
    if heads % kv_heads:
        raise fields.wrong("num_key_value_heads", f"a divisor of {heads} attention heads")
    head_dim = fields.integer("head_dim", hidden // heads, least=2)
    if head_dim < 2 or head_dim % 2 or head_dim > 1 << 16:
        raise fields.wrong("head_dim", f"an even number up to 65536 (it comes out as {head_dim})")
    return ModelConfig(
        architecture=architecture_of(config, where),
        model_type=fields.text("model_type", ""),
        hidden_size=hidden,
        intermediate_size=fields.integer("intermediate_size", least=1),
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=fields.integer("vocab_size", least=1),
        rms_norm_eps=fields.real("rms_norm_eps", 1e-6),
        hidden_act=fields.text("hidden_act", "silu"),
        tied=fields.flag("tie_word_embeddings", False),
        attention_bias=fields.flag("attention_bias", False),
        mlp_bias=fields.flag("mlp_bias", False),
        max_positions=fields.integer("max_position_embeddings", 0),
        windows=_windows(fields, layers),
        rope=_rope(fields),
        dtype=fields.text("dtype", fields.text("torch_dtype", "")),
    )


def _windows(fields: Fields, layers: int) -> tuple[int, ...]:
    window = fields.integer("sliding_window", 0)
    if not window or not fields.flag("use_sliding_window", True):
        return (0,) * layers
    kinds = as_strings(fields.values.get("layer_types"), f"{fields.where}: layer_types")
    if kinds:
        known = {"full_attention": 0, "sliding_attention": window}
        if len(kinds) != layers or any(kind not in known for kind in kinds):
            raise fields.wrong("layer_types", f"{layers} of {', '.join(known)}")
        return tuple(known[kind] for kind in kinds)
    first = fields.integer("max_window_layers", 0)
    return tuple(window if layer >= first else 0 for layer in range(layers))


def _rope(fields: Fields) -> RopeConfig:
    """`rope_parameters` (transformers >= 5) or `rope_theta` with `rope_scaling` (before)."""
    found: Object = {}
    for key in ("rope_scaling", "rope_parameters"):
        found.update(as_object(fields.values.get(key), f"{fields.where}: {key}"))
    rope = Fields(found, f"{fields.where}: rope_parameters")
    theta = rope.real("rope_theta", fields.real("rope_theta", 10000.0))
    if theta <= 0:
        raise rope.wrong("rope_theta", "a positive number")
    kind = rope.text("rope_type", rope.text("type", "default"))
    partial = rope.real("partial_rotary_factor", fields.real("partial_rotary_factor", 1.0))
    if partial != 1.0:
        raise rope.wrong("partial_rotary_factor", "1 for this family")
    skipped = ("rope_theta", "partial_rotary_factor")
    numbers: dict[str, float] = {}
    for key, value in found.items():
        if isinstance(value, dict):
            raise rope.wrong(key, "one set of rope parameters for all layers")
        if key not in skipped and isinstance(value, int | float):  # flags become 0.0 and 1.0
            numbers[key] = rope.real(key, 0.0) if not isinstance(value, bool) else float(value)
    return RopeConfig(kind, theta, numbers)


def read_generation(generation: Object, config: Object, where: str) -> Object:
    """generation_config.json, its special tokens filled in from the config where it has none.

    `eos_token_id` is always a list. Raises ModelError where a token is no token id.
    """
    inner = text_config(config, where)
    out = dict(generation)
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        holders = (generation, config, inner)
        value = next((h[key] for h in holders if h.get(key) is not None), None)
        tokens = one_or_many(value)
        if any(type(i) is not int or not 0 <= i < MAX_INT for i in tokens):
            raise ModelError(
                f"{where}: {key}: expected token ids, found {str(tokens)[:80]}; {REPAIR}"
            )
        if key == "eos_token_id":
            out[key] = tokens
        elif tokens:
            out[key] = tokens[0]
    return out
