"""Which CUDA compiler this machine offers, and how it and the C++ compiler build one library.

Kernels (.cu) go through nvcc, one object per template, machine code of one architecture and no PTX.
Everything else goes through the C++ compiler, which links too: with the static CUDA runtime, so
that a library needs nothing of CUDA but the driver.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ..ir.errors import TargetError
from .compiler import Compiler
from .plan_cuda import Arch

REMEDY = 'pip install "halfbyte[cuda]"'
OLDEST = (13, 0)
DRIVER_MIN = "580"  # the first driver of CUDA 13
SYSTEM = Path("/usr/local/cuda")
CUTLASS = "cutlass_library"  # the package that nvidia-cutlass installs
WHEELS = "cu13"  # the folder of nvidia-cuda-nvcc and its companions in the package `nvidia`

_FLAGS = (
    "-std=c++17",
    "-O3",
    "-Xptxas=-v",  # registers, spills and shared memory of each kernel
    "-Xcompiler=-fPIC,-fvisibility=hidden,-ffp-contract=off,-Wall",
)
_HOST_FLAGS = ("-fno-threadsafe-statics",)


@dataclass(frozen=True, slots=True)
class Nvcc:
    """An nvcc that answered. `root`: the toolkit's folder, with include, lib and bin."""

    path: Path
    root: Path
    version: str

    @property
    def libraries(self) -> Path:
        """The folder of libcudart_static.a. Raises TargetError where it is missing."""
        for name in ("lib64", "lib", "targets/x86_64-linux/lib"):
            if (self.root / name / "libcudart_static.a").exists():
                return self.root / name
        raise TargetError(f"{self.root}: no libcudart_static.a; run `{REMEDY}`")


@dataclass(frozen=True, slots=True)
class CudaCompiler:
    """nvcc for kernels, a C++ compiler for the rest: a toolchain of build.py for one target."""

    host: Compiler
    nvcc: Nvcc
    arch: Arch

    def __str__(self) -> str:
        return f"nvcc {self.nvcc.version} with {self.host}"

    @property
    def version(self) -> str:
        return f"{self.host.version}\nnvcc {self.nvcc.version}"

    @property
    def refused(self) -> tuple[tuple[str, str], ...]:
        """Nothing: a target is built whole or not at all."""
        return ()

    @property
    def remedy(self) -> str:
        """The command that brings an nvcc we know to work."""
        return REMEDY

    @property
    def linker(self) -> tuple[str, ...]:
        return self.host.linker

    @property
    def link_flags(self) -> tuple[str, ...]:
        return (*self.host.link_flags, "-Wl,--exclude-libs,ALL")

    @property
    def link_libraries(self) -> tuple[str, ...]:
        return (f"-L{self.nvcc.libraries}", "-lcudart_static", "-ldl", "-lrt", "-lpthread", "-lm")

    @property
    def program_flags(self) -> tuple[str, ...]:
        """Flags of a program of this machine, linked of the objects of a library."""
        return (*self.host.baseline, "-Wl,--as-needed", "-lpthread", "-lm", "-ldl")

    def command_of(self, unit: str) -> tuple[str, ...]:
        """What compiles a unit of this name; paths of this machine, so no part of a cache key."""
        if unit.endswith(".cu"):
            includes = cutlass_includes() if self._uses_cutlass(unit) else ()
            return str(self.nvcc.path), f"-ccbin={self.host.command[0]}", *includes
        return *self.host.command, "-isystem", str(self.nvcc.root / "include")

    def flags_of(self, unit: str) -> tuple[str, ...]:
        """The flags of a unit."""
        if unit.endswith(".cu"):
            version = (f"-DHB_CUTLASS={cutlass_version()}",) if self._uses_cutlass(unit) else ()
            return *_FLAGS, *self.arch.flags, *version
        return *self.host.compile_flags, *_HOST_FLAGS

    def _uses_cutlass(self, unit: str) -> bool:
        return "cutlass" in unit and not self.arch.twin


def find_cuda_compiler(host: Compiler, arch: Arch, cuda_home: str | None) -> CudaCompiler:
    """A C++ compiler and nvcc (see `find_nvcc`) as one toolchain.

    TargetError: there is no nvcc, or the C++ compiler is one it cannot work with.
    """
    if host.is_zig:
        raise TargetError(f"{host}: nvcc needs g++ or clang++ beside it; run `apt install g++`")
    return CudaCompiler(host, find_nvcc(cuda_home), arch)


def find_nvcc(cuda_home: str | None) -> Nvcc:
    """nvcc of $CUDA_HOME if that is set, else of PATH, of /usr/local/cuda, of the pip packages.

    TargetError: there is none that is new enough.
    """
    tried: list[str] = []
    for path in _candidates(cuda_home):
        found = _identify(path)
        if isinstance(found, Nvcc):
            return found
        tried.append(f"{path}: {found}")
    listed = "; ".join(tried) or "nothing on PATH, no pip package"
    raise TargetError(f"CUDA: no nvcc {OLDEST[0]} or newer ({listed}); run `{REMEDY}`")


def _candidates(cuda_home: str | None) -> Iterator[Path]:
    if cuda_home is not None:
        yield Path(cuda_home) / "bin" / "nvcc"
        return
    if on_path := shutil.which("nvcc"):
        yield Path(on_path)
    yield from (path for path in (SYSTEM / "bin" / "nvcc",) if path.exists())
    yield from (folder / "bin" / "nvcc" for folder in wheel_folders())


def wheel_folders() -> list[Path]:
    """Where pip puts NVIDIA's toolkit packages."""
    spec = importlib.util.find_spec("nvidia")
    places = spec.submodule_search_locations if spec else None
    return [path for place in places or () if (path := Path(place) / WHEELS).is_dir()]


def cutlass_folder() -> Path:
    """The headers of the package nvidia-cutlass. Raises TargetError where it is not installed."""
    spec = importlib.util.find_spec(CUTLASS)
    places = list(spec.submodule_search_locations or ()) if spec else []
    folder = Path(places[0]) / "source" if places else None
    if folder is None or not (folder / "include" / "cutlass").is_dir():
        raise TargetError(f"CUTLASS: its headers are not here; run `{REMEDY}`")
    return folder


def cutlass_includes() -> tuple[str, ...]:
    """nvcc's flags for the headers of CUTLASS. Raises TargetError."""
    folder = cutlass_folder()
    folders = folder / "include", folder / "tools" / "util" / "include"
    return tuple(word for path in folders for word in ("-isystem", str(path)))


def cutlass_version() -> str:
    """The version of CUTLASS's headers, as 4.2.0. Raises TargetError."""
    text = (cutlass_folder() / "include" / "cutlass" / "version.h").read_text()
    numbers = re.findall(r"#define CUTLASS_(?:MAJOR|MINOR|PATCH) (\d+)", text)
    return ".".join(numbers)


def _identify(path: Path) -> Nvcc | str:
    """The nvcc at `path`, or why it will not do."""
    with tempfile.TemporaryDirectory(prefix="halfbyte-") as folder:
        unit = Path(folder) / "probe.cu"
        unit.write_text("")
        command = (str(path), "--version", "--dryrun", "-c", str(unit))
        version, where = _run(command[:2]), _run((command[0], *command[2:]))
    number = re.search(r"release (\d+)\.(\d+), V([\d.]+)", version)
    here = re.search(r"^#\$ _HERE_=(.+)$", where, re.MULTILINE)
    if number is None or here is None:
        return (version or where).strip().splitlines()[-1][:200] if version or where else "silent"
    if (int(number[1]), int(number[2])) < OLDEST:
        return f"release {number[1]}.{number[2]} is too old"
    return Nvcc(path, Path(here[1]).parent, number[3])


def _run(command: tuple[str, ...]) -> str:
    try:
        ran = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return ran.stdout + ran.stderr
