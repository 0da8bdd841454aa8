"""`inspect --check`: is the artifact whole, and does its code fit this machine?"""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .doctor import Cpu, Gpu, read_cpu, read_gpus
from .inspect_format import size, table
from .inspect_source import Source
from .runtime.devices import fits, is_cuda
from .runtime.disk import sha256_of
from .runtime.manifest import TargetFacts

GLIBC = "glibc>="
CAPABILITY = "compute capability"


@dataclass(frozen=True, slots=True)
class PartState:
    """One file: `found` is its SHA-256 where that is not the manifest's."""

    name: str
    bytes: int
    sha256: str
    found: str | None


@dataclass(frozen=True, slots=True)
class TargetState:
    """One compiled library: the kernels it would use here, and what it lacks here."""

    name: str
    library: str
    isas: tuple[str, ...]
    isa: str | None
    lacks: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Check:
    """The verdict on an artifact."""

    format: int
    producer: str
    parts: tuple[PartState, ...]
    targets: tuple[TargetState, ...]
    whole: bool
    runs_here: bool

    @property
    def good(self) -> bool:
        return self.whole and self.runs_here


def check(source: Source) -> Check:
    """Hashes every part. A missing part or a wrong size was a ModelError when it was opened."""
    parts = tuple(
        PartState(name, part.bytes, part.sha256, found if found != part.sha256 else None)
        for name, part in sorted(source.manifest.parts.items())
        for found in (sha256_of(source.artifact.path(name)),)
    )
    cpu, gpus = read_cpu(Path("/proc/cpuinfo")), read_gpus()
    targets = tuple(_target(name, t, cpu, gpus) for name, t in source.manifest.targets.items())
    return Check(
        format=source.manifest.format,
        producer=source.manifest.producer,
        parts=parts,
        targets=targets,
        whole=all(part.found is None for part in parts),
        runs_here=any(not t.lacks for t in targets),
    )


def _target(name: str, facts: TargetFacts, cpu: Cpu, gpus: Sequence[Gpu]) -> TargetState:
    missing = [why for feature in facts.features if (why := _lack(feature))]
    if is_cuda(name):
        missing += _device_lacks(name, facts, gpus)
        return TargetState(name, facts.library, facts.isas, name, tuple(missing))
    able = [isa for isa in facts.isas if isa not in cpu.lacks]
    if not able:
        missing.append(f"an instruction set of {', '.join(facts.isas)}")
    return TargetState(name, facts.library, facts.isas, able[-1] if able else None, tuple(missing))


def _device_lacks(name: str, facts: TargetFacts, gpus: Sequence[Gpu]) -> list[str]:
    """What the devices here have not, by the driver's own account of them."""
    here = ", ".join(f"{gpu.name}, {gpu.compute_capability}" for gpu in gpus) or "none"
    able = [gpu for gpu in gpus if fits(name, _capability(gpu))]
    if not able:
        needed = next((f for f in facts.features if f.startswith(CAPABILITY)), CAPABILITY)
        return [f"a CUDA device of {needed} (found {here})"]
    least = facts.driver_min or "0"
    if any(_numbers(gpu.driver) >= _numbers(least) for gpu in able):
        return []
    return [f"driver {least} or newer (found {able[0].driver})"]


def _capability(gpu: Gpu) -> tuple[int, int]:
    major, _, minor = gpu.compute_capability.partition(".")
    return (int(major), int(minor)) if major.isdigit() and minor.isdigit() else (0, 0)


def _lack(feature: str) -> str | None:
    """Why this machine has not what the library needs, None where it has (devices: see above)."""
    if feature.startswith(CAPABILITY):
        return None
    if feature == "x86-64":
        found = platform.machine()
        return None if found in ("x86_64", "AMD64") else f"x86-64 (this is {found})"
    if feature.startswith(GLIBC):
        library, version = platform.libc_ver()
        wanted = feature.removeprefix(GLIBC)
        if library == "glibc" and _numbers(version) >= _numbers(wanted):
            return None
        return f"{feature} (found {library} {version})"
    return f"{feature} (this version of halfbyte does not know it)"


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(word) for word in version.split(".") if word.isdigit())


def check_text(facts: Check) -> list[str]:
    """A line per file and per library, then the verdict."""
    rows = [
        (part.name, size(part.bytes), part.sha256[:12],
         "good" if part.found is None else f"CHANGED: found {part.found[:12]}")
        for part in facts.parts
    ]  # fmt: skip
    lines = [f"manifest: format {facts.format}, by {facts.producer}", ""]
    lines += [*table(rows, ("part", "size", "sha256", ""), right=(1,)), ""]
    for t in facts.targets:
        if t.lacks:
            lines.append(f"{t.name}: does not run here: it needs {'; '.join(t.lacks)}")
        else:
            lines.append(f"{t.name}: runs here, with its {t.isa} kernels (has {', '.join(t.isas)})")
    whole = "whole" if facts.whole else "DAMAGED: compile the model again, or copy it again"
    return [*lines, f"artifact: {whole}"]
