"""onnxruntime's GroupQueryAttention as ONNX's RotaryEmbedding and Attention.

Reference: onnxruntime's docs/ContribOperators.md. The cache it returns is the one it was given with
the new keys and values behind: ORT writes them at `seqlens_k`, which is the same place as long as
no sequence of the batch is padded.
"""

from __future__ import annotations

import numpy as np
from onnx import NodeProto, TensorProto

from .onnx_model import AttrValue, Patch, attribute, integer, operand, real

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
    if integer(node, "do_rotary", 0):
        positions = operand(node, 9) or _positions(patch, q, node.input[5])
        q = _rotated(patch, node, q, positions, heads)
        k = _rotated(patch, node, k, positions, kv_heads)
    _attend(patch, node, (q, k, v), heads, kv_heads)


def _unpacked(patch: Patch, packed: str, heads: int, kv_heads: int) -> tuple[str, str, str]:
    """Queries, keys and values lie one behind the other in the last axis."""
    width = patch.op("Shape", [packed], start=2, end=3)
    head = patch.op("Div", [width, patch.ints([heads + 2 * kv_heads])])
    sizes = patch.op("Mul", [head, patch.ints([heads, kv_heads, kv_heads])])
    names = [patch.model.names.fresh(f"{packed}.{part}") for part in "qkv"]
    patch.op("Split", [packed, sizes], names, axis=2)
    return names[0], names[1], names[2]


def _positions(patch: Patch, q: str, last: str) -> str:
    """[B, S]: a sequence's last new token stands at seqlens_k, the others before it."""
    length = patch.op("Shape", [q], start=1, end=2)
    scalar = patch.op("Squeeze", [length])
    zero, one = (patch.constant(np.array(i, np.int64)) for i in (0, 1))
    steps = patch.op("Range", [zero, scalar, one])
    ends = patch.op(
        "Reshape", [patch.op("Cast", [last], to=TensorProto.INT64), patch.ints([-1, 1])]
    )
    first = patch.op("Sub", [patch.op("Add", [ends, one]), scalar])
    return patch.op("Add", [first, steps])


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
    patch: Patch, node: NodeProto, qkv: tuple[str, str, str], heads: int, kv_heads: int
) -> None:
    past = [operand(node, 3), operand(node, 4)]
    operands = [*qkv, "", *past] if all(past) else list(qkv)
    attrs: dict[str, AttrValue] = {"softcap": real(node, "softcap", 0.0)}
    if scale := real(node, "scale", 0.0):
        attrs["scale"] = scale
    window = attribute(node, "local_window_size")
    if window is not None and window.i >= 0:
        attrs["left_window_size"] = window.i
    attrs |= {"is_causal": 1, "q_num_heads": heads, "kv_num_heads": kv_heads}
    patch.op("Attention", operands, list(node.output[:3]), **attrs)
