"""onnxruntime's GroupQueryAttention as ONNX's RotaryEmbedding, TensorScatter and Attention.

Reference: onnxruntime's docs/ContribOperators.md. Each sequence of a batch has its own length,
seqlens_k + 1: its new rows stand at the end of that, in the cache and in the rotation. The cache
has room behind them, as ORT's buffers do, or grows to total_sequence_length. A first prompt that is
shorter than its padded row starts at 0; of what stands behind it ORT says nothing, nor do we.
"""

from __future__ import annotations

import numpy as np
from onnx import NodeProto, TensorProto

from .onnx_model import AttrValue, Patch, integer, operand, real

NEWER = "export the model for another runtime, or with standard operators"
_PLAIN = {"do_rotary", "kv_num_heads", "num_heads", "scale", "softcap", "rotary_interleaved",
          "local_window_size"}  # fmt: skip
_OFF = {"smooth_softmax": (0, -1), "qk_output": (0,), "kv_cache_bit_width": (0,)}
"""Attributes of variants that are not here, and the values that switch them off."""


def group_query_attention(node: NodeProto, opset: int, patch: Patch) -> None:
    """Raises ModelError for the variants: sinks, masks of its own, quantised caches."""
    for attr in node.attribute:
        if attr.name not in _PLAIN and attr.i not in _OFF.get(attr.name, ()):
            raise patch.fail(f"attribute {attr.name[:40]}", NEWER)
    if any(operand(node, i) for i in range(10, len(node.input))):
        raise patch.fail("an attention bias, a sink or scales of a cache", NEWER)
    heads, kv_heads = integer(node, "num_heads", 0), integer(node, "kv_num_heads", 0)
    if heads < 1 or kv_heads < 1:
        raise patch.fail("expected num_heads and kv_num_heads", NEWER)
    q, k, v = node.input[:3]
    if not k:
        q, k, v = _unpacked(patch, q, heads, kv_heads)
    first = _first(patch, q, node.input[5])
    if integer(node, "do_rotary", 0):
        positions = operand(node, 9) or _positions(patch, q, first)
        q = _rotated(patch, node, q, positions, heads)
        k = _rotated(patch, node, k, positions, kv_heads)
    _attend(patch, node, (q, k, v), first, heads, kv_heads)


def _unpacked(patch: Patch, packed: str, heads: int, kv_heads: int) -> tuple[str, str, str]:
    """Queries, keys and values lie one behind the other in the last axis."""
    width = patch.op("Shape", [packed], start=2, end=3)
    head = patch.op("Div", [width, patch.ints([heads + 2 * kv_heads])])
    sizes = patch.op("Mul", [head, patch.ints([heads, kv_heads, kv_heads])])
    names = [patch.model.names.fresh(f"{packed}.{part}") for part in "qkv"]
    patch.op("Split", [packed, sizes], names, axis=2)
    return names[0], names[1], names[2]


def _rows(patch: Patch, q: str) -> str:
    """The number of new rows, [1]."""
    return patch.op("Shape", [q], start=1, end=2)


def _first(patch: Patch, q: str, last: str) -> str:
    """[B]: where the first new row of each sequence stands."""
    ends = patch.op("Reshape", [patch.op("Cast", [last], to=TensorProto.INT64), patch.ints([-1])])
    length = patch.op("Add", [ends, patch.ints([1])])
    start = patch.op("Sub", [length, _rows(patch, q)])
    return patch.op("Max", [start, patch.ints([0])])


def _positions(patch: Patch, q: str, first: str) -> str:
    """[B, S]: one behind the other from the first on."""
    zero, one = (patch.constant(np.array(i, np.int64)) for i in (0, 1))
    steps = patch.op("Range", [zero, patch.op("Squeeze", [_rows(patch, q)]), one])
    return patch.op("Add", [patch.op("Reshape", [first, patch.ints([-1, 1])]), steps])


def _rotated(patch: Patch, node: NodeProto, x: str, positions: str, heads: int) -> str:
    cos, sin = operand(node, 7), operand(node, 8)
    if not cos or not sin:
        raise patch.fail("do_rotary without cos_cache and sin_cache", "export the model again")
    table = patch.model.constants.get(cos)
    width = 2 * table.shape[-1] if table is not None and table.shape else 0
    return patch.op(
        "RotaryEmbedding", [x, cos, sin, positions], num_heads=heads,
        interleaved=integer(node, "rotary_interleaved", 0), rotary_embedding_dim=width,
    )  # fmt: skip


def _attend(
    patch: Patch,
    node: NodeProto,
    qkv: tuple[str, str, str],
    first: str,
    heads: int,
    kv_heads: int,
) -> None:
    attrs: dict[str, AttrValue] = {"softcap": real(node, "softcap", 0.0)}
    if scale := real(node, "scale", 0.0):
        attrs["scale"] = scale
    if (window := integer(node, "local_window_size", -1)) > 0:  # the token itself is one of them
        attrs["left_window_size"] = window - 1
    attrs["is_causal"] = 1
    past = [operand(node, 3), operand(node, 4)]
    if not all(past):
        attrs |= {"q_num_heads": heads, "kv_num_heads": kv_heads}
        patch.op("Attention", list(qkv), list(node.output[:3]), **attrs)
        return
    q, *new = (_split(patch, x, n) for x, n in zip(qkv, (heads, kv_heads, kv_heads), strict=True))
    rows = _rows(patch, qkv[0])
    present: tuple[str, ...] = (*node.output[1:3], "", "")
    cache = [
        _written(patch, old, x, first, operand(node, 6), name)
        for old, x, name in zip(past, new, present, strict=False)
    ]
    lengths = patch.op("Add", [first, rows])
    y = patch.op("Attention", [q, *cache, "", "", "", lengths], (), **attrs)
    joined = patch.op("Transpose", [y], perm=[0, 2, 1, 3])
    patch.op("Reshape", [joined, patch.ints([0, 0, -1])], node.output[:1])


def _split(patch: Patch, x: str, heads: int) -> str:
    """[B, S, heads * D] as [B, heads, S, D]."""
    apart = patch.op("Reshape", [x, patch.ints([0, 0, heads, -1])])
    return patch.op("Transpose", [apart], perm=[0, 2, 1, 3])


def _written(patch: Patch, cache: str, rows: str, first: str, total: str, name: str) -> str:
    """The cache [B, heads, P, D] with the new rows in their places, grown where it has no room."""
    wanted = patch.op("Reshape", [patch.op("Cast", [total], to=TensorProto.INT64), patch.ints([1])])
    room = patch.op("Shape", [cache], start=2, end=3)
    more = patch.op("Max", [patch.op("Sub", [wanted, room]), patch.ints([0])])
    pads = patch.op("Concat", [patch.ints([0] * 6), more, patch.ints([0])], axis=0)
    grown = patch.op("Pad", [cache, pads])
    return patch.op("TensorScatter", [grown, rows, first], [name] if name else [], axis=2)
