"""Inverse frequencies against the formulas of transformers, written out element by element."""

from __future__ import annotations

import math

import numpy as np
import pytest

from halfbyte.frontend.config import RopeConfig
from halfbyte.frontend.rope import inverse_frequencies
from halfbyte.ir.errors import ModelError

DIM, THETA = 64, 1e6
PLAIN = np.array([THETA ** (-2 * i / DIM) for i in range(DIM // 2)])


def table(kind: str, **parameters: float) -> tuple[np.ndarray, float]:
    return inverse_frequencies(RopeConfig(kind, THETA, parameters), DIM, "here")


def test_default_and_linear() -> None:
    found, factor = table("default")
    np.testing.assert_array_equal(found, PLAIN.astype(np.float32))
    assert found.dtype == np.float32 and factor == 1.0
    np.testing.assert_allclose(table("linear", factor=4.0)[0], PLAIN / 4, rtol=1e-7)


def test_llama3_keeps_short_waves_and_stretches_long_ones() -> None:
    low, high, original, factor = 1.0, 4.0, 1024.0, 8.0
    expected: list[float] = []
    for f in PLAIN:
        wave = 2 * math.pi / f
        if wave < original / high:
            expected.append(f)
        elif wave > original / low:
            expected.append(f / factor)
        else:
            smooth = (original / wave - low) / (high - low)
            expected.append((1 - smooth) * f / factor + smooth * f)
    found, scale = table("llama3", low_freq_factor=low, high_freq_factor=high, factor=factor,
                         original_max_position_embeddings=original)  # fmt: skip
    np.testing.assert_allclose(found, expected, rtol=1e-7)
    assert (
        scale == 1.0
        and len({round(float(e / p), 3) for e, p in zip(found, PLAIN, strict=True)}) > 2
    )


@pytest.mark.parametrize(
    ("extra", "scale"),
    [({}, 0.1 * math.log(16) + 1), ({"mscale": 1.0, "mscale_all_dim": 1.0}, 1.0),
     ({"attention_factor": 0.7}, 0.7)],
)  # fmt: skip
def test_yarn(extra: dict[str, float], scale: float) -> None:
    original, factor = 4096.0, 16.0

    def dim_of(rotations: float) -> float:
        return DIM * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(THETA))

    low, high = math.floor(dim_of(32)), math.ceil(dim_of(1))
    expected: list[float] = []
    for i, f in enumerate(PLAIN):
        ramp = min(max((i - low) / (high - low), 0.0), 1.0)
        expected.append(f / factor * ramp + f * (1 - ramp))
    found, got = table("yarn", factor=factor, original_max_position_embeddings=original, **extra)
    np.testing.assert_allclose(found, expected, rtol=1e-7)
    assert got == pytest.approx(scale)


@pytest.mark.parametrize(
    ("kind", "parameters", "message"),
    [
        ("longrope", {}, "rope type 'longrope', expected one of default, linear, llama3, yarn"),
        ("linear", {}, "linear needs a positive factor"),
        ("llama3", {"factor": 2.0}, "original_max_position_embeddings"),
        ("linear", {"factor": 5e-324}, "no finite table"),
    ],
)
def test_what_cannot_be_built_is_named(
    kind: str, parameters: dict[str, float], message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        table(kind, **parameters)
