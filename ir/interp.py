"""The meaning of a graph: every op by its numpy reference. The oracle for kernels and phases."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from .errors import IRError
from .graph import Graph, Op, Value
from .numerics import NUMPY_DTYPES
from .opdef import Data
from .ops import lookup
from .types import Plain, TensorType

WeightSource = Callable[[str], Data]
"""The data of a checkpoint tensor by name."""


def evaluate(op: Op, args: list[Data]) -> tuple[Data, ...]:
    """The op's results on these operands."""
    result = lookup(op).reference(op, args)
    results = result if isinstance(result, tuple) else (result,)
    return tuple(map(_rounded, op.outs, results)) if op.outs else results


def _rounded(value: Value, data: Data) -> Data:
    """A result in the dtype its type says: references give f32."""
    if isinstance(data, dict) or not isinstance(value.type.enc, Plain):
        return data
    return data.astype(NUMPY_DTYPES[value.type.enc.dtype], copy=False)


def zeros(type_: TensorType) -> Data:
    """A state as it is before the first step; caches stay [heads, positions, D] in any layout."""
    dtype = type_.enc.dtype if isinstance(type_.enc, Plain) else "f32"
    return np.zeros(type_.static, NUMPY_DTYPES[dtype])


def run(
    graph: Graph,
    args: Mapping[str, Data],
    weights: WeightSource,
    state: dict[str, Data] | None = None,
) -> list[Data]:
    """The graph's results. `state` carries caches from step to step, by name, and is updated.

    Raises IRError for a missing argument.
    """
    state = {} if state is None else state
    values: dict[Value, Data] = {}
    owner: dict[Value, str] = {}
    for arg in graph.args:
        if arg.name not in args:
            raise IRError(f"@{graph.name}: argument {arg} is missing, given {sorted(args)}")
        values[arg] = args[arg.name]
    last_use = {v: i for i, op in enumerate(graph.ops) for v in op.args}
    for i, op in enumerate(graph.ops):
        source = op.get("source", "")
        if op.name == "weight":
            values[op.out] = weights(source)
        elif op.name == "state":
            values[op.out] = state.setdefault(source, zeros(op.out.type))
            owner[op.out] = source
        else:
            values.update(zip(op.outs, evaluate(op, [values[v] for v in op.args]), strict=True))
            _follow_state(op, values, owner, state)
        for v in op.args:
            if last_use[v] == i and v not in graph.outs:
                values.pop(v, None)
    return [values[v] for v in graph.outs]


def _follow_state(
    op: Op, values: dict[Value, Data], owner: dict[Value, str], state: dict[str, Data]
) -> None:
    """Where a result shares a state's memory, it is that state from now on."""
    for out, operand in zip(op.outs, lookup(op).inplace, strict=True):
        if operand is not None and op.args[operand] in owner:
            owner[out] = owner[op.args[operand]]
            state[owner[out]] = values[out]


def fold(values: Sequence[Value], graph: Graph, weights: WeightSource) -> list[Data]:
    """The data of constants: weights, relaid, cast, packed. Only what they need is read.

    Raises IRError where a value depends on an argument.
    """
    producers = graph.producers()
    memo: dict[Value, Data] = {}

    def data(v: Value) -> Data:
        if v not in memo:
            op = producers.get(v)
            if op is None or op.name == "state":
                raise IRError(f"@{graph.name}: {v} is not constant")
            if op.name == "weight":
                memo[v] = weights(op.get("source", ""))
            else:
                memo.update(zip(op.outs, evaluate(op, [data(a) for a in op.args]), strict=True))
        return memo[v]

    return [data(v) for v in values]
