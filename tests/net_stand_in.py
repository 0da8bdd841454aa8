"""Artifacts of ONNX graphs for sm_90a whose library runs on a machine without a device.

The executor, the plan, device memory and what goes to and fro are the real ones, over a stand-in
for the CUDA runtime (fake_net_device.cc); kernels of the device are the host's templates.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from halfbyte.codegen import ffi_options, find_compiler
from halfbyte.codegen import kernels_net_cuda as cuda
from halfbyte.codegen.build import build
from halfbyte.codegen.emit import Request
from halfbyte.codegen.isa import SCALAR
from halfbyte.codegen.kernels_net import C_TYPES
from halfbyte.codegen.net_emit import NetBuild, NetLibrary, write_net_artifact
from halfbyte.codegen.net_plan import NetPlan, make_net_plan
from halfbyte.codegen.net_sides import LINEAR
from halfbyte.codegen.net_sources import net_cuda_sources, symbols
from halfbyte.codegen.nvcc import CudaCompiler, find_cuda_compiler
from halfbyte.codegen.plan_cuda import arch_of
from halfbyte.codegen.render import Source, source
from halfbyte.driver import Options, Run
from halfbyte.driver_onnx import compile_target, for_graphs, net_facts
from halfbyte.frontend.onnx_importer import import_onnx
from halfbyte.ir.target import target
from halfbyte.runtime.artifact import ModelFacts

TARGET = "sm_90a"


@dataclass(frozen=True, slots=True)
class HostOnly(CudaCompiler):
    """The toolchain without the CUDA runtime: the stand-in takes its place."""

    @property
    def link_libraries(self) -> tuple[str, ...]:
        return "-lstdc++", "-lpthread", "-lm"


def toolchain(cache: Path) -> HostOnly:
    """TargetError: CUDA's headers are not here."""
    real = find_cuda_compiler(find_compiler(None, cache), arch_of(target(TARGET)), None)
    return HostOnly(real.host, real.nvcc, real.arch)


def sources(plan: NetPlan, text: str) -> list[Source]:
    """The library's units, those for nvcc replaced."""
    kept = [s for s in net_cuda_sources(plan, arch_of(plan.target)) if s.name.endswith(".cc")]
    kernels = [
        _as_devices(family, variant)
        for family, variant in plan.families(cuda.DEVICE)
        if family != LINEAR
    ]
    headers = {name: body for s in kept for name, body in s.headers.items()}
    linear = source("device_linear.h", None, "net")
    headers |= {**linear.headers, linear.name: linear.text}
    headers["host_cudart.h"] = (Path(__file__).parent / "host_cudart.h").read_text()
    return [*kept, *kernels, Source("fake_net_device.cc", text, dict(sorted(headers.items())))]


def _as_devices(family: str, variant: str) -> Source:
    """The host's kernels under the names of the device's."""
    facts = {"variant": variant, "c_type": C_TYPES.get(variant, "")}
    made = source(f"{family}.cc", SCALAR, "net", **facts)
    text = made.text.replace("hb::net::scalar", f"hb::net::{cuda.CUDA.name}")
    return replace(made, name=f"{family}.{variant}.stand-in.cc", text=text)


def compile_stand_in(file: Path, out: Path, cache: Path, compiler: HostOnly) -> None:
    """As `halfbyte.compile(file, out, target="cpu,sm_90a")`, for the stand-in."""
    imported = import_onnx(file)
    for_cpu = Options(file, None, "cpu", compile_to="60_codegen")
    cpu = compile_target(Run(for_cpu, for_graphs(target("cpu"))), imported)
    assert cpu.library is not None
    options = Options(file, None, TARGET, compile_to="50_capture")
    made = compile_target(Run(options, for_graphs(target(TARGET))), imported)
    plan = make_net_plan(made.graphs, made.run.target)
    text = (Path(__file__).parent / "fake_net_device.cc").read_text()
    built = build(sources(plan, text), symbols(plan), compiler, ffi_options(cache))
    library = NetLibrary(plan, built, compiler, (TARGET,), {}, 0.0)
    request = Request(ModelFacts("onnx", file.stem, 0, 0, None, (), {}), "test", "2026-01-01")
    builds = [
        NetBuild(m.graphs, lib, (), (), "") for m, lib in ((cpu, cpu.library), (made, library))
    ]
    write_net_artifact(out, builds, net_facts(imported), imported.weights, request)
