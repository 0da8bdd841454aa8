"""ONNX operators of transformers that are more than a matrix product or a normalisation."""

from __future__ import annotations

from .errors import IRError
from .graph import Op
from .onnx_ops import Shape, dtype, is_given, like, onnx, shape, typed
from .opdef import OpDef
from .types import UNKNOWN, Dim, TensorType


def _heads(op: Op, i: int, attr: str) -> tuple[Dim, Dim, Dim, Dim] | None:
    """Operand i as [batch, heads, rows, size]. Raises IRError where it cannot be that."""
    found = shape(op, i)
    if found is None:
        return None
    if len(found) == 4:
        return found[0], found[1], found[2], found[3]
    count = op.get(attr, 0)
    if len(found) != 3 or count < 1:
        raise IRError(f"{op.name}: operand {i} is of rank {len(found)} for {attr} {count}")
    size = found[2] // count if isinstance(found[2], int) else UNKNOWN
    return found[0], count, found[1], size


def _sum(a: Dim, b: Dim) -> Dim:
    return a + b if isinstance(a, int) and isinstance(b, int) else UNKNOWN


def _with_past(op: Op, new: Shape | None, i: int) -> Shape | None:
    """`new` behind operand i along the rows."""
    if new is None or not is_given(op, i):
        return new
    past = shape(op, i)
    rows = _sum(past[2], new[2]) if past is not None and len(past) == 4 else UNKNOWN
    return (*new[:2], rows, new[3])


def _attention(op: Op) -> tuple[TensorType, ...]:
    q, k = _heads(op, 0, "q_num_heads"), _heads(op, 1, "kv_num_heads")
    keys = _with_past(op, k, 4)
    values = _with_past(op, _heads(op, 2, "kv_num_heads"), 5)
    out = scores = None
    if q is not None and values is not None:
        size = values[3]
        out = (*q[:3], size)
        if len(shape(op, 0) or ()) == 3:
            both = isinstance(q[1], int) and isinstance(size, int)
            out = (q[0], q[2], int(q[1]) * int(size) if both else UNKNOWN)
    if q is not None and keys is not None:
        scores = (*q[:3], keys[2])
    kind = dtype(op, 0)
    return typed(kind, out), typed(kind, keys), typed(dtype(op, 2), values), typed(kind, scores)


_ATTENTION = {
    "is_causal": "no key behind the query; 0",
    "kv_num_heads": "of keys and values of rank 3",
    "left_window_size": "keys before the query that it sees; -1: all",
    "q_num_heads": "of queries of rank 3",
    "qk_matmul_output_mode": "scores as products 0, capped 1, biased 2, shares 3; 0",
    "right_window_size": "keys behind the query that it sees; -1: all",
    "scale": "of the products; 1 / sqrt(size)",
    "softcap": "scores are kept below by tanh; 0: they are not",
    "softmax_precision": "at least; computed in float or double whatever it is",
}
_ROTARY = {
    "interleaved": "pairs are neighbours, not halves apart; 0",
    "num_heads": "of an input of rank 3",
    "rotary_embedding_dim": "elements of a head that turn; all",
}

# fmt: off
OPS: dict[str, OpDef] = {
    "onnx_attention": onnx("Attention", "softmax(q k^T * scale + mask) v; keys; values; scores",
                           3, 7, _attention, _ATTENTION),
    "onnx_rotary_embedding": onnx("RotaryEmbedding", "pairs turned by the angle of their position",
                                  3, 4, like(), _ROTARY),
}
# fmt: on
