"""How far a kernel may stray from the interpreter: bounds derived from its order of summation.

`u` = 2^-24 is the rounding unit of f32. A sum of k products in f32 strays by at most k*u*S with
S = sum |x||w|, and for independent roundings by about sqrt(k)*u*S; a kernel sums in 16 or more
interleaved chains, so we allow (2*sqrt(k) + 16) * u * S. Transcendentals count 16 units. A kernel
that reads its activations to `precision` p (relative to the largest of a block of 16) adds p * S',
S' with the block's largest |x| in the place of each. W4A4 kernels may also round an activation that
stands on the edge between two codes to the other side where a norm or silu comes first: that adds
the spread of the quantiser over those few units.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ..ir import numerics
from ..ir.graph import Op
from ..ir.numerics import F64
from ..ir.opdef import Data, array, f64
from ..ir.ops_fused import split_qkv
from ..ir.ops_model import weight_matrix

UNIT = 2.0**-24
_TRANSCENDENTAL = 16 * UNIT
_STEEPEST_GELU = 1.13  # the largest slope of gelu, at sqrt(2)
_FLOOR = 1e-30  # where everything is zero, denormals may differ

Bound = F64
"""Largest allowed |kernel - interpreter|, broadcastable to the result."""


def tolerance(op: Op, args: list[Data], results: tuple[Data, ...], precision: float) -> list[Bound]:
    """One bound for each result of `op` on `args`, which gave `results`."""
    bounds = RULES[op.name](op, args, results, precision)
    return [np.asarray(bound + _FLOOR) for bound in bounds]


def _rounding(k: int) -> float:
    return (2 * np.sqrt(k) + 16) * UNIT


def _one_rounding(
    op: Op, args: list[Data], results: tuple[Data, ...], precision: float
) -> list[F64]:
    return [2 * UNIT * np.abs(f64(r)) for r in results]


def _exact(op: Op, args: list[Data], results: tuple[Data, ...], precision: float) -> list[F64]:
    return [np.zeros(()) for _ in results]


# --- linear --------------------------------------------------------------------------------------


def _roles(op: Op, args: list[Data]) -> dict[str, Data]:
    names = op.strs("roles") or ("x", "w", "bias")[: len(args)]
    return dict(zip(names, args, strict=True))


def _after_prologue(op: Op, named: dict[str, Data]) -> F64:
    x, kind = f64(named["x"]), op.get("prologue", "none")
    if kind == "rmsnorm":
        return numerics.rmsnorm(x, f64(named["gamma"]), op.get("eps", 1e-6))
    if kind == "silu_mul":
        gate, up = np.split(x, 2, axis=1)
        return numerics.silu(gate) * up
    return x


def _quantized(x: F64, scale: np.float32) -> F64:
    codes, sf = numerics.quantize_activation(x.astype(np.float32), scale)
    rows = np.full(x.shape[0], scale, np.float32)
    return numerics.dequantize_nvfp4(numerics.pack_codes(codes), sf, rows)


def _block_largest(x: F64) -> F64:
    """|x| with each value replaced by the largest of its block of 16."""
    rows, k = x.shape
    padded = np.zeros((rows, -(-k // 16) * 16))
    padded[:, :k] = np.abs(x)
    blocks = padded.reshape(rows, -1, 16)
    return np.broadcast_to(blocks.max(axis=2, keepdims=True), blocks.shape).reshape(rows, -1)[:, :k]


def _linear(op: Op, args: list[Data], results: tuple[Data, ...], precision: float) -> list[F64]:
    named = _roles(op, args)
    w = np.abs(weight_matrix(op.args[1].type, named["w"]))
    x = _after_prologue(op, named)
    is_gelu = op.get("epilogue", "none") == "gelu"
    error = _rounding(x.shape[1]) + (_TRANSCENDENTAL if is_gelu else 0)
    if op.get("act", "f32") == "nvfp4":
        scale = np.float32(array(named["input_scale"]).reshape(()))
        below, at, above = (_quantized(x * (1 + d), scale) for d in (-error, 0, error))
        spread = np.maximum(np.abs(above - at), np.abs(below - at))
        if op.get("prologue", "none") == "none":
            spread = np.zeros_like(spread)
        read = np.abs(at) * error + spread
    else:
        read = np.abs(x) * error + _block_largest(x) * precision
    bound = read @ w.T
    if "row_scale" in named:
        bound = bound * np.abs(f64(named["row_scale"]))
    for term in ("bias", "residual"):
        if term in named:
            bound = bound + 2 * UNIT * np.abs(f64(named[term]))
    bound = bound * _STEEPEST_GELU if is_gelu else bound
    return [bound + 4 * UNIT * np.abs(f64(results[0]))]


# --- rows ----------------------------------------------------------------------------------------


def _norm(op: Op, args: list[Data], results: tuple[Data, ...], precision: float) -> list[F64]:
    return [_rounding(array(args[1]).shape[-1]) * np.abs(f64(results[0]))]


def _silu_mul(op: Op, args: list[Data], results: tuple[Data, ...], precision: float) -> list[F64]:
    return [_TRANSCENDENTAL * np.abs(f64(results[0])) + UNIT * np.abs(f64(args[1]))]


# --- rotation and attention ----------------------------------------------------------------------


def _turned(x: F64, dim: int, scale: float, unit: float) -> F64:
    """A rotation mixes two numbers of a head: its error is relative to the larger."""
    low, high = np.split(np.abs(x).reshape(x.shape[0], -1, dim), 2, axis=2)
    both = np.concatenate([low + high] * 2, axis=2) * abs(scale)
    return both.reshape(x.shape) * unit


def _rope(op: Op, args: list[Data], results: tuple[Data, ...], precision: float) -> list[F64]:
    dim, scale = op.get("head_dim", 0), op.get("scale", 1.0)
    return [_turned(f64(args[0]), dim, scale, _TRANSCENDENTAL)]


def _rope_append(
    op: Op, args: list[Data], results: tuple[Data, ...], precision: float
) -> list[F64]:
    heads, kv_heads, dim = op.get("heads", 0), op.get("kv_heads", 0), op.get("head_dim", 0)
    scale, eps = op.get("scale", 1.0), op.get("eps", 1e-6)
    cuts = [heads * dim, (heads + kv_heads) * dim]
    q, k, _ = np.split(f64(args[0]), cuts, axis=1)
    unit = _TRANSCENDENTAL
    if len(args) == 7:
        q, k = (
            numerics.rmsnorm(x.reshape(len(x), -1, dim), f64(g), eps).reshape(x.shape)
            for x, g in ((q, args[5]), (k, args[6]))
        )
        unit += _rounding(dim)
    turned = [_turned(x, dim, scale, unit) for x in (q, k)]
    bound = turned[1]
    if code_scale := op.get("k_scale", 0.0):
        bound = _straddled(f64(split_qkv(op, args)[1]), bound, code_scale)
    # Cache rows [head, token, dim] of the tokens of this step; older rows are not looked at.
    return [turned[0], by_head(bound, kv_heads), np.zeros(())]


def _straddled(x: F64, error: F64, scale: float) -> F64:
    """How far the FP8 code of x may be from that of x +- error: zero but where an edge between two
    codes lies within.
    """
    below, at, above = (f64(numerics.kv_codes(x + d, scale)) for d in (-error, 0, error))
    return np.maximum(np.abs(above - at), np.abs(below - at))


def by_head(rows: F64, heads: int) -> F64:
    """[T, H * D] as [H, T, D]."""
    return rows.reshape(rows.shape[0], heads, -1).swapaxes(0, 1)


def _attention(op: Op, args: list[Data], results: tuple[Data, ...], precision: float) -> list[F64]:
    heads, kv_heads, dim = op.get("heads", 0), op.get("kv_heads", 0), op.get("head_dim", 0)
    q, keys, values = map(f64, args[:3])
    keys, values = keys * op.get("k_scale", 1.0), values * op.get("v_scale", 1.0)
    group = heads // kv_heads
    by_query = np.abs(q).reshape(q.shape[0], kv_heads, group, dim)
    scores = np.einsum("tkgd,kcd->tkg", by_query, np.abs(keys).max(axis=1, keepdims=True))
    # An error e of a score moves its weight by a factor exp(e); weights are normed to one.
    error = 2 * _rounding(dim) * np.abs(op.get("scale", 1.0)) * scores
    error = error + _TRANSCENDENTAL * op.get("softcap", 0.0)
    largest = np.abs(values).max(axis=1)
    relative = np.expm1(np.minimum(2 * error, 1)) + _rounding(keys.shape[1]) + _TRANSCENDENTAL
    relative = relative + precision  # to which the weights are rounded before they meet the values
    bound = relative[..., None] * largest[None, :, None, :]
    return [bound.reshape(q.shape)]


_Rule = Callable[[Op, list[Data], tuple[Data, ...], float], list[F64]]
RULES: dict[str, _Rule] = {
    "linear": _linear,
    "fused_linear": _linear,
    "embed": _one_rounding,
    "rmsnorm": _norm,
    "head_rmsnorm": _norm,
    "add": _one_rounding,
    "silu_mul": _silu_mul,
    "take_rows": _exact,
    "rope": _rope,
    "kv_append": _exact,
    "rope_append": _rope_append,
    "attention": _attention,
}
