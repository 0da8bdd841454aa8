"""Every kernel of a finished library against the interpreter, on the artifact's own weights.

For each distinct (kernel, op, shapes, attributes) of the plan, inputs are written into the
library's memory, one launch runs, and its result is compared within the tolerance of tolerance.py.
Inputs are random rows with outliers, large and tiny rows, and a zero row.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import tvm_ffi

from ..ir import numerics
from ..ir.errors import IRError, TargetError
from ..ir.graph import Op, Value
from ..ir.interp import evaluate
from ..ir.numerics import NUMPY_DTYPES, Array
from ..ir.opdef import Data, array
from ..ir.ops_fused import unquantized
from ..ir.ops_model import LOGITS_ROWS
from ..ir.types import P16, PAGED, PANEL_ROWS, QUANTISED_CACHES, Plain, TensorType
from ..runtime.artifact import SelfTest
from .args import Space
from .kernels import LINEAR_OPS, Kernel
from .lower import place_of, ref
from .plan import Plan
from .tolerance import tolerance

IDS, ROWS = 5, 6  # hb::Space: inputs of a step, which no Ref names
MOST_ROWS = 17  # one more than an AMX tile holds
NARROW = 1024  # of a linear with more outputs, only the first and last ones are compared
KEYS = 300  # cached before the step under test
LONGEST_WINDOW = 8192  # a longer one would make the test slow
Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Case:
    """One launch to try: the op, its place in the launch list, a bucket, tokens, and the kernel."""

    op: Op
    index: int
    bucket: int
    tokens: int
    kernel: Kernel


def cases(plan: Plan, one_row: bool = False) -> list[Case]:
    """One case for each distinct kernel, shape and token count the plan can meet.

    `one_row`: a prefill step returns the logits of one token only, and launches are sized for
    their bucket, not for its tokens.
    """
    found: dict[tuple[object, ...], Case] = {}
    for index, op in enumerate(plan.ops):
        for at, bucket in enumerate(plan.buckets):
            kernel = plan.kernel_of(op, at)
            tokens = min(bucket.tokens, MOST_ROWS, plan.context)
            if one_row and bucket.prefill and op.out.type.count == LOGITS_ROWS:
                tokens = 1
            key = (kernel.name, tokens, bucket.tokens if one_row else 0, *_signature(op))
            found.setdefault(key, Case(op, index, bucket.tokens, tokens, kernel))
    return list(found.values())


def _signature(op: Op) -> tuple[object, ...]:
    attrs = {k: v for k, v in op.attrs.items() if k not in ("kernels", "launch")}
    return op.name, str(sorted(attrs.items())), tuple(str(v.type) for v in op.args)


class Session:
    """A library with its weights, driven launch by launch. Close it to free its memory."""

    def __init__(self, library: Path, image: Bytes, *, threads: int = 2, isa: str = "auto") -> None:
        try:
            self._module = cast(Any, tvm_ffi).load_module(str(library))
        except (OSError, RuntimeError) as error:
            raise TargetError(f"{library}: this system cannot load it: {error}") from error
        self.image = image
        self._handle = cast(int, self._module["create"](image, threads, isa))
        self.isa = str(self._module["isa"](self._handle))

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self._module["destroy"](self._handle)

    def poke(self, space: int, offset: int, data: Array) -> None:
        """Write an array's bytes at a byte offset of a space."""
        self._module["poke"](self._handle, space, offset, _bytes(data))

    def peek(self, space: int, offset: int, shape: tuple[int, ...], dtype: str = "f32") -> Array:
        """Read numbers from a byte offset of a space."""
        kind = np.dtype(NUMPY_DTYPES[dtype])
        out = np.empty(int(np.prod(shape)) * kind.itemsize, np.uint8)
        self._module["peek"](self._handle, space, offset, out)
        return out.view(kind).reshape(shape)

    def cases(self, plan: Plan) -> list[Case]:
        """What there is to try."""
        return cases(plan)

    def write_cache(self, value: Value, data: Array) -> None:
        """The first positions of a cache: data [heads, positions, head_dim]."""
        _, capacity, dim = value.type.static
        for head in range(len(data)):
            offset = place_of(value).offset + head * capacity * dim * 4
            self.poke(int(Space.STATE), offset, data[head])

    def read_cache(self, value: Value, rows: slice) -> Array:
        """Positions of a cache [heads, positions, head_dim]."""
        heads, capacity, dim = value.type.static
        base = place_of(value).offset + rows.start * dim * 4
        shape = rows.stop - rows.start, dim
        read = (
            self.peek(int(Space.STATE), base + head * capacity * dim * 4, shape)
            for head in range(heads)
        )
        return np.stack(list(read))

    def launch(self, case: Case, rows: int, position: int) -> None:
        """Run one launch alone."""
        self._module["launch"](self._handle, case.bucket, case.index, case.tokens, rows, position)

    def weight(self, value: Value) -> Data:
        """A constant as the library reads it: an array, or parts by suffix."""
        parts: dict[str, Array] = {}
        for offset, part in value.type.placed_parts():
            at = place_of(value).offset + offset
            raw = self.image[at : at + part.nbytes]
            parts[part.suffix] = raw.view(NUMPY_DTYPES[part.dtype]).reshape(part.shape)
        return parts[""] if isinstance(value.type.enc, Plain) else parts


def _bytes(data: Array) -> Bytes:
    return np.ascontiguousarray(data).reshape(-1).view(np.uint8)


def selftest(plan: Plan, session: Session, seed: int = 0) -> list[SelfTest]:
    """Try every case. TargetError: a kernel is further from the interpreter than its tolerance."""
    rng = np.random.default_rng(seed)
    return [_try(case, plan, session, rng) for case in session.cases(plan)]


def _try(case: Case, plan: Plan, session: Session, rng: np.random.Generator) -> SelfTest:
    position = _position(case, plan)
    for space in (IDS, ROWS):  # left over from the case before, they could be out of range now
        session.poke(space, 0, np.zeros(case.tokens, np.int32))
    args = [_operand(v, case, position, plan, session, rng) for v in case.op.args]
    session.launch(case, case.tokens, position)
    op, args, columns = _narrow(*_as_computed(case, args))
    expected = evaluate(op, args)
    bounds = tolerance(op, args, expected, case.kernel.precision(session.isa))
    worst = SelfTest(case.op.loc, case.kernel.name, case.bucket, 0.0, 0.0)
    ratio = -1.0
    for value, want, bound in zip(case.op.outs, expected, bounds, strict=True):
        found, want = _result(value, array(want), columns, case, position, session)
        want = want.astype(np.float64)
        error = np.abs(found.astype(np.float64) - want)
        error[~np.isfinite(error)] = np.inf
        limit = np.broadcast_to(bound + _stored(value) * np.abs(want), error.shape)
        at = np.unravel_index(int(np.argmax(error / np.maximum(limit, 1e-300))), error.shape)
        if float(error[at]) / max(float(limit[at]), 1e-300) > ratio:
            ratio = float(error[at]) / max(float(limit[at]), 1e-300)
            worst = replace(worst, max_abs=float(error[at]), tolerance=float(limit[at]))
    if worst.max_abs > worst.tolerance:
        raise TargetError(
            f"{case.op.loc or case.op.out}: kernel {case.kernel.name} ({session.isa}, "
            f"{case.tokens} rows) is wrong on this machine: off by {worst.max_abs:.3g} from the "
            f"interpreter, expected at most {worst.tolerance:.3g}; report it with the artifact's "
            f"passes/ folder, and compile with another compiler"
        )
    return worst


def _stored(value: Value) -> float:
    """Where a result is stored in bf16: kernel and interpreter each round it, by up to 2^-8."""
    return 2.0**-7 if value.type.enc in (Plain("bf16"), Plain("bf16", PAGED)) else 0.0


def _position(case: Case, plan: Plan) -> int:
    """Far enough for several blocks of keys and for a window that has begun to move."""
    window = case.op.get("window", 0)
    return min(plan.context - case.tokens, KEYS + (window if window <= LONGEST_WINDOW else 0))


# --- operands ------------------------------------------------------------------------------------


def _operand(
    value: Value, case: Case, position: int, plan: Plan, session: Session, rng: np.random.Generator
) -> Data:
    """Data for one operand, written into the library's memory where it is not constant."""
    if value.place is None:
        return _input(value, case, position, plan, session, rng)
    if value.place.space == "weights":
        return session.weight(value)
    if value.place.space == "state":
        return _cache(value, case, position, session, rng)
    data = activations(case.tokens, value.type.last, rng).astype(_dtype(value))
    at = ref(value)
    session.poke(int(at.space), at.offset * case.bucket, data)
    return data


def activations(rows: int, k: int, rng: np.random.Generator) -> Array:
    """f32 [rows, k]: outliers in each row; beyond the first, a large, a tiny and a zero row."""
    x = rng.standard_normal((rows, k))
    x[rng.random((rows, k)) < 0.01] *= 20
    for row, factor in enumerate((1.0, 1e4, 1e-6, 0.0)[:rows]):
        x[row] *= factor
    return x.astype(np.float32)


def _input(
    value: Value, case: Case, position: int, plan: Plan, session: Session, rng: np.random.Generator
) -> Data:
    """The step's own inputs: token ids, position, rows."""
    if value.name == "pos":
        return np.array(position, np.int32)
    if value.name not in ("ids", "rows"):
        raise IRError(f"{value}: expected one of the inputs ids, pos, rows")
    space, limit = (IDS, plan.vocab) if value.name == "ids" else (ROWS, case.tokens)
    data = rng.integers(0, limit, case.tokens).astype(np.int32)
    data[-1] = limit - 1
    session.poke(space, 0, data)
    return data


def _cache(
    value: Value, case: Case, position: int, session: Session, rng: np.random.Generator
) -> Data:
    """Random keys or values [heads, position + tokens, head_dim]: as much as the step sees."""
    heads, _, dim = value.type.static
    data = rng.standard_normal((heads, position + case.tokens, dim))
    if value.type.enc in QUANTISED_CACHES:  # over the whole range, some saturated
        data = numerics.e4m3_saturate((data * numerics.E4M3_MAX / 3).astype(np.float32))
    data = data.astype(_dtype(value))
    session.write_cache(value, data)
    return data


def dtype_name(value: Value) -> str:
    """The IR dtype of a plain value."""
    assert isinstance(value.type.enc, Plain)
    return value.type.enc.dtype


def _dtype(value: Value) -> np.dtype[Any]:
    return np.dtype(NUMPY_DTYPES[dtype_name(value)])


# --- results -------------------------------------------------------------------------------------


def _result(
    value: Value, want: Array, columns: Array | None, case: Case, position: int, session: Session
) -> tuple[Array, Array]:
    """What the library has, and the part of the reference it is compared with."""
    place = place_of(value)
    if place.space == "state":
        rows = slice(position, position + case.tokens)
        return session.read_cache(value, rows), want[:, rows]
    at = ref(value)
    offset = at.offset * (case.bucket if at.space == Space.ARENA else 1)
    assert isinstance(value.type.enc, Plain)
    shape = case.tokens, value.type.last
    found = session.peek(int(at.space), offset, shape, value.type.enc.dtype)
    return (found if columns is None else found[:, columns]), want


# --- only a part of a large weight --------------------------------------------------------------


def _as_computed(case: Case, args: list[Data]) -> tuple[Op, list[Data]]:
    """The op as its kernel means it: an exact one leaves out the quantiser of a W4A4 linear."""
    if not case.kernel.decl.exact:
        return case.op, args
    op = unquantized(case.op)
    kept = dict(zip(case.op.args, args, strict=True))
    return op, [kept[v] for v in op.args]


def _narrow(op: Op, args: list[Data]) -> tuple[Op, list[Data], Array | None]:
    """The op with only the first and last outputs of a wide p16 linear, and which those are.

    An embedding keeps the panels of the table that its ids name, and all its outputs.
    """
    if op.name == "embed" and getattr(op.args[1].type.enc, "layout", "") == P16:
        return *_narrow_table(op, args), None
    if op.name not in LINEAR_OPS:
        return op, args, None
    w = op.args[1].type
    n, _ = w.static
    if n <= NARROW or getattr(w.enc, "layout", "") != P16:
        return op, args, None
    panels = -(-n // PANEL_ROWS)
    half = NARROW // 2 // PANEL_ROWS
    chosen = np.r_[0:half, panels - half : panels]
    columns = (chosen[:, None] * PANEL_ROWS + np.arange(PANEL_ROWS)).reshape(-1)
    columns = columns[columns < n]
    roles = op.strs("roles") or ("x", "w", "bias")[: len(args)]
    data = [_cut(r, d, chosen, columns) for r, d in zip(roles, args, strict=True)]
    return _with_weight(op, len(columns)), data, columns


def _with_weight(op: Op, n: int) -> Op:
    """The op with a weight (operand 1) of n rows."""
    x, w, *others = op.args
    smaller = Value(w.name, TensorType((n, w.type.last), w.type.enc))
    return replace(op, args=(x, smaller, *others))


def _narrow_table(op: Op, args: list[Data]) -> tuple[Op, list[Data]]:
    ids, table = map(array, args)
    panels, index = np.unique(ids // PANEL_ROWS, return_inverse=True)
    inside = (index * PANEL_ROWS + ids % PANEL_ROWS).astype(np.int32)
    return _with_weight(op, len(panels) * PANEL_ROWS), [inside, table[panels]]


def _cut(role: str, data: Data, panels: Array, columns: Array) -> Data:
    if role == "w":
        if not isinstance(data, dict):
            return data[panels]
        scales = data["gs"].reshape(-1, PANEL_ROWS)[panels]
        return {"": data[""][panels], "gs": scales.reshape(-1)}
    if role in ("bias", "row_scale", "residual"):
        return array(data)[..., columns]
    return data


def summary(tests: Iterable[SelfTest]) -> str:
    """One line: how many, and the one that came closest to its tolerance."""
    found = [test for test in tests if test.tolerance > 0]
    if not found:
        return "self-test: nothing to compare"
    worst = max(found, key=lambda test: test.max_abs / test.tolerance)
    share = worst.max_abs / worst.tolerance
    return f"self-test: {len(found)} cases, worst {share:.0%} of tolerance ({worst.kernel})"
