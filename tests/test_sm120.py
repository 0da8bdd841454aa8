"""The sm_120a kernels on a machine without the card: what they are made of, and what they read.

Their arithmetic is checked elsewhere, by the same templates built with HB_TWIN on another GPU.
Here: the native build holds the instructions it promises, nothing spills, no block asks for more
shared memory than there is; and the layouts agree with CuTe's own layout functions.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from halfbyte.codegen.compiler import find_compiler
from halfbyte.codegen.nvcc import CudaCompiler, find_cuda_compiler
from halfbyte.codegen.plan_cuda import Arch
from halfbyte.codegen.ptxas import Resources, resources
from halfbyte.codegen.render import source
from halfbyte.codegen.sass import LOCAL_MEMORY, census, count, find_tools
from halfbyte.ir.errors import TargetError
from halfbyte.ir.layouts import scales_to_sfatom

SM120A, SM90A = Arch("sm_120a", 12, 0, "a"), Arch("sm_90a", 9, 0, "a")
SHARED_LIMIT = 101_376
OMMA = "OMMA.SF.16864.F32.E2M1.E2M1.UE4M3.4X"
TO_E2M1 = "F2FP.SATFINITE.E2M1.F32.PACK_AB_MERGE_C"
UNITS = ("nvfp4_quantize", "nvfp4_w4a4_smallm", "nvfp4_gemv_rowmajor")


@dataclass(frozen=True)
class Built:
    """An object file, and what the compiler said of it."""

    path: Path
    words: str
    ok: bool


Build = Callable[..., Built]


@pytest.fixture(scope="module")
def toolchain(tmp_path_factory: pytest.TempPathFactory) -> CudaCompiler:
    cache = tmp_path_factory.mktemp("cache")
    try:
        host = find_compiler(os.environ.get("CXX"), cache)
        return find_cuda_compiler(host, SM120A, os.environ.get("CUDA_HOME"))
    except TargetError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def build(toolchain: CudaCompiler, tmp_path_factory: pytest.TempPathFactory) -> Build:
    """Compiles a template; `edit` is what changes its text and headers first."""

    def compiled(
        unit: str,
        *flags: str,
        arch: Arch = SM120A,
        edit: Callable[[str], str] = str,
    ) -> Built:
        folder = tmp_path_factory.mktemp(unit)
        rendered = source(f"{unit}.cu", None, "cuda", target=arch, shared_bytes=SHARED_LIMIT)
        for name, text in {f"{unit}.cu": rendered.text, **rendered.headers}.items():
            (folder / name).write_text(edit(text))
        nvcc = (str(toolchain.nvcc.path), "-std=c++17", "-O3", "-Xptxas=-v", arch.gencode)
        command = (*nvcc, *flags, "-cubin", "-o", f"{unit}.cubin", f"{unit}.cu")
        ran = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        return Built(folder / f"{unit}.cubin", ran.stdout + ran.stderr, ran.returncode == 0)

    return compiled


@pytest.fixture(scope="module")
def native(build: Build) -> dict[str, Built]:
    built = {unit: build(unit) for unit in UNITS}
    assert all(each.ok for each in built.values()), [each.words for each in built.values()]
    return built


def test_no_kernel_spills_or_asks_for_too_much(native: dict[str, Built]) -> None:
    kernels: list[Resources] = [k for b in native.values() for k in resources(b.words)]
    assert len(kernels) >= 6 + 4 + 8
    assert not [k for k in kernels if k.stack or k.spill_stores or k.spill_loads]
    assert not [k for k in kernels if k.shared > SHARED_LIMIT]


def test_every_kernel_holds_its_instruction(native: dict[str, Built]) -> None:
    tools = find_tools(os.environ.get("CUDA_HOME"))
    if tools is None:
        pytest.skip("no cuobjdump")
    found: dict[str, Counter[str]] = {}
    for built in native.values():
        found |= census(built.path, tools)
    local = {k: c for k, c in found.items() if any(count(c, name) for name in LOCAL_MEMORY)}
    assert not local
    quantizers = [c for k, c in found.items() if "quantize_kernel" in k]
    products = [c for k, c in found.items() if "smallm_kernel" in k]
    vectors = [c for k, c in found.items() if "gemv_rowmajor" in k and "prepare_rows" not in k]
    assert len(quantizers) == 6 and all(c[TO_E2M1] == 4 for c in quantizers)
    # four instructions for each column tile of 8 tokens: two along k, two pairs of row tiles
    assert sorted(c[OMMA] for c in products) == [4, 8, 16, 32]
    assert len(vectors) == 8 and all(count(c, "HMMA") >= 16 for c in vectors)


def test_the_limit_of_shared_memory_is_enforced(build: Build) -> None:
    def lowered(text: str) -> str:
        return text.replace(str(SHARED_LIMIT), "65536")

    built = build("nvfp4_w4a4_smallm", edit=lowered)
    assert not built.ok and "shared memory of two blocks on sm_120" in built.words


def test_other_architectures_need_the_twin(build: Build) -> None:
    without = build("nvfp4_quantize", arch=SM90A)
    assert not without.ok and "HB_TWIN" in without.words
    assert build("nvfp4_quantize", "-DHB_TWIN", arch=SM90A).ok


# --- CuTe ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cute(
    toolchain: CudaCompiler, root: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., np.ndarray]:
    """Runs tests/data/cute_layouts.cc; gives the int32 that it writes."""
    spec = importlib.util.find_spec("cutlass_library")
    places = list(spec.submodule_search_locations or ()) if spec else []
    if not places:
        pytest.skip("no CUTLASS: pip install nvidia-cutlass")
    program = tmp_path_factory.mktemp("cute") / "layouts"
    headers = toolchain.nvcc.root / "include"
    folders = (Path(places[0]) / "source" / "include", headers, headers / "cccl")
    includes = [f"-I{folder}" for folder in folders]
    file = str(root / "tests" / "data" / "cute_layouts.cc")
    command = [*toolchain.host.command, "-std=c++17", "-w", *includes, file, "-o", str(program)]
    subprocess.run(command, check=True)

    def run(*words: object) -> np.ndarray:
        ran = subprocess.run([str(program), *map(str, words)], capture_output=True, check=True)
        return np.frombuffer(ran.stdout, np.int32)

    return run


@pytest.mark.parametrize(
    ("rows", "k"), [(1, 64), (128, 64), (129, 128), (300, 112), (576, 576), (1000, 2112), (33, 32)]
)
def test_scales_lie_where_cutlass_looks(cute: Callable[..., np.ndarray], rows: int, k: int) -> None:
    offsets = cute("scales", rows, k).reshape(2, rows, k // 16)
    numbered = np.arange(1, rows * (k // 16) + 1, dtype=np.int32).reshape(rows, -1)
    plane = scales_to_sfatom(numbered).reshape(-1)
    for of_operand in offsets:
        np.testing.assert_array_equal(plane[of_operand], numbered)


def test_fragments_are_those_of_the_twin(cute: Callable[..., np.ndarray]) -> None:
    """nvfp4_mma.cuh states which lane holds what; CuTe's traits of the instruction say the same."""
    a, b, c, a_scales, b_scales = np.split(cute("mma"), np.cumsum([1024, 512, 128, 2048]))
    lane = np.arange(32)[:, None]
    g, t = lane // 4, lane % 4
    v = np.arange(32)[None, :]
    row, k = g + 8 * (v // 8 % 2), 32 * (v // 16) + 8 * t + v % 8
    np.testing.assert_array_equal(a.reshape(32, 32), row + 16 * k)
    v = v[:, :16]
    np.testing.assert_array_equal(b.reshape(32, 16), g + 8 * (32 * (v // 8) + 8 * t + v % 8))
    v = v[:, :4]
    np.testing.assert_array_equal(c.reshape(32, 4), g + 8 * (v // 2) + 16 * (2 * t + v % 2))
    k = np.arange(64)[None, :]
    np.testing.assert_array_equal(a_scales.reshape(32, 64), g + 8 * (t % 2) + 16 * k)
    np.testing.assert_array_equal(b_scales.reshape(32, 64), g + 8 * k)


def test_cutlass_template_renders() -> None:
    for tile_k in (128, 256):
        for out in ("bf16", "f32"):
            facts = {"tile_k": tile_k, "out": out}
            unit = source("nvfp4_w4a4_cutlass.cu", None, "cuda", **facts)
            assert f"int multiply_cutlass_k{tile_k}_{out}(" in unit.text
            assert "static_assert(Kernel::SharedStorageSize <= kSharedLimit" in unit.text
            assert f"kSharedLimit = {SHARED_LIMIT};" in unit.headers["nvfp4_w4a4.h"]
