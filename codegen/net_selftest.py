"""Every kernel of an ONNX graph against onnx's reference evaluator, on the graph's own constants.

The graph is walked on random inputs; at each node the kernel and the evaluator get the same
operands, so that no error adds up. What that does not reach, since random numbers ought to be
indices somewhere before it or an image is too small, is tried on larger inputs, and then node by
node on operands that are drawn for it (net_operands.py). The manifest lists what was tested.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from ..ir.errors import TargetError
from ..ir.graph import Graph, Op, Value, const_values
from ..ir.interp import WeightSource, evaluate, fold
from ..ir.numerics import NUMPY_DTYPES, Array
from ..ir.opdef import Data
from ..ir.ops import lookup
from ..runtime.artifact import SelfTest
from .kernels import LINEAR_OPS
from .kernels_net import BUCKETS, FEW, MANY
from .net_operands import EXTENTS, fitting_operands, is_parameter, random_operand
from .net_plan import CONTROL, NetPlan
from .net_session import NetSession
from .onnx_deviations import deviation
from .onnx_oracle import OURS, evaluate_onnx
from .tolerance import tolerance

SECONDS = 20.0
"""Of evaluator time; what is left then is not tested."""
RELATIVE = {"f64": 1e-6, "f32": 1e-4, "f16": 4e-3, "bf16": 3e-2}
"""Error allowed of each dtype, of the largest result: two orders of one sum differ by less."""
_ROUNDED = ("quantize_linear", "qlinear", "cast")  # results that may fall on either side of a tie
_RANDOM = ("random", "bernoulli", "multinomial")
_SHORT = 2.0
"""Seconds: a graph that was walked in less is walked again on larger inputs."""


@dataclass(slots=True)
class _Walk:
    """The test under way: what was found, which signatures are done, and the time left."""

    plan: NetPlan
    graphs: tuple[Graph, ...]
    session: NetSession
    weights: WeightSource
    random: np.random.Generator
    tests: list[SelfTest] = field(default_factory=list[SelfTest])
    done: set[str] = field(default_factory=set[str])
    met: set[Op] = field(default_factory=set[Op])
    spent: float = 0.0


def net_selftest(
    plan: NetPlan, graphs: tuple[Graph, ...], session: NetSession, weights: WeightSource
) -> tuple[SelfTest, ...]:
    """One result for each distinct op and operand types. TargetError: a kernel is wrong here."""
    walk = _Walk(plan, graphs, session, weights, np.random.default_rng(0))
    for unknown in EXTENTS:
        start = time.perf_counter()
        _program(walk, 0, [random_operand(v.type, walk.random, unknown) for v in graphs[0].args])
        if not _left(walk) or time.perf_counter() - start > _SHORT:
            break
    for program, number, op in _left(walk):
        _alone(walk, program, number, op)
    return tuple(walk.tests)


def _left(walk: _Walk) -> list[tuple[int, int, Op]]:
    """Program, number and op of the nodes that were not met with operands they take."""
    return [
        (i, number, op)
        for i, program in enumerate(walk.plan.programs)
        for number, op in enumerate(program.ops)
        if _is_testable(op) and not _is_done(walk, op)
    ]


def _is_done(walk: _Walk, op: Op) -> bool:
    """Whether the node was met; for a linear, whether both of its kernels were tested somewhere."""
    tested = {test.kernel for test in walk.tests}
    return op in walk.met and (op.name not in LINEAR_OPS or tested.issuperset(op.strs("kernels")))


def _is_testable(op: Op, drawn: Sequence[int] = ()) -> bool:
    """Whether the evaluator can say what the op gives, with these operands drawn at random."""
    if op.name in CONTROL or any(word in op.name for word in _RANDOM):
        return False
    return not deviation(op, drawn)


def _alone(walk: _Walk, program: int, number: int, op: Op) -> None:
    """Tests a node on operands of its own, the first that it and the evaluator take."""
    graph = walk.graphs[program]
    const = const_values(graph)
    absent = {v for o in graph.ops if o.name == "absent" for v in o.outs}
    constants = {v: fold([v], graph, walk.weights)[0] for v in op.args if v in const}
    stand_in = {v: np.zeros(0) for v in absent}
    for unknown in EXTENTS:
        if _is_done(walk, op) or walk.spent > SECONDS:
            return
        known = [constants.get(v, stand_in.get(v)) for v in op.args]
        drawn = fitting_operands(op, known, walk.random, unknown)
        if drawn is not None:
            _node(walk, program, number, op, constants, drawn, is_alone=True)


def _program(walk: _Walk, index: int, args: Sequence[Array | None]) -> None:
    """Tests the nodes of one program on these arguments, and of the bodies it hands values to."""
    graph, program = walk.graphs[index], walk.plan.programs[index]
    const = const_values(graph)
    values: dict[Value, Array | None] = dict(zip(graph.args, args, strict=True))
    absent = {v for op in graph.ops if op.name == "absent" for v in op.outs}
    for number, op in enumerate(program.ops):
        if walk.spent > SECONDS:
            return
        constants = {v: fold([v], graph, walk.weights)[0] for v in op.args if v in const}
        given = [None if v in const or v in absent else values.get(v) for v in op.args]
        missing = [
            v for v in op.args if v not in const and v not in absent and values.get(v) is None
        ]
        if missing:
            continue
        results = _node(walk, index, number, op, constants, given)
        values.update(zip(op.outs, results or (), strict=False))
        for body in program.nodes[number].programs:
            _body(walk, op, body, given, constants)


def _body(
    walk: _Walk, op: Op, body: int, given: Sequence[Array | None], constants: Mapping[Value, Data]
) -> None:
    """One turn of a body, on what the node hands it."""
    operands = [
        constants.get(v) if v in constants else g for v, g in zip(op.args, given, strict=True)
    ]
    plain = [o if isinstance(o, np.ndarray) else None for o in operands]
    if op.name == "onnx_if":
        name = walk.graphs[body].name
        branch = "then" if op.get("then", "") == name else "else"
        args = [plain[i] for i in op.ints(f"{branch}_captures")]
    elif op.name == "onnx_loop":
        args = [np.int64(0).reshape(()), np.bool_(True).reshape(()), *plain[2:]]
    else:
        states, axes = op.get("states", 0), op.ints("scan_input_axes")
        slices = [
            None if p is None or not p.shape[axis] else np.take(p, 0, axis)
            for p, axis in zip(plain[states : states + len(axes)], axes, strict=True)
        ]
        args = [*plain[:states], *slices, *plain[states + len(axes) :]]
    _program(walk, body, [None if a is None else np.asarray(a) for a in args])


def _node(
    walk: _Walk,
    program: int,
    number: int,
    op: Op,
    constants: Mapping[Value, Data],
    given: Sequence[Array | None],
    is_alone: bool = False,
) -> list[Array] | None:
    """The results of a node, tested where its like was not yet; None where there are none.

    `is_alone`: the operands were drawn for it, and a kernel may refuse them.
    """
    signature = _signature(op, given)
    is_known = signature in walk.done or (op in walk.met and not is_alone)
    expected: list[Array] | None = None
    drawn = [i for i, g in enumerate(given) if g is not None]
    if not is_known and _is_testable(op, drawn):
        start = time.perf_counter()
        expected = _expected(op, constants, given)
        walk.spent += time.perf_counter() - start
        if expected is None:
            return None
    try:
        found = walk.session.launch(program, number, given, len(op.outs))
    except RuntimeError as error:
        if expected is None or is_alone or _is_guessed(op, given):
            return None
        raise TargetError(f"{error}; its like runs in onnx's reference evaluator") from error
    if expected is not None:
        operands = [constants.get(v, g) for v, g in zip(op.args, given, strict=True)]
        walk.tests.append(_compare(walk, op, found, expected, operands))
        walk.done.add(signature)
    if expected is not None or signature in walk.done:
        walk.met.add(op)
    return found


def _is_guessed(op: Op, given: Sequence[Array | None]) -> bool:
    """Whether extents were chosen here, or sizes, indices or ratios may be among the operands: the
    evaluator's numpy takes any of them (a window larger than the image), a kernel what makes sense.
    """
    if any(not isinstance(d, int) for v in op.args for d in v.type.shape):
        return True
    return any(g is not None and is_parameter(g) for g in given[1:])


def _signature(op: Op, given: Sequence[Array | None]) -> str:
    attrs = {k: v for k, v in op.attrs.items() if k not in OURS}
    types = [str(v.type) for v in op.args]
    shapes = [None if g is None else g.shape for g in given]
    return f"{op.name} {sorted(attrs.items())} {types} {shapes}"


def _expected(
    op: Op, constants: Mapping[Value, Data], given: Sequence[Array | None]
) -> list[Array] | None:
    operands = [constants.get(v, g) for v, g in zip(op.args, given, strict=True)]
    try:
        if op.name in LINEAR_OPS:
            return [_linear(op, operands)]
        plain = [o if isinstance(o, np.ndarray) else None for o in operands]
        return evaluate_onnx(op, plain)
    except Exception:  # the evaluator's ways to say that operands make no sense are many
        return None


def _rows(op: Op, operands: Sequence[Data | None]) -> list[Data]:
    """The operands of a linear, x and what is added to its product as matrices."""
    roles = op.strs("roles") or ("x", "w", "bias")
    return [
        o.reshape(-1, o.shape[-1]) if role in ("x", "residual") and isinstance(o, np.ndarray) else o
        for role, o in zip(roles, operands, strict=False)
        if o is not None
    ]


def _linear(op: Op, operands: Sequence[Data | None]) -> Array:
    """By the IR's own interpreter, on rows."""
    y = evaluate(op, _rows(op, operands))[0]
    assert isinstance(y, np.ndarray)
    x = operands[0]
    assert isinstance(x, np.ndarray)
    return y.reshape(*x.shape[:-1], -1)


def _compare(
    walk: _Walk,
    op: Op,
    found: Sequence[Array],
    expected: Sequence[Array],
    operands: Sequence[Data | None],
) -> SelfTest:
    """Raises TargetError where shape, dtype or values differ."""
    where = f"{op.loc or op.out} ({lookup(op).onnx or op.name})"
    kernel, worst, allowed = op.strs("kernels")[-1], 0.0, 0.0
    for i, (ours, theirs) in enumerate(zip(found, expected, strict=False)):
        if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
            raise TargetError(
                f"{where}: result {i} is {ours.dtype} {list(ours.shape)} by the kernel, expected "
                f"{theirs.dtype} {list(theirs.shape)}; this is our bug"
            )
        if op.name in LINEAR_OPS:
            kernel, error, limit = _linear_error(walk, op, ours, theirs, operands)
        else:
            error, limit = _error(op, ours, theirs)
        if not error <= limit:
            raise TargetError(
                f"{where}: result {i} is off by {error:.3g}, allowed {limit:.3g}; "
                f"kernel {kernel} is wrong on this machine"
            )
        worst, allowed = max(worst, error), max(allowed, limit)
    return SelfTest(op.loc or str(op.out), kernel, BUCKETS[-1], worst, allowed)


def _linear_error(
    walk: _Walk, op: Op, ours: Array, theirs: Array, operands: Sequence[Data | None]
) -> tuple[str, float, float]:
    """The kernel that ran, and its error and bound where they are closest (tolerance.py)."""
    rows = _rows(op, operands)
    count = np.asarray(rows[0]).shape[0]
    name = op.strs("kernels")[BUCKETS.index(FEW if count <= FEW else MANY)]
    kernel = next(k for k in walk.plan.linears if k.name == name)
    want = theirs.reshape(count, -1)
    precision = kernel.precision(walk.session.isa)
    bound = np.broadcast_to(tolerance(op, rows, (want,), precision)[0], want.shape)
    difference = np.abs(ours.reshape(want.shape).astype(np.float64) - want)
    if not difference.size:
        return kernel.name, 0.0, 0.0
    at = np.unravel_index(np.argmax(difference / bound), want.shape)
    return kernel.name, float(difference[at]), float(bound[at])


def _error(op: Op, ours: Array, theirs: Array) -> tuple[float, float]:
    """The largest difference, and what is allowed. Equal infinities and NaNs are no difference."""
    name = next((d for d, t in NUMPY_DTYPES.items() if t == ours.dtype), "")
    a, b = ours.astype(np.float64), theirs.astype(np.float64)
    same = (a == b) | (np.isnan(a) & np.isnan(b))
    if same.all():
        return 0.0, 0.0
    with np.errstate(invalid="ignore"):
        differences = np.abs(a - b)[~same]
    error = float(np.max(np.where(np.isnan(differences), np.inf, differences)))
    finite = np.abs(b[np.isfinite(b)])
    largest = float(finite.max()) if finite.size else 0.0
    if name in RELATIVE:
        return error, RELATIVE[name] * max(largest, 1e-30)
    return error, 1.0 if any(word in op.name for word in _ROUNDED) else 0.0
