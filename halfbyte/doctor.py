"""`halfbyte doctor`: what this machine offers, what each target lacks here, and what mends it."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from . import __version__
from .environment import cuda_home
from .ir.errors import TargetError
from .ir.target import TARGETS

_HELP = "compilers, CPU, CUDA and packages here, what each target lacks, and how to mend it"

RUN_PACKAGES = ("numpy", "apache-tvm-ffi", "tokenizers", "jinja2")
COMPILE_PACKAGES = ("ml_dtypes", "gguf")
OPTIONAL_PACKAGES = ("ziglang", "apache-tvm", "nvidia-cutlass", "nvidia-cuda-cuobjdump")

# Kernel variant of the target cpu -> CPU features; the table of codegen/isa.py (a test holds them
# equal), which is out of reach where only the runtime's packages are installed.
_AVX2 = ("avx2", "fma", "f16c", "bmi2")
_AVX512 = (*_AVX2, "avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512vbmi", "avx512vnni")
_AMX = (*_AVX512, "avx512bf16", "avx512fp16", "amx-tile", "amx-bf16")
ISA_FEATURES = {"scalar": (), "avx2": _AVX2, "avx512": _AVX512, "amx": _AMX}

# Target -> compute capability; what follows is codegen/nvcc.py's (a test holds them equal).
CUDA_TARGETS = {"sm_120a": "12.0", "sm_90a": "9.0"}
OLDEST_NVCC, OLDEST_DRIVER = (13, 0), 580
CUDA_EXTRA = 'pip install "halfbyte[cuda]"'
CUTLASS = "nvidia-cutlass"


@dataclass(frozen=True, slots=True)
class Tool:
    """A program or package: its version, or None where it is absent."""

    name: str
    version: str | None
    where: str = ""


@dataclass(frozen=True, slots=True)
class Cpu:
    """The processor. `lacks`: for each kernel variant beyond `isa`, the features it would need."""

    model: str
    cores: int
    isa: str
    lacks: dict[str, tuple[str, ...]]


@dataclass(frozen=True, slots=True)
class Gpu:
    """One CUDA device as the driver reports it."""

    name: str
    compute_capability: str
    memory: str
    driver: str


@dataclass(frozen=True, slots=True)
class Cache:
    """The folder of compiled objects."""

    folder: str
    files: int
    bytes: int


@dataclass(frozen=True, slots=True)
class Lack:
    """One thing a target misses here. `remedy` is a command, or says why there is none."""

    needed_to: str
    what: str
    remedy: str


@dataclass(frozen=True, slots=True)
class TargetState:
    """What a target can do here: nothing lacking means that it compiles and runs."""

    name: str
    lacks: tuple[Lack, ...]

    def can(self, verb: str) -> bool:
        """Whether nothing that `verb` ("compile" or "run") needs is missing."""
        return all(lack.needed_to != verb for lack in self.lacks)


@dataclass(frozen=True, slots=True)
class Report:
    """Everything `halfbyte doctor` says."""

    halfbyte: str
    python: str
    system: str
    cpu: Cpu
    compilers: tuple[Tool, ...]
    gpus: tuple[Gpu, ...]
    packages: tuple[Tool, ...]
    cache: Cache
    targets: tuple[TargetState, ...]


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Registers `doctor` with argparse's subparsers."""
    parser: argparse.ArgumentParser = subparsers.add_parser("doctor", help=_HELP, description=_HELP)
    parser.add_argument("--json", action="store_true", help="one JSON object")
    return parser


def main(args: argparse.Namespace, cache: Path | None = None, cxx: str | None = None) -> int:
    """Prints the report. `cache` is the object cache and `cxx` the user's $CXX, both as the
    driver uses them. Returns 0 if artifacts of the target cpu run here, else 1.
    """
    report = examine(cache or Path.home() / ".cache" / "halfbyte", cxx)
    print(json.dumps(asdict(report), indent=1) if args.json else to_text(report))
    return 0 if report.targets[0].can("run") else 1


def examine(cache: Path, cxx: str | None) -> Report:
    """Ask the machine. Starts the compilers and nvidia-smi for their versions, changes nothing
    but the memory of compilers in `cache`.
    """
    names = (*RUN_PACKAGES, *COMPILE_PACKAGES, *OPTIONAL_PACKAGES)
    packages = tuple(_package(name) for name in names)
    compilers = (_cxx(cache, cxx), _zig(), _nvcc())
    gpus = read_gpus()
    targets = (cpu_target(compilers, packages), *(cuda_target(n, compilers, gpus, packages)
               for n in CUDA_TARGETS))  # fmt: skip
    return Report(
        halfbyte=f"{__version__} at {Path(__file__).parent}",
        python=f"{platform.python_version()} at {sys.executable}",
        system=f"{platform.system()} {platform.machine()}, {' '.join(platform.libc_ver())}",
        cpu=read_cpu(Path("/proc/cpuinfo")),
        compilers=compilers,
        gpus=gpus,
        packages=packages,
        cache=_cache(cache),
        targets=targets,
    )


# --- what is here -------------------------------------------------------------------------------


def _package(name: str) -> Tool:
    try:
        return Tool(name, importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return Tool(name, None)


def _cxx(cache: Path, cxx: str | None) -> Tool:
    """The compiler that `halfbyte compile` would use."""
    try:
        from .codegen.compiler import find_compiler
    except ModuleNotFoundError:  # of the extra `compile`: nothing to ask, so only look
        return _first_cxx((cxx,) if cxx else ("c++", "g++", "clang++"))
    try:
        compiler = find_compiler(cxx, cache)
    except TargetError as error:
        return Tool("c++", None, str(error))
    return Tool("c++", compiler.version.splitlines()[0], " ".join(compiler.command))


def _first_cxx(names: Sequence[str]) -> Tool:
    paths = [path for name in names if (path := shutil.which(name))]
    for path in paths:
        if version := _answer((path, "--version")):
            return Tool("c++", version.splitlines()[0], path)
    return Tool("c++", None)


def _zig() -> Tool:
    spec = importlib.util.find_spec("ziglang")
    where = str(Path(spec.origin).parent) if spec is not None and spec.origin else ""
    return Tool("ziglang", _package("ziglang").version, where)


def _nvcc() -> Tool:
    """The nvcc that `halfbyte compile` would use."""
    try:
        from .codegen.nvcc import find_nvcc
    except ModuleNotFoundError:  # of the extra `compile`: look on PATH alone
        return _nvcc_on_path()
    try:
        found = find_nvcc(cuda_home())
    except TargetError as error:
        return Tool("nvcc", None, str(error))
    return Tool("nvcc", found.version, str(found.path))


def _nvcc_on_path() -> Tool:
    path = shutil.which("nvcc")
    if path is None:
        return Tool("nvcc", None)
    words = _answer((path, "--version")).replace(",", " ").split()
    after = words.index("release") + 1 if "release" in words else len(words)
    return Tool("nvcc", words[after] if after < len(words) else None, path)


def read_gpus() -> tuple[Gpu, ...]:
    """The CUDA devices, as nvidia-smi tells; none where there is no driver."""
    path = shutil.which("nvidia-smi")
    if path is None:
        return ()
    fields = "name,compute_cap,memory.total,driver_version"
    answer = _answer((path, f"--query-gpu={fields}", "--format=csv,noheader"))
    rows = ([cell.strip() for cell in line.split(",")] for line in answer.splitlines())
    return tuple(Gpu(*row) for row in rows if len(row) == len(fields.split(",")))


def _answer(command: Sequence[str]) -> str:
    """What a program prints, or "" where it fails or does not answer in half a minute."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def read_cpu(cpuinfo: Path) -> Cpu:
    """The processor by /proc/cpuinfo. The library asks CPUID itself when it is loaded, and the
    operating system for the AMX registers: what it finds there decides."""
    facts = _cpuinfo(cpuinfo)
    flags = set(facts.get("flags", "").replace("_", "").split())
    lacks: dict[str, tuple[str, ...]] = {}
    best = "scalar"
    for isa, features in ISA_FEATURES.items():
        missing = tuple(f for f in features if f.replace("-", "") not in flags)
        if missing:
            lacks[isa] = missing
        elif not lacks:
            best = isa
    return Cpu(facts.get("model name", platform.machine()), _cores(), best, lacks)


def _cpuinfo(path: Path) -> dict[str, str]:
    """Key and value of the first processor."""
    try:
        first = path.read_text().partition("\n\n")[0]
    except OSError:
        return {}
    pairs = (line.partition(":") for line in first.splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cache(folder: Path) -> Cache:
    sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
    return Cache(str(folder), len(sizes), sum(sizes))


# --- what the targets lack ------------------------------------------------------------------------


def _missing(packages: Sequence[Tool], names: Sequence[str], verb: str, pip: str) -> list[Lack]:
    absent = [tool.name for tool in packages if tool.name in names and tool.version is None]
    if not absent:
        return []
    return [Lack(verb, f"Python packages {', '.join(absent)}", pip)]


def cpu_target(compilers: Sequence[Tool], packages: Sequence[Tool]) -> TargetState:
    """What the target cpu lacks. `compilers` as in Report: c++, ziglang, nvcc."""
    lacks: list[Lack] = []
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        found = f"{platform.system()} {platform.machine()}"
        lacks.append(Lack("run", f"x86-64 Linux (found {found})", "none: another machine"))
    lacks += _missing(packages, RUN_PACKAGES, "run", f"pip install {' '.join(RUN_PACKAGES)}")
    remedy = f"pip install {' '.join(COMPILE_PACKAGES)}"
    lacks += _missing(packages, COMPILE_PACKAGES, "compile", remedy)
    if compilers[0].version is None:
        mend = "unset CXX" if compilers[0].where.startswith("$CXX") else "pip install ziglang"
        lacks.append(Lack("compile", "a C++ compiler that works", mend))
    return TargetState("cpu", tuple(lacks))


def cuda_target(
    name: str, compilers: Sequence[Tool], gpus: Sequence[Gpu], packages: Sequence[Tool] = ()
) -> TargetState:
    """What a target of CUDA_TARGETS lacks. `compilers` as in Report: c++, ziglang, nvcc."""
    capability = CUDA_TARGETS[name]
    nvcc = compilers[2].version
    lacks: list[Lack] = []
    if nvcc is None or tuple(int(part) for part in nvcc.split(".")[:2]) < OLDEST_NVCC:
        wanted = f"nvcc >= {OLDEST_NVCC[0]}.{OLDEST_NVCC[1]} (found {nvcc or 'none'})"
        lacks.append(Lack("compile", wanted, CUDA_EXTRA))
    if "mma_nvfp4" in TARGETS[name].features:
        lacks += _missing(packages, (CUTLASS,), "compile", CUDA_EXTRA)
    if all(gpu.compute_capability != capability for gpu in gpus):
        found = ", ".join(f"{gpu.name} ({gpu.compute_capability})" for gpu in gpus) or "no GPU"
        wanted = f"a GPU of compute capability {capability} (found {found})"
        lacks.append(Lack("run", wanted, "none: another machine"))
    elif all(_release(gpu.driver) < OLDEST_DRIVER for gpu in gpus):
        wanted = f"driver {OLDEST_DRIVER} or newer (found {gpus[0].driver})"
        lacks.append(Lack("run", wanted, "install a newer NVIDIA driver"))
    return TargetState(name, tuple(lacks))


def _release(driver: str) -> int:
    number = driver.partition(".")[0]
    return int(number) if number.isdigit() else 0


# --- as text --------------------------------------------------------------------------------------


def to_text(report: Report) -> str:
    """The report for people, one fact per line."""
    lines = [
        f"halfbyte  {report.halfbyte}",
        f"python    {report.python}",
        f"system    {report.system}",
        f"cpu       {report.cpu.model}, {report.cpu.cores} cores; {report.cpu.isa} kernels run",
    ]
    for isa, missing in report.cpu.lacks.items():
        lines.append(f"          no {isa} kernels: lacks {', '.join(missing)}")
    lines += ["", "compilers"]
    lines += [
        f"  {t.name:<16}{t.version or 'absent'}  {t.where}".rstrip() for t in report.compilers
    ]
    lines += ["", "CUDA devices"]
    lines += [
        f"  {gpu.name}, compute capability {gpu.compute_capability}, {gpu.memory}, "
        f"driver {gpu.driver}"
        for gpu in report.gpus
    ] or ["  none"]
    lines += ["", "packages"]
    lines += [f"  {tool.name:<16}{tool.version or 'absent'}" for tool in report.packages]
    size = f"{report.cache.files} files, {report.cache.bytes / 1e6:.1f} MB"
    lines += ["", f"cache     {report.cache.folder}: {size}", "", "targets"]
    for target in report.targets:
        lines += _target_lines(target)
    return "\n".join(lines)


def _target_lines(target: TargetState) -> list[str]:
    able = " and ".join(f"{verb}s" for verb in ("compile", "run") if target.can(verb))
    lines = [f"  {target.name:<16}{able or 'neither compiles nor runs'} here"]
    for lack in target.lacks:
        lines.append(f"    to {lack.needed_to} it lacks {lack.what}")
        lines.append(f"      mend: {lack.remedy}")
    return lines
