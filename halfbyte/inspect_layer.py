"""`inspect --layer`: the journey of one module's weights, from the checkpoint to its kernels."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from .inspect_format import modules_of, token_spans
from .inspect_path import behind, delta, made_at, path_of, reader_of, resolve, sources_of, strangers
from .inspect_source import Decision, Source
from .ir.graph import SOURCES, Graph, Op, const_values
from .ir.types import P16, PANEL_ROWS, SUPER_BLOCK_K, Nvfp4, Plain, ceil_div
from .runtime.manifest import KernelChoice, Refusal, SelfTest

FUSE, SELECT = "_fuse", "_select_kernels"

ROLES: dict[tuple[str, str, int], str] = {
    ("dequantize", "nvfp4", 0): "e2m1 codes, two a byte",
    ("dequantize", "nvfp4", 1): "block scales, one for 16 inputs",
    ("dequantize", "nvfp4", 2): "global scale",
    ("dequantize", "fp8", 0): "e4m3 codes",
    ("dequantize", "fp8", 1): "scale",
    ("dequantize", "gguf", 0): "blocks as in the GGUF file",
    ("quantize_dequantize", "nvfp4", 1): "input scale",
    ("linear", "", 1): "weight",
    ("linear", "", 2): "bias",
    ("embed", "", 1): "embedding table",
    ("rmsnorm", "", 1): "gamma",
    ("head_rmsnorm", "", 1): "gamma",
}
"""(op, its format, operand) -> what the operand is."""


@dataclass(frozen=True, slots=True)
class Tensor:
    """A checkpoint tensor the module reads. `value`: the name of its value in the IR."""

    name: str
    type: str
    bytes: int
    role: str
    value: str
    scale: float | None


@dataclass(frozen=True, slots=True)
class Step:
    """What one phase did to the module, and the decisions that concern it.

    `operands` says who the operands are that do not come from the module itself.
    """

    phase: str
    why: str
    removed: tuple[str, ...]
    added: tuple[str, ...]
    operands: tuple[str, ...]
    notes: tuple[str, ...]
    decisions: tuple[Decision, ...]

    @property
    def changed(self) -> bool:
        return bool(self.removed or self.added or self.notes)


@dataclass(frozen=True, slots=True)
class Buffer:
    """One buffer of a stored weight; offsets in bytes, in the image and in the file."""

    suffix: str
    dtype: str
    shape: tuple[int, ...]
    bytes: int
    offset: int
    file: str
    file_offset: int


@dataclass(frozen=True, slots=True)
class Stored:
    """A weight as it lies in the artifact. `rows`: the module's own rows of a joint weight."""

    name: str
    type: str
    bytes: int
    bits_per_number: float
    padding: str
    rows: tuple[int, int]
    shares: tuple[str, ...]
    buffers: tuple[Buffer, ...]


@dataclass(frozen=True, slots=True)
class Kernel:
    """The kernel of some buckets, which serve `tokens` ("9..512"), and what was refused first."""

    buckets: tuple[int, ...]
    tokens: str
    kernel: str
    refused: tuple[Refusal, ...]
    fallback: bool


@dataclass(frozen=True, slots=True)
class Tested:
    """A self-test of a kernel on this module's shape; `at` is where it was measured."""

    at: str
    kernel: str
    bucket: int
    max_abs: float
    tolerance: float


@dataclass(frozen=True, slots=True)
class Journey:
    """Everything the artifact knows of one module."""

    module: str
    op: str
    n: int
    k: int
    scheme: str
    dialect: str
    runs_as: str
    joint: tuple[str, ...]
    tensors: tuple[Tensor, ...]
    steps: tuple[Step, ...]
    stored: tuple[Stored, ...]
    kernels: tuple[Kernel, ...]
    selftests: tuple[Tested, ...]
    launch: int
    arguments: str


def journey(source: Source, wanted: str) -> Journey:
    """The journey of the module `wanted` names. Raises ModelError (see `resolve`)."""
    module = resolve(source, wanted)
    names = sources_of(source.first).get(module, [])
    first, last = (path_of(g, names, module) for g in (source.first, source.last))
    own = next((op for op in reversed(first) if op.loc == module and op.name not in SOURCES), None)
    reader = reader_of(last)
    loc = "" if reader is None else reader.loc or str(reader.out)
    choices = [c for c in source.facts.kernels if c.loc == loc]
    n, k = _shape(own)
    return Journey(
        module=module,
        op=own.name if own else "",
        n=n,
        k=k,
        scheme=_scheme(first),
        dialect=_dialect(source, module, first),
        runs_as=loc,
        joint=tuple(modules_of(loc)) if module in modules_of(loc) else (),
        tensors=_tensors(source, module, first),
        steps=_steps(source, names, module),
        stored=_stored(source, names, last),
        kernels=_kernels(choices, source.facts.buckets),
        selftests=_selftests(source, choices),
        launch=reader.get("launch", -1) if reader else -1,
        arguments=_arguments(source, reader),
    )


def _shape(op: Op | None) -> tuple[int, int]:
    if op is None or len(op.args) < 2 or len(op.args[1].type.shape) != 2:
        return 0, 0
    n, k = op.args[1].type.static
    return n, k


# --- the checkpoint -------------------------------------------------------------------------------


def _scheme(path: tuple[Op, ...]) -> str:
    """What kind of numbers the checkpoint holds; "" where the path reads none."""
    formats = {op.name: op.get("format", "") for op in path}
    if "weight" not in formats:
        return ""
    if "dequantize" not in formats:
        return "dense"
    kind = formats["dequantize"]
    if kind != "nvfp4":
        return kind
    return "nvfp4, 4-bit activations" if "quantize_dequantize" in formats else "nvfp4, weight only"


def _dialect(source: Source, module: str, path: tuple[Op, ...]) -> str:
    """The producer's spelling: as import noted it, or as the tensors' names tell it."""
    noted = next((s.dialect for s in source.scales if s.module == module and s.dialect), "")
    if noted:
        return noted
    names = " ".join(op.get("source", "") for op in path if op.name == "weight")
    marks = {"weight_packed": "compressed-tensors", "weight_scale_2": "modelopt"}
    kind = _scheme(path)
    return next((dialect for mark, dialect in marks.items() if mark in names), kind)


def _tensors(source: Source, module: str, path: tuple[Op, ...]) -> tuple[Tensor, ...]:
    values = {s.role: s.value for s in source.scales if s.module == module}
    found: list[Tensor] = []
    for op in path:
        if op.name != "weight":
            continue
        role = _role(op, path)
        key = {"global scale": "weight_global", "input scale": "input"}.get(role.partition(",")[0])
        found.append(
            Tensor(op.get("source", ""), str(op.out.type), op.out.type.nbytes, role, str(op.out),
                   values.get(key) if key else None)
        )  # fmt: skip
    return tuple(found)


def _role(weight: Op, path: tuple[Op, ...]) -> str:
    """What a tensor is to the op that reads it; looked for through what only reshapes it."""
    value, divisor = weight.out, ""
    for op in path:
        if value not in op.args:
            continue
        role = ROLES.get((op.name, op.get("format", ""), op.args.index(value)))
        if role is not None:
            return role + divisor
        divisor = ", stored as 1/x" if op.name == "reciprocal" else divisor
        value = op.out
    return ""


# --- the phases -----------------------------------------------------------------------------------


def _steps(source: Source, names: Sequence[str], module: str) -> tuple[Step, ...]:
    modules = set(sources_of(source.first))
    steps: list[Step] = []
    before_graph: Graph | None = None
    before: tuple[Op, ...] = ()
    for phase in source.phases:
        graph = source.graph(phase)
        path = path_of(graph, names, module)
        change = delta(before, path)
        graph_before = before_graph or graph
        around = behind(graph_before, before) if phase.endswith(FUSE) else set[str]()
        around |= made_at(before, path)
        chosen = _decisions(source, phase, module, modules, around)
        why = source.phase_facts[phase].why if phase in source.phase_facts else ""
        others = tuple(strangers(graph, before, path)) if change.added else ()
        steps.append(Step(phase, why, change.removed, change.added, others, change.notes, chosen))
        before_graph, before = graph, path
    return tuple(steps)


def _decisions(
    source: Source, phase: str, module: str, modules: set[str], around: set[str]
) -> tuple[Decision, ...]:
    """Those at the module, those that name it, and of other rules those at the places `around`."""
    chosen: list[Decision] = []
    for d in source.decisions:
        if d.phase != phase or phase.endswith(SELECT):  # the kernels have a table of their own
            continue
        named = modules.intersection(re.findall(r"[\w.]+", d.detail))
        if module in d.modules or module in named or (d.at in around and not named):
            chosen.append(d)
    here = {d.rule for d in chosen if module in d.modules}
    return tuple(d for d in chosen if module in d.modules or d.rule not in here)


# --- the artifact ---------------------------------------------------------------------------------


def _stored(source: Source, names: Sequence[str], path: tuple[Op, ...]) -> tuple[Stored, ...]:
    """The stored values on the path, the largest first: what the reader is given."""
    const = const_values(source.last)
    facts = {weight.name: weight for weight in source.facts.weights}
    found: list[Stored] = []
    for op in path:
        v = op.out
        if v not in const or v.place is None or v.place.space != "weights":
            continue
        fact = facts.get(v.name)
        offset = v.place.offset if fact is None else fact.offset
        shape, enc = v.type.static, v.type.enc
        buffers = tuple(
            Buffer(part.suffix, part.dtype, part.shape, part.nbytes, offset + at,
                   *source.file_place(offset + at))
            for at, part in v.type.placed_parts()
        )  # fmt: skip
        numbers = max(1, _product(shape))
        others = () if fact is None else tuple(s for s in fact.source if s not in names)
        found.append(
            Stored(v.name, str(v.type), v.type.nbytes, v.type.nbytes * 8 / numbers,
                   _padding(shape, enc), _rows(op, path, shape), others, buffers)
        )  # fmt: skip
    return tuple(sorted(found, key=lambda s: -s.bytes))


def _product(shape: Sequence[int]) -> int:
    total = 1
    for extent in shape:
        total *= extent
    return total


def _padding(shape: tuple[int, ...], enc: object) -> str:
    """What a panel layout adds: zero rows, and for super-blocks zero columns."""
    if not isinstance(enc, Nvfp4 | Plain) or enc.layout != P16:
        return ""
    n, k = shape
    rows = ceil_div(n, PANEL_ROWS) * PANEL_ROWS
    columns = ceil_div(k, SUPER_BLOCK_K) * SUPER_BLOCK_K if isinstance(enc, Nvfp4) else k
    padded = [f"{what} {a} to {b}" for what, a, b in (("rows", n, rows), ("inputs", k, columns))
              if a != b]  # fmt: skip
    return " and ".join(padded)


def _rows(stored: Op, path: tuple[Op, ...], shape: tuple[int, ...]) -> tuple[int, int]:
    """The rows [start, stop) of the stored value that come from the path's own tensors."""
    start, stop = 0, shape[0] if shape else 1
    made = {v for op in path for v in op.outs}
    needed = set(stored.args)
    for op in reversed(path):
        if not needed.intersection(op.outs):
            continue
        needed.update(op.args)
        if op.name == "concat":
            at = 0
            for v in op.args:
                if v in made:
                    return at, at + v.type.static[0]
                at += v.type.static[0]
    return start, stop


def _kernels(choices: Sequence[KernelChoice], buckets: Sequence[int]) -> tuple[Kernel, ...]:
    """Buckets of one kernel and the same refused candidates together."""
    groups: dict[tuple[str, tuple[str, ...], bool], list[KernelChoice]] = {}
    for c in choices:
        key = c.kernel, tuple(r.kernel for r in c.refused), c.fallback
        groups.setdefault(key, []).append(c)
    return tuple(
        Kernel(served, token_spans(served, buckets), cs[0].kernel, _joined(cs), cs[0].fallback)
        for cs in groups.values()
        for served in (tuple(c.bucket for c in cs),)
    )


def _joined(choices: Sequence[KernelChoice]) -> tuple[Refusal, ...]:
    """The refusals of several buckets; reasons that differ are all kept."""
    reasons: dict[str, list[str]] = {}
    for c in choices:
        for r in c.refused:
            known = reasons.setdefault(r.kernel, [])
            if r.reason not in known:
                known.append(r.reason)
    return tuple(Refusal(kernel, "; ".join(found)) for kernel, found in reasons.items())


def _selftests(source: Source, choices: Sequence[KernelChoice]) -> tuple[Tested, ...]:
    """Of this op, or of another with the same kernel and shape: each is tested once."""
    shapes = {(c.loc, c.kernel, c.bucket): (c.op, c.n, c.k) for c in source.facts.kernels}
    wanted = {(c.kernel, c.bucket): (c.op, c.n, c.k) for c in choices}
    found: dict[tuple[str, int], SelfTest] = {}
    for test in source.facts.selftest:
        key = test.kernel, test.bucket
        at = test.loc, *key
        same = key in wanted and shapes.get(at) == wanted[key]
        if same and (key not in found or test.loc == choices[0].loc):
            found[key] = test
    return tuple(Tested(t.loc, t.kernel, t.bucket, t.max_abs, t.tolerance) for t in found.values())


def _arguments(source: Source, reader: Op | None) -> str:
    """`file:line` of the launch's arguments in the generated source, where it is recorded."""
    if reader is None:
        return ""
    mark = f"{reader.out} = {reader.name}("
    for number, line in enumerate(source.generated("plan.cc"), 1):
        if mark in line:
            return f"{source.folder}/60_codegen/plan.cc:{number}"
    return ""
