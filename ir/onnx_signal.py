"""ONNX operators on signals: Fourier transforms and mel filters."""

from __future__ import annotations

from .errors import IRError
from .graph import Op
from .onnx_ops import dtype, onnx, shape, typed
from .opdef import OpDef
from .types import UNKNOWN, TensorType

_FLOATS = {1: "f32", 10: "f16", 11: "f64", 16: "bf16"}
"""By onnx.TensorProto.DataType: what a matrix of mel weights can be made of."""


def _dft(op: Op) -> TensorType:
    found = shape(op, 0)
    if found is None:
        return typed(dtype(op, 0), None)
    half = bool(op.get("inverse", 0)) and bool(op.get("onesided", 0))
    return typed(dtype(op, 0), (UNKNOWN,) * (len(found) - 1) + (1 if half else 2,))


def _stft(op: Op) -> TensorType:
    batch = (shape(op, 0) or (UNKNOWN,))[0]
    return typed(dtype(op, 0), (batch, UNKNOWN, UNKNOWN, 2))


def _mel(op: Op) -> TensorType:
    kind = op.get("output_datatype", 1)
    if kind not in _FLOATS:
        raise IRError(f"{op.name}: output_datatype is {kind}, expected one of {sorted(_FLOATS)}")
    return typed(_FLOATS[kind], (UNKNOWN, UNKNOWN))


# fmt: off
OPS: dict[str, OpDef] = {
    "onnx_dft": onnx("DFT", "discrete Fourier transform along an axis", 1, 3, _dft,
                     {"inverse": "0", "onesided": "half of the spectrum of a real signal; 0"}),
    "onnx_stft": onnx("STFT", "transforms of windowed pieces", 2, 4, _stft,
                      {"onesided": "half of the spectrum; 1"}),
    "onnx_mel_weight_matrix": onnx("MelWeightMatrix", "filters of a mel scale", 5, 5, _mel,
                                   {"output_datatype": "of ONNX; 1"}),
}
# fmt: on
