"""What the kernels of a library take of a device: by the assembler's words and a census of SASS."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from ..runtime.artifact import KernelCode
from .build import Built
from .cache import Store
from .graphs import Compiled
from .ptxas import resources
from .sass import Tools, census, find_tools, matrix_instruction
from .tiles import shown

_NOTHING: Mapping[str, Mapping[str, int]] = {}


def compiled_kernels(built: Built, cuda_home: str | None = None) -> tuple[Compiled, ...]:
    """Every kernel of a library, unit by unit; none for a library of the cpu.

    Where there is no disassembler, the instruction of the tensor cores stays unsaid.
    """
    tools = find_tools(cuda_home)
    found: list[Compiled] = []
    for unit, words in built.words.items():
        if not unit.endswith(".cu"):
            continue
        counted = _census(built.objects[unit], tools) if tools else _NOTHING
        for k in resources(words):
            spilled = k.spill_stores + k.spill_loads
            code = KernelCode(
                unit,
                shown(unit, k.name),
                k.registers,
                k.stack,
                spilled,
                k.shared,
                matrix_instruction(counted.get(k.symbol, {})),
            )
            found.append(Compiled(k.symbol, code))
    return tuple(found)


def _census(object_: Path, tools: Tools) -> Mapping[str, Mapping[str, int]]:
    """Of one object of the cache, beside which it is kept."""
    store, key = Store(object_.parent.parent), object_.stem
    if (known := store.get(key, ".census")) is not None:
        return {name: Counter(counts) for name, counts in json.loads(known.read_text()).items()}
    counted = census(object_, tools)
    store.put(key, ".census", json.dumps(counted).encode())
    return counted
