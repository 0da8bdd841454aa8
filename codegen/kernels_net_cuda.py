"""The families of kernels_net.py that CUDA targets have too, and what their launches read where.

A family here has a template templates/net_cuda/<family>.cu.jinja, for the operators and variants of
the host's but those left out. Where loops.h is all that differs, that template includes the host's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from .isa import Isa
from .kernels_net import C_TYPES, NetKernel
from .render import Source, source

FOLDER = "net_cuda"
CUDA = Isa("cuda", 0, ("--extended-lambda", "-fmad=false", "-diag-suppress=186"))
"""The namespace of kernels that run on a device, and nvcc's flags for them.

What multiplies and adds in one rounding says fmaf: elsewhere results are the host's. Warning 186
is of comparisons with 0 in templates that signed and unsigned types share.
"""


@dataclass(frozen=True, slots=True)
class CudaFamily:
    """What of a family runs on a device.

    `without`: operators, `no_variants`: types or widths that it has no kernel for. `host_ins`: for
    operators (without `onnx_`), the operands whose values are read on the host, as sizes are.
    """

    without: tuple[str, ...] = ()
    no_variants: tuple[str, ...] = ()
    host_ins: Mapping[str, tuple[int, ...]] = field(default_factory=dict[str, tuple[int, ...]])


FAMILIES: dict[str, CudaFamily] = {
    "arithmetic": CudaFamily(host_ins={"clip": (1, 2)}),
}

VIEWS = "views"
"""The family that looks at shapes alone: it runs on the host, and leaves operand 0 where it is."""


def family_of(kernel: NetKernel) -> CudaFamily | None:
    """What CUDA targets have of the kernel's family, None where they lack this operator."""
    found = FAMILIES.get(kernel.family)
    return None if found is None or kernel.name in found.without else found


def variants_of(kernel: NetKernel) -> tuple[str, ...]:
    """The variants of a kernel that a device runs; none where it has none at all."""
    found = family_of(kernel)
    return () if found is None else tuple(v for v in kernel.variants if v not in found.no_variants)


def host_ins(kernel: NetKernel) -> tuple[int, ...]:
    """The operands whose values a launch on the device reads on the host."""
    found = family_of(kernel)
    return () if found is None else tuple(found.host_ins.get(kernel.name, ()))


def unit(family: str, variant: str) -> Source:
    """The translation unit of one family and variant: <family>[.<variant>].cuda.cu."""
    facts = {"variant": variant, "c_type": C_TYPES.get(variant, "")}
    return source(f"{family}.cu", CUDA, FOLDER, **facts)
