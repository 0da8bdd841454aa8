"""onnx's own backend node cases, compiled for the cpu and compared: values, shapes and dtypes."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import halfbyte
from halfbyte.ir.errors import HalfbyteError

PASSED, REFUSED, WRONG, FAILED = "passed", "refused", "wrong", "failed"
KINDS = (PASSED, REFUSED, WRONG, FAILED)
DRAWN = ("Bernoulli", "RandomUniformLike")
"""Operators whose results no two implementations share."""


LAST_PLACE = {"float16": 2.0**-10, "bfloat16": 2.0**-7, "float32": 2.0**-23}


@dataclass(frozen=True)
class Outcome:
    """What became of a case: passed; refused (ModelError at compile time, with its words); wrong
    (other values, and no error); failed (an error at run time, or one that is our bug)."""

    name: str
    kind: str
    words: str = ""


@functools.cache
def cases() -> dict[str, Any]:
    """Every node case of the installed onnx, by name."""
    from onnx.backend.test.case.node import collect_testcases

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {case.name: case for case in collect_testcases(None)}


def run_case(
    name: str, folder: Path, target: str = "cpu", device: str = "cpu", units: int = 1
) -> Outcome:
    """Compile the case's model into `folder`, run its data sets on the device, compare (see
    `difference`)."""
    case = cases()[name]
    path, out = folder / f"{name}.onnx", folder / f"{name}.hb"
    path.write_bytes(case.model.SerializeToString())
    try:
        halfbyte.compile(path, out, target=target)
    except halfbyte.ModelError as error:
        return Outcome(name, REFUSED, str(error))
    except (HalfbyteError, Exception) as error:
        return Outcome(name, FAILED, f"{type(error).__name__}: {error}")
    try:
        return run_artifact(name, out, device, units)
    except Exception as error:
        return Outcome(name, FAILED, f"{type(error).__name__}: {error}")


def run_artifact(name: str, out: Path, device: str = "cpu", units: int = 1) -> Outcome:
    """Run the data sets of a case on its artifact, compare."""
    case = cases()[name]
    stored = {t.name for t in case.model.graph.initializer}
    ports = [v.name for v in case.model.graph.input if v.name not in stored]
    with halfbyte.load(out, device, threads=2) as net:
        for inputs, expected in case.data_sets:
            given = {n: _array(x) for n, x in zip(ports, inputs, strict=False)}
            found = list(net.run(given).values())
            drawn = any(n.op_type in DRAWN for n in case.model.graph.node)
            # Nobody's random numbers are another's: shapes and dtypes are compared, and
            # test_onnx_random.py tests how they are distributed.
            why = difference(found, expected, case.rtol, np.inf if drawn else case.atol, units)
            if why:
                return Outcome(name, WRONG, why)
    return Outcome(name, PASSED)


def _array(data: Any) -> Any:
    """Data of a case: an array, or a TensorProto where numpy has no such dtype of its own."""
    import onnx

    is_proto = isinstance(data, onnx.TensorProto)
    return onnx.numpy_helper.to_array(data) if is_proto else np.asarray(data)


def difference(
    found: Sequence[Any], expected: Sequence[Any], rtol: float, atol: float, units: int = 1
) -> str:
    """Where the results differ, "" where they do not. NaN equals NaN.

    The tolerance is the case's, and units in the last place of the largest result: a case's own may
    be less than one rounding (bf16, and the inverse DFT).
    """
    if len(found) != len(expected):
        return f"{len(found)} results, expected {len(expected)}"
    for i, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        theirs = _array(theirs)
        if ours.dtype != theirs.dtype or ours.shape != theirs.shape:
            return f"result {i}: {ours.dtype} {ours.shape}, expected {theirs.dtype} {theirs.shape}"
        a, b = ours.astype(np.float64), theirs.astype(np.float64)
        largest = np.max(np.abs(b), initial=0.0, where=np.isfinite(b))
        last = units * LAST_PLACE.get(ours.dtype.name, 0.0) * largest
        if not np.allclose(a, b, rtol=rtol, atol=atol + last, equal_nan=True):
            return f"result {i}: off by {np.nanmax(np.abs(a - b)):.4g} (rtol {rtol}, atol {atol})"
    return ""
