"""Operands for the self-test of a node that its graph's random inputs do not reach.

They are drawn by the types of the operands. Where an operator reads sizes, axes or indices of one,
random numbers would be refused, by a kernel or by the evaluator: these get numbers that make sense.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..ir.graph import Op
from ..ir.numerics import NUMPY_DTYPES, Array
from ..ir.opdef import Data
from ..ir.types import UNRANKED, Plain, TensorType


@dataclass(frozen=True, slots=True)
class Extents:
    """What an extent is that only a run knows: `few` where it counts examples, `many` where samples
    or pixels: along the last axis, and from the third on.
    """

    few: int
    many: int

    def of(self, axis: int, rank: int) -> int:
        return self.many if axis == rank - 1 or axis >= 2 else self.few


EXTENTS = (Extents(3, 3), Extents(1, 640), Extents(1, 1), Extents(40, 40))
"""Tried in this order: a Conv wants more than its window, a Squeeze nothing but 1."""
_MOST_ELEMENTS = 1 << 24


def random_operand(
    type_: TensorType, random: np.random.Generator, unknown: Extents = EXTENTS[0]
) -> Array | None:
    """Values that many operators accept: normal numbers, 0 and 1 for integers. None: too many."""
    if not isinstance(type_.enc, Plain):
        return None
    shape = (2, 3) if type_.shape == UNRANKED else type_.shape
    extents = tuple(
        d if isinstance(d, int) else unknown.of(i, len(shape)) for i, d in enumerate(shape)
    )
    if int(np.prod(extents, dtype=np.float64)) > _MOST_ELEMENTS:
        return None
    dtype = NUMPY_DTYPES[type_.enc.dtype]
    if dtype.kind in "iub" or type_.enc.dtype in ("i4", "u4", "i2", "u2"):
        return random.integers(0, 2, extents).astype(dtype)
    return random.standard_normal(extents).astype(dtype)


def fitting_operands(
    op: Op, constants: Sequence[Data | None], random: np.random.Generator, unknown: Extents
) -> list[Array | None] | None:
    """Operands for one node, None for each of `constants` that is there and for absent ones.

    None where an operand holds integers that this module knows nothing of.
    """
    found: list[Data | None] = list(constants)
    drawn: list[Array | None] = [None] * len(op.args)
    for i, v in enumerate(op.args):
        if found[i] is not None:
            continue
        fit = _FITS.get((op.name, i))
        value = fit(found, op) if fit else random_operand(v.type, random, unknown)
        if value is None or (not fit and i > 0 and is_parameter(value)):
            return None
        found[i] = drawn[i] = value
    return drawn


def is_parameter(value: Array) -> bool:
    """Whether sizes, indices or ratios may be what it holds."""
    return value.dtype.kind in "iu" or value.size == 1


Fit = Callable[[Sequence[Data | None], Op], Array | None]
"""From the operands so far, what the next one may be."""


def _shape_of_first(found: Sequence[Data | None], op: Op) -> Array | None:
    return np.array(found[0].shape, np.int64) if isinstance(found[0], np.ndarray) else None


def _for_each_axis(value: int, sides: int = 1) -> Fit:
    def fit(found: Sequence[Data | None], op: Op) -> Array | None:
        x = found[0]
        return np.full(x.ndim * sides, value, np.int64) if isinstance(x, np.ndarray) else None

    return fit


def _numbers(*values: int) -> Fit:
    """These, of the operand's own type and rank (0 or 1)."""

    def fit(found: Sequence[Data | None], op: Op) -> Array | None:
        at = next(i for i, data in enumerate(found) if data is None)
        type_ = op.args[at].type
        dtype = NUMPY_DTYPES[type_.enc.dtype] if isinstance(type_.enc, Plain) else np.int64
        if type_.shape == ():
            return np.array(values[0], dtype)
        count = type_.shape[0] if type_.shape != UNRANKED else len(values)
        return np.resize(np.array(values, dtype), count if isinstance(count, int) else len(values))

    return fit


_FITS: Mapping[tuple[str, int], Fit] = {
    ("onnx_expand", 1): _shape_of_first,
    ("onnx_reshape", 1): _shape_of_first,
    ("onnx_tile", 1): _for_each_axis(2),
    ("onnx_pad", 1): _for_each_axis(1, 2),
    ("onnx_top_k", 1): _numbers(1),
    ("onnx_slice", 1): _numbers(0),
    ("onnx_slice", 2): _numbers(2),
    ("onnx_slice", 4): _numbers(1),
    ("onnx_range", 0): _numbers(0),
    ("onnx_range", 1): _numbers(7),
    ("onnx_range", 2): _numbers(2),
    ("onnx_constant_of_shape", 0): _numbers(2, 3),
    ("onnx_one_hot", 1): _numbers(3),
    ("onnx_gather", 1): _numbers(0),
    ("onnx_cum_sum", 1): _numbers(0),
    ("onnx_lstm", 4): _numbers(1),
    ("onnx_gru", 4): _numbers(1),
    ("onnx_rnn", 4): _numbers(1),
}
"""Operands that are not numbers to compute with."""
