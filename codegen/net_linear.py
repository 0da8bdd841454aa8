"""What the plan of an ONNX graph says of its linears, as C++ initialisers.

On the cpu: LinearFacts of net/linear.h; on a device: LinearFacts of net_cuda/device_linear.h.
"""

from __future__ import annotations

from collections.abc import Mapping

from ..ir.errors import IRError
from ..ir.graph import Op
from ..ir.ops_fused import role
from ..ir.types import Nvfp4
from .kernels import Kernel
from .kernels_net import BUCKETS, FEW, MANY
from .kernels_net_cuda import PLAIN_LINEAR
from .lower import EPILOGUES, PROLOGUES
from .net_literals import real


def _kernel(op: Op, table: Mapping[str, Kernel], rows: int) -> Kernel:
    """The kernel of a linear of at most so many rows."""
    return table[op.strs("kernels")[BUCKETS.index(rows)]]


def linear_of_cpu(op: Op, table: Mapping[str, Kernel]) -> str:
    """The LinearFacts of linear.h."""
    few, many = (_kernel(op, table, rows) for rows in (FEW, MANY))
    w = op.args[1].type
    n, k = w.static
    offsets = {part.suffix: at for at, part in w.placed_parts()}
    at = {
        name: -1 if (value := role(op, name)) is None else op.args.index(value)
        for name in ("bias", "residual", "gamma", "row_scale", "input_scale")
    }
    scale_at = offsets["gs"] if isinstance(w.enc, Nvfp4) else -1
    few_space = few.decl.workspace(op, FEW)
    parts = (
        _launcher(few, few_space.shared, 0, few_space.per_thread),
        _launcher(many, *_affine(op, many)),
        f"{FEW}, {n}, {k}, {', '.join(map(str, at.values()))}",
        str(int(PROLOGUES[op.get("prologue", "none")])),
        str(int(EPILOGUES[op.get("epilogue", "none")])),
        real(op.get("eps", 0.0)),
        str(scale_at),
    )
    return "{" + ", ".join(parts) + "}"


def _launcher(kernel: Kernel, base: int, per_row: int, per_thread: int) -> str:
    return f"{{l_{kernel.name}, {base}, {per_row}, {per_thread}}}"


def _affine(op: Op, kernel: Kernel) -> tuple[int, int, int]:
    """Workspace of many rows: base, per row, per thread. IRError: it is not affine in the rows."""
    small, large, larger = (kernel.decl.workspace(op, rows) for rows in (1024, 2048, 4096))
    per_row, rest = divmod(large.shared - small.shared, 1024)
    if rest or larger.shared - large.shared != 2048 * per_row:
        raise IRError(f"{kernel.name}: workspace is not affine in the rows")
    return small.shared - 1024 * per_row, per_row, larger.per_thread


_PASSED_ON = {"x", "w", "bias", "residual", "input_scale"}
"""Operands of linears that a launch on a device has a place for; kernels that read activations as
they are need no input_scale."""


def linear_of_device(op: Op, table: Mapping[str, Kernel]) -> str:
    """The LinearFacts of device_linear.h. IRError: an operand that no such launch passes on."""
    if op.get("prologue", "none") != "none" or not set(op.strs("roles")) <= _PASSED_ON:
        raise IRError(f"{op.loc}: {op.strs('roles')} with prologue {op.get('prologue', 'none')}")
    w = op.args[1].type
    n, k = w.static
    offsets = {part.suffix: at for at, part in w.placed_parts()}
    added = [role(op, name) for name in ("bias", "residual")]
    at = [-1 if value is None else op.args.index(value) for value in added]
    gelu = "true" if op.get("epilogue", "none") == "gelu" else "false"
    parts = (
        *(_launch(op, _kernel(op, table, rows), rows) for rows in (FEW, MANY)),
        f"{FEW}, {n}, {k}, {at[0]}, {at[1]}, {gelu}",
        f"{offsets.get('sf', -1)}, {offsets.get('gs', -1)}",
    )
    return "{" + ", ".join(parts) + "}"


def _launch(op: Op, kernel: Kernel, rows: int) -> str:
    rounds = "false" if kernel.family == PLAIN_LINEAR else "true"
    return f"{{hb::{kernel.name}, {kernel.decl.workspace(op, rows).shared}, {rounds}}}"
