"""THE op table: one entry per op, holding all that is known of it.

An entry says how the result is typed (`infer`, which also verifies), what it means (`reference`, in
numpy), and in one line what it is for. Printer, parser, verifier, interpreter and docs read this
table and need nothing else, so a new op is one entry in one of the `ops_*` files.
"""

from __future__ import annotations

from . import onnx_table, ops_fused, ops_model, ops_weight
from .errors import IRError
from .graph import Op
from .opdef import OpDef
from .types import TensorType

OPS: dict[str, OpDef] = {
    **ops_weight.OPS,
    **ops_model.OPS,
    **ops_fused.OPS,
    **onnx_table.OPS,
}


def lookup(op: Op) -> OpDef:
    """The table's entry. Raises IRError for an unknown op."""
    if op.name not in OPS:
        raise IRError(f"unknown op {op.name!r}, expected one of {sorted(OPS)}")
    return OPS[op.name]


def infer(op: Op) -> tuple[TensorType, ...]:
    """The types of the op's results, from operands and attributes. Raises IRError."""
    entry = lookup(op)
    if not entry.least <= len(op.args) <= entry.most:
        wanted = str(entry.least) if entry.least == entry.most else f"{entry.least}..{entry.most}"
        raise IRError(f"{op.name}: expected {wanted} operands, found {len(op.args)}")
    types = entry.infer(op)
    return types if isinstance(types, tuple) else (types,)
