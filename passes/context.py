"""What a phase may know besides the graph, and what it leaves behind besides the graph."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..ir.graph import Graph, Value
from ..ir.interp import WeightSource, fold
from ..ir.kernel import KernelDecl
from ..ir.numerics import Array
from ..ir.opdef import array
from ..ir.rewrite import LogEntry
from ..ir.target import Target

AUTO, W4A4, W4A16 = "auto", "w4a4", "w4a16"
RECIPES = (AUTO, W4A4, W4A16)


@dataclass(frozen=True, slots=True)
class Context:
    """The user's wishes, the target's facts, its kernel table, and weights on demand.

    `needs_fp8_cache`: the user insists on a KV cache in FP8, on a target that may have none.
    `weights_start`: where in the weight image the constants of this graph begin; those of other
    graphs of the same model stand before it.
    """

    target: Target
    kernels: tuple[KernelDecl, ...]
    weights: WeightSource
    recipe: str = AUTO
    quantize: str | None = None
    allow_fallback: frozenset[str] = frozenset()
    threads: int = 1
    needs_fp8_cache: bool = False
    weights_start: int = 0

    @property
    def keeps_w4a4(self) -> bool:
        """Whether 4-bit activations of the checkpoint stay: asked for, or native on this target."""
        return self.recipe == W4A4 or (self.recipe == AUTO and self.target.w4a4_native)

    def constant(self, graph: Graph, value: Value) -> Array:
        """The data of a small constant (a scale). Raises IRError where it is none."""
        return array(fold([value], graph, self.weights)[0])


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a phase made: the graph and its decisions."""

    graph: Graph
    log: tuple[LogEntry, ...] = ()


@dataclass(frozen=True, slots=True)
class Phase:
    """A numbered step. The number is permanent; `why` says what it is for.

    `ensures` raises IRError where what the phase guarantees does not hold of its result.
    """

    id: str
    why: str
    run: Callable[[Graph, Context], Outcome]
    ensures: Callable[[Graph, Context], None]


def nothing(graph: Graph, context: Context) -> None:
    """The `ensures` of a phase that guarantees no more than a valid graph."""
