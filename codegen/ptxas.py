"""What the assembler said of each kernel: registers, spills, shared memory."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

_ENTRY = re.compile(r"Compiling entry function '(\w+)' for '(\w+)'")
_SPILLS = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers")
_SHARED = re.compile(r"(\d+) bytes smem")
_NAME = re.compile(r"(\d+)(?=([A-Za-z_]))")


@dataclass(frozen=True, slots=True)
class Resources:
    """Of one kernel. `symbol` as the assembler spells it; bytes, and registers per thread.

    `shared` counts static shared memory only; what a launch adds stands in the template.
    """

    symbol: str
    registers: int
    stack: int
    spill_stores: int
    spill_loads: int
    shared: int

    @property
    def name(self) -> str:
        """The kernel as its source calls it, template arguments too: `gemv<2, 1, true>`."""
        return readable(self.symbol)


def resources(words: str) -> Iterator[Resources]:
    """The kernels of one compilation with `-Xptxas -v`, in its order."""
    symbol, stack = "", (0, 0, 0)
    for line in words.splitlines():
        if found := _ENTRY.search(line):
            symbol, stack = found[1], (0, 0, 0)
        elif symbol and (found := _SPILLS.search(line)):
            stack = int(found[1]), int(found[2]), int(found[3])
        elif symbol and (found := _USED.search(line)):
            shared = _SHARED.search(line)
            yield Resources(symbol, int(found[1]), *stack, int(shared[1]) if shared else 0)
            symbol = ""


def readable(symbol: str) -> str:
    """The last name of an Itanium-mangled symbol and its literal template arguments."""
    rest, name = symbol.removeprefix("_ZN").removeprefix("_Z"), symbol
    while found := _NAME.match(rest):
        length, start = int(found[1]), found.end(1)
        name, rest = rest[start : start + length], rest[start + length :]
    if not rest.startswith("I"):
        return name
    literals = re.match(r"I((?:L[a-z]\w*?E|[a-z]|\d+\w+?)*)E", rest)
    values = re.findall(r"L([a-z])(n?\d+)E", literals[1] if literals else rest.split("Ev")[0])
    shown = [_literal(kind, value) for kind, value in values]
    return f"{name}<{', '.join(shown)}>" if shown else name


def _literal(kind: str, value: str) -> str:
    if kind == "b":
        return "true" if value == "1" else "false"
    return value.replace("n", "-")
