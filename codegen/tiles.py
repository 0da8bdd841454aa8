"""What a block of a compiled kernel makes, read off its template arguments.

`rows x tokens x k` of a linear: output rows and tokens of a block, and inputs of one stage of its
pipeline (K: all of them at once). "" for kernels that have no such thing.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from ..runtime.artifact import KernelCode

_Tile = Callable[[list[int]], str]
_TILES: dict[tuple[str, str], _Tile] = {
    ("nvfp4_gemv_rowmajor", "gemv_rowmajor"): lambda a: f"{8 * a[0]} x 8 x K",
    ("nvfp4_gemm_rowmajor", "gemm_rowmajor"): lambda a: f"{min(a[0], 64) + 64} x {a[0]} x 64"
    if a[0] > 64 else f"64 x {a[0]} x 64",
    ("nvfp4_w4a4_smallm", "smallm_kernel"): lambda a: f"128 x {8 * a[0]} x 128",
    ("nvfp4_w4a4_cutlass_k128", "cutlass"): lambda a: "128 x 128 x 128",
    ("nvfp4_w4a4_cutlass_k256", "cutlass"): lambda a: "128 x 128 x 256",
    ("nvfp4_gemv", "gemv"): lambda a: f"{16 * a[0]} x {8 * a[1]} x K",
    ("nvfp4_gemm", "gemm"): lambda a: f"{a[1]} x {a[0]} x 64",
    ("dense_gemv", "dense_gemv_kernel"): lambda a: "16 x 8 x 128",
    ("dense_gemm", "dense_gemm_kernel"): lambda a: f"128 x {a[0]} x 64",
    ("attention_prefill", "attention_prefill_kernel"): lambda a: f"{16 * a[1]} queries x 64 keys",
    ("attention_decode", "attention_decode_kernel"): lambda a: "16 heads x 16 keys",
}  # fmt: skip


def tile_of(code: KernelCode) -> str:
    """The tile of a compiled kernel, where it has one."""
    stem = re.sub(r"_(bf16|f32)$", "", code.unit.removesuffix(".cu"))
    name, _, arguments = code.kernel.partition("<")
    numbers = [int(word) for word in re.findall(r"-?\d+", arguments)]
    tile = _TILES.get((stem, name))
    try:
        return "" if tile is None else tile(numbers)
    except IndexError:
        return ""


def shown(unit: str, name: str) -> str:
    """A compiled kernel's name: CUTLASS's is thousands of letters, and says less than its unit."""
    return "cutlass" if "cutlass" in unit and name.startswith("device_kernel") else name
