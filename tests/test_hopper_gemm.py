"""nvfp4_gemm of sm_90a on the host: every tile, whole and split, against the weights' own values.

What its threads do is run as it stands; what they do it with (copies, barriers, clusters, wgmma) is
tests/emulation/hopper. Speed and the real instructions are for a GPU: tests/test_cuda_gpu.py.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

from halfbyte.codegen import ffi_options
from halfbyte.codegen.build import build
from halfbyte.codegen.plan_cuda import kernel_facts
from halfbyte.codegen.render import Source, source
from halfbyte.ir import layouts_cuda, numerics
from halfbyte.ir.errors import TargetError
from halfbyte.ir.target import target
from tests.net_stand_in import toolchain

EMULATION = Path(__file__).parent / "emulation" / "hopper"
SMALL = [(32, 64), (32, 128), (64, 64), (64, 128)]
LARGE = [(128, 128), (192, 128), (256, 128)]
N, K, STRIDE = 300, 336, 344  # neither fills its last tile


@pytest.fixture(scope="module")
def library(pytestconfig: pytest.Config) -> Path:
    """nvfp4_gemm.cu, read by the C++ compiler with the stand-ins in place of three headers."""
    assert pytestconfig.cache is not None
    cache = Path(pytestconfig.cache.mkdir("objects"))
    try:
        compiler = toolchain(cache)
    except TargetError as error:
        pytest.skip(f"an emulated device needs CUDA's headers: {error}")
    kernel = source("nvfp4_gemm.cu", None, "cuda", **kernel_facts(target("sm_90a")))
    stand_ins = {path.name: path.read_text() for path in EMULATION.glob("*.cuh")}
    headers = {**kernel.headers, **stand_ins, kernel.name: kernel.text}
    unit = Source("gemm.cc", (EMULATION / "gemm.cc").read_text(), headers, ("-w",))
    return build([unit], ("planned", "failure", "multiply"), compiler, ffi_options(cache)).path


@dataclass(frozen=True, slots=True)
class Case:
    """A linear with row scales and bias; f32 outputs add to a residual."""

    tokens: int
    rows: int
    splits: int
    f32: bool

    @property
    def m(self) -> int:
        return self.tokens + 9  # two tiles of tokens, one nearly empty

    @property
    def sms(self) -> int:
        """Two tiles are left for the last wave."""
        return 2 * 2 * -(-N // (2 * self.rows)) - 2


def expected(case: Case) -> tuple[dict[str, NDArray[Any]], NDArray[Any], NDArray[Any]]:
    """The operands; the result in f64; the sums of magnitudes that bound its error."""
    rng = np.random.default_rng(case.tokens + case.rows + case.splits)
    packed = rng.integers(0, 256, (N, K // 2), np.uint8)
    scales = rng.integers(0, 0x7F, (N, K // 16), np.uint8).view(ml_dtypes.float8_e4m3fn)
    x = rng.normal(size=(case.m, STRIDE)).astype(ml_dtypes.bfloat16)
    row_scale = rng.uniform(0.01, 0.02, N).astype(np.float32)
    bias = rng.normal(size=N).astype(np.float32)
    residual = rng.normal(size=(case.m, N)).astype(np.float32) * case.f32
    codes, atoms = layouts_cuda.nvfp4_to_wgmma(packed, scales)
    weight = numerics.E2M1[numerics.unpack_codes(packed)].astype(np.float64)
    weight = weight * np.repeat(scales.astype(np.float64), 16, axis=1) * row_scale[:, None]
    rows = x[:, :K].astype(np.float64)
    total = rows @ weight.T + bias + residual
    bound = np.abs(rows) @ np.abs(weight).T + np.abs(bias) + np.abs(residual)
    return (
        {"codes": codes, "scales": atoms, "x": x, "row_scale": row_scale, "bias": bias,
         "residual": residual},
        total, bound,
    )  # fmt: skip


def multiplied(library: Path, case: Case, data: dict[str, NDArray[Any]]) -> NDArray[Any]:
    """What the kernel stores; NaN where it stores nothing."""
    dtype = np.float32 if case.f32 else ml_dtypes.bfloat16
    out = np.full((case.m, N), np.nan, dtype)
    workspace = np.zeros(65536 + case.sms * 64 * 512, np.uint8)

    def of(array: NDArray[Any] | None) -> ctypes.c_void_p:
        return ctypes.c_void_p(None if array is None else array.ctypes.data)

    loaded = ctypes.CDLL(str(library))
    loaded.failure.restype = ctypes.c_char_p
    status = loaded.multiply(
        of(data["codes"]), of(data["scales"]), of(data["x"]), of(out), of(data["row_scale"]),
        of(data["bias"]), of(data["residual"] if case.f32 else None), case.m, N, K, STRIDE,
        int(case.f32), case.tokens, case.rows, case.splits, case.sms, of(workspace),
        ctypes.c_int64(workspace.size),
    )  # fmt: skip
    assert status == 0, loaded.failure()
    assert not workspace[:65536].any(), "counters must be left at zero"
    return out.astype(np.float64)


CASES = [
    *(Case(*tile, splits, f32=splits == 2) for tile in LARGE for splits in (1, 2)),
    *(Case(*tile, n, f32=(i + n) % 2 == 0) for i, tile in enumerate(SMALL) for n in (1, 2, 3)),
]


@pytest.mark.parametrize(
    "case",
    CASES,
    ids=lambda c: f"{c.tokens}x{c.rows}-{c.splits}-{'f32' if c.f32 else 'bf16'}",
)
def test_tile_equals_the_weights_own_values(library: Path, case: Case) -> None:
    data, total, bound = expected(case)
    found = multiplied(library, case, data)
    rounding = 0.0 if case.f32 else 2.0**-8
    worst = np.abs(found - total) / (bound * 2.0**-20 + np.abs(total) * rounding)
    assert not np.isnan(found).any()
    assert worst.max() <= 1.0, f"{worst.max():.2f} times what rounding may do"


def test_a_plan_covers_every_linear(library: Path) -> None:
    planned: Callable[..., None] = ctypes.CDLL(str(library)).planned
    rng = np.random.default_rng(0)
    for _ in range(3000):
        m, n, k, sms = (int(v) for v in np.exp(rng.uniform(0, [8.5, 12.0, 10.5, 5.5])).astype(int))
        sms = max(2, sms)
        plan = (ctypes.c_int * 5)()
        planned(m, n, 16 * -(-k // 16), sms, plan)
        tokens, rows, whole, splits, units = plan
        assert (tokens, rows) in SMALL + LARGE
        tiles = 2 * -(-m // tokens) * -(-n // (2 * rows))
        assert units == whole + (tiles - whole) * splits and 0 <= whole <= tiles
        even = sms // 2 * 2
        assert splits == 1 or (units - whole <= even and whole % even == 0)
        assert splits <= 2 or tokens <= 64
