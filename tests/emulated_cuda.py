"""A toolchain that builds the library of a CUDA target for the host: kernels run, slowly, without a
device (see emulation/cuda_runtime.h). What is tested so is what they compute, not how."""

from __future__ import annotations

import hashlib
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from halfbyte import driver
from halfbyte.codegen import kernel_code, kernels_net_cuda
from halfbyte.codegen.compiler import Compiler
from halfbyte.codegen.nvcc import CudaCompiler, find_cuda_compiler
from halfbyte.codegen.plan_cuda import Arch
from halfbyte.ir.errors import TargetError

FOLDER = Path(__file__).parent / "emulation"


@dataclass(frozen=True, slots=True)
class Emulated(CudaCompiler):
    """The C++ compiler for kernels too; `runtime` is the stand-in for CUDA's."""

    runtime: Path

    @property
    def link_libraries(self) -> tuple[str, ...]:
        return str(self.runtime), "-lstdc++", "-lpthread", "-lm"

    def command_of(self, unit: str) -> tuple[str, ...]:
        includes = "-isystem", str(self.nvcc.root / "include")
        if not unit.endswith(".cu"):
            return *self.host.command, *includes
        return *self.host.command, "-x", "c++", f"-I{FOLDER}", *includes

    def flags_of(self, unit: str) -> tuple[str, ...]:
        flags = (*self.host.compile_flags, "-fno-threadsafe-statics")
        if not unit.endswith(".cu"):
            return flags
        stand_in = hashlib.sha256((FOLDER / "cuda_runtime.h").read_bytes()).hexdigest()
        return *flags, "-O1", "-w", f"-DHB_EMULATION={stand_in}"


def emulate(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Let the driver build for CUDA targets so. Skips the test where there are no CUDA headers."""

    def find(host: Compiler, arch: Arch, cuda_home: str | None) -> CudaCompiler:
        try:
            real = find_cuda_compiler(host, arch, cuda_home)
        except TargetError as error:
            pytest.skip(f"an emulated device needs CUDA's headers: {error}")
        runtime = folder / "cudart.o"
        include = ("-isystem", str(real.nvcc.root / "include"))
        source = str(FOLDER / "cudart.cc")
        command = (*host.command, "-fPIC", "-O1", *include, "-c", source, "-o", str(runtime))
        subprocess.run(command, check=True, capture_output=True)
        return Emulated(real.host, real.nvcc, real.arch, runtime)

    monkeypatch.setattr(driver, "find_cuda_compiler", find)

    def no_tools(cuda_home: str | None) -> None:
        """There is no machine code of a device to count."""

    monkeypatch.setattr(kernel_code, "find_tools", no_tools)
    monkeypatch.setattr(kernels_net_cuda, "CUDA", replace(kernels_net_cuda.CUDA, flags=()))
