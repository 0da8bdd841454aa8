"""Operators that draw numbers: no reference has the same ones, so their laws are tested."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from onnx import TensorProto

from tests.onnx_node import run_node

COUNT = 100_000
NEAR = 5 / COUNT**0.5  # five deviations of a mean of COUNT numbers of variance 1


def test_uniform_numbers_fill_their_range(tmp_path: Path) -> None:
    (x,) = run_node(tmp_path, "RandomUniform", [], shape=[COUNT], low=-1.0, high=3.0, seed=7.0)
    assert -1 <= x.min() < -0.99 and 2.99 < x.max() < 3
    assert abs(x.mean() - 1) < 2 * NEAR
    assert abs(x.var() - 16 / 12) < 2 * NEAR


def test_normal_numbers_have_their_moments(tmp_path: Path) -> None:
    like = np.zeros((COUNT // 100, 100), np.float32)
    (x,) = run_node(tmp_path, "RandomNormalLike", [like], mean=1.0, scale=2.0, seed=7.0)
    z = (x.astype(np.float64).ravel() - 1) / 2
    assert x.shape == like.shape
    assert abs(z.mean()) < NEAR
    assert abs(z.var() - 1) < 2 * NEAR
    assert abs((z**4).mean() - 3) < 10 * NEAR
    assert abs((z[:-1] * z[1:]).mean()) < NEAR


def test_a_seed_decides_the_numbers(tmp_path: Path) -> None:
    def draw(**seed: Any) -> np.ndarray[Any, Any]:
        return run_node(tmp_path, "RandomUniform", [], shape=[1000], **seed)[0]

    assert (draw(seed=3.0) == draw(seed=3.0)).all()
    assert (draw(seed=3.0) != draw(seed=4.0)).mean() > 0.99
    assert (draw() != draw()).mean() > 0.99


def test_bernoulli_follows_its_probabilities(tmp_path: Path) -> None:
    p = np.linspace(0, 1, COUNT, dtype=np.float32)
    (x,) = run_node(tmp_path, "Bernoulli", [p], [TensorProto.BOOL], dtype=9, seed=1.0)
    assert x.dtype == bool and not x[0] and x[-1]
    parts = (x - p.astype(np.float64)).reshape(10, -1).mean(1)
    assert np.abs(parts).max() < NEAR * 10**0.5


def test_multinomial_follows_its_logits(tmp_path: Path) -> None:
    chances = np.array([[0.1, 0.2, 0.7], [0.5, 0.25, 0.25]])
    logits = np.log(chances).astype(np.float32) + 3
    (x,) = run_node(
        tmp_path, "Multinomial", [logits], [TensorProto.INT64], dtype=7, sample_size=COUNT, seed=3.0
    )
    counts = np.stack([np.bincount(row, minlength=3) for row in x]) / COUNT
    np.testing.assert_allclose(counts, chances, atol=NEAR)
