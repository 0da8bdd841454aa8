"""Ops of a decoder: what a step computes, before any fusion.

References compute in f64 and round once to the result's dtype: a kernel is measured against the
exact value of the op on its f32 inputs, so its whole error is its own.
"""

from __future__ import annotations

import numpy as np

from . import layouts, layouts_cuda, numerics
from .errors import IRError
from .graph import Op
from .numerics import F64, Array
from .opdef import Data, OpDef, activation, array, expect, f64, parts, plain, result
from .types import (
    P16,
    QUANTISED_CACHES,
    SFATOM,
    WGMMA,
    Dim,
    Nvfp4,
    Plain,
    TensorType,
    tensor,
)

LOGITS_ROWS = "R"


def weight_matrix(type_: TensorType, data: Data) -> F64:
    """The exact f64 matrix [N, K] of a weight in any encoding and layout."""
    n, k = type_.static
    enc = type_.enc
    if isinstance(enc, Plain):
        w = array(data)
        return (layouts.dense_from_p16(w, n) if enc.layout == P16 else w).astype(np.float64)
    if not isinstance(enc, Nvfp4):
        raise IRError(f"linear: no meaning for a weight of type {type_}")
    buffers = parts(data)
    packed, sf, gs = buffers[""], buffers.get("sf"), buffers["gs"]
    if enc.layout == P16:
        packed, sf = layouts.nvfp4_from_p16(packed, n, k)
        return numerics.dequantize_nvfp4(packed, sf, gs[:n])
    assert sf is not None
    if enc.layout == WGMMA:
        tiles = packed.reshape(*packed.shape[:2], 2, -1, 16)
        packed, sf = layouts_cuda.nvfp4_from_wgmma(tiles, sf, n, k)
        return numerics.dequantize_nvfp4(packed, sf, gs[:n])
    if enc.layout == SFATOM:
        packed, sf = layouts_cuda.nvfp4_from_sfatom(packed, sf, n, k)
        return numerics.dequantize_nvfp4(packed, sf, gs[:n])
    rows = np.repeat(gs.astype(np.float32), enc.shards or (n,))
    return numerics.dequantize_nvfp4(packed, sf, rows)


def activation_matrix(type_: TensorType, data: Data) -> F64:
    """The exact f64 matrix [T, K] of an activation, plain or nvfp4."""
    if isinstance(type_.enc, Plain):
        return f64(data)
    p = parts(data)
    rows = np.full(p[""].shape[0], p["gs"].reshape(()), np.float32)
    return numerics.dequantize_nvfp4(p[""], p["sf"], rows)


# --- linear --------------------------------------------------------------------------------------


def infer_matmul(op: Op, x: TensorType, w: TensorType) -> TensorType:
    """[…, K] by [N, K] is […, N]."""
    n, k = w.static
    expect(op, "inner extent of x", x.last, k)
    return result(op, *x.shape[:-1], n)


def _infer_linear(op: Op) -> TensorType:
    out = infer_matmul(op, op.args[0].type, op.args[1].type)
    if len(op.args) == 3:
        expect(op, "bias", op.args[2].type, tensor("f32", out.last))
    return out


def _linear(op: Op, args: list[Data]) -> Data:
    x = activation_matrix(op.args[0].type, args[0])
    y = x @ weight_matrix(op.args[1].type, args[1]).T
    return (y + f64(args[2]) if len(args) == 3 else y).astype(np.float32)


# --- activation quantiser ------------------------------------------------------------------------


def _infer_fake_quantize(op: Op) -> TensorType:
    if op.get("format", "") != "nvfp4":
        raise IRError(f"quantize_dequantize: unknown format {op.get('format', '')!r}")
    plain(op, 1, "f32")
    return plain(op, 0, "f32")


def _quantize(op: Op, args: list[Data]) -> Data:
    scale = np.float32(array(args[1]).reshape(()))
    codes, sf = numerics.quantize_activation(array(args[0]), scale)
    return {"": numerics.pack_codes(codes), "sf": sf, "gs": np.array([scale], np.float32)}


def _infer_quantize(op: Op) -> TensorType:
    x = activation(op, 0)
    plain(op, 1, "f32")
    if x.last % numerics.BLOCK:
        raise IRError(f"quantize_nvfp4: last axis {x.last} is not a multiple of 16")
    return x.with_enc(Nvfp4())


def _fake_quantize(op: Op, args: list[Data]) -> Data:
    type_, x = op.args[0].type.with_enc(Nvfp4()), array(args[0])
    rows = _quantize(op, [x.reshape(-1, x.shape[-1]), args[1]])
    return activation_matrix(type_, rows).astype(np.float32).reshape(x.shape)


# --- rows, norms, pointwise ----------------------------------------------------------------------


def _infer_embed(op: Op) -> TensorType:
    ids, table = plain(op, 0, "i32"), plain(op, 1)
    return result(op, ids.count, table.last)


def _embed(op: Op, args: list[Data]) -> Data:
    table = weight_matrix(op.args[1].type, args[1])
    return (table[array(args[0])] * op.get("scale", 1.0)).astype(np.float32)


def _infer_rmsnorm(op: Op) -> TensorType:
    x = activation(op, 0)
    expect(op, "gamma", plain(op, 1, "f32").static, (x.last,))
    return result(op, *x.shape)


def _rmsnorm(op: Op, args: list[Data]) -> Data:
    y = numerics.rmsnorm(f64(args[0]), f64(args[1]), op.get("eps", 1e-6))
    return y.astype(np.float32)


def _infer_head_rmsnorm(op: Op) -> TensorType:
    x, dim = activation(op, 0), op.get("head_dim", 0)
    expect(op, "heads * head_dim", op.get("heads", 0) * dim, x.last)
    expect(op, "gamma", plain(op, 1, "f32").static, (dim,))
    return result(op, *x.shape)


def _head_rmsnorm(op: Op, args: list[Data]) -> Data:
    x = f64(args[0])
    heads = x.reshape(x.shape[0], -1, op.get("head_dim", 0))
    y = numerics.rmsnorm(heads, f64(args[1]), op.get("eps", 1e-6))
    return y.reshape(x.shape).astype(np.float32)


def _infer_binary(op: Op) -> TensorType:
    a, b = activation(op, 0), activation(op, 1)
    expect(op, "shape of the second operand", b.shape, a.shape)
    return result(op, *a.shape)


def _add(op: Op, args: list[Data]) -> Data:
    return (f64(args[0]) + f64(args[1])).astype(np.float32)


def _silu_mul(op: Op, args: list[Data]) -> Data:
    return (numerics.silu(f64(args[0])) * f64(args[1])).astype(np.float32)


def _infer_take_rows(op: Op) -> TensorType:
    return result(op, plain(op, 1, "i32").count, activation(op, 0).last)


def _take_rows(op: Op, args: list[Data]) -> Data:
    return array(args[0])[array(args[1])]


# --- positions, cache, attention -----------------------------------------------------------------


def rope_heads(x: F64, position: int, inv_freq: Array, heads: int, scale: float) -> F64:
    """RoPE of [T, heads * D] whose first token stands at `position`; angles are f32 products."""
    tokens = x.shape[0]
    at = np.arange(position, position + tokens, dtype=np.float32)
    angles = np.multiply.outer(at, inv_freq.astype(np.float32)).astype(np.float64)
    rotated = numerics.rotate_half(x.reshape(tokens, heads, -1), angles, scale)
    return rotated.reshape(tokens, -1)


def _infer_rope(op: Op) -> TensorType:
    x, dim = activation(op, 0), op.get("head_dim", 0)
    expect(op, "heads * head_dim", op.get("heads", 0) * dim, x.last)
    expect(op, "inverse frequencies", plain(op, 2, "f32").static, (dim // 2,))
    return result(op, *x.shape)


def _rope(op: Op, args: list[Data]) -> Data:
    position = int(array(args[1]))
    heads, scale = op.get("heads", 0), op.get("scale", 1.0)
    return rope_heads(f64(args[0]), position, array(args[2]), heads, scale).astype(np.float32)


def check_cache_scales(op: Op, cache: TensorType, *names: str) -> None:
    """Scales of keys and values go with a quantised cache and only with it. Raises IRError."""
    for name in names:
        scale = op.get(name, 0.0)
        if cache.enc in QUANTISED_CACHES:
            if not 0 < scale < np.inf:
                raise IRError(f"{op.name}: {name} is {scale}, expected a finite number above 0")
        elif name in op.attrs:
            raise IRError(f"{op.name}: {name} goes with a quantised cache, found {cache}")


def _infer_kv_append(op: Op) -> TensorType:
    cache = plain(op, 0)
    heads, _, dim = cache.static
    expect(op, "row", activation(op, 1).last, heads * dim)
    check_cache_scales(op, cache, "cache_scale")
    return cache


def append_rows(cache: Array, rows: Array, position: int, scale: float = 0.0) -> Array:
    """A copy of cache [H, C, D] with rows [T, H * D] at `position`. Raises IRError past the end.

    `scale`: of the rows in a quantised cache, see `numerics.kv_codes`; 0 where it is none.
    """
    heads, capacity, dim = cache.shape
    if position + rows.shape[0] > capacity:
        raise IRError(f"kv_append: {position + rows.shape[0]} positions, capacity {capacity}")
    out = cache.copy()
    stored = numerics.kv_codes(rows, scale) if scale else rows
    by_head = stored.reshape(-1, heads, dim).swapaxes(0, 1)
    out[:, position : position + rows.shape[0]] = by_head
    return out


def _kv_append(op: Op, args: list[Data]) -> Data:
    scale = op.get("cache_scale", 0.0)
    return append_rows(array(args[0]), array(args[1]), int(array(args[2])), scale)


def _infer_attention(op: Op) -> TensorType:
    q, keys = activation(op, 0), plain(op, 1)
    heads, kv_heads, dim = op.get("heads", 0), op.get("kv_heads", 0), op.get("head_dim", 0)
    expect(op, "width of q", q.last, heads * dim)
    expect(op, "key cache", (keys.static[0], keys.static[2]), (kv_heads, dim))
    expect(op, "value cache", plain(op, 2), keys)
    check_cache_scales(op, keys, "k_scale", "v_scale")
    if op.get("softcap", 0.0) < 0:
        raise IRError(f"attention: softcap is {op.get('softcap', 0.0)}, expected 0 or more")
    if kv_heads <= 0 or heads % kv_heads:
        raise IRError(f"attention: {heads} heads do not share {kv_heads} key heads evenly")
    return result(op, *q.shape)


def _attention(op: Op, args: list[Data]) -> Data:
    q, keys, values = map(f64, args[:3])
    keys, values = keys * op.get("k_scale", 1.0), values * op.get("v_scale", 1.0)
    position, dim = int(array(args[3])), op.get("head_dim", 0)
    heads, window, cap = op.get("heads", 0), op.get("window", 0), op.get("softcap", 0.0)
    tokens = q.shape[0]
    group = heads // keys.shape[0]
    ahead = np.subtract.outer(
        np.arange(position, position + tokens, dtype=np.int64),
        np.arange(position + tokens, dtype=np.int64),
    )
    hidden = (ahead < 0) | (ahead >= window) if window else ahead < 0
    out = np.empty((tokens, heads, dim))
    for h in range(heads):
        k, v = keys[h // group, : position + tokens], values[h // group, : position + tokens]
        scores = q.reshape(tokens, heads, dim)[:, h] @ k.T * op.get("scale", 1.0)
        scores = cap * np.tanh(scores / cap) if cap else scores
        scores = np.where(hidden, -np.inf, scores)
        weights = np.exp(scores - scores.max(axis=1, keepdims=True))
        out[:, h] = weights / weights.sum(axis=1, keepdims=True) @ v
    return out.reshape(tokens, -1).astype(np.float32)


def rows_of(count: Dim) -> str:
    """Which run-time count a leading extent stands for: "tokens" (T) or "rows" (R, logits)."""
    return "rows" if count == LOGITS_ROWS else "tokens"


_HEADS = {"heads": "head count", "head_dim": "extent of a head"}
OPS: dict[str, OpDef] = {
    "linear": OpDef("x W^T (+ bias)", 2, 3, _infer_linear, _linear),
    "quantize_dequantize": OpDef("f32 through nvfp4 and back, as a W4A4 checkpoint means it", 2, 2,
                                 _infer_fake_quantize, _fake_quantize, attrs={"format": "nvfp4"}),
    "quantize_nvfp4": OpDef("activations to nvfp4: calibrated global scale, block scales from the "
                            "data", 2, 2, _infer_quantize, _quantize),
    "embed": OpDef("rows of a table (times scale)", 2, 2, _infer_embed, _embed,
                   attrs={"scale": "factor, 1"}),
    "rmsnorm": OpDef("x * gamma / rms(x)", 2, 2, _infer_rmsnorm, _rmsnorm, attrs={"eps": "1e-6"}),
    "head_rmsnorm": OpDef("rmsnorm of each head (qk-norm)", 2, 2, _infer_head_rmsnorm,
                          _head_rmsnorm, attrs={**_HEADS, "eps": "1e-6"}),
    "add": OpDef("a + b", 2, 2, _infer_binary, _add),
    "silu_mul": OpDef("silu(gate) * up", 2, 2, _infer_binary, _silu_mul),
    "take_rows": OpDef("the rows whose logits are wanted", 2, 2, _infer_take_rows, _take_rows),
    "rope": OpDef("rotary embedding, half-rotation order", 3, 3, _infer_rope, _rope,
                  attrs={**_HEADS, "scale": "of cos and sin, 1"}),
    "kv_append": OpDef("rows into the cache at the step's position", 3, 3, _infer_kv_append,
                       _kv_append, inplace=(0,),
                       attrs={"cache_scale": "of rows in an FP8 cache"}),
    "attention": OpDef("causal attention over the cache, grouped heads, optional window", 4, 4,
                       _infer_attention, _attention,
                       attrs={**_HEADS, "kv_heads": "key heads", "scale": "of the scores",
                              "window": "keys seen, 0 = all",
                              "softcap": "c of c·tanh(score/c), 0 = none",
                              "k_scale": "of keys in an FP8 cache",
                              "v_scale": "of its values"}),
}  # fmt: skip
