"""numerics.py against ml_dtypes, the tie tables of the specs, and the producers' own files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from halfbyte.frontend import open_checkpoint
from halfbyte.ir import layouts, numerics

TIES = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0]


def neighbours(values: list[float]) -> NDArray[np.float32]:
    x = np.array(values, np.float32)
    up, down = np.nextafter(x, np.float32(np.inf)), np.nextafter(x, np.float32(-np.inf))
    return np.concatenate([x, up, down, -x, -up, -down])


def test_e2m1_codes_equal_ml_dtypes_at_every_tie_and_beside_it() -> None:
    x = np.concatenate([neighbours(TIES), np.linspace(-7, 7, 20001, dtype=np.float32)])
    expected = x.astype(ml_dtypes.float4_e2m1fn).view(np.uint8)
    assert np.array_equal(numerics.e2m1_codes(x), expected)


def test_e2m1_values_are_those_of_the_spec() -> None:
    assert numerics.E2M1[:8].tolist() == [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    assert np.signbit(numerics.E2M1[8])


@pytest.mark.parametrize(
    ("value", "byte"),
    [(448, 0x7E), (300, 0x79), (256, 0x78), (240, 0x77), (1e9, 0x7E), (2**-9, 0x01), (2**-11, 0)],
)
def test_e4m3_saturates_and_keeps_its_boundaries(value: float, byte: int) -> None:
    assert numerics.e4m3_saturate(np.array([value], np.float32)).view(np.uint8)[0] == byte


def test_activation_quantiser_follows_the_reference_form() -> None:
    """Element by element, in f32, as vLLM's ref_nvfp4_quant is written."""
    rng = np.random.default_rng(3)
    x = (rng.standard_normal((5, 64)) * np.exp(rng.uniform(-9, 5, (5, 1)))).astype(np.float32)
    x[0, :16] = 0
    input_scale = np.float32(0.0137)
    codes, scales = numerics.quantize_activation(x, input_scale)
    g = np.float32(1) / input_scale
    f = np.float32
    for t in range(x.shape[0]):
        for b in range(4):
            block = x[t, 16 * b : 16 * b + 16]
            scale = f(np.clip(g * (f(np.abs(block).max()) * f(1 / 6)), -448, 448))
            stored = scale.astype(ml_dtypes.float8_e4m3fn)
            decoded = f(stored)
            inverse = f(1) / (decoded * (f(1) / g)) if decoded else f(0)
            wanted = np.clip(block * inverse, -6, 6).astype(ml_dtypes.float4_e2m1fn)
            assert scales[t, b] == stored
            assert np.array_equal(codes[t, 16 * b : 16 * b + 16], wanted.view(np.uint8))


def test_weight_quantiser_reproduces_modelopts_bytes(shared: Path) -> None:
    """The bytes ModelOpt wrote, from its own dequantised weights: a quantiser's fixed point.

    Re-quantising exact NVFP4 values must give the same scales and codes (but for the sign of zero).
    """
    checkpoint = open_checkpoint(shared / "models/tiny/llama_untied-modelopt")
    name = "model.layers.0.mlp.down_proj"
    packed = checkpoint.read(f"{name}.weight")
    scale = checkpoint.read(f"{name}.weight_scale")
    scale2 = np.float32(checkpoint.read(f"{name}.weight_scale_2").reshape(()))
    rows = np.full(packed.shape[0], scale2, np.float32)
    w = numerics.dequantize_nvfp4(packed, scale, rows).astype(np.float32)
    ours, our_scale, our_scale2 = numerics.quantize_weight(w)
    assert our_scale2 == pytest.approx(float(scale2), rel=1e-6)
    full = np.abs(w.reshape(*scale.shape, 16)).max(-1) == 6 * scale.astype(np.float32) * scale2
    assert full.mean() > 0.5  # blocks whose maximum is coded as 6 fix the scale
    assert np.array_equal(our_scale.view(np.uint8)[full], scale.view(np.uint8)[full])
    values = numerics.E2M1[numerics.unpack_codes(ours)].reshape(*full.shape, 16)
    assert np.array_equal(
        values[full], numerics.E2M1[numerics.unpack_codes(packed)].reshape(*full.shape, 16)[full]
    )


@st.composite
def weights(draw: st.DrawFn) -> tuple[NDArray[np.uint8], NDArray[Any]]:
    n, blocks = draw(st.integers(1, 70)), draw(st.integers(1, 9))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    packed = rng.integers(0, 256, (n, blocks * 8), np.uint8)
    scales = rng.integers(0, 127, (n, blocks), np.uint8).view(ml_dtypes.float8_e4m3fn)
    return packed, scales


@settings(max_examples=30, deadline=None)
@given(weights())
def test_p16_is_a_permutation_of_bytes(weight: tuple[NDArray[np.uint8], NDArray[Any]]) -> None:
    packed, scales = weight
    n, k = packed.shape[0], packed.shape[1] * 2
    back, back_scales = layouts.nvfp4_from_p16(layouts.nvfp4_to_p16(packed, scales), n, k)
    assert np.array_equal(back, packed)
    assert np.array_equal(back_scales.view(np.uint8), scales.view(np.uint8))


def test_p16_places_every_code_where_the_layout_says() -> None:
    rng = np.random.default_rng(0)
    n, k = 37, 80
    packed = rng.integers(0, 256, (n, k // 2), np.uint8)
    scales = rng.integers(0, 127, (n, k // 16), np.uint8).view(ml_dtypes.float8_e4m3fn)
    blocks = layouts.nvfp4_to_p16(packed, scales)
    for row in range(n):
        for col in range(k):
            code = packed[row, col // 2] >> (4 if col % 2 else 0) & 15
            j, h, i = col % 64 // 16, col % 16 // 8, col % 8
            byte = blocks[row // 16, col // 64, 64 + j * 128 + h * 64 + row % 16 * 4 + i % 4]
            assert (byte >> 4 if i >= 4 else byte & 15) == code
        for block in range(k // 16):
            stored = blocks[row // 16, block // 4, row % 16 * 4 + block % 4]
            value = np.array(int(stored) << 7, np.uint16).view(np.float16)  # f16 = UE5M3 << 7
            assert np.float32(value) == np.float32(scales[row, block])


@pytest.mark.parametrize("shape", [(1, 1), (128, 4), (576, 36), (192, 36), (300, 7), (1536, 36)])
def test_sfatom_offsets_are_cutlass(shape: tuple[int, int]) -> None:
    m, groups = shape
    rng = np.random.default_rng(1)
    scales = rng.integers(0, 127, shape, np.uint8).view(ml_dtypes.float8_e4m3fn)
    flat = layouts.scales_to_sfatom(scales).reshape(-1).view(np.uint8)
    r, g = np.meshgrid(np.arange(m), np.arange(groups), indexing="ij")
    tiles = -(-groups // 4)
    offset = ((r // 128) * tiles + g // 4) * 512 + (r % 32) * 16 + ((r % 128) // 32) * 4 + g % 4
    assert np.array_equal(flat[offset], scales.view(np.uint8))
    rest = np.ones(flat.size, bool)
    rest[offset.reshape(-1)] = False
    assert not flat[rest].any(), "padding must be zero"
    back = layouts.scales_from_sfatom(layouts.scales_to_sfatom(scales), m, groups)
    assert np.array_equal(back.view(np.uint8), scales.view(np.uint8))


def test_dense_panels_invert() -> None:
    w = np.arange(37 * 5, dtype=np.float32).reshape(37, 5)
    panels = layouts.dense_to_p16(w)
    assert panels.shape == (3, 5, 16) and panels[1, 3, 4] == w[20, 3] and not panels[2, :, 5:].any()
    assert np.array_equal(layouts.dense_from_p16(panels, 37), w)
