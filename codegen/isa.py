"""The instruction sets one cpu library holds side by side, as rows of facts."""

from __future__ import annotations

from dataclasses import dataclass

_AVX2 = ("-mavx2", "-mfma", "-mf16c", "-mbmi2")
_AVX512 = (
    *_AVX2,
    "-mavx512f",
    "-mavx512bw",
    "-mavx512vl",
    "-mavx512dq",
    "-mavx512vbmi",
    "-mavx512vnni",
)
_AMX = (*_AVX512, "-mavx512bf16", "-mavx512fp16", "-mamx-tile", "-mamx-bf16")


@dataclass(frozen=True, slots=True)
class Isa:
    """One variant of every kernel: its compiler flags, and where it falls back to.

    `base` names the ISA whose entry serves a kernel family that has no variant of this one.
    """

    name: str
    level: int
    flags: tuple[str, ...]
    features: tuple[str, ...] = ()
    base: str = ""

    def __str__(self) -> str:
        return self.name


def _features(flags: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(flag.removeprefix("-m") for flag in flags)


SCALAR = Isa("scalar", 0, ())
AVX2 = Isa("avx2", 1, _AVX2, _features(_AVX2), base="scalar")
AVX512 = Isa("avx512", 2, _AVX512, _features(_AVX512), base="avx2")
AMX = Isa("amx", 3, _AMX, _features(_AMX), base="avx512")

ISAS: tuple[Isa, ...] = (SCALAR, AVX2, AVX512, AMX)
"""In rising order: the library takes the last one the machine serves."""
