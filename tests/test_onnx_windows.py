"""Convolutions and pools where onnx's reference evaluator is no oracle, and bad operands."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto

from halfbyte import ModelError
from tests.onnx_node import run_node

Array = np.ndarray[Any, Any]


def randoms(*shape: int) -> Array:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


def test_transposed_convolution_of_groups(tmp_path: Path) -> None:
    x, w, b = randoms(2, 6, 5, 7), randoms(6, 4, 3, 2), randoms(8)
    groups, stride, dilation = 2, (2, 1), (1, 3)
    y = np.zeros((2, 8, 9 + 2, 7 + 3))
    for n, c, i, j in np.ndindex(*x.shape):
        group = c // 3
        for m, p, q in np.ndindex(4, 3, 2):
            at = (
                n,
                group * 4 + m,
                i * stride[0] + p * dilation[0],
                j * stride[1] + q * dilation[1],
            )
            y[at] += x[n, c, i, j] * w[c, m, p, q]
    expected = y[:, :, 1:-1, :-2] + b[:, None, None]
    (found,) = run_node(
        tmp_path, "ConvTranspose", [x, w, b], group=groups, strides=stride, dilations=dilation,
        pads=[1, 0, 1, 2],
    )  # fmt: skip
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def windows(extent: int, kernel: int, stride: int, pad: int) -> list[range]:
    """Of one axis with ceil_mode: the elements of each, from the first that begins in front of the
    end of the tensor and its first padding."""
    count = -(-(extent + 2 * pad - kernel) // stride) + 1
    count -= (count - 1) * stride >= extent + pad
    return [range(i * stride - pad, i * stride - pad + kernel) for i in range(count)]


@pytest.mark.parametrize(("kernel", "stride", "pad"), [(3, 2, 0), (4, 3, 1), (5, 4, 2)])
def test_last_windows_of_ceil_mode(tmp_path: Path, kernel: int, stride: int, pad: int) -> None:
    x = randoms(1, 2, 11, 8)
    rows, columns = (windows(extent, kernel, stride, pad) for extent in x.shape[2:])
    largest = np.empty((1, 2, len(rows), len(columns)))
    means, places = np.empty_like(largest), np.empty(largest.shape, np.int64)
    for c, (i, r), (j, s) in itertools.product(range(2), enumerate(rows), enumerate(columns)):
        inside = [(p, q) for p in r for q in s if 0 <= p < 11 and 0 <= q < 8]
        values = [x[0, c, p, q] for p, q in inside]
        counted = sum(p < 11 + pad and q < 8 + pad for p in r for q in s)
        largest[0, c, i, j] = max(values)
        p, q = inside[int(np.argmax(values))]
        places[0, c, i, j] = c * 88 + q * 11 + p
        means[0, c, i, j] = sum(values) / counted
    told: dict[str, Any] = {"kernel_shape": [kernel] * 2, "strides": [stride] * 2,
                            "pads": [pad] * 4, "ceil_mode": 1}  # fmt: skip
    types = [TensorProto.FLOAT, TensorProto.INT64]
    found, at = run_node(tmp_path, "MaxPool", [x], types, storage_order=1, **told)
    np.testing.assert_array_equal(found, largest)
    np.testing.assert_array_equal(at, places)
    (found,) = run_node(tmp_path, "AveragePool", [x], count_include_pad=1, **told)
    np.testing.assert_allclose(found, means, rtol=1e-5, atol=1e-6)


def test_max_roi_pool(tmp_path: Path) -> None:
    x = randoms(2, 3, 9, 12)
    rois = np.array([[0, 0, 0, 5, 5], [1, 2, 1, 11, 8], [1, 10, 7, 30, 30]], np.float32)
    found = run_node(tmp_path, "MaxRoiPool", [x, rois], pooled_shape=[2, 3], spatial_scale=0.5)[0]
    # Halved and rounded: the first region is rows and columns 0 to 3, ends included.
    first = x[0, :, :4, :4]
    np.testing.assert_array_equal(found[0, :, 0, 0], first[:, :2, :2].max((1, 2)))
    np.testing.assert_array_equal(found[0, :, 1, 2], first[:, 2:, 2:].max((1, 2)))
    second = x[1, :, 1:5, 1:7]
    np.testing.assert_array_equal(found[1, :, 1, 1], second[:, 2:, 2:4].max((1, 2)))


def test_integers_beyond_the_image_are_refused(tmp_path: Path) -> None:
    x = randoms(1, 1, 2, 2)
    with pytest.raises(ModelError, match=r"MaxUnpool.*index 99"):
        run_node(
            tmp_path, "MaxUnpool", [x, np.array([[[[0, 1], [2, 99]]]])], kernel_shape=[2, 2],
            strides=[2, 2],
        )  # fmt: skip
    with pytest.raises(ModelError, match=r"NegativeLogLikelihoodLoss.*target 7 of 3 classes"):
        run_node(tmp_path, "NegativeLogLikelihoodLoss", [randoms(2, 3), np.array([0, 7])])
    with pytest.raises(ModelError, match=r"RoiAlign.*batch_indices"):
        boxes = np.array([[0, 0, 1, 1]], np.float32)
        run_node(tmp_path, "RoiAlign", [x, boxes, np.array([5])], output_height=1, output_width=1)
