"""Where onnx's reference evaluator (1.23) does not do what the standard says: no oracle there.

Each was found by comparing it with onnxruntime on random operands; our kernels follow the standard,
which onnxruntime does too. Where the evaluator merely raises, nothing needs to be said here.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

from ..ir.graph import Op
from ..ir.onnx_ops import is_given, shape
from ..ir.types import Plain


def deviation(op: Op, drawn: Collection[int] = ()) -> str:
    """What the evaluator does otherwise for this op, "" where it can be believed.

    `drawn`: operands that are random numbers. Where they are parameters, it computes nonsense that
    our kernels refuse.
    """
    if op.name == "onnx_resize" and any(i > 0 for i in drawn):
        return "scales and regions drawn at random make no sense"
    rule = _RULES.get(op.name)
    return rule(op) if rule else ""


_DEFAULTS = {
    "onnx_rnn": ("Tanh",),
    "onnx_gru": ("Sigmoid", "Tanh"),
    "onnx_lstm": ("Sigmoid", "Tanh", "Tanh"),
}


def _recurrent(op: Op) -> str:
    if is_given(op, 4):
        return "sequence_lens is ignored"
    if op.attrs.get("clip"):
        return "clip is ignored"
    if op.attrs.get("input_forget"):
        return "input_forget is ignored"
    defaults = _DEFAULTS[op.name]
    named = op.strs("activations") or defaults
    usual = defaults * (len(named) // len(defaults))
    return "" if named == usual else "activations are ignored, or one serves all directions"


def _pool(op: Op) -> str:
    if op.attrs.get("ceil_mode"):
        return "with ceil_mode, windows are moved by half of what the last one lacks"
    if op.get("auto_pad", "NOTSET").startswith("SAME"):
        if any(d != 1 for d in op.ints("dilations")):
            return "SAME_* pads for a kernel without dilations"
        if op.name == "onnx_max_pool":
            return "SAME_LOWER rounds the number of windows down"
    if op.name == "onnx_max_pool" and len(op.outs) > 1:
        return "indices are not those of storage_order, or are none"
    return ""


def _conv_transpose(op: Op) -> str:
    if op.ints("output_shape"):
        return "output_shape decides no pads"
    same = op.get("auto_pad", "NOTSET").startswith("SAME")
    return "SAME_* takes negative pads where strides exceed the kernel" if same else ""


def _qlinear_conv(op: Op) -> str:
    x, scales = shape(op, 0), shape(op, 4)
    is_image = x is not None and len(x) == 4
    return "" if is_image or not scales else "scales of channels are taken for those of images"


def _resize(op: Op) -> str:
    mode = op.get("coordinate_transformation_mode", "half_pixel")
    return "a rounding error moves the taps by one" if mode == "half_pixel_symmetric" else ""


def _lp_normalization(op: Op) -> str:
    return "with p = 1, signs are summed with the values" if op.get("p", 2) == 1 else ""


def _zero_point(op: Op) -> str:
    """What quantises to floats has no zero point but zero, and this one is drawn at random."""
    enc = op.args[2].type.enc if is_given(op, 2) else None
    is_float = isinstance(enc, Plain) and enc.dtype.startswith("f")
    return "a zero point of a float type is not zero" if is_float else ""


_RULES: dict[str, Callable[[Op], str]] = {
    "onnx_rnn": _recurrent,
    "onnx_gru": _recurrent,
    "onnx_lstm": _recurrent,
    "onnx_max_pool": _pool,
    "onnx_average_pool": _pool,
    "onnx_lp_pool": _pool,
    "onnx_conv_transpose": _conv_transpose,
    "onnx_qlinear_conv": _qlinear_conv,
    "onnx_resize": _resize,
    "onnx_lp_normalization": _lp_normalization,
    "onnx_quantize_linear": _zero_point,
    "onnx_dequantize_linear": _zero_point,
}
