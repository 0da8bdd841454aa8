"""The library of a CUDA target: what it exports and needs, what its kernels take, what they are."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from halfbyte.codegen import declarations, elf, ffi_options, find_compiler
from halfbyte.codegen.args import ARGS
from halfbyte.codegen.build import build
from halfbyte.codegen.compiler import Compiler
from halfbyte.codegen.kernel_code import compiled_kernels
from halfbyte.codegen.kernels_cuda import COUNTER_BYTES, HEAD_DIMS
from halfbyte.codegen.nvcc import CudaCompiler, find_cuda_compiler
from halfbyte.codegen.plan import Plan, make_plan
from halfbyte.codegen.plan_cuda import SYMBOLS, Arch, arch_of, cuda_sources, kernel_facts
from halfbyte.codegen.ptxas import readable, resources
from halfbyte.codegen.render import TEMPLATES, source
from halfbyte.codegen.sass import LOCAL_MEMORY, census, count, find_tools, matrix_instruction, parse
from halfbyte.codegen.table import table_of
from halfbyte.frontend import import_model, open_checkpoint
from halfbyte.ir.errors import IRError, TargetError
from halfbyte.ir.ops import OPS
from halfbyte.ir.target import TARGETS, target
from halfbyte.passes import pipeline
from halfbyte.passes.context import Context

HOPPER = target("sm_90a")


@pytest.fixture(scope="module")
def plan(root: Path) -> Plan:
    checkpoint = root / "tests" / "data" / "llama_tied-modelopt"
    imported = import_model(open_checkpoint(checkpoint), context=100)
    context = Context(HOPPER, declarations("sm_90a"), imported.weights)
    return make_plan(pipeline.run(imported.graph, context), HOPPER)


@pytest.fixture(scope="module")
def cache(pytestconfig: pytest.Config) -> Path:
    assert pytestconfig.cache is not None
    return Path(pytestconfig.cache.mkdir("objects"))


@pytest.fixture(scope="module")
def toolchain(cache: Path) -> CudaCompiler:
    try:
        return find_cuda_compiler(find_compiler(None, cache), arch_of(HOPPER), None)
    except TargetError as error:
        pytest.skip(str(error))


# --- the plan -------------------------------------------------------------------------------------


def test_the_plan_counts_pages(plan: Plan) -> None:
    assert plan.pages == 7 and plan.state_bytes == 7 * plan.state_bytes_per_page
    rope = next(a for a in plan.arguments if a.struct == "RopeAppendArgs")
    assert ".k_cache = {3, 0}" in rope.initialiser
    assert plan.workspace_bytes >= COUNTER_BYTES and plan.workspace_bytes_per_thread == 0


def test_buckets_decode_first_and_then_prefill(plan: Plan) -> None:
    assert [b.tokens for b in plan.buckets] == list(HOPPER.buckets)
    assert [b.prefill for b in plan.buckets] == [b > HOPPER.sequences for b in HOPPER.buckets]
    names = {k.name for k in plan.kernels}
    assert {"nvfp4_gemv", "nvfp4_gemm", "attention_decode", "attention_prefill"} <= names


def test_the_table_is_sound() -> None:
    table = table_of("sm_90a")
    for kernel in table.kernels:
        assert kernel.decl.serves <= set(OPS) and kernel.args in ARGS and kernel.decl.promise
        assert (TEMPLATES / "cuda" / f"{kernel.family}.cu.jinja").exists(), kernel.name
    assert len(table.by_name) == len(table.kernels)


def test_architectures_are_never_plain() -> None:
    assert arch_of(HOPPER).gencode == "-gencode=arch=compute_90a,code=sm_90a"
    assert Arch("sm_120f", 12, 0, "f").gencode == "-gencode=arch=compute_120f,code=sm_120f"
    with pytest.raises(IRError, match="cpu: expected a CUDA target"):
        arch_of(TARGETS["cpu"])


# --- the compiler ---------------------------------------------------------------------------------


def test_no_nvcc_names_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    host = find_compiler(None, cache)
    with pytest.raises(TargetError, match=r"no nvcc 13 or newer \(.*/bin/nvcc: .*halfbyte\[cuda\]"):
        find_cuda_compiler(host, arch_of(HOPPER), str(tmp_path))
    old = tmp_path / "bin" / "nvcc"
    old.parent.mkdir()
    old.write_text('#!/bin/sh\necho "release 12.4, V12.4.99"\necho "#\\$ _HERE_=/x/bin" >&2\n')
    old.chmod(0o755)
    with pytest.raises(TargetError, match="release 12.4 is too old"):
        find_cuda_compiler(host, arch_of(HOPPER), str(tmp_path))
    zig = Compiler(("/x/zig", "c++"), ("/x/zig", "cc"), "zig")
    with pytest.raises(TargetError, match="nvcc needs g\\+\\+"):
        find_cuda_compiler(zig, arch_of(HOPPER), None)


def test_paths_of_this_machine_are_in_no_key(toolchain: CudaCompiler) -> None:
    for unit in ("plan.cc", "gemv.cu"):
        assert not any("/" in flag for flag in toolchain.flags_of(unit))
    assert not any("/" in flag for flag in toolchain.link_flags)


@pytest.mark.slow
def test_the_library_holds_what_it_promises(
    plan: Plan, toolchain: CudaCompiler, cache: Path
) -> None:
    built = build(cuda_sources(plan, HOPPER), SYMBOLS, toolchain, ffi_options(cache))
    facts = elf.read(built.path)
    assert {name for name in facts.exports if name.startswith("__tvm_ffi_")} == set(SYMBOLS)
    assert not [name for name in facts.exports if name.startswith("cuda")]
    code = [c.code for c in compiled_kernels(built)]
    units = {c.unit for c in code}
    assert {f"{family}.cu" for family in plan.families} | {"sample.cu"} == units
    assert not [c for c in code if c.spilled or c.stack], "kernels must not touch local memory"
    assert all(0 < c.registers <= 255 for c in code)
    heads = sum(c.unit == "attention_decode.cu" for c in code)
    assert heads == len(HEAD_DIMS)
    again = build(cuda_sources(plan, HOPPER), SYMBOLS, toolchain, ffi_options(cache))
    assert not again.compiled and [c.code for c in compiled_kernels(again)] == code


@pytest.mark.slow
def test_machine_code_has_the_instructions_it_promises(
    plan: Plan, toolchain: CudaCompiler, cache: Path
) -> None:
    tools = find_tools()
    if tools is None:
        pytest.skip("no cuobjdump and nvdisasm: pip install the extra `cuda`")
    built = build(cuda_sources(plan, HOPPER), SYMBOLS, toolchain, ffi_options(cache))
    found = census(built.path, tools)
    for symbol, instructions in found.items():
        for name in LOCAL_MEMORY:
            assert not count(instructions, name), symbol
    matrix = {readable(s).split("<")[0]: matrix_instruction(i) for s, i in found.items()}
    assert matrix["gemm"].startswith("HGMMA.64x")
    for name in ("gemv", "dense_gemv_kernel", "attention_decode_kernel"):
        assert matrix[name] == "HMMA.16816.F32.BF16", name


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sm_90a", "sm_120a"])
@pytest.mark.parametrize("unit", ["attention_decode_fp8", "attention_prefill_fp8", "rope_append"])
def test_fp8_caches_are_converted_by_the_hardware(
    name: str, unit: str, toolchain: CudaCompiler, tmp_path: Path
) -> None:
    tools = find_tools()
    if tools is None:
        pytest.skip("no cuobjdump and nvdisasm: pip install the extra `cuda`")
    chosen = target(name)
    compiler = replace(toolchain, arch=arch_of(chosen))
    made = source(f"{unit}.cu", None, "cuda", **kernel_facts(chosen))
    for file, text in {made.name: made.text, **made.headers}.items():
        (tmp_path / file).write_text(text)
    object_ = tmp_path / "unit.o"
    command = (*compiler.command_of(made.name), *compiler.flags_of(made.name), "-c", "-o")
    subprocess.run(
        (*command, str(object_), made.name), cwd=tmp_path, check=True, capture_output=True
    )
    found = {symbol: n for symbol, n in census(object_, tools).items() if "E4m3" in symbol}
    converts = "F2FP.SATFINITE.E4M3" if unit == "rope_append" else "F2FP.F16.E4M3"
    assert found
    for symbol, instructions in found.items():
        assert any(name.startswith(converts) for name in instructions), symbol
        assert not any(count(instructions, local) for local in LOCAL_MEMORY), symbol
        assert (matrix_instruction(instructions) == "") == (unit == "rope_append"), symbol


# --- what the tools say ---------------------------------------------------------------------------

PTXAS = """
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_ZN2hb4gemvILi2ELi1ELb1EEEvNS_4ArgsE' for 'sm_90a'
ptxas info    : Function properties for _ZN2hb4gemvILi2ELi1ELb1EEEvNS_4ArgsE
    8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 72 registers, used 1 barriers, 1024 bytes smem, 400 bytes cmem[0]
ptxas info    : Compiling entry function '_Z4copyPfS_' for 'sm_90a'
ptxas info    : Used 8 registers, 368 bytes cmem[0]
"""
SASS = """
    code for sm_90a
        Function : _ZN2hb4gemvE
    .headerflags @"EF_CUDA_SM90 EF_CUDA_PTX_SM(EF_CUDA_SM90)"
        /*0000*/                   LDC R1, c[0x0][0x28] ;      /* 0x00000a00ff017b82 */
                                                               /* 0x000fe20000000800 */
        /*0010*/              @!P0 HMMA.16816.F32.BF16 R8, R4, R2, RZ ;
        /*0020*/                   HGMMA.64x256x16.F32.BF16 R24, R4, gdesc[UR4], R24 ;
        /*0030*/               @P1 STL [R1], R2 ;
"""


def test_the_assemblers_words_are_read() -> None:
    first, second = resources(PTXAS)
    assert (first.name, first.registers, first.shared) == ("gemv<2, 1, true>", 72, 1024)
    assert (first.stack, first.spill_stores, first.spill_loads) == (8, 4, 12)
    assert (second.name, second.registers, second.shared) == ("copy", 8, 0)


def test_a_census_counts_by_family() -> None:
    found = parse(SASS)
    instructions = found["_ZN2hb4gemvE"]
    assert sum(instructions.values()) == 4
    assert count(instructions, "HMMA") == 1 and count(instructions, "STL") == 1
    assert matrix_instruction(instructions) == "HGMMA.64x256x16.F32.BF16"
    assert matrix_instruction({"FFMA": 3}) == ""


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on PATH")
def test_nvcc_tells_its_root(toolchain: CudaCompiler) -> None:
    assert (toolchain.nvcc.root / "include" / "cuda_runtime_api.h").exists()
    assert toolchain.nvcc.libraries.is_dir()
