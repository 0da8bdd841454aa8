"""The final graph -> the static data of a model: arguments, launch lists, sizes, kernel tables.

Argument structs do not depend on the bucket (arena offsets count bytes per token), so each launch
has one per struct type, shared by the buckets whose kernels read that type.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..ir.errors import IRError
from ..ir.graph import Graph, Op
from ..ir.target import Target
from ..ir.text import op_text
from .isa import ISAS, Isa
from .kernels import FAMILIES, Kernel
from .lower import lower, pages_of
from .render import Source, family_sources, source
from .table import Table, table_of

RUNTIME_SOURCES = ("team.cc", "cpuid.cc", "ffi.cc", "registry.cc", "session.cc", "exports.cc")
EXPORTS = tuple(
    f"__tvm_ffi_{name}"
    for name in (
        "create", "destroy", "isa", "reset", "prefill", "decode",
        "launch", "poke", "peek", "profile",
    )
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Arguments:
    """One static struct of plan.cc. `comment` is the op in IR text."""

    name: str
    struct: str
    initialiser: str
    comment: str


@dataclass(frozen=True, slots=True)
class Launch:
    """One entry of a launch list: an index into the kernel table, and a struct's name."""

    kernel: int
    args: str


@dataclass(frozen=True, slots=True)
class Bucket:
    """The launch list of one token capacity. `prefill`: its tokens are all of one sequence."""

    tokens: int
    launches: tuple[Launch, ...]
    prefill: bool


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything plan.cc says. Sizes in bytes; `kernels` in the order of table indices.

    `pages`: of the paged caches of one whole context, each `state_bytes` / `pages`; 1 if not paged.
    """

    table: Table
    ops: tuple[Op, ...]
    arguments: tuple[Arguments, ...]
    buckets: tuple[Bucket, ...]
    kernels: tuple[Kernel, ...]
    weights_bytes: int
    arena_bytes_per_token: int
    state_bytes: int
    workspace_bytes: int
    workspace_bytes_per_thread: int
    vocab: int
    context: int
    pages: int

    @property
    def state_bytes_per_page(self) -> int:
        """Bytes of a page of every cache."""
        return self.state_bytes // self.pages

    @property
    def families(self) -> tuple[str, ...]:
        """The kernel families the plan uses, in the order of the table."""
        used = {kernel.family for kernel in self.kernels}
        return tuple(dict.fromkeys(k.family for k in self.table.kernels if k.family in used))

    def kernel_of(self, op: Op, bucket: int) -> Kernel:
        """The kernel of an op in the bucket of this index."""
        return self.table.by_name[op.strs("kernels")[bucket]]


def launches_of(graph: Graph) -> tuple[Op, ...]:
    """The ops of a step in launch order. IRError: their numbers are not 0, 1, 2 …"""
    ops = sorted(
        (op for op in graph.ops if "launch" in op.attrs), key=lambda op: op.get("launch", 0)
    )
    if [op.get("launch", -1) for op in ops] != list(range(len(ops))):
        raise IRError(f"@{graph.name}: launches are not numbered 0..{len(ops) - 1}")
    return tuple(ops)


def buckets_of(graph: Graph) -> tuple[int, ...]:
    """The token capacities a step is compiled for, ascending. IRError: phase 35 has not run."""
    found = graph.attrs.get("buckets")
    if not isinstance(found, tuple) or not found:
        raise IRError(f"@{graph.name}: expected the attribute buckets, found {found!r}")
    return tuple(int(tokens) for tokens in found)


def make_plan(graph: Graph, target: Target) -> Plan:
    """The plan of a graph that went through phase 50. IRError: something has no kernel or place."""
    ops, buckets, table = launches_of(graph), buckets_of(graph), table_of(target.name)
    by_name = table.by_name
    names = sorted({name for op in ops for name in op.strs("kernels")}, key=list(by_name).index)
    index = {name: i for i, name in enumerate(names)}
    arguments: dict[str, Arguments] = {}
    lists: list[Bucket] = []
    for at, tokens in enumerate(buckets):
        launches: list[Launch] = []
        for i, op in enumerate(ops):
            kernel = by_name[op.strs("kernels")[at]]
            made = _arguments(i, op, kernel)
            arguments[made.name] = made
            launches.append(Launch(index[kernel.name], made.name))
        lists.append(Bucket(tokens, tuple(launches), tokens > target.sequences))
    shared, per_thread = _workspace(ops, buckets, table)
    return Plan(
        table=table,
        ops=ops,
        arguments=tuple(arguments.values()),
        buckets=tuple(lists),
        kernels=tuple(by_name[name] for name in names),
        weights_bytes=_extent(graph, "weights"),
        arena_bytes_per_token=_extent(graph, "arena"),
        state_bytes=_extent(graph, "state"),
        workspace_bytes=shared,
        workspace_bytes_per_thread=per_thread,
        vocab=graph.outs[0].type.last,
        context=_context(graph),
        pages=max((pages_of(op.out.type) for op in graph.ops if op.name == "state"), default=1),
    )


def _arguments(index: int, op: Op, kernel: Kernel) -> Arguments:
    struct = kernel.args
    # A comment that ends in a backslash would swallow the next line of C++.
    comment = op_text(op).replace("\\", "/").replace("\n", " ")
    name = f"{struct.name.removesuffix('Args').lower()}_{index}"
    return Arguments(name, struct.name, struct.initialiser(lower(op, struct)), comment)


def _workspace(ops: Sequence[Op], buckets: Sequence[int], table: Table) -> tuple[int, int]:
    """Bytes that serve every launch: shared, and per thread, each rounded up to a cache line."""
    needs = [
        table.by_name[name].decl.workspace(op, tokens)
        for op in ops
        for name, tokens in zip(op.strs("kernels"), buckets, strict=True)
    ]
    shared = max((need.shared for need in needs), default=0)
    per_thread = max((need.per_thread for need in needs), default=0)
    return _line(shared), _line(per_thread)


def _line(nbytes: int) -> int:
    return -(-nbytes // 64) * 64


def _extent(graph: Graph, space: str) -> int:
    places = (value.place for value in graph.values())
    return max((p.offset + p.nbytes for p in places if p and p.space == space), default=0)


def _context(graph: Graph) -> int:
    """The capacity of the KV caches, [heads, context, head_dim] each. IRError: they differ."""
    found = {op.out.type.static[1] for op in graph.ops if op.name == "state"}
    if len(found) != 1:
        raise IRError(f"@{graph.name}: expected caches of one capacity, found {sorted(found)}")
    return found.pop()


def kernel_table(plan: Plan, isa: Isa) -> tuple[str, ...]:
    """For each kernel of the plan, the namespace of the best variant up to `isa`."""
    return tuple(variant_of(kernel, isa).name for kernel in plan.kernels)


def variant_of(kernel: Kernel, isa: Isa) -> Isa:
    """The best variant of a kernel up to `isa`."""
    by_name = {known.name: known for known in ISAS}
    while isa not in kernel.isas:
        isa = by_name[isa.base]
    return isa


def cpu_sources(plan: Plan, isas: Sequence[Isa]) -> list[Source]:
    """Every translation unit of the plan's library for these ISAs (SCALAR must be among them)."""
    families = {
        family: tuple(isa for isa in FAMILIES[family] if isa in isas) for family in plan.families
    }
    tables = [(isa, kernel_table(plan, isa) if isa in isas else None) for isa in ISAS]
    fixed = [source(name) for name in RUNTIME_SOURCES]
    return [*family_sources(families), *fixed, source("plan.cc", plan=plan, tables=tables)]


def manifest_shape(op: Op) -> tuple[int, int]:
    """(n, k) of a linear or embedding for the manifest's kernel table; zeros for other ops."""
    if op.name in ("linear", "fused_linear", "embed"):
        n, k = op.args[1].type.static
        return n, k
    return 0, 0
