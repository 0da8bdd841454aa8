"""Ops that no kernel takes, told all at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

from ..ir.errors import TargetError
from ..ir.graph import Op
from ..ir.kernel import Refused

X = TypeVar("X")
Y = TypeVar("Y")


class UnservedError(TargetError):
    """`ops`: what no kernel of the target takes, each with the refusals."""

    def __init__(self, message: str, ops: tuple[tuple[Op, tuple[Refused, ...]], ...]) -> None:
        super().__init__(message)
        self.ops = ops


def gathered(items: Iterable[X], f: Callable[[X], Y]) -> list[Y]:
    """f of each item. Raises one UnservedError of all that f raised."""
    results: list[Y] = []
    errors: list[UnservedError] = []
    for item in items:
        try:
            results.append(f(item))
        except UnservedError as error:
            errors.append(error)
    if errors:
        ops = tuple(op for error in errors for op in error.ops)
        raise UnservedError("\n".join(map(str, errors)), ops)
    return results
