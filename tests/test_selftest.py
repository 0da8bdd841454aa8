"""The self-test's tolerances: tight enough to catch a wrong kernel, wide enough for a right one."""

from __future__ import annotations

import numpy as np
import pytest

from halfbyte.codegen.selftest import activations
from halfbyte.codegen.tolerance import RULES, UNIT, tolerance
from halfbyte.ir.graph import Op, Value
from halfbyte.ir.interp import evaluate
from halfbyte.ir.layouts import dense_to_p16, nvfp4_to_p16, pad_to
from halfbyte.ir.numerics import quantize_weight
from halfbyte.ir.opdef import Data, array
from halfbyte.ir.types import Nvfp4, Plain, TensorType, tensor

RNG = np.random.default_rng(7)
N, K, T = 48, 96, 5


def weight(enc: str) -> tuple[TensorType, Data]:
    w = RNG.standard_normal((N, K)).astype(np.float32)
    if enc == "f32":
        return TensorType((N, K), Plain("f32", "p16")), dense_to_p16(w)
    packed, sf, gs = quantize_weight(w)
    data = {"": nvfp4_to_p16(packed, sf), "gs": pad_to(np.full(N, gs, np.float32), 16)}
    return TensorType((N, K), Nvfp4(layout="p16")), data


def linear(enc: str, prologue: str, act: str, epilogue: str = "none") -> tuple[Op, list[Data]]:
    w_type, w = weight(enc)
    width = 2 * K if prologue == "silu_mul" else K
    found: dict[str, tuple[TensorType, Data]] = {
        "x": (tensor("f32", "T", width), activations(T, width, RNG)),
        "w": (w_type, w),
    }
    if prologue == "rmsnorm":
        found["gamma"] = tensor("f32", K), 1 + RNG.standard_normal(K).astype(np.float32) / 4
    found["bias"] = tensor("f32", N), RNG.standard_normal(N).astype(np.float32)
    found["residual"] = tensor("f32", "T", N), activations(T, N, RNG)
    if act == "nvfp4":
        found["input_scale"] = tensor("f32"), np.array(0.004, np.float32)
    values = tuple(Value(name, type_) for name, (type_, _) in found.items())
    attrs = {"roles": tuple(found), "prologue": prologue, "act": act, "eps": 1e-6,
             "epilogue": epilogue}  # fmt: skip
    op = Op("fused_linear", values, (Value("y", tensor("f32", "T", N)),), {**attrs})
    return op, [data for _, data in found.values()]


@pytest.mark.parametrize("enc", ["f32", "nvfp4"])
@pytest.mark.parametrize("prologue", ["none", "rmsnorm", "silu_mul"])
@pytest.mark.parametrize("act", ["f32", "nvfp4"])
def test_a_bound_holds_for_f32_and_not_for_a_fault(enc: str, prologue: str, act: str) -> None:
    op, args = linear(enc, prologue, act)
    results = evaluate(op, args)
    (bound,) = tolerance(op, args, results, UNIT)
    y = array(results[0]).astype(np.float64)
    assert bound.shape == y.shape and np.all(bound > 0) and np.all(np.isfinite(bound))
    # One input of 96 left out of the sum must show in most outputs of an ordinary row.
    assert isinstance(args[0], np.ndarray)
    x = args[0].copy()
    x[:, 32 + np.argmax(np.abs(x[0, 32:48]))] = 0  # not one that its block rounds to zero
    faulty = array(evaluate(op, [x, *args[1:]])[0])
    caught = np.abs(faulty - y) > bound
    assert caught[0].mean() > (0.2 if act == "nvfp4" else 0.6)


@pytest.mark.parametrize("enc", ["f32", "nvfp4"])
def test_a_bound_of_gelu_holds_for_f32_and_not_for_a_fault(enc: str) -> None:
    op, args = linear(enc, "none", "f32", "gelu")
    (bound,) = tolerance(op, args, evaluate(op, args), UNIT)
    y = array(evaluate(op, args)[0]).astype(np.float64)
    without = Op(op.name, op.args, op.outs, {**op.attrs, "epilogue": "none"})
    assert np.all(bound > 0) and np.all(bound[:1] < 1e-2)
    assert (np.abs(array(evaluate(without, args)[0]) - y) > bound)[0].mean() > 0.6


def test_a_bound_is_relative_to_the_sum_of_magnitudes() -> None:
    op, args = linear("f32", "none", "f32")
    (small,) = tolerance(op, args, evaluate(op, args), UNIT)
    (split,) = tolerance(op, args, evaluate(op, args), 2.0**-16)
    assert np.all(split[:3] > small[:3])  # row 3 is zero
    assert small[0].max() < 1e-3  # x of order 1 (outliers 20), w of order 1, 96 terms


def test_every_rule_has_an_op() -> None:
    assert {"fused_linear", "attention", "rope_append", "embed"} <= set(RULES)


def test_activations_hold_the_extremes() -> None:
    x = activations(6, 256, RNG)
    largest = np.abs(x).max(axis=1)
    assert largest[1] > 1e4 > largest[0] > 5
    assert 0 < largest[2] < 1e-3 and largest[3] == 0
