"""On which side of a CUDA target each op of an ONNX graph runs: the device, or the host.

Sizes, axes and indices that are worked out of shapes are read by the host, which launches; a device
that computed them would have to be waited for. So an op runs on the host where all that it reads is
known there (shapes, constants, inputs of integers) and somebody there wants what it makes. All else
runs on the device; control flow is walked by the host.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from ..ir.graph import Graph, Op, Value, const_values
from ..ir.kernel import KernelDecl
from ..ir.rewrite import LogEntry
from ..ir.types import Plain
from .launches import launched

HOST, DEVICE = "host", "device"
SIDES = {
    HOST: "runs on the device; the op is worked out of shapes on the host, which reads it",
    DEVICE: "runs on the host, which reads nothing of the op",
}
"""Why a kernel of the other side does not take an op that was placed on this one."""
CONDITIONS: dict[str, tuple[int, ...]] = {"onnx_if": (0,), "onnx_loop": (0, 1), "onnx_scan": ()}
"""Operands of control flow whose values the host reads."""


@dataclass(slots=True)
class _Placement:
    """What is known on the host, by op and by value, and what is wanted there."""

    kernels: Sequence[KernelDecl]
    known: set[Value]
    wanted: set[Value] = field(default_factory=set[Value])

    def kernel(self, op: Op, side: str) -> KernelDecl | None:
        """The kernel that would run the op on a side."""
        return next(
            (k for k in self.kernels if k.side == side and op.name in k.serves
             and k.refuses(op, 1) is None),
            None,
        )  # fmt: skip


def _is_count(v: Value) -> bool:
    """Whether the value is of integers or bools."""
    return isinstance(v.type.enc, Plain) and v.type.enc.dtype in (
        "i64", "i32", "i16", "i8", "u64", "u32", "u16", "u8", "bool",
    )  # fmt: skip


def _is_known(op: Op, here: _Placement) -> bool:
    """Whether the host can work the op out."""
    kernel = here.kernel(op, HOST)
    if kernel is None:
        return False
    if kernel.looks_at_shapes and op.name in ("onnx_shape", "onnx_size"):
        return True
    return all(v in here.known for v in op.args)


def _side(op: Op, here: _Placement) -> tuple[str, str]:
    """The side of an op whose readers have theirs, and why."""
    host, device = here.kernel(op, HOST), here.kernel(op, DEVICE)
    if host is not None and host.looks_at_shapes:
        return HOST, "it looks at shapes alone"
    if host is None or not all(v in here.known for v in op.outs):
        return DEVICE, ""
    if any(v in here.wanted for v in op.outs):
        return HOST, "of shapes and constants, and read there"
    if device is None and all(map(_is_count, op.outs)):
        return HOST, "of shapes and constants; the device has no kernel for it"
    return DEVICE, ""


def _want(op: Op, side: str, here: _Placement) -> None:
    """Takes down which operands the host reads."""
    if op.name in CONDITIONS:
        reads = CONDITIONS[op.name]
    elif side == DEVICE:
        kernel = here.kernel(op, DEVICE)
        reads = () if kernel is None else kernel.host_ins
    else:
        kernel = here.kernel(op, HOST)
        is_view = kernel is not None and kernel.looks_at_shapes
        passes_on = op.name not in ("onnx_shape", "onnx_size")
        skipped = is_view and not (passes_on and any(v in here.wanted for v in op.outs))
        reads = tuple(range(1 if skipped else 0, len(op.args)))
    here.wanted.update(op.args[i] for i in reads if i < len(op.args))


def placed(graph: Graph, kernels: Sequence[KernelDecl]) -> tuple[Graph, list[LogEntry]]:
    """The graph with the `side` of each op that a kernel may run on either."""
    sided = [k for k in kernels if k.side]
    absent = {v for op in graph.ops if op.name == "absent" for v in op.outs}
    here = _Placement(sided, {*const_values(graph), *absent, *filter(_is_count, graph.args)})
    ops = launched(graph)
    for op in ops:
        if _is_known(op, here):
            here.known.update(op.outs)
    sides: dict[Op, str] = {}
    log: list[LogEntry] = []
    for op in reversed(ops):
        side, why = _side(op, here)
        _want(op, side, here)
        if any(op.name in k.serves for k in sided):
            sides[op] = side
        if why:
            log.append(LogEntry(side, op.loc or str(op.out), True, why))
    done = [
        Op(op.name, op.args, op.outs, {**op.attrs, "side": sides[op]}, op.loc)
        if op in sides
        else op
        for op in graph.ops
    ]
    return graph.with_ops(done), log[::-1]
