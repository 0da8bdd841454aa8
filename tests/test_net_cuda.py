"""ONNX graphs on CUDA targets, as far as a machine without a device can tell."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from halfbyte.codegen import find_compiler
from halfbyte.codegen import kernels_net_cuda as table
from halfbyte.codegen.kernels_net import KERNELS
from halfbyte.codegen.nvcc import CudaCompiler, find_cuda_compiler
from halfbyte.codegen.plan_cuda import arch_of
from halfbyte.codegen.render import TEMPLATES
from halfbyte.ir.errors import TargetError
from halfbyte.ir.target import target


def test_the_table_is_sound() -> None:
    families = {kernel.family for kernel in KERNELS}
    names = {kernel.name for kernel in KERNELS}
    for name, family in table.FAMILIES.items():
        assert name in families and {*family.without, *family.host_ins} <= names
        assert (TEMPLATES / table.FOLDER / f"{name}.cu.jinja").exists(), name


@pytest.mark.parametrize("name", table.FAMILIES)
def test_a_family_renders(name: str) -> None:
    kernels = [kernel for kernel in KERNELS if kernel.family == name]
    for variant in {v for kernel in kernels for v in table.variants_of(kernel)}:
        unit = table.unit(name, variant)
        for kernel in kernels:
            if variant in table.variants_of(kernel):
                symbol = f"{kernel.name}_{variant}" if variant else kernel.name
                assert f"bool {symbol}(Call& call)" in unit.text, symbol
        assert "namespace hb::net::cuda" in unit.text
        assert Path(unit.name).suffix == ".cu"


@pytest.mark.slow
@pytest.mark.parametrize("name", table.FAMILIES)
@pytest.mark.parametrize("arch", ["sm_90a", "sm_120a"])
def test_a_family_compiles(
    name: str, arch: str, tmp_path: Path, pytestconfig: pytest.Config
) -> None:
    toolchain = toolchain_of(arch, pytestconfig)
    kernel = next(kernel for kernel in KERNELS if kernel.family == name)
    unit = table.unit(name, table.variants_of(kernel)[0])
    for file, text in {**unit.headers, unit.name: unit.text}.items():
        (tmp_path / file).write_text(text)
    command = (*toolchain.command_of(unit.name), *toolchain.flags_of(unit.name), *unit.flags)
    ran = subprocess.run(
        (*command, "-c", unit.name, "-o", "unit.o"), cwd=tmp_path, capture_output=True, text=True
    )
    assert ran.returncode == 0 and "warning" not in ran.stderr, ran.stderr


def toolchain_of(arch: str, config: pytest.Config) -> CudaCompiler:
    """nvcc for a target; skips the test where there is none."""
    assert config.cache is not None
    cache = Path(config.cache.mkdir("objects"))
    try:
        return find_cuda_compiler(find_compiler(None, cache), arch_of(target(arch)), None)
    except TargetError as error:
        pytest.skip(str(error))
