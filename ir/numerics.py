"""The definition of halfbyte's arithmetic: element codes, rounding, quantisers.

Every kernel on every target is measured against these functions; they are tested against ml_dtypes,
the producers' own files and the tie tables of the specs, never against themselves.
Sources: OCP MX 1.0 (e2m1, e8m0), OCP FP8 (e4m3), PTX ISA `cvt.rn.satfinite.e2m1x2`, ModelOpt
`nvfp4_tensor.py`, vLLM `nvfp4_emulation_utils.py` (`ref_nvfp4_quant`).
"""

from __future__ import annotations

import math
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
U8 = NDArray[np.uint8]
Array = NDArray[Any]

NUMPY_DTYPES: dict[str, np.dtype[Any]] = {
    "f64": np.dtype(np.float64), "f32": np.dtype(np.float32), "f16": np.dtype(np.float16),
    "bf16": np.dtype(ml_dtypes.bfloat16), "f8e4m3": np.dtype(ml_dtypes.float8_e4m3fn),
    "f8e5m2": np.dtype(ml_dtypes.float8_e5m2), "f8e8m0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "i64": np.dtype(np.int64), "i32": np.dtype(np.int32), "i16": np.dtype(np.int16),
    "i8": np.dtype(np.int8), "u64": np.dtype(np.uint64), "u32": np.dtype(np.uint32),
    "u16": np.dtype(np.uint16), "u8": np.dtype(np.uint8), "bool": np.dtype(np.bool_),
    "f8e4m3fnuz": np.dtype(ml_dtypes.float8_e4m3fnuz),
    "f8e5m2fnuz": np.dtype(ml_dtypes.float8_e5m2fnuz),
    "f4e2m1": np.dtype(ml_dtypes.float4_e2m1fn), "i4": np.dtype(ml_dtypes.int4),
    "u4": np.dtype(ml_dtypes.uint4), "i2": np.dtype(ml_dtypes.int2),
    "u2": np.dtype(ml_dtypes.uint2),
}  # fmt: skip
"""The numpy dtype of each IR dtype."""

BLOCK = 16
E2M1_MAX = 6.0
E4M3_MAX = 448.0
GLOBAL_MAX = E2M1_MAX * E4M3_MAX
"""2688: an NVFP4 tensor of absolute maximum `a` has global scale `a / 2688`."""

E2M1: F32 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
"""Value of each 4-bit code: sign in bit 3."""


def e2m1_codes(x: F32) -> U8:
    """Codes of `x`: nearest, ties to the even code, saturating at 6; -0 becomes code 8.

    Codes are half units up to 2, units up to 4, double units up to 6, so in each binade e a code is
    rint(|x| * 2^(1-e)) + 2e, and rint's ties to even are ties to the even code.
    """
    magnitude = np.minimum(np.abs(x), np.float32(E2M1_MAX))
    from_two, from_four = magnitude >= 2, magnitude >= 4
    magnitude *= np.float32(2) - from_two - np.float32(0.5) * from_four
    codes = np.rint(magnitude).astype(np.uint8)
    codes += 2 * from_two.view(np.uint8) + 2 * from_four.view(np.uint8)
    codes |= np.signbit(x).astype(np.uint8) << 3
    return codes


def e4m3_saturate(x: F32) -> Array:
    """f32 to e4m3, nearest even, clamped to +-448 first (a plain cast makes NaN from 465 on)."""
    return np.clip(x, -E4M3_MAX, E4M3_MAX).astype(ml_dtypes.float8_e4m3fn)


def kv_codes(rows: Array, scale: float) -> Array:
    """Rows of keys or values as an FP8 cache holds them: e4m3(row / scale), in f32, saturating.

    A row is then code * scale (vLLM `scaled_convert`, ModelOpt's k_scale and v_scale).
    """
    with np.errstate(over="ignore"):  # saturates below
        return e4m3_saturate(rows.astype(np.float32) / np.float32(scale))


def pack_codes(codes: U8) -> U8:
    """[..., K] codes to [..., K/2] bytes: even k in the low nibble."""
    return np.bitwise_or(codes[..., 0::2], np.left_shift(codes[..., 1::2], np.uint8(4)))


def unpack_codes(packed: U8) -> U8:
    """[..., K/2] bytes to [..., K] codes."""
    out = np.empty((*packed.shape[:-1], packed.shape[-1] * 2), np.uint8)
    np.bitwise_and(packed, 15, out=out[..., 0::2])
    np.right_shift(packed, 4, out=out[..., 1::2])
    return out


def dequantize_nvfp4(packed: U8, block_scale: Array, row_scale: F32) -> F64:
    """e2m1 x e4m3 x f32, exact in f64: packed [N, K/2], block_scale [N, K/16], row_scale [N]."""
    values = E2M1[unpack_codes(packed)].reshape(*block_scale.shape, BLOCK)
    exact = values * block_scale.astype(np.float32)[..., None]
    flat = exact.reshape(packed.shape[0], -1).astype(np.float64)
    return flat * row_scale.astype(np.float64)[:, None]


def quantize_activation(x: F32, input_scale: np.float32) -> tuple[U8, Array]:
    """The NVFP4 activation quantiser: codes [T, K] and e4m3 block scales [T, K/16].

    With G = 1 / input_scale, per block of 16: scale = e4m3(G * (amax * f32(1/6))), code =
    e2m1(x * (1 / (scale * (1 / G)))), zero where the scale is zero; all in f32
    (vLLM `ref_nvfp4_quant`; nearest even, saturating).
    """
    g = np.float32(1) / np.float32(input_scale)
    blocks = x.astype(np.float32).reshape(x.shape[0], -1, BLOCK)
    amax = np.abs(blocks).max(axis=-1)
    scale = e4m3_saturate(g * (amax * np.float32(1 / 6)))
    decoded = scale.astype(np.float32)
    with np.errstate(divide="ignore"):
        inverse = np.float32(1) / (decoded * (np.float32(1) / g))
    inverse[decoded == 0] = 0
    codes = e2m1_codes(np.multiply(blocks, inverse[..., None], dtype=np.float32))
    return codes.reshape(x.shape), scale


def quantize_weight(w: F32) -> tuple[U8, Array, np.float32]:
    """NVFP4 weights as ModelOpt makes them: packed [N, K/2], e4m3 [N, K/16], f32 scale.

    global = amax / 2688; block scale = e4m3(clamp(bmax / (6 * global), 2^-9, 448)), 1 for a zero
    block; code = e2m1(w / (scale * global)). Source: modelopt `NVFP4QTensor.quantize`.
    """
    blocks = w.reshape(w.shape[0], -1, BLOCK)
    bmax = np.abs(blocks).max(axis=-1)
    amax = bmax.max(initial=np.float32(0))
    scale2 = np.float32(amax / np.float32(GLOBAL_MAX)) if amax > 0 else np.float32(1)
    scale = bmax / (np.float32(E2M1_MAX) * scale2)
    scale[scale == 0] = 1
    scale = e4m3_saturate(np.clip(scale, np.float32(2**-9), np.float32(E4M3_MAX)))
    unit = scale.astype(np.float32) * scale2
    codes = e2m1_codes(np.divide(blocks, unit[..., None], dtype=np.float32))
    return pack_codes(codes.reshape(w.shape)), scale, scale2


def silu(x: F64) -> F64:
    """x / (1 + exp(-x)), without overflow for large negative x."""
    return x / (1 + np.exp(-np.clip(x, -700, None)))


def gelu(x: F64) -> F64:
    """x / 2 * (1 + erf(x / sqrt(2)))."""
    erf = np.frompyfunc(math.erf, 1, 1)
    return x / 2 * (1 + np.asarray(erf(x / math.sqrt(2)), np.float64))


def rmsnorm(x: F64, gamma: F64, eps: float) -> F64:
    """x * gamma / sqrt(mean(x^2) + eps) over the last axis."""
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * gamma


def rotate_half(x: F64, angles: F64, scale: float) -> F64:
    """RoPE on [T, H, D] with angles [T, D/2]: pairs (i, i + D/2), cos and sin scaled."""
    cos, sin = np.cos(angles)[:, None] * scale, np.sin(angles)[:, None] * scale
    low, high = np.split(x, 2, axis=-1)
    return np.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1)
