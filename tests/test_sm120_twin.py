"""The sm_120a kernels, with software twins of its two instructions, run on another CUDA device.

Run by `make test-gpu`. The quantiser must give the interpreter's bytes; products may differ by the
order of their f32 sums; and whole models of the tiny checkpoints run on the kernels that sm_120a
would run, CUTLASS's replaced by a plain reading of the same bytes.
"""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

from halfbyte.codegen import declarations, ffi_options, find_compiler
from halfbyte.codegen.emit import Build, Library, Request, compile_library, write_artifact
from halfbyte.codegen.kernels_sm120 import units
from halfbyte.codegen.nvcc import CudaCompiler, find_cuda_compiler
from halfbyte.codegen.plan_cuda import Arch
from halfbyte.codegen.render import source
from halfbyte.codegen.selftest import selftest, summary
from halfbyte.codegen.selftest_cuda import DeviceSession
from halfbyte.environment import cache_folder, cuda_home
from halfbyte.frontend import Imported, import_model, open_checkpoint
from halfbyte.ir import numerics
from halfbyte.ir.graph import Graph
from halfbyte.ir.layouts import scales_from_sfatom
from halfbyte.ir.layouts_cuda import nvfp4_to_sfatom
from halfbyte.ir.target import target
from halfbyte.passes import pipeline
from halfbyte.passes.context import Context
from halfbyte.runtime import Model
from halfbyte.runtime.artifact import Artifact, ModelFacts
from halfbyte.runtime.cuda_session import CudaSession
from halfbyte.runtime.devices import read_device
from halfbyte.runtime.session import load_native
from halfbyte.runtime.target_weights import TargetWeights
from tests.graphs import Shape, decoder
from tests.test_oracle import TINY, cosines

pytestmark = pytest.mark.gpu
WORST_W4A4 = 0.95  # cosine of a row of logits, as it is asked of the cpu
HOME = target("sm_120a")
TWIN = Arch("sm_120a", 9, 0, "a", twin=True)
LIMIT = HOME.shared_bytes
NONE, RMSNORM, SILU_MUL = 0, 1, 2
F32, BF16 = 0, 1
Floats = NDArray[Any]


@pytest.fixture(scope="module")
def toolchain() -> CudaCompiler:
    return find_cuda_compiler(find_compiler(None, cache_folder()), TWIN, cuda_home())


# --- the kernels, one by one ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def twin(
    toolchain: CudaCompiler, root: Path, tmp_path_factory: pytest.TempPathFactory
) -> ctypes.CDLL:
    """The W4A4 kernels and tests/data/sm120_twin.cu as one library."""
    folder = tmp_path_factory.mktemp("twin")
    names: list[str] = []
    for unit in units(frozenset({"nvfp4_w4a4_gemm_k128"})):
        made = unit.twin()
        facts = {"target": TWIN, "shared_bytes": LIMIT, **made.facts}
        rendered = source(made.template, None, "cuda", **facts)
        for name, text in {made.name: rendered.text, **rendered.headers}.items():
            (folder / name).write_text(text)
        names.append(made.name)
    calls = root / "tests" / "data" / "sm120_twin.cu"
    nvcc = (str(toolchain.nvcc.path), "-std=c++17", "-O3", "-shared", "-Xcompiler=-fPIC")
    command = (*nvcc, *TWIN.flags, "-I.", "-o", "twin.so", *names, str(calls))
    subprocess.run(command, cwd=folder, check=True)
    return ctypes.CDLL(str(folder / "twin.so"))


def pointer(a: Floats | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if a is None else a.ctypes.data)


def quantized(
    twin: ctypes.CDLL, x: Floats, scale: float, prologue: int = NONE, gamma: Floats | None = None
) -> tuple[Floats, Floats, Floats]:
    """Codes [m, k], block scales [m, k/16], and all of the padded scale plane, of the kernel."""
    m, width = x.shape
    k = width // 2 if prologue == SILU_MUL else width
    row, tiles = -(-k // 32) * 16, (-(-m // 128), -(-k // 64))
    codes, atoms = np.zeros((m, row), np.uint8), np.zeros((*tiles, 512), np.uint8)
    status = twin.twin_quantize(
        pointer(x), F32 if x.dtype == np.float32 else BF16, pointer(gamma), ctypes.c_float(scale),
        m, k, prologue, ctypes.c_float(1e-5), tiles[0] * 128, pointer(codes), pointer(atoms),
    )  # fmt: skip
    assert status == 0
    assert not codes[:, k // 2 :].any()
    return numerics.unpack_codes(codes)[:, :k], scales_from_sfatom(atoms, m, k // 16), atoms


SHAPES = [(1, 16), (1, 4096), (3, 48), (5, 272), (33, 512), (64, 96), (130, 208), (257, 1024)]


def hard_rows(m: int, k: int, seed: int = 0) -> Floats:
    """Random rows with outliers, then rows of one kind of trouble each, as far as they go."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((m, k)).astype(np.float32)
    x[rng.random((m, k)) < 0.02] *= 30
    ties = np.resize(np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5, 6], np.float32), k)
    troubles = [np.zeros(k), np.full(k, -0.0), np.full(k, 1e-30), np.full(k, 3e38), ties, -ties,
                np.resize([0, 448 * 6], k), np.resize([2.0**-9, 2.0**-12], k)]  # fmt: skip
    for i, row in enumerate(troubles[: m // 2]):
        x[2 * i + 1] = row
    return x


@pytest.mark.parametrize(("m", "k"), SHAPES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("scale", [1.0, 0.0371, 1e-4, 37.0])
def test_the_quantiser_gives_the_interpreters_bytes(
    twin: ctypes.CDLL, m: int, k: int, dtype: str, scale: float
) -> None:
    x: Floats = np.ascontiguousarray(hard_rows(m, k).astype(np.dtype(dtype)))
    codes, scales, atoms = quantized(twin, x, scale)
    with np.errstate(over="ignore"):  # the row of 3e38 is meant to saturate
        rows = x.astype(np.float32)
        wanted, wanted_scales = numerics.quantize_activation(rows, np.float32(scale))
    np.testing.assert_array_equal(scales, wanted_scales.view(np.uint8))
    np.testing.assert_array_equal(codes, wanted)
    assert np.count_nonzero(atoms) == np.count_nonzero(scales), "padding is zero"


def away_from_ties(x: Floats, scale: float) -> Floats:
    """Where a code cannot turn by an error of 2^-18 of its value before rounding; by blocks, since
    a block's scale may turn too.
    """
    low, high = (numerics.quantize_activation((x * f).astype(np.float32), np.float32(scale))
                 for f in (1 - 2.0**-18, 1 + 2.0**-18))  # fmt: skip
    steady = low[1].view(np.uint8) == high[1].view(np.uint8)
    return (low[0] == high[0]) & np.repeat(steady, 16, axis=1)


@pytest.mark.parametrize(("m", "k"), SHAPES)
@pytest.mark.parametrize("prologue", [RMSNORM, SILU_MUL])
def test_fused_quantisers_differ_at_ties_only(
    twin: ctypes.CDLL, m: int, k: int, prologue: int
) -> None:
    rng = np.random.default_rng(1)
    scale = 0.01
    if prologue == RMSNORM:
        x = rng.standard_normal((m, k)).astype(np.float32)
        gamma = rng.standard_normal(k).astype(np.float32)
        exact = numerics.rmsnorm(x.astype(np.float64), gamma.astype(np.float64), 1e-5)
    else:
        x = rng.standard_normal((m, 2 * k)).astype(ml_dtypes.bfloat16)
        gamma = None
        gate, up = np.split(x.astype(np.float64), 2, axis=1)
        exact = numerics.silu(gate) * up
    codes, _, _ = quantized(twin, x, scale, prologue, gamma)
    wanted, _ = numerics.quantize_activation(exact.astype(np.float32), np.float32(scale))
    steady = away_from_ties(exact, scale)
    assert steady.mean() > 0.99
    np.testing.assert_array_equal(codes[steady], wanted[steady])


PRODUCTS = [
    (1, 8, 32), (8, 96, 96), (7, 100, 288), (16, 130, 512), (33, 256, 2048), (64, 515, 1024),
    (17, 24, 12288), (32, 128, 160), (24, 40, 4096),
]  # fmt: skip


def multiplied(
    twin: ctypes.CDLL, kind: int, m: int, n: int, k: int, extra: bool, room: int = 0,
    hostile: bool = False,
) -> tuple[Floats, Floats, Floats]:  # fmt: skip
    """What a kernel gives, the exact result, and how far f32 sums may stray from it."""
    rng = np.random.default_rng(m * n + k)
    high = 127 if hostile else 0x50
    low = 0 if hostile else 0x30
    codes = [rng.integers(0, 256, (rows, k // 2), np.uint8) for rows in (m, n)]
    scales = [rng.integers(low, high, (rows, k // 16), np.uint8) for rows in (m, n)]
    row_scale = (rng.random(n) * 1e-2).astype(np.float32)
    bias = rng.standard_normal(n).astype(np.float32) if extra else None
    residual = rng.standard_normal((m, n)).astype(np.float32) if kind == 2 or extra else None
    out_type = F32 if residual is not None else BF16
    dtype = np.float32 if out_type == F32 else ml_dtypes.bfloat16
    out = np.zeros((m, n), dtype)
    x_codes, x_atoms = nvfp4_to_sfatom(codes[0], scales[0])
    w_codes, w_atoms = nvfp4_to_sfatom(codes[1], scales[1])
    operands = [np.ascontiguousarray(a) for a in (x_codes, x_atoms, w_codes, w_atoms)]
    status = twin.twin_multiply(
        kind, *map(pointer, operands), pointer(row_scale), ctypes.c_float(0.25), pointer(bias),
        pointer(residual), out_type, m, n, x_codes.shape[1] * 2, ctypes.c_int64(room), 132,
        pointer(out),
    )  # fmt: skip
    assert status == 0
    f8 = ml_dtypes.float8_e4m3fn
    x = numerics.dequantize_nvfp4(codes[0], scales[0].view(f8), np.full(m, 0.25, np.float32))
    w = numerics.dequantize_nvfp4(codes[1], scales[1].view(f8), row_scale)
    plus = (bias if bias is not None else 0) + (residual if residual is not None else 0)
    allowed = np.abs(x) @ np.abs(w).T * (2 * np.sqrt(k / 16) + 16) * 2.0**-24
    allowed += 2.0**-22 * np.abs(plus) + 1e-30
    exact = x @ w.T + plus
    if out_type == BF16:
        allowed += 2.0**-8 * np.abs(exact)
    return out.astype(np.float64), exact, allowed


@pytest.mark.parametrize(("m", "n", "k"), PRODUCTS)
@pytest.mark.parametrize("extra", [False, True])
@pytest.mark.parametrize("hostile", [False, True])
def test_small_m_products(
    twin: ctypes.CDLL, m: int, n: int, k: int, extra: bool, hostile: bool
) -> None:
    for room in (0, 64 << 20):
        found, exact, allowed = multiplied(twin, 0, m, n, k, extra, room, hostile)
        assert (np.abs(found - exact) <= allowed).all(), np.abs(found - exact).max()


@pytest.mark.parametrize(("m", "n", "k"), [(65, 96, 96), (130, 104, 288), (512, 256, 512)])
@pytest.mark.parametrize("kind", [1, 2])
def test_the_bytes_that_cutlass_is_given(
    twin: ctypes.CDLL, m: int, n: int, k: int, kind: int
) -> None:
    found, exact, allowed = multiplied(twin, kind, m, n, k, extra=kind == 2)
    assert (np.abs(found - exact) <= allowed).all(), np.abs(found - exact).max()


# --- whole models ---------------------------------------------------------------------------------


def compiled(toolchain: CudaCompiler, folder: Path, recipe: str) -> tuple[Imported, Graph, Library]:
    imported = import_model(open_checkpoint(folder), context=512)
    context = Context(HOME, declarations(HOME.name), imported.weights, recipe=recipe)
    graph = pipeline.run(imported.graph, context)
    return imported, graph, compile_library(graph, HOME, toolchain, ffi_options(cache_folder()))


@contextmanager
def opened(
    toolchain: CudaCompiler, folder: Path, recipe: str, out: Path
) -> Generator[tuple[Model, Library]]:
    """A model on the twin build; `load` would refuse it, since this card is no sm_120."""
    imported, graph, library = compiled(toolchain, folder, recipe)
    facts = ModelFacts("tiny", folder.name, library.plan.vocab, library.plan.context, None, (), {})
    request = Request(facts, "test", "2026-01-01T00:00:00Z")
    artifact = write_artifact(out, [Build(graph, library)], imported.weights, request)
    native = load_native(library.built.path, artifact.target(HOME.name).library_sha256)
    weights = TargetWeights(artifact, HOME.name)
    found = read_device(native, 0, None)
    session = CudaSession(native, weights.pieces, artifact.manifest, HOME.name, found)
    with Model(artifact, HOME.name, weights, session) as model:
        yield model, library


def checkpoint(shared: Path, name: str) -> Path:
    folder = shared / "models" / name
    if not folder.is_dir():
        pytest.skip(f"{folder} is not here")
    return folder


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("recipe", ["auto", "w4a16"])
def test_every_kernel_equals_the_interpreter(
    shared: Path, toolchain: CudaCompiler, tmp_path: Path, name: str, recipe: str
) -> None:
    folder = checkpoint(shared, f"tiny/{name}")
    with opened(toolchain, folder, recipe, tmp_path / "t.hb") as (model, library):
        path = model.artifact.folder
    weights = TargetWeights(Artifact.open(path), HOME.name)
    with DeviceSession(library.built.path, weights.whole, library.plan) as session:
        tests = selftest(library.plan, session)
    weights.close()
    print(summary(tests))
    assert {test.kernel for test in tests} == {kernel.name for kernel in library.plan.kernels}


@pytest.mark.parametrize("name", TINY)
def test_logits_with_exact_activations(
    shared: Path, toolchain: CudaCompiler, tmp_path: Path, name: str
) -> None:
    folder = checkpoint(shared, f"tiny/{name}")
    known = dict(np.load(folder / "reference.npz"))
    ids = [int(i) for i in known["input_ids"]]
    with opened(toolchain, folder, "w4a16", tmp_path / "t.hb") as (model, _):
        assert cosines(model.logits(ids), known["w4a16_f32_logits"]).min() >= 0.999


@pytest.mark.parametrize("name", TINY)
def test_logits_with_quantised_activations(
    shared: Path, toolchain: CudaCompiler, tmp_path: Path, name: str
) -> None:
    """Prefill of many tokens runs W4A4 kernels; its last row is held to the producer's emulation.

    The bound is that of the worst row on the cpu: one activation that is rounded to bf16 first
    may fall into another code, and what follows strays with it. Exactness is tested kernel by
    kernel above.
    """
    folder = checkpoint(shared, f"tiny/{name}")
    known = dict(np.load(folder / "reference.npz"))
    if "w4a4_emul_f32_logits" not in known:
        pytest.skip("no emulation of 4-bit activations")
    ids = [int(i) for i in known["input_ids"]]
    with opened(toolchain, folder, "w4a4", tmp_path / "t.hb") as (model, _):
        session = model.session
        session.begin()
        session.rewind()
        found = session.feed(ids).copy()
    wanted = known["w4a4_emul_f32_logits"][-1]
    near = cosines(found[None], wanted[None])[0]
    assert near >= WORST_W4A4, near


@pytest.mark.parametrize("recipe", ["auto", "w4a16"])
def test_smollm2_answers(
    shared: Path, toolchain: CudaCompiler, tmp_path: Path, recipe: str
) -> None:
    folder = checkpoint(shared, "smollm2-135m-llmcompressor")
    known = dict(np.load(folder / "reference.npz"))
    passage = [int(i) for i in known["passage_ids"]]
    with opened(toolchain, folder, recipe, tmp_path / "t.hb") as (model, _):
        assert 30 < model.perplexity(passage[:256]) < 60


def test_the_twin_is_what_decides(
    twin: ctypes.CDLL, toolchain: CudaCompiler, root: Path, tmp_path: Path
) -> None:
    """A kernel that reads its operands wrongly does not pass: a swapped scale is seen."""
    found, exact, allowed = multiplied(twin, 0, 8, 96, 96, False)
    assert (np.abs(found - exact) <= allowed).all()
    assert not (np.abs(found[:, ::-1] - exact) <= allowed).all()


def test_many_rows_are_streamed(toolchain: CudaCompiler, tmp_path: Path) -> None:
    """Rows of x that do not fit beside a GEMV's rings come with its weights: K = 4096, 8 tokens."""
    made = decoder(Shape(hidden=4096, inner=4096, heads=32, kv_heads=8, head_dim=128, layers=1))
    context = Context(HOME, declarations(HOME.name), made.data.__getitem__)
    graph = pipeline.run(made.graph, context)
    library = compile_library(graph, HOME, toolchain, ffi_options(cache_folder()))
    facts = ModelFacts("tiny", "wide", library.plan.vocab, library.plan.context, None, (), {})
    request = Request(facts, "test", "2026-01-01T00:00:00Z")
    built = [Build(graph, library)]
    artifact = write_artifact(tmp_path / "t.hb", built, made.data.__getitem__, request)
    assert library.graphs is not None
    enqueued = {library.code[kind.kernel].kernel for kind in library.graphs.kinds}
    assert {"gemv_rowmajor<2, true, 0>", "gemv_rowmajor<4, true, 0>"} <= enqueued
    weights = TargetWeights(artifact, HOME.name)
    with DeviceSession(library.built.path, weights.whole, library.plan) as session:
        print(summary(selftest(library.plan, session)))
    weights.close()
