"""The CUDA weight layout against its formula, and against the kernels' own decoding of a word."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from halfbyte.ir import layouts, layouts_cuda, numerics

Weight = tuple[NDArray[np.uint8], NDArray[Any]]


def random_weight(n: int, k: int, seed: int, least_scale: int = 1) -> Weight:
    rng = np.random.default_rng(seed)
    packed = rng.integers(0, 256, (n, k // 2), np.uint8)
    scales = rng.integers(least_scale, 127, (n, k // 16), np.uint8)
    return packed, scales.view(ml_dtypes.float8_e4m3fn)


def decode_word(word: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """nvfp4_decode.cuh `decode_word`: the four bf16x2 of each word, [..., 4]."""
    mask = np.uint32(0x81C081C0)
    return np.stack(
        [
            word & mask,
            (word * np.uint32(8)) & mask,
            ((word & np.uint32(0x20072007)) * np.uint32(0x44)) & mask,
            ((word >> np.uint32(3) & np.uint32(0x09C009C0)) * np.uint32(0x11)) & mask,
        ],
        axis=-1,
    )


@pytest.mark.parametrize("shape", [(37, 80), (130, 48), (128, 64)])
def test_every_code_is_where_the_layout_says(shape: tuple[int, int]) -> None:
    n, k = shape
    packed, scales = random_weight(n, k, 0)
    codes, _ = layouts_cuda.nvfp4_to_wgmma(packed, scales)
    words = codes.view("<u4").reshape(-1)
    steps = -(-k // 64)
    assert words.size == -(-n // 128) * steps * 1024
    seen = np.zeros_like(words)
    for row in range(n):
        for col in range(k):
            code = int(packed[row, col // 2]) >> (col % 2 * 4) & 15
            r, c = row % 128, col % 64
            thread = r % 64 // 16 * 32 + r % 16 // 2 * 4 + c % 8 // 2
            tile = row // 128 * steps + col // 64
            at = ((tile * 2 + r // 64) * 128 + thread) * 4 + c // 16
            pair = c % 16 // 8 * 2 + r % 2
            for bit, place in enumerate(layouts_cuda.CODE_BITS[pair]):
                where = place + 16 * (c % 2)
                assert int(words[at]) >> where & 1 == code >> bit & 1
                seen[at] |= np.uint32(1 << where)
    assert not (words & ~seen).any(), "padding must be zero"


def test_the_kernels_decoding_gives_the_fragments_of_mma_m16n8k16() -> None:
    """Rows g and g + 8 of the instruction are rows 2g and 2g + 1 of the weight."""
    packed, scales = random_weight(128, 64, 1)
    codes, _ = layouts_cuda.nvfp4_to_wgmma(packed, scales)
    fragments = decode_word(codes.view("<u4").reshape(2, 4, 8, 4, 4))  # [half][warp][g][t][k16]
    values = fragments.view(np.uint16).view(ml_dtypes.bfloat16).astype(np.float64) * 2.0**126
    values = values.reshape(2, 4, 8, 4, 4, 4, 2)
    weight = numerics.E2M1[numerics.unpack_codes(packed)].astype(np.float64)
    weight = weight.reshape(2, 4, 16, 4, 16)  # [half][warp][row][k16][k]
    for g in range(8):
        for t in range(4):
            for register in range(4):  # PTX ISA, matrix fragments for mma.m16n8k16: a0..a7 in pairs
                row, k = 2 * g + register % 2, 2 * t + register // 2 * 8
                expected = weight[:, :, row, :, k : k + 2]
                assert np.array_equal(values[:, :, g, t, :, register], expected)


def test_the_kernels_decoding_of_scales_is_exact_but_for_zero() -> None:
    """nvfp4_decode.cuh `lifted_scales`: bits of f16, to those of a bf16 that is 2^118 as large."""
    scales = np.arange(1, 0x7F, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn)
    halves = scales.astype(np.float16).view(np.uint16)
    lifted = ((halves >> 3) + np.uint16(0x7300)).view(ml_dtypes.bfloat16)
    assert np.array_equal(lifted.astype(np.float64), scales.astype(np.float64) * 2.0**118)


def test_blocks_whose_scale_is_zero_have_zero_codes() -> None:
    packed, scales = random_weight(130, 96, 3, least_scale=0)
    scales[5, 2] = scales[128] = 0
    codes, atoms = layouts_cuda.nvfp4_to_wgmma(packed, scales)
    back, back_scales = layouts_cuda.nvfp4_from_wgmma(codes, atoms, 130, 96)
    void = np.repeat(scales.astype(np.float32) == 0, 8, axis=1)
    assert np.array_equal(back, np.where(void, 0, packed))
    assert np.array_equal(back_scales.view(np.uint8), scales.view(np.uint8))


def test_scales_are_sfatom() -> None:
    packed, scales = random_weight(200, 192, 2)
    _, atoms = layouts_cuda.nvfp4_to_wgmma(packed, scales)
    assert np.array_equal(atoms.view(np.uint8), layouts.scales_to_sfatom(scales).view(np.uint8))


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 300), st.integers(1, 12), st.integers(0, 2**32 - 1))
def test_it_is_a_permutation_of_bits(n: int, blocks: int, seed: int) -> None:
    packed, scales = random_weight(n, blocks * 16, seed)
    codes, atoms = layouts_cuda.nvfp4_to_wgmma(packed, scales)
    assert np.unpackbits(codes).sum() == np.unpackbits(packed).sum()
    back, back_scales = layouts_cuda.nvfp4_from_wgmma(codes, atoms, n, blocks * 16)
    assert np.array_equal(back, packed)
    assert np.array_equal(back_scales.view(np.uint8), scales.view(np.uint8))
