"""Small decoder graphs for tests: built as an importer builds them, with random weights."""

from __future__ import annotations

from dataclasses import dataclass

import ml_dtypes
import numpy as np

from halfbyte.ir.builder import Builder
from halfbyte.ir.graph import Graph, Value
from halfbyte.ir.numerics import Array, quantize_weight
from halfbyte.ir.types import tensor


@dataclass(frozen=True, slots=True)
class Shape:
    """A decoder: hidden and feed-forward widths, heads, layers, vocabulary, cache capacity.

    `kv_scales`: those of keys and values in an FP8 cache.
    """

    hidden: int = 48
    inner: int = 80
    heads: int = 3
    kv_heads: int = 1
    head_dim: int = 16
    layers: int = 2
    vocab: int = 37
    context: int = 32
    window: int = 0
    softcap: float = 0.0
    kv_scales: tuple[float, float] | None = None


@dataclass(frozen=True, slots=True)
class Decoder:
    """A graph and the data of its weights."""

    graph: Graph
    data: dict[str, Array]

    def inputs(self, tokens: int, position: int = 0, seed: int = 1) -> dict[str, Array]:
        """Random token ids; all rows wanted."""
        vocab = next(w for w in self.data.values() if w.ndim == 2).shape[0]
        ids = np.random.default_rng(seed).integers(0, vocab, tokens).astype(np.int32)
        rows = np.arange(tokens, dtype=np.int32)
        return {"ids": ids, "pos": np.array(position, np.int32), "rows": rows}


class _Maker:
    def __init__(self, shape: Shape, w4a4: bool, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.b = Builder("tiny")
        self.data: dict[str, Array] = {}
        self.shape, self.w4a4 = shape, w4a4

    def weight(self, name: str, data: Array, dtype: str) -> Value:
        self.data[name] = data
        return self.b.weight(name, tensor(dtype, *data.shape))

    def normal(self, *shape: int) -> Array:
        return (self.rng.standard_normal(shape) / np.sqrt(shape[-1])).astype(np.float32)

    def gamma(self, name: str, n: int) -> Value:
        return self.weight(name, 1 + self.normal(n), "f32")

    def linear(self, loc: str, x: Value, n: int, k: int, scale: float = 0.002) -> Value:
        packed, sf, gs = quantize_weight(self.normal(n, k) * np.float32(self.rng.uniform(0.5, 2)))
        b = self.b
        parts = (
            self.weight(f"{loc}.weight", packed, "u8"),
            self.weight(f"{loc}.weight_scale", sf, "f8e4m3"),
            self.weight(f"{loc}.weight_scale_2", np.array(gs, np.float32), "f32"),
        )
        w = b.op("dequantize", *parts, format="nvfp4", loc=loc)
        if self.w4a4:
            s = self.weight(f"{loc}.input_scale", np.array(scale, np.float32), "f32")
            x = b.op("quantize_dequantize", x, s, format="nvfp4", loc=loc)
        return b.op("linear", x, w, loc=loc)


def _layer(m: _Maker, i: int, h: Value, pos: Value, inv_freq: Value) -> Value:
    s, b = m.shape, m.b
    at = f"model.layers.{i}"
    x = b.op("rmsnorm", h, m.gamma(f"{at}.norm1", s.hidden), eps=1e-5, loc=f"{at}.norm1")
    q, k, v = (
        m.linear(f"{at}.{n}_proj", x, heads * s.head_dim, s.hidden)
        for n, heads in (("q", s.heads), ("k", s.kv_heads), ("v", s.kv_heads))
    )
    cache = tensor("f8e4m3" if s.kv_scales else "f32", s.kv_heads, s.context, s.head_dim)
    keys, values = (b.state(f"{at}.{n}_cache", cache) for n in "kv")
    scales = dict(zip(("k_scale", "v_scale"), s.kv_scales or (), strict=False))
    of_k, of_v = ({"cache_scale": scale} for scale in s.kv_scales) if s.kv_scales else ({}, {})
    dim = s.head_dim
    q = b.op("rope", q, pos, inv_freq, loc=f"{at}.attn", heads=s.heads, head_dim=dim)
    k = b.op("rope", k, pos, inv_freq, loc=at, heads=s.kv_heads, head_dim=dim)
    keys = b.op("kv_append", keys, k, pos, loc=at, hint="v", **of_k)
    values = b.op("kv_append", values, v, pos, loc=at, hint="v", **of_v)
    a = b.op(
        "attention", q, keys, values, pos, loc=f"{at}.attn", heads=s.heads,
        kv_heads=s.kv_heads, head_dim=dim, scale=dim**-0.5, window=s.window, softcap=s.softcap,
        hint="v", **scales,
    )  # fmt: skip
    h = b.op("add", h, m.linear(f"{at}.o_proj", a, s.hidden, s.heads * s.head_dim), loc=at)
    x = b.op("rmsnorm", h, m.gamma(f"{at}.norm2", s.hidden), eps=1e-5, loc=f"{at}.norm2")
    gate, up = (m.linear(f"{at}.{n}_proj", x, s.inner, s.hidden) for n in ("gate", "up"))
    x = b.op("silu_mul", gate, up, loc=at)
    return b.op("add", h, m.linear(f"{at}.down_proj", x, s.hidden, s.inner), loc=at)


def decoder(shape: Shape = Shape(), *, w4a4: bool = False, seed: int = 0) -> Decoder:  # noqa: B008
    """A Llama-like decoder with a tied bf16 head, its linears as ModelOpt writes NVFP4."""
    m = _Maker(shape, w4a4, seed)
    ids, pos = m.b.arg("ids", tensor("i32", "T")), m.b.arg("pos", tensor("i32"))
    rows = m.b.arg("rows", tensor("i32", "R"))
    table = m.normal(shape.vocab, shape.hidden).astype(ml_dtypes.bfloat16)
    embedding = m.weight("model.embed_tokens.weight", table, "bf16")
    frequencies = 10000.0 ** -(np.arange(shape.head_dim // 2) * 2 / shape.head_dim)
    inv_freq = m.weight("rope.inv_freq", frequencies.astype(np.float32), "f32")
    h = m.b.op("embed", ids, embedding, loc="model.embed_tokens", hint="h")
    for layer in range(shape.layers):
        h = _layer(m, layer, h, pos, inv_freq)
    h = m.b.op("take_rows", h, rows)
    x = m.b.op("rmsnorm", h, m.gamma("model.norm", shape.hidden), eps=1e-5, loc="model.norm")
    logits = m.b.op("linear", x, embedding, loc="lm_head", hint="logits")
    return Decoder(m.b.build(logits), m.data)
