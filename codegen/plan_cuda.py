"""The sources of a CUDA target's library: the kernels it uses, the executor, the plan."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from ..ir.errors import IRError, TargetError
from ..ir.target import Target
from .kernels_cuda import head_dims
from .kernels_sm120 import W4A4_FAMILY, Unit, tiles_of, units
from .plan import Plan
from .render import Source, source

FOLDER = "cuda"
RUNTIME_SOURCES = ("ffi.cc", "registry.cc", "status.cc", "session.cc", "graphs.cc", "upload.cc")
SAMPLER = "sample.cu"
_SAMPLER_BYTES = 18 * 1024  # of a block's shared memory that its search takes
EXPORTS: dict[str, dict[str, int]] = {
    "facts.cc": {"device": 2},
    "exports.cc": {
        "memory": 2, "create": 4, "upload": 3, "ready": 1, "destroy": 1, "pages": 4,
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

    `a` is code for this capability alone, `f` for its family. `twin`: built for a device that lacks
    the instructions of the target, with software twins of them (nvfp4_mma.cuh), to be compared with
    the interpreter there; never part of an artifact that is handed on.
    """

    name: str
    major: int
    minor: int
    suffix: str
    twin: bool = False

    @property
    def gencode(self) -> str:
        """nvcc's flag. Never a bare -arch: it would embed PTX, or code of an older architecture."""
        number = f"{self.major}{self.minor}{self.suffix}"
        return f"-gencode=arch=compute_{number},code=sm_{number}"

    @property
    def flags(self) -> tuple[str, ...]:
        """nvcc's flags of this machine code."""
        return (self.gencode, "-DHB_TWIN") if self.twin else (self.gencode,)


def arch_of(target: Target) -> Arch:
    """The machine code of a CUDA target. Raises IRError for a target that is none."""
    found = re.fullmatch(r"sm_(\d+)(\d)([af]?)", target.name)
    if found is None:
        raise IRError(f"{target.name}: expected a CUDA target such as sm_90a")
    return Arch(target.name, int(found[1]), int(found[2]), found[3])


def kernel_facts(
    target: Target, arch: Arch | None = None, kernels: frozenset[str] = frozenset()
) -> dict[str, object]:
    """What the templates of one CUDA target (as `arch`, its own) may ask."""
    return {
        "head_dims": head_dims(target.shared_bytes),
        "target": arch or arch_of(target),
        "shared_bytes": target.shared_bytes,
        "sms": target.sms,
        "cutlass_tiles": tiles_of(kernels),
    }


def cuda_sources(plan: Plan, target: Target, arch: Arch | None = None) -> list[Source]:
    """Every translation unit of the plan's library for one CUDA target (as `arch`, its own)."""
    arch = arch or arch_of(target)
    names = frozenset(kernel.name for kernel in plan.kernels)
    _check_sampler(plan, target)
    facts = kernel_facts(target, arch, names)
    more = units(names) if W4A4_FAMILY in plan.families else ()
    kernels = [source(f"{family}.cu", None, FOLDER, **facts) for family in plan.families]
    fixed = [source(name, None, FOLDER, **facts) for name in (SAMPLER, *RUNTIME_SOURCES)]
    exports = [
        source(name, None, FOLDER, exports=functions.items(), **facts)
        for name, functions in EXPORTS.items()
    ]
    products = [_source(unit.twin() if arch.twin else unit, facts) for unit in more]
    last = source("plan.cc", None, FOLDER, plan=plan, **facts)
    return [*products, *kernels, *fixed, *exports, last]


def record_sources(sources: Sequence[Source], target: Target) -> list[Source]:
    """What the program `record` (record.cc) is linked of: the kernels and the plan of a library."""
    kept = [s for s in sources if s.name.endswith(".cu") or s.name == "plan.cc"]
    return [*kept, source("record.cc", None, FOLDER, sms=target.sms)]


def _check_sampler(plan: Plan, target: Target) -> None:
    """Eight blocks of sample.cu hold a row of logits. Raises TargetError where they cannot."""
    most = (target.shared_bytes - _SAMPLER_BYTES) // 16 * 4 * 8
    if plan.vocab > most:
        raise TargetError(
            f"vocabulary: {plan.vocab} tokens, the sampler of {target.name} takes at most {most}; "
            "compile for a target with more shared memory, or for cpu"
        )


def _source(unit: Unit, facts: Mapping[str, object]) -> Source:
    made = source(unit.template, None, FOLDER, **{**facts, **unit.facts})
    return replace(made, name=unit.name, flags=unit.flags, heavy=unit.heavy)
