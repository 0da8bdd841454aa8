"""The sources of a CUDA target's library: the kernels it uses, the executor, the plan."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ..ir.errors import IRError
from ..ir.target import Target
from .kernels_cuda import CUDA_FACTS
from .plan import Plan
from .render import Source, source

FOLDER = "cuda"
RUNTIME_SOURCES = ("ffi.cc", "registry.cc", "session.cc", "graphs.cc", "upload.cc")
SAMPLER = "sample.cu"
EXPORTS: dict[str, dict[str, int]] = {
    "exports.cc": {
        "device": 2, "memory": 2, "create": 4, "upload": 3, "ready": 1, "destroy": 1, "pages": 4,
        "prefill": 6, "decode": 5, "sampling": 4, "start": 4, "advance": 2, "poll": 3,
    },
    "probes.cc": {
        "launch": 6, "poke": 4, "peek": 4, "profile": 5, "counters": 2, "graph": 3,
    },
}  # fmt: skip
"""The functions of the library by source, and how many arguments each takes."""

SYMBOLS = tuple(f"__tvm_ffi_{name}" for names in EXPORTS.values() for name in names)


@dataclass(frozen=True, slots=True)
class Arch:
    """The machine code of a target: a compute capability, and the suffix that nvcc wants behind it.

    `a` is code for this capability alone, `f` for its family.
    """

    name: str
    major: int
    minor: int
    suffix: str

    @property
    def gencode(self) -> str:
        """nvcc's flag. Never a bare -arch: it would embed PTX, or code of an older architecture."""
        number = f"{self.major}{self.minor}{self.suffix}"
        return f"-gencode=arch=compute_{number},code=sm_{number}"


def arch_of(target: Target) -> Arch:
    """The machine code of a CUDA target. Raises IRError for a target that is none."""
    found = re.fullmatch(r"sm_(\d+)(\d)([af]?)", target.name)
    if found is None:
        raise IRError(f"{target.name}: expected a CUDA target such as sm_90a")
    return Arch(target.name, int(found[1]), int(found[2]), found[3])


def cuda_sources(plan: Plan, target: Target) -> list[Source]:
    """Every translation unit of the plan's library for one CUDA target."""
    facts = {**CUDA_FACTS, "target": arch_of(target)}
    kernels = [source(f"{family}.cu", None, FOLDER, **facts) for family in plan.families]
    fixed = [source(name, None, FOLDER, **facts) for name in (SAMPLER, *RUNTIME_SOURCES)]
    exports = [
        source(name, None, FOLDER, exports=functions.items(), **facts)
        for name, functions in EXPORTS.items()
    ]
    return [*kernels, *fixed, *exports, source("plan.cc", None, FOLDER, plan=plan, **facts)]
