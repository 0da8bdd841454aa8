"""Operators as older opsets spell them, written as the newest one does.

Only what changed in form is here; an operator without a rule reads the same in every opset that its
schema allows. The differences are those of onnx's Changelog.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from onnx import AttributeProto, NodeProto, TensorProto, helper

from .onnx_model import (
    AttrValue,
    Patch,
    Spelling,
    attribute,
    integer,
    integers,
    operand,
    real,
    text,
)


def _again(
    node: NodeProto,
    patch: Patch,
    *,
    op_type: str = "",
    inputs: Sequence[str] | None = None,
    drop: Sequence[str] = (),
    **attrs: AttrValue,
) -> None:
    """The node with other operands or attributes, everything else as it was."""
    new = NodeProto()
    new.CopyFrom(node)
    new.op_type = op_type or node.op_type
    if inputs is not None:
        del new.input[:]
        new.input.extend(inputs)
    kept = [a for a in node.attribute if a.name not in drop and a.name not in attrs]
    del new.attribute[:]
    new.attribute.extend(kept)
    new.attribute.extend(helper.make_attribute(k, v) for k, v in attrs.items())
    patch.keep(new)


def _renamed(op_type: str) -> Spelling:
    def rule(node: NodeProto, opset: int, patch: Patch) -> None:
        _again(node, patch, op_type=op_type)

    return rule


def _dropping(*names: str) -> Spelling:
    """Attributes that say nothing any more."""

    def rule(node: NodeProto, opset: int, patch: Patch) -> None:
        _again(node, patch, drop=names)

    return rule


def _arithmetic(node: NodeProto, opset: int, patch: Patch) -> None:
    """Before opset 7: `axis` placed the smaller operand of a broadcast."""
    if opset < 7 and attribute(node, "axis") is not None:
        raise patch.fail("broadcasts along an axis, as before opset 7")
    _again(node, patch, drop=("axis", "broadcast", "consumed_inputs"))


def _prelu(node: NodeProto, opset: int, patch: Patch) -> None:
    """Before opset 7 a slope is one number, or one for each channel: along axis 1, not the last."""
    if opset >= 7:
        return _again(node, patch)
    x, slope = node.input
    spatial = patch.op("Shape", [patch.op("Shape", [x], start=2)])
    ones = patch.op("Expand", [patch.ints([1]), spatial])
    columns = patch.op("Concat", [patch.ints([-1]), ones], axis=0)
    slopes = patch.op("Reshape", [slope, columns])
    _again(node, patch, inputs=[x, slopes], drop=("consumed_inputs",))


def _axes_as_operand(below: int) -> Spelling:
    def rule(node: NodeProto, opset: int, patch: Patch) -> None:
        axes = integers(node, "axes")
        if opset >= below or axes is None:
            return _again(node, patch)
        _again(node, patch, inputs=[node.input[0], patch.ints(axes)], drop=("axes",))

    return rule


def _clip(node: NodeProto, opset: int, patch: Patch) -> None:
    if opset >= 11:
        return _again(node, patch)
    bounds = [attribute(node, name) for name in ("min", "max")]
    x = node.input[0]
    given = [patch.like(b.f, x) if b is not None else "" for b in bounds]
    _again(node, patch, inputs=[x, *given], drop=("min", "max", "consumed_inputs"))


def _softmax(node: NodeProto, opset: int, patch: Patch) -> None:
    """Before opset 13: over all axes from `axis` on, as one."""
    if opset >= 13:
        return _again(node, patch)
    x, axis = node.input[0], integer(node, "axis", 1)
    flat = patch.op("Flatten", [x], axis=axis)
    y = patch.op(node.op_type, [flat], axis=-1)
    shape = patch.op("Shape", [x])
    patch.op("Reshape", [y, shape], node.output)


def _slice(node: NodeProto, opset: int, patch: Patch) -> None:
    if opset >= 10:
        return _again(node, patch)
    lists = [integers(node, name) for name in ("starts", "ends", "axes")]
    given = [patch.ints(values) for values in lists if values is not None]
    _again(node, patch, inputs=[node.input[0], *given], drop=("starts", "ends", "axes"))


def _split(node: NodeProto, opset: int, patch: Patch) -> None:
    sizes = integers(node, "split")
    if opset < 13 and sizes is not None:
        _again(node, patch, inputs=[node.input[0], patch.ints(sizes)], drop=("split",))
    elif opset < 18 and not operand(node, 1):
        _again(node, patch, num_outputs=len(node.output))
    else:
        _again(node, patch)


def _pad(node: NodeProto, opset: int, patch: Patch) -> None:
    if opset >= 11:
        return _again(node, patch)
    pads = integers(node, "pads") or integers(node, "paddings") or ()
    x = node.input[0]
    value = patch.like(real(node, "value", 0.0), x)
    _again(node, patch, inputs=[x, patch.ints(pads), value], drop=("pads", "paddings", "value"))


def _top_k(node: NodeProto, opset: int, patch: Patch) -> None:
    k = attribute(node, "k")
    if opset >= 10 or k is None:
        return _again(node, patch)
    _again(node, patch, inputs=[node.input[0], patch.ints([k.i])], drop=("k",))


def _reshape(node: NodeProto, opset: int, patch: Patch) -> None:
    shape = integers(node, "shape")
    if opset >= 5 or shape is None:
        return _again(node, patch)
    inputs = [node.input[0], patch.ints(shape)]
    _again(node, patch, inputs=inputs, drop=("shape", "consumed_inputs"))


def _dropout(node: NodeProto, opset: int, patch: Patch) -> None:
    """Before opset 12 a model for inference says nothing of training."""
    if opset >= 12:
        return _again(node, patch)
    if opset < 10 and len(node.output) > 1:
        raise patch.fail("reads the mask of a Dropout before opset 10")
    _again(node, patch, drop=("ratio", "is_test", "consumed_inputs"))


def _batch_normalization(node: NodeProto, opset: int, patch: Patch) -> None:
    if opset < 7 and not integer(node, "is_test", 0):
        raise patch.fail("is a BatchNormalization in training")
    if opset < 9 and not integer(node, "spatial", 1):
        raise patch.fail("normalises each position by itself (spatial=0)")
    if opset < 14 and len(node.output) > 1:
        raise patch.fail("is a BatchNormalization in training")
    _again(node, patch, drop=("spatial", "is_test", "consumed_inputs"))


def _resize(node: NodeProto, opset: int, patch: Patch) -> None:
    if opset < 11:
        x, scales = node.input
        return _upsampled(node, patch, x, scales)
    inputs = list(node.input)
    for i in (1, 2):  # an empty tensor said "not this one" before operands could be left out
        known = patch.model.constants.get(inputs[i]) if i < len(inputs) else None
        if known is not None and known.count == 0:
            inputs[i] = ""
    _again(node, patch, inputs=inputs)


def _upsample(node: NodeProto, opset: int, patch: Patch) -> None:
    if opset >= 9:
        return _upsampled(node, patch, *node.input)
    scales = attribute(node, "scales")
    if scales is None:
        raise patch.fail("has no scales, as before opset 7")
    data = patch.constant(np.array(scales.floats, np.float32))
    _upsampled(node, patch, node.input[0], data)


def _upsampled(node: NodeProto, patch: Patch, x: str, scales: str) -> None:
    """Upsample, and Resize of opset 10: source = destination / scale, rounded down."""
    patch.op(
        "Resize", [x, "", scales], node.output, mode=text(node, "mode", "nearest"),
        coordinate_transformation_mode="asymmetric", nearest_mode="floor",
    )  # fmt: skip


def _grid_sample(node: NodeProto, opset: int, patch: Patch) -> None:
    if opset >= 20:
        return _again(node, patch)
    mode = text(node, "mode", "bilinear")
    newly = {"bilinear": "linear", "bicubic": "cubic"}.get(mode, mode)
    _again(node, patch, mode=newly)


def _roi_align(node: NodeProto, opset: int, patch: Patch) -> None:
    if opset >= 16:
        return _again(node, patch)
    _again(node, patch, coordinate_transformation_mode="output_half_pixel")


def _dft(node: NodeProto, opset: int, patch: Patch) -> None:
    if opset >= 20:
        return _again(node, patch)
    axis = patch.constant(np.array(integer(node, "axis", 1), np.int64))
    _again(node, patch, inputs=[node.input[0], operand(node, 1), axis], drop=("axis",))


def _cast(node: NodeProto, opset: int, patch: Patch) -> None:
    to = attribute(node, "to")
    if to is None or to.type != AttributeProto.STRING:
        return _again(node, patch)
    name = to.s.decode("utf-8", "replace")
    if name not in TensorProto.DataType.keys():
        raise patch.fail(f"casts to {name[:40]!r}, which is no type")
    _again(node, patch, to=TensorProto.DataType.Value(name))


def _norm_order(node: NodeProto, opset: int, patch: Patch) -> None:
    """GlobalLpPool and LpPool of opset 1 have a float p."""
    p = attribute(node, "p")
    if p is None or p.type != AttributeProto.FLOAT:
        return _again(node, patch)
    if not p.f.is_integer():
        raise patch.fail(f"p is {p.f}, expected an integer")
    _again(node, patch, p=int(p.f))


def _selu(node: NodeProto, opset: int, patch: Patch) -> None:
    if opset >= 6:
        return _again(node, patch)
    alpha, gamma = real(node, "alpha", 1.6732), real(node, "gamma", 1.0507)
    _again(node, patch, drop=("consumed_inputs",), alpha=alpha, gamma=gamma)


def _group_normalization(node: NodeProto, opset: int, patch: Patch) -> None:
    """Before opset 21, scale and bias are per group: repeat each for the channels of its group."""
    if opset >= 21:
        return _again(node, patch)
    x, groups = node.input[0], integer(node, "num_groups", 1)
    channels = patch.op("Shape", [x], start=1, end=2)
    each = patch.op("Div", [channels, patch.ints([groups])])
    column, flat = patch.ints([groups, 1]), patch.ints([-1])
    spread = patch.op("Concat", [patch.ints([groups]), each], axis=0)
    wide: list[str] = []
    for name in node.input[1:3]:
        rows = patch.op("Reshape", [name, column])
        wide.append(patch.op("Reshape", [patch.op("Expand", [rows, spread]), flat]))
    _again(node, patch, inputs=[x, *wide])


def _scan(node: NodeProto, opset: int, patch: Patch) -> None:
    if opset < 9:
        raise patch.fail("is a Scan over a batch, as opset 8 had it")
    _again(node, patch)


def _tile(node: NodeProto, opset: int, patch: Patch) -> None:
    if opset < 6:
        raise patch.fail("is a Tile along one axis, as before opset 6")
    _again(node, patch)


_REDUCTIONS = ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "SumSquare")
_UNARY = ("Abs", "Ceil", "Elu", "Exp", "Floor", "HardSigmoid", "InstanceNormalization", "LeakyRelu",
          "Log", "Max", "Mean", "Min", "Neg", "Reciprocal", "Relu", "Sigmoid", "Sqrt",
          "Sum", "Tanh")  # fmt: skip
_BINARY = ("Add", "And", "Div", "Equal", "Greater", "Less", "Mul", "Or", "Pow", "Sub", "Xor")

OLDER: Mapping[str, Spelling] = {
    **{name: _dropping("consumed_inputs") for name in _UNARY},
    **{name: _arithmetic for name in _BINARY},
    **{f"Reduce{name}": _axes_as_operand(18) for name in _REDUCTIONS},
    **{name: _dropping("output_sequence") for name in ("GRU", "LSTM", "RNN")},
    "ReduceSum": _axes_as_operand(13),
    "Squeeze": _axes_as_operand(13),
    "Unsqueeze": _axes_as_operand(13),
    "Softmax": _softmax,
    "LogSoftmax": _softmax,
    "Hardmax": _softmax,
    "BatchNormalization": _batch_normalization,
    "Cast": _cast,
    "Clip": _clip,
    "DFT": _dft,
    "Dropout": _dropout,
    "Gemm": _dropping("broadcast"),
    "GlobalLpPool": _norm_order,
    "GridSample": _grid_sample,
    "GroupNormalization": _group_normalization,
    "LpPool": _norm_order,
    "PRelu": _prelu,
    "Pad": _pad,
    "Reshape": _reshape,
    "Resize": _resize,
    "RoiAlign": _roi_align,
    "Scan": _scan,
    "Scatter": _renamed("ScatterElements"),
    "Selu": _selu,
    "Slice": _slice,
    "Split": _split,
    "Tile": _tile,
    "TopK": _top_k,
    "Upsample": _upsample,
}
"""Operator -> how its older forms read today."""
