"""The translation units of the library of an ONNX graph: on the cpu, and on CUDA targets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from . import kernels_net_cuda as cuda
from .isa import ISAS, SCALAR, Isa
from .kernels import FAMILIES as LINEAR_FAMILIES
from .kernels_net import C_TYPES, isas_of
from .net_plan import NetPlan
from .net_sides import Entry
from .plan import variant_of
from .plan_cuda import Arch, kernel_facts
from .render import Source, family_sources, source

FOLDER = "net"
RUNTIME_SOURCES = ("memory.cc", "values.cc", "call.cc", "executor.cc", "control.cc", "life.cc")
SHARED_SOURCES = ("team.cc", "cpuid.cc", "ffi.cc", "registry.cc")
EXPORTS: Mapping[str, int] = {
    "create": 3, "load": 2, "ready": 1, "destroy": 1, "isa": 1, "inputs": 2, "input": 4, "run": 1,
    "launch": 3, "result": 3, "fetch": 3, "counters": 2,
}  # fmt: skip
"""The functions of the library, and how many arguments each takes."""
DEVICE_EXPORTS: Mapping[str, int] = {"device": 2}
"""What the library of a CUDA target has besides."""


def symbols(plan: NetPlan) -> tuple[str, ...]:
    """The exports of the plan's library."""
    names = (*EXPORTS, *DEVICE_EXPORTS) if plan.on_device else EXPORTS
    return tuple(f"__tvm_ffi_{name}" for name in names)


def net_sources(plan: NetPlan, isas: Sequence[Isa]) -> list[Source]:
    """Every translation unit of the library of a cpu, for these ISAs (SCALAR among them)."""
    used = {kernel.family for kernel in plan.linears}
    linear_units = family_sources(
        {f: tuple(i for i in LINEAR_FAMILIES[f] if i in isas) for f in sorted(used)}
    )
    return [
        *_host_units(plan, isas),
        *linear_units,
        *_fixed(),
        source("no_device.cc", None, FOLDER),
        _plan_source(plan, isas),
    ]


def net_cuda_sources(plan: NetPlan, arch: Arch) -> list[Source]:
    """Every translation unit of the library of a CUDA target, as machine code of `arch`."""
    facts = kernel_facts(plan.target, arch, frozenset(k.name for k in plan.linears))
    families = dict.fromkeys(kernel.family for kernel in plan.linears)
    if cuda.BY_LINEAR in plan.families(cuda.DEVICE):
        families["dense_gemm"] = None
    units = [cuda.unit(family, variant) for family, variant in plan.families(cuda.DEVICE)]
    linears = [
        cuda.unit(family, "") if family == cuda.PLAIN_LINEAR
        else source(f"{family}.cu", None, "cuda", **facts)
        for family in families
    ]  # fmt: skip
    return [
        *linears,
        *units,
        *_host_units(plan, (SCALAR,)),
        *_fixed(),
        source("device.cc", None, cuda.FOLDER),
        source("status.cc", None, "cuda"),
        source("facts.cc", None, "cuda", exports=DEVICE_EXPORTS.items()),
        _plan_source(plan, (SCALAR,)),
    ]


def _host_units(plan: NetPlan, isas: Sequence[Isa]) -> list[Source]:
    return [
        replace(
            source(f"{family}.cc", isa, FOLDER, variant=variant, c_type=C_TYPES.get(variant, "")),
            name=".".join(filter(None, (family, variant, isa.name, "cc"))),
        )
        for family, variant in plan.families(cuda.HOST)
        for isa in isas_of(family, variant)
        if isa in isas
    ]


def _fixed() -> list[Source]:
    """The executor and what it exports."""
    return [
        *(source(name, None, FOLDER) for name in RUNTIME_SOURCES),
        *(source(name) for name in SHARED_SOURCES),
        source("exports.cc", None, FOLDER, exports=EXPORTS.items()),
    ]


def _plan_source(plan: NetPlan, isas: Sequence[Isa]) -> Source:
    tables = [(isa, _table(plan, isa) if isa in isas else None) for isa in ISAS]
    found = [row for _, table in tables for row in table or ()]
    is_device = plan.on_device
    header = "device_linear.h" if is_device else "linear.h"
    linears = () if is_device else plan.linears
    spaces = [
        (k.name, [variant_of(k, isa).name if isa in isas else "" for isa in ISAS]) for k in linears
    ]
    return source(
        "net_plan.cc", None, FOLDER, programs=plan.programs, weights_bytes=plan.weights_bytes,
        tables=tables, declared=tuple(dict.fromkeys(found)),
        linear_header=header if plan.linears else "", linear_tables=spaces,
        linear_names=[(i, [k.name for k in linears if i in k.isas]) for i in isas],
        launchers=[k.name for k in plan.linears] if is_device else (),
    )  # fmt: skip


def _table(plan: NetPlan, isa: Isa) -> list[tuple[str, str]]:
    """For each kernel, the namespace of its best variant up to `isa`, or that of devices."""
    by_name = {known.name: known for known in ISAS}

    def best(entry: Entry) -> str:
        if entry.side == cuda.DEVICE:
            return cuda.CUDA.name
        at, have = isa, isas_of(entry.family, entry.variant)
        while at not in have and at is not SCALAR:
            at = by_name[at.base]
        return at.name

    return [(entry.symbol, best(entry)) for entry in plan.kernels]
