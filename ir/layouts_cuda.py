"""Weight layouts of the CUDA targets, as permutations of bits.

`sfatom128x4`: what the block-scaled tensor cores of sm_120 read, through CUTLASS or our own
kernels: codes row by row, scales in CUTLASS's atoms.
`wgmma128x64`: what a warp needs of 16 rows x 64 k as A operand of m16n8k16 (and, four warps side
by side, of wgmma m64nNk16) is 512 contiguous bytes, and each code's bits stand where bf16 wants
them or a few shifts away. Kernels: codegen/templates/cuda/nvfp4_decode.cuh.jinja.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .layouts import pad_to, scales_from_sfatom, scales_to_sfatom
from .numerics import BLOCK, U8, Array, pack_codes
from .types import CODE_ROW_K, TILE_K, TILE_ROWS

# Bits of a half word that hold bits 0..3 (m, e, e, s) of the code of pair 0, 1, 2, 3.
CODE_BITS = ((6, 7, 8, 15), (3, 4, 5, 12), (0, 1, 2, 13), (9, 10, 11, 14))

# Axes of a code's place: a tile's 128 rows are [half][warp][g][odd row] and its 64 k are
# [k16 step][upper eight][t][odd k]; pair = 2 * (upper eight) + (odd row); half word = odd k.
_ROWS, _COLUMNS = (2, 4, 8, 2), (4, 2, 4, 2)
_FROM_WORDS = (0, 2, 3, 4, 8, 1, 6, 7, 5, 9)


def _spread(pair: int) -> NDArray[np.uint32]:
    """Of each packed byte (k even low, k odd high), the word with its two codes in place."""
    codes = np.arange(256, dtype=np.uint32)
    word = np.zeros(256, np.uint32)
    for bit, place in enumerate(CODE_BITS[pair]):
        word |= (codes >> bit & 1) << place | (codes >> (4 + bit) & 1) << (16 + place)
    return word


_SPREAD = tuple(_spread(pair) for pair in range(4))


def nvfp4_to_sfatom(packed: U8, block_scale: Array) -> tuple[U8, Array]:
    """Codes [N, K/2] and e4m3 scales [N, K/16] to sfatom128x4: codes [N, ceil32(K)/2], scales
    [N/128, K/64, 512]. Padding is zero.
    """
    return pad_to(packed, 1, CODE_ROW_K // 2), scales_to_sfatom(block_scale)


def nvfp4_from_sfatom(codes: U8, atoms: Array, n: int, k: int) -> tuple[U8, Array]:
    """The inverse: packed codes [n, k/2] and e4m3 scales [n, k/16]."""
    return codes[:, : k // 2], scales_from_sfatom(atoms, n, k // 16)


def _without_void(packed: U8, block_scale: Array) -> U8:
    """`packed`, with zero codes where the scale of a block is zero."""
    void = block_scale.view(np.uint8) == 0
    if not void.any():
        return packed
    blocks = packed.reshape(*void.shape, BLOCK // 2)
    return np.where(void[..., None], np.uint8(0), blocks).reshape(packed.shape)


def nvfp4_to_wgmma(packed: U8, block_scale: Array) -> tuple[U8, Array]:
    """Codes [N, K/2] and e4m3 scales [N, K/16] to `wgmma128x64` codes and SfAtom scales.

    Codes: u8 [N/128, K/64, 2, 128, 16], 16 bytes = 4 little-endian words for each half tile of 64
    rows and thread (32 * warp + 4 * g + t) of a warpgroup. Word w holds columns 16w + 2t + {0, 1}
    (low, high half word) of rows 16 * warp + 2g (pair 0) and + 1 (pair 1), and 8 columns further
    on (pairs 2, 3), bits by CODE_BITS. Scales: e4m3 [N/128, K/64, 512]. Padding is zero, and so are
    the codes of a block whose scale is zero: the kernels' way to read a scale knows no zero.
    """
    padded = pad_to(_without_void(packed, block_scale), TILE_ROWS, TILE_K // 2)
    tiles, steps = padded.shape[0] // TILE_ROWS, padded.shape[1] * 2 // TILE_K
    codes = padded.reshape(tiles, *_ROWS, steps, *_COLUMNS[:3])
    # now [tile, half, warp, g, odd row, step, k16 step, upper eight, t]: a byte is both odd k
    joined = np.zeros((tiles, 2, 4, 8, steps, 4, 4), np.uint32)
    for pair, spread in enumerate(_SPREAD):
        joined |= np.take(spread, codes[:, :, :, :, pair % 2, :, :, pair // 2], mode="clip")
    placed = joined.transpose(0, 4, 1, 2, 3, 6, 5)  # [tile, step, half, warp, g, t, k16 step]
    words = np.ascontiguousarray(placed, "<u4").view(np.uint8)
    words = words.reshape(tiles, steps, 2, TILE_ROWS, 16)
    return words, scales_to_sfatom(block_scale)


def nvfp4_from_wgmma(codes: U8, atoms: Array, n: int, k: int) -> tuple[U8, Array]:
    """The inverse but for codes without effect: packed codes [n, k/2], e4m3 scales [n, k/16]."""
    tiles, steps = codes.shape[:2]
    halves: NDArray[np.uint16] = codes.view("<u2").reshape(tiles, steps, 2, TILE_ROWS, 4, 2)
    pairs = np.zeros((*halves.shape[:-1], 4, 2), np.uint8)
    for pair, places in enumerate(CODE_BITS):
        for bit, place in enumerate(places):
            pairs[..., pair, :] |= ((halves >> place & 1) << bit).astype(np.uint8)
    placed = pairs.reshape(tiles, steps, 2, 4, 8, 4, 4, 2, 2, 2).transpose(_FROM_WORDS)
    rows = placed.reshape(tiles * TILE_ROWS, steps * TILE_K)[:n, :k]
    return pack_codes(rows), scales_from_sfatom(atoms, n, k // 16)
