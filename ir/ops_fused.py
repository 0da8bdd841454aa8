"""Fused ops of phase 30. Each means the composition it replaced, and its reference says so."""

from __future__ import annotations

import numpy as np

from . import numerics
from .errors import IRError
from .graph import Op, Value
from .numerics import F64, Array
from .opdef import Data, OpDef, activation, array, expect, f64, plain, result
from .ops_model import (
    append_rows,
    check_cache_scales,
    infer_matmul,
    rope_heads,
    weight_matrix,
)
from .types import TensorType, tensor

PROLOGUES = ("none", "rmsnorm", "silu_mul")
EPILOGUES = ("none", "gelu")
ROLES = ("x", "w", "gamma", "bias", "residual", "input_scale", "row_scale")
"""Operands of fused_linear. x and w come first; the others where they are present."""


def role(op: Op, name: str) -> Value | None:
    """The operand that plays `name` in a linear or fused_linear, or None."""
    roles = op.strs("roles") or ("x", "w", "bias")[: len(op.args)]
    return op.args[roles.index(name)] if name in roles else None


def unquantized(op: Op) -> Op:
    """A linear without its activation quantiser: what an exact kernel makes of a W4A4 linear."""
    if op.get("act", "f32") == "f32":
        return op
    kept = [(r, v) for r, v in zip(op.strs("roles"), op.args, strict=True) if r != "input_scale"]
    attrs = {**op.attrs, "roles": tuple(r for r, _ in kept), "act": "f32"}
    return Op(op.name, tuple(v for _, v in kept), op.outs, attrs, op.loc)


def _roles(op: Op) -> dict[str, TensorType]:
    roles = op.strs("roles")
    if len(roles) != len(op.args) or roles[:2] != ("x", "w") or not set(roles) <= set(ROLES):
        raise IRError(f"fused_linear: roles {roles} for {len(op.args)} operands; known {ROLES}")
    return {r: v.type for r, v in zip(roles, op.args, strict=True)}


def _infer_fused_linear(op: Op) -> TensorType:
    types, prologue = _roles(op), op.get("prologue", "none")
    if prologue not in PROLOGUES:
        raise IRError(f"fused_linear: prologue {prologue!r}, expected one of {PROLOGUES}")
    if (epilogue := op.get("epilogue", "none")) not in EPILOGUES:
        raise IRError(f"fused_linear: epilogue {epilogue!r}, expected one of {EPILOGUES}")
    x = activation(op, 0)
    width = x.last // 2 if prologue == "silu_mul" else x.last
    out = infer_matmul(op, tensor("f32", *x.shape[:-1], width), types["w"])
    if (prologue == "rmsnorm") != ("gamma" in types):
        raise IRError("fused_linear: gamma goes with prologue rmsnorm and only with it")
    if (op.get("act", "f32") == "nvfp4") != ("input_scale" in types):
        raise IRError("fused_linear: input_scale goes with act nvfp4 and only with it")
    if "residual" in types:
        _expect_alike(types["residual"], out)
    for vector in ("bias", "row_scale"):
        if vector in types:
            expect(op, vector, types[vector], tensor("f32", out.last))
    return out


def _expect_alike(residual: TensorType, out: TensorType) -> None:
    """Raises IRError for a residual of another shape; symbols are equal if a pass says so."""
    pairs = zip(residual.shape, out.shape, strict=False)
    known = [(a, b) for a, b in pairs if isinstance(a, int) and isinstance(b, int)]
    if len(residual.shape) != len(out.shape) or any(a != b for a, b in known):
        raise IRError(f"fused_linear: the residual is {residual}, the product {out}")


def _prologue(op: Op, named: dict[str, Data]) -> F64:
    x = f64(named["x"])
    kind = op.get("prologue", "none")
    if kind == "rmsnorm":
        x = numerics.rmsnorm(x, f64(named["gamma"]), op.get("eps", 1e-6))
    elif kind == "silu_mul":
        gate, up = np.split(x, 2, axis=-1)
        x = numerics.silu(gate) * up
    x = x.astype(np.float32)
    if op.get("act", "f32") == "f32":
        return x.astype(np.float64)
    scale = np.float32(array(named["input_scale"]).reshape(()))
    codes, sf = numerics.quantize_activation(x, scale)
    rows = np.full(x.shape[0], scale, np.float32)
    return numerics.dequantize_nvfp4(numerics.pack_codes(codes), sf, rows)


def _fused_linear(op: Op, args: list[Data]) -> Data:
    named = dict(zip(op.strs("roles"), args, strict=True))
    y = _prologue(op, named) @ weight_matrix(op.args[1].type, named["w"]).T
    if "row_scale" in named:
        y = y * f64(named["row_scale"])
    if "bias" in named:
        y = y + f64(named["bias"])
    if op.get("epilogue", "none") == "gelu":
        y = numerics.gelu(y)
    if "residual" in named:
        y = y + f64(named["residual"])
    return y.astype(np.float32)


# --- q/k norm, rope and the append of keys and values in one op ----------------------------------


def _infer_rope_append(op: Op) -> tuple[TensorType, ...]:
    heads, kv_heads, dim = op.get("heads", 0), op.get("kv_heads", 0), op.get("head_dim", 0)
    qkv, keys = activation(op, 0), plain(op, 1)
    expect(op, "width of qkv", qkv.last, (heads + 2 * kv_heads) * dim)
    expect(op, "key cache", (keys.static[0], keys.static[2]), (kv_heads, dim))
    expect(op, "value cache", plain(op, 2), keys)
    check_cache_scales(op, keys, "k_scale", "v_scale")
    expect(op, "inverse frequencies", plain(op, 4, "f32").static, (dim // 2,))
    if len(op.args) not in (5, 7):
        raise IRError("rope_append: q and k gammas come together")
    return result(op, qkv.count, heads * dim), keys, keys


def split_qkv(op: Op, args: list[Data]) -> tuple[Array, Array, Array]:
    """Rotated q, rotated k and v of a rope_append, each [T, heads * D], f32."""
    heads, kv_heads, dim = op.get("heads", 0), op.get("kv_heads", 0), op.get("head_dim", 0)
    cuts = np.cumsum([heads * dim, kv_heads * dim])
    q, k, v = np.split(f64(args[0]), cuts, axis=1)
    position, inv_freq, scale = int(array(args[3])), array(args[4]), op.get("scale", 1.0)
    if len(args) == 7:
        eps = op.get("eps", 1e-6)
        q, k = (
            numerics.rmsnorm(x.reshape(len(x), -1, dim), f64(g), eps).reshape(x.shape)
            for x, g in ((q, args[5]), (k, args[6]))
        )
    q = rope_heads(q, position, inv_freq, heads, scale)
    k = rope_heads(k, position, inv_freq, kv_heads, scale)
    return q.astype(np.float32), k.astype(np.float32), v.astype(np.float32)


def _rope_append(op: Op, args: list[Data]) -> tuple[Data, ...]:
    q, k, v = split_qkv(op, args)
    position = int(array(args[3]))
    keys = append_rows(array(args[1]), k, position, op.get("k_scale", 0.0))
    return q, keys, append_rows(array(args[2]), v, position, op.get("v_scale", 0.0))


OPS: dict[str, OpDef] = {
    "fused_linear": OpDef("[rmsnorm | silu_mul] -> [nvfp4 quantise] -> x W^T [* row scale] "
                          "[+ bias] [gelu] [+ residual]", 2, 7, _infer_fused_linear, _fused_linear,
                          attrs={"roles": "what each operand is", "prologue": "of x",
                                 "epilogue": "none or gelu, before the residual",
                                 "act": "f32 or nvfp4", "eps": "of rmsnorm"}),
    "rope_append": OpDef("qkv -> [qk-norm] -> rope; gives q and the caches with k and v appended",
                         5, 7, _infer_rope_append, _rope_append,
                         attrs={"heads": "q heads", "kv_heads": "k and v heads",
                                "head_dim": "extent of a head", "eps": "of qk-norm",
                                "scale": "of cos and sin",
                                "k_scale": "of keys in an FP8 cache",
                                "v_scale": "of its values"}, inplace=(None, 1, 2)),
}  # fmt: skip
