"""Which kernel each launch of an ONNX graph calls, on which side, and where operands are read."""

from __future__ import annotations

from dataclasses import dataclass

from ..ir.graph import Op
from ..ir.target import Target
from . import kernels_net_cuda as cuda
from .kernels import LINEAR_OPS
from .kernels_net import BY_OP

LINEAR = "linear"
CONTROL = {"onnx_if": ("IF", ("then", "else")), "onnx_loop": ("LOOP", ("body",)),
           "onnx_scan": ("SCAN", ("body",))}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Entry:
    """A kernel of the table: the C++ function, the template that defines it, and where it runs."""

    symbol: str
    family: str
    variant: str
    side: str


def is_device(target: Target) -> bool:
    """Whether kernels of the target may run on a device."""
    return "cuda" in target.features


def side_of(op: Op, target: Target) -> str:
    """Where a launch runs: cuda.HOST or cuda.DEVICE."""
    if not is_device(target) or op.name in CONTROL:
        return cuda.HOST
    return cuda.DEVICE if op.name in LINEAR_OPS else op.get("side", cuda.DEVICE)


def entry_of(op: Op, target: Target) -> Entry:
    """The kernel of a launch."""
    side = side_of(op, target)
    if op.name in LINEAR_OPS:
        return Entry(LINEAR, LINEAR, "", side)
    kernel = BY_OP[op.name]
    variant = kernel.variant(op)
    symbol = f"{kernel.name}_{variant}" if variant else kernel.name
    return Entry(symbol, kernel.family, variant, side)


def sides_of(op: Op, target: Target) -> tuple[str, ...]:
    """Where each operand is read, as net.h's Side."""
    count, side = len(op.args), side_of(op, target).upper()
    if not is_device(target):
        return (side,) * count
    if op.name in CONTROL:  # the executor's own affair
        return ("UNREAD",) * count
    if op.name in LINEAR_OPS:
        return (side,) * count
    kernel = BY_OP[op.name]
    if kernel.family == cuda.VIEWS:
        return ("UNREAD", *("HOST",) * (count - 1))
    on_host = cuda.host_ins(kernel) if side == "DEVICE" else range(count)
    return tuple("HOST" if i in on_host else side for i in range(count))
