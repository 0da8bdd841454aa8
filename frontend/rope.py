"""Inverse frequencies of rotary embeddings, one table per model, computed in f64 and rounded once.

Formulas: transformers 5 `modeling_rope_utils.py` (default, linear, llama3, yarn).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from ..ir.errors import ModelError
from .config import RopeConfig

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]


def inverse_frequencies(rope: RopeConfig, head_dim: int, where: str) -> tuple[F32, float]:
    """f32 [head_dim / 2] and the factor on cos and sin. Raises ModelError for another rope type."""
    build = _KINDS.get(rope.kind)
    if build is None:
        raise ModelError(
            f"{where}: rope type {rope.kind[:40]!r}, expected one of {', '.join(_KINDS)}; this "
            "model needs a position encoding that halfbyte does not have"
        )
    base = rope.theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    with np.errstate(all="ignore"):
        exact, factor = build(rope, base, where)
        table = exact.astype(np.float32)
    if not np.isfinite(table).all() or not math.isfinite(factor):
        raise ModelError(
            f"{where}: rope parameters {dict(rope.parameters)} give no finite table; "
            "repair the config"
        )
    return table, factor


def _need(rope: RopeConfig, key: str, where: str) -> float:
    value = rope.parameters.get(key, 0.0)
    if value <= 0:
        raise ModelError(
            f"{where}: rope type {rope.kind} needs a positive {key}, found {value}; "
            "repair the config"
        )
    return value


def _default(rope: RopeConfig, base: F64, where: str) -> tuple[F64, float]:
    return base, 1.0


def _linear(rope: RopeConfig, base: F64, where: str) -> tuple[F64, float]:
    return base / _need(rope, "factor", where), 1.0


def _llama3(rope: RopeConfig, base: F64, where: str) -> tuple[F64, float]:
    """Long waves are stretched by `factor`, short ones kept, those between are blended."""
    factor, original = (
        _need(rope, k, where) for k in ("factor", "original_max_position_embeddings")
    )
    low, high = (_need(rope, k, where) for k in ("low_freq_factor", "high_freq_factor"))
    turns = original * base / (2 * math.pi)
    blend = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return base * ((1 - blend) / factor + blend), 1.0


def _yarn(rope: RopeConfig, base: F64, where: str) -> tuple[F64, float]:
    """YaRN (arXiv 2309.00071): a ramp between interpolated and kept frequencies."""
    factor, original = (
        _need(rope, k, where) for k in ("factor", "original_max_position_embeddings")
    )
    half = base.size
    get = rope.parameters.get

    def correction(rotations: float) -> float:
        return half * math.log(original / (rotations * 2 * math.pi)) / math.log(rope.theta)

    low, high = correction(get("beta_fast", 32.0) or 32.0), correction(get("beta_slow", 1.0) or 1.0)
    if get("truncate", 1.0):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * half - 1)
    high = high + 0.001 if low == high else high
    ramp = np.clip((np.arange(half) - low) / (high - low), 0.0, 1.0)
    table = base / factor * ramp + base * (1 - ramp)
    return table, _yarn_factor(rope, factor)


def _yarn_factor(rope: RopeConfig, factor: float) -> float:
    def of(mscale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0

    get = rope.parameters.get
    if "attention_factor" in rope.parameters:
        return rope.parameters["attention_factor"]
    mscale, all_dim = get("mscale", 0.0), get("mscale_all_dim", 0.0)
    return of(mscale) / of(all_dim) if mscale and all_dim else of(1.0)


_KINDS: dict[str, Callable[[RopeConfig, F64, str], tuple[F64, float]]] = {
    "default": _default, "linear": _linear, "llama3": _llama3, "yarn": _yarn,
}  # fmt: skip
