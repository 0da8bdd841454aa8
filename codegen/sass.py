"""A census of machine instructions: what a library's kernels are really made of.

A tensor-core kernel whose census shows none of the instruction it promises runs on a slower path;
LDL and STL are traffic to local memory, which is what spilled registers cost.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ..ir.errors import TargetError
from .nvcc import wheel_folders

REMEDY = "pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm"
LOCAL_MEMORY = ("LDL", "STL")
MATRIX = ("HGMMA", "QGMMA", "OMMA", "QMMA", "HMMA")
"""Instructions of the tensor cores, in the order in which a kernel would prefer them."""

_FUNCTION = re.compile(r"^\s*Function : (\S+)")
_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][A-Za-z0-9_.]*)")


@dataclass(frozen=True, slots=True)
class Tools:
    """cuobjdump, and the folder of the nvdisasm that it starts."""

    cuobjdump: Path
    nvdisasm: Path


def find_tools(cuda_home: str | None = None) -> Tools | None:
    """The disassembler of $CUDA_HOME, PATH or the pip packages; None where there is none."""
    folders = [Path(cuda_home) / "bin"] if cuda_home else []
    folders += [folder / "bin" for folder in wheel_folders()]
    found = [_which(name, folders) for name in ("cuobjdump", "nvdisasm")]
    return Tools(found[0], found[1]) if found[0] and found[1] else None


def _which(name: str, folders: list[Path]) -> Path | None:
    path = shutil.which(name) or shutil.which(name, path=os.pathsep.join(map(str, folders)))
    return Path(path) if path else None


def census(library: Path, tools: Tools) -> dict[str, Counter[str]]:
    """Instructions of each kernel (by symbol) of a library or object, by their full name.

    Raises TargetError where the disassembler fails.
    """
    path = os.pathsep.join((str(tools.nvdisasm.parent), str(tools.cuobjdump.parent), os.defpath))
    command = (str(tools.cuobjdump), "-sass", str(library))
    ran = subprocess.run(command, capture_output=True, text=True, env={"PATH": path})
    if ran.returncode != 0:
        raise TargetError(f"{library}: {tools.cuobjdump} failed: {ran.stderr.strip()}")
    return parse(ran.stdout)


def parse(text: str) -> dict[str, Counter[str]]:
    """The census of cuobjdump's words."""
    found: dict[str, Counter[str]] = {}
    current: Counter[str] = Counter()
    for line in text.splitlines():
        if function := _FUNCTION.match(line):
            current = found.setdefault(function[1], Counter())
        elif instruction := _INSTRUCTION.match(line):
            current[instruction[1]] += 1
    return found


def count(instructions: Mapping[str, int], family: str) -> int:
    """How many instructions of a family (`HMMA` counts HMMA.16816.F32.BF16) there are."""
    return sum(n for name, n in instructions.items() if name.split(".")[0] == family)


def matrix_instruction(instructions: Mapping[str, int]) -> str:
    """The tensor-core instruction a kernel uses most, in full; "" for none."""
    for family in MATRIX:
        of_family = {n: c for n, c in instructions.items() if n.split(".")[0] == family}
        if of_family:
            return max(of_family, key=lambda name: of_family[name])
    return ""
