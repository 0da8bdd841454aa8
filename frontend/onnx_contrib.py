"""Operators of onnxruntime (domain com.microsoft) as the standard operators that they stand for.

Reference: onnxruntime's docs/ContribOperators.md. What a graph knows only at run time (a head's
width, say) is computed by nodes, which fold away where shapes are known.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from onnx import NodeProto

from .onnx_gqa import NEWER, group_query_attention
from .onnx_model import LEFT_OUT, Patch, Spelling, integer, operand, real
from .onnx_tensors import Constant
from .tensor_info import Array


def _skip_norm(norm: str, bias_at: int) -> Spelling:
    """norm(input + skip + bias); output 3 is the sum, 1 and 2 (statistics) are for training."""

    def rule(node: NodeProto, opset: int, patch: Patch) -> None:
        if any(_is_read(node, i) for i in (1, 2)):
            raise patch.fail("its statistics are asked for", NEWER)
        total = [node.output[3]] if _is_read(node, 3) else ()
        bias = operand(node, bias_at)
        h = patch.op("Add", node.input[:2], () if bias else total)
        if bias:
            h = patch.op("Add", [h, bias], total)
        scale = [n for n in node.input[2:bias_at] if n]
        epsilon = real(node, "epsilon", 1e-12)
        patch.op(norm, [h, *scale], node.output[:1], axis=-1, epsilon=epsilon)

    return rule


def _is_read(node: NodeProto, i: int) -> bool:
    """Whether somebody asked for output i."""
    return i < len(node.output) and not node.output[i].startswith(LEFT_OUT)


def _simplified_norm(node: NodeProto, opset: int, patch: Patch) -> None:
    if _is_read(node, 1):
        raise patch.fail("its statistics are asked for", NEWER)
    patch.op(
        "RMSNormalization", node.input[:2], node.output[:1], axis=integer(node, "axis", -1),
        epsilon=real(node, "epsilon", 1e-5), stash_type=integer(node, "stash_type", 1),
    )  # fmt: skip


def _gelu(approximate: str) -> Spelling:
    """Gelu, of the sum where a bias is given."""

    def rule(node: NodeProto, opset: int, patch: Patch) -> None:
        x = node.input[0]
        if operand(node, 1):
            x = patch.op("Add", node.input[:2])
        patch.op("Gelu", [x], node.output, approximate=approximate)

    return rule


def _quick_gelu(node: NodeProto, opset: int, patch: Patch) -> None:
    patch.op("Swish", node.input, node.output, alpha=real(node, "alpha", 1.702))


def _fused_mat_mul(node: NodeProto, opset: int, patch: Patch) -> None:
    """alpha * A' B', each transposed in its last two axes where its attribute says so."""
    if integer(node, "transBatchA", 0) or integer(node, "transBatchB", 0):
        raise patch.fail("transposes batches", NEWER)
    a, b = node.input
    scaled = real(node, "alpha", 1.0) != 1.0
    outs = () if scaled else node.output
    left = "km" if integer(node, "transA", 0) else "mk"
    right = "nk" if integer(node, "transB", 0) else "kn"
    weight = patch.model.constants.get(b)
    if right == "nk" and weight is not None and len(weight.shape) == 2:
        b, right = patch.op("Transpose", [b], perm=[1, 0]), "kn"
    if left == "mk" and right == "kn":
        y = patch.op("MatMul", [a, b], outs)
    else:
        y = patch.op("Einsum", [a, b], outs, equation=f"...{left},...{right}->...mn")
    if scaled:
        patch.op("Mul", [y, patch.like(real(node, "alpha", 1.0), a)], node.output)


def _rotary(node: NodeProto, opset: int, patch: Patch) -> None:
    """Its position ids stand second, ONNX's last."""
    if real(node, "scale", 1.0) != 1.0 or integer(node, "is_packed_batching", 0):
        raise patch.fail("scales, or packs batches", NEWER)
    x, positions, cos, sin = node.input
    patch.op(
        "RotaryEmbedding", [x, cos, sin, positions], node.output,
        num_heads=integer(node, "num_heads", 0), interleaved=integer(node, "interleaved", 0),
        rotary_embedding_dim=integer(node, "rotary_embedding_dim", 0),
    )  # fmt: skip


def _mat_mul_nbits(node: NodeProto, opset: int, patch: Patch) -> None:
    """A weight of 4 or 8 bits in blocks becomes a dense one, [N, K], when it is read."""
    n, k, block = (integer(node, name, 0) for name in ("N", "K", "block_size"))
    bits = integer(node, "bits", 4)
    names = [operand(node, i) for i in range(1, 4)]
    parts = [patch.model.constants.get(name) for name in names if name]
    if bits not in (4, 8) or block < 16 or block & (block - 1) or min(n, k) < 1:
        raise patch.fail(f"bits {bits}, block_size {block}, N {n}, K {k}: expected 4 or 8 bits in "
                         "blocks of a power of two", NEWER)  # fmt: skip
    if operand(node, 4) or any(c is None for c in parts):
        raise patch.fail("has a g_idx, or weights that are no constants", NEWER)
    codes, scales, *zeros = (c for c in parts if c is not None)
    blocks = -(-k // block)
    if codes.shape != (n, blocks, block * bits // 8) or scales.count != n * blocks:
        raise patch.fail(
            f"weights {list(codes.shape)} and {scales.count} scales, expected "
            f"{[n, blocks, block * bits // 8]} and {n * blocks}", "export the model again"
        )  # fmt: skip
    zero = zeros[0] if zeros else None
    if zero is not None and (zero.dtype != "u8" or zero.count != n * -(-blocks * bits // 8)):
        raise patch.fail("zero points are not packed as the weights", NEWER)
    name = patch.model.names.fresh(names[0])
    patch.model.constants[name] = Constant(
        scales.dtype, (n, k), lambda: _dense(codes, scales, zero, bits, (n, k))
    )
    weight = patch.op("Transpose", [name], perm=[1, 0])
    y = patch.op("MatMul", [node.input[0], weight], () if operand(node, 5) else node.output)
    if operand(node, 5):
        patch.op("Add", [y, node.input[5]], node.output)


def _codes(packed: Array, bits: int) -> Array:
    """The codes of each row of bytes, low bits first."""
    if bits == 8:
        return packed
    pairs = np.stack([packed & 15, packed >> 4], axis=-1)
    return pairs.reshape(*packed.shape[:-1], -1)


def _dense(
    codes: Constant, scales: Constant, zero: Constant | None, bits: int, shape: tuple[int, int]
) -> Array:
    """(code - zero point) * scale; the zero point is the middle where none is given."""
    n, k = shape
    values = _codes(codes.load(), bits).astype(np.float32)
    scale = scales.load().astype(np.float32).reshape(n, -1, 1)
    middle = np.float32(1 << (bits - 1))
    offset: Array = np.full(scale.shape, middle)
    if zero is not None:
        points = _codes(zero.load().reshape(n, -1), bits)[:, : scale.shape[1]]
        offset = points.astype(np.float32)[..., None]
    dense = ((values - offset) * scale).reshape(n, -1)[:, :k]
    return np.ascontiguousarray(dense).astype(scales.load().dtype)


def _standard(op_type: str) -> Spelling:
    """The same operator in ONNX's own domain."""

    def rule(node: NodeProto, opset: int, patch: Patch) -> None:
        new = NodeProto()
        new.CopyFrom(node)
        new.domain, new.op_type = "", op_type
        patch.keep(new)

    return rule


CONTRIB: Mapping[str, Spelling] = {
    "BiasGelu": _gelu("none"),
    "DequantizeLinear": _standard("DequantizeLinear"),
    "FastGelu": _gelu("tanh"),
    "FusedMatMul": _fused_mat_mul,
    "Gelu": _gelu("none"),
    "GroupQueryAttention": group_query_attention,
    "MatMulNBits": _mat_mul_nbits,
    "QuantizeLinear": _standard("QuantizeLinear"),
    "QuickGelu": _quick_gelu,
    "RotaryEmbedding": _rotary,
    "SimplifiedLayerNormalization": _simplified_norm,
    "SkipLayerNormalization": _skip_norm("LayerNormalization", 4),
    "SkipSimplifiedLayerNormalization": _skip_norm("RMSNormalization", 3),
}
"""Operator of com.microsoft -> how ONNX says it."""
