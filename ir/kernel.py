"""What a phase knows of a kernel: whom it serves, what it refuses and why, what memory it needs.

The table itself belongs to code generation (codegen/kernels.py) and reaches the phases through the
driver. Its order is preference: the first kernel that accepts an op in a bucket gets it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from .graph import Op


@dataclass(frozen=True, slots=True)
class Workspace:
    """Scratch bytes of one launch: `shared` by the team, plus `per_thread` for each thread."""

    shared: int = 0
    per_thread: int = 0


def no_workspace(op: Op, tokens: int) -> Workspace:
    """For kernels that compute in registers and on the stack."""
    return Workspace()


Refusal = Callable[[Op, int], str | None]
"""(op, tokens of the bucket) -> None when the kernel takes it, else the reason why not."""


@dataclass(frozen=True, slots=True)
class KernelDecl:
    """One kernel as the phases see it.

    `serves` names ops; `needs` names features of the target (see ir/target.py); `refuses` and
    `workspace` are asked per op and bucket. A `fallback` kernel is taken only where the user allows
    it by name. An `exact` one reads the activations of W4A4 linears as they are, where the op
    would quantise them (see `ops_fused.unquantized`). `promise` states the accuracy in words;
    `precision` is the relative error to which it reads activations (2^-24: as they are), from which
    the self-test derives its tolerance.

    On a target where an op may run on either `side` ("host" or "device"), a kernel serves one of
    them; on the device, it reads the values of `host_ins` (operand numbers) on the host all the
    same. One that `looks_at_shapes` reads no value of operand 0, wherever that is.
    """

    name: str
    serves: frozenset[str]
    needs: frozenset[str]
    refuses: Refusal
    promise: str
    precision: float = 2.0**-24
    workspace: Callable[[Op, int], Workspace] = no_workspace
    fallback: bool = False
    exact: bool = False
    side: str = ""
    host_ins: tuple[int, ...] = ()
    looks_at_shapes: bool = False


@dataclass(frozen=True, slots=True)
class Refused:
    """Why a kernel that serves the op's kind does not run this one."""

    kernel: str
    reason: str
