"""Weight layouts as byte permutations: what phase 20 asks for and kernels read.

Each layout has an inverse, and both are pure functions of bytes: no value is ever decoded and
encoded again (that is how an engine once clamped 448 to 240). Formulas: docs/numerics.md.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np

from .numerics import U8, Array, pack_codes, unpack_codes
from .types import PANEL_ROWS, SUPER_BLOCK_BYTES, SUPER_BLOCK_K, ceil_div

_SCALE_BYTES = 64


def _ue5m3_table() -> U8:
    """UE5M3 (unsigned, 5-bit exponent of bias 15) of each non-negative e4m3 byte, exact.

    Every e4m3, subnormals too, becomes a NORMAL number there: no kernel meets a denormal operand.
    """
    table = np.zeros(256, np.uint8)
    for byte in range(1, 127):
        value = float(np.uint8(byte).view(ml_dtypes.float8_e4m3fn))
        mantissa, exponent = np.frexp(value)
        table[byte] = (int(exponent) - 1 + 15) << 3 | int((mantissa * 2 - 1) * 8)
    return table


UE5M3_OF_E4M3 = _ue5m3_table()
E4M3_OF_UE5M3 = np.zeros(256, np.uint8)
E4M3_OF_UE5M3[UE5M3_OF_E4M3[:127]] = np.arange(127, dtype=np.uint8)


def pad_to(a: Array, *multiples: int) -> Array:
    """Zero-pad each axis up to a multiple; the array itself where nothing is missing."""
    extra = [-size % m for size, m in zip(a.shape, multiples, strict=True)]
    return np.pad(a, [(0, e) for e in extra]) if any(extra) else a


def _split_nibbles(packed: U8, axis: int) -> U8:
    """Low nibbles, then high nibbles, along a new axis."""
    return np.stack([np.bitwise_and(packed, 15), np.right_shift(packed, 4)], axis=axis)


def nvfp4_to_p16(packed: U8, block_scale: Array) -> U8:
    """Codes [N, K/2] and e4m3 scales [N, K/16] to super-blocks [N/16, K/64, 576].

    Bytes 0..63 hold UE5M3 scales (lane n: 4 blocks of row n); then for block j, half h: lane n,
    byte i = code of k = 16j + 8h + i (low nibble) and k + 4 (high nibble).
    """
    codes = pad_to(unpack_codes(packed), PANEL_ROWS, SUPER_BLOCK_K)
    panels, blocks = codes.shape[0] // PANEL_ROWS, codes.shape[1] // SUPER_BLOCK_K
    scales = pad_to(UE5M3_OF_E4M3[block_scale.view(np.uint8)], PANEL_ROWS, 4)
    out = np.empty((panels, blocks, SUPER_BLOCK_BYTES), np.uint8)
    by_lane = scales.reshape(panels, PANEL_ROWS, blocks, 4).transpose(0, 2, 1, 3)
    out[..., :_SCALE_BYTES] = by_lane.reshape(panels, blocks, _SCALE_BYTES)
    split = codes.reshape(panels, PANEL_ROWS, blocks, 4, 2, 2, 4)
    nibbles = split[..., 0, :] | split[..., 1, :] << 4
    by_lane = nibbles.transpose(0, 2, 3, 4, 1, 5)
    out[..., _SCALE_BYTES:] = by_lane.reshape(panels, blocks, -1)
    return out


def nvfp4_from_p16(super_blocks: U8, n: int, k: int) -> tuple[U8, Array]:
    """The inverse: packed codes [n, k/2] and e4m3 scales [n, k/16]."""
    panels, blocks, _ = super_blocks.shape
    scales = super_blocks[..., :_SCALE_BYTES].reshape(panels, blocks, PANEL_ROWS, 4)
    rows = E4M3_OF_UE5M3[scales].transpose(0, 2, 1, 3).reshape(panels * PANEL_ROWS, -1)
    nibbles = super_blocks[..., _SCALE_BYTES:].reshape(panels, blocks, 4, 2, PANEL_ROWS, 4)
    nibbles = nibbles.transpose(0, 4, 1, 2, 3, 5)
    codes = _split_nibbles(nibbles, axis=-2).reshape(panels * PANEL_ROWS, -1)
    codes = codes[:n, :k]
    scales = np.ascontiguousarray(rows[:n, : k // 16])
    return pack_codes(codes), scales.view(ml_dtypes.float8_e4m3fn)


def dense_to_p16(w: Array) -> Array:
    """[N, K] to [N/16, K, 16]: lane = output row, rows padded with zeros."""
    padded = pad_to(w, PANEL_ROWS, 1)
    panels = padded.reshape(-1, PANEL_ROWS, w.shape[1])
    return np.ascontiguousarray(panels.transpose(0, 2, 1))


def dense_from_p16(panels: Array, n: int) -> Array:
    """The inverse of `dense_to_p16`: [n, K]."""
    return panels.transpose(0, 2, 1).reshape(-1, panels.shape[1])[:n]


def scales_to_sfatom(block_scale: Array) -> Array:
    """e4m3 scales [M, K/16] to CUTLASS's 128x4 atoms [M/128, K/64, 512], zero-padded.

    offset(m, g) = ((m/128) * ceil(K/64) + g/4) * 512 + (m%32)*16 + ((m%128)/32)*4 + g%4
    (cutlass `Sm1xxBlockScaledConfig::SfAtom`).
    """
    padded = pad_to(block_scale, 128, 4)
    tiles_m, tiles_k = ceil_div(block_scale.shape[0], 128), padded.shape[1] // 4
    atoms = padded.reshape(tiles_m, 4, 32, tiles_k, 4).transpose(0, 3, 2, 1, 4)
    return np.ascontiguousarray(atoms).reshape(tiles_m, tiles_k, 512)


def scales_from_sfatom(atoms: Array, m: int, groups: int) -> Array:
    """The inverse: [m, groups]."""
    tiles_m, tiles_k, _ = atoms.shape
    rows = atoms.reshape(tiles_m, tiles_k, 32, 4, 4).transpose(0, 3, 2, 1, 4)
    return rows.reshape(tiles_m * 128, tiles_k * 4)[:m, :groups]
