"""The kernel table of sm_120: what it has instead of, or besides, the kernels of kernels_cuda.py.

NVFP4 weights lie in `sfatom128x4` there, one scale plane that every kernel below reads. A W4A4
linear of up to 8 tokens is bound by the reading of its weight: its GEMV reads activations as they
are, which costs nothing and loses nothing. From there on the block-scaled tensor cores multiply
4-bit activations: our own kernel up to 64 tokens, CUTLASS (whose smallest tile is 128 x 128) above.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from ..ir.graph import Op
from ..ir.kernel import KernelDecl, Workspace
from ..ir.ops_fused import role
from ..ir.types import SFATOM, Plain, ceil_div
from . import args
from .constraints import LinearRule
from .kernels import LINEAR_OPS, Kernel, ceil_to, shape_of_linear
from .kernels_cuda import COUNTER_BYTES, MOST_SMS, attention, dense_gemv, linear

NVFP4_MMA = frozenset({"cuda", "mma_nvfp4"})
GEMV_ROWS = 8  # kColumns of nvfp4_gemv_rowmajor.cu
SMALL_M = 64  # kSmallM of nvfp4_w4a4.h
W4A4_FAMILY = "nvfp4_w4a4"
_TILES = (256, 128)  # k of a CUTLASS tile, the preferred one first
_DEEP_K = 2048  # from which on a tile of 256 k leaves enough of them for a pipeline


def _operands(op: Op, tokens: int) -> int:
    """Bytes of quantised activations behind the counters: codes and block scales."""
    _, k = shape_of_linear(op)
    codes = ceil_to(tokens * ceil_to(k, 32) // 2, 256)
    return COUNTER_BYTES + codes + ceil_div(tokens, 128) * ceil_div(k, 64) * 512


def _small_m(op: Op, tokens: int) -> Workspace:
    """And the partial sums of a split of K, where rows of W alone do not fill a device."""
    n, _ = shape_of_linear(op)
    blocks, columns = ceil_div(n, 128), next(c for c in (8, 16, 32, 64) if tokens <= c)
    partials = (MOST_SMS + blocks) * columns * 512 if blocks < MOST_SMS else 0
    return Workspace(_operands(op, tokens) + partials)


def _large_m(op: Op, tokens: int) -> Workspace:
    return Workspace(_operands(op, tokens))


_FEW = LinearRule(
    "nvfp4", SFATOM, epilogue_scale=False, x="bf16", exact=True, rows=GEMV_ROWS, k_multiple=16
)
_MANY = replace(_FEW, rows=None)
_W4A4 = replace(_MANY, act="nvfp4", exact=False)
_W4A4_FEW = replace(_W4A4, rows=SMALL_M)


@dataclass(frozen=True, slots=True)
class _CutlassRule:
    """What CUTLASS's tiles and the two epilogues we instantiate demand."""

    tile_k: int

    def __call__(self, op: Op, tokens: int) -> str | None:
        if why := _W4A4(op, tokens):
            return why
        n, k = shape_of_linear(op)
        is_f32 = op.out.type.enc == Plain("f32")
        unit = 4 if is_f32 else 8
        if tokens <= SMALL_M:
            return f"M = {SMALL_M + 1} and more only, bucket has {tokens}"
        if n % unit:
            return f"N is {n}, kernel stores multiples of {unit}"
        if is_f32 != (role(op, "residual") is not None):
            return "kernel gives f32 with a residual, bf16 without"
        if self.tile_k > 128 and (k < _DEEP_K or k % self.tile_k):
            return f"K is {k}, kernel takes multiples of {self.tile_k} from {_DEEP_K} on"
        return None


def _w4a4(
    name: str, refuses: Callable[[Op, int], str | None], workspace: Callable[[Op, int], Workspace]
) -> Kernel:
    promise = "4-bit products and block scales, f32 sums"
    decl = KernelDecl(name, LINEAR_OPS, NVFP4_MMA, refuses, promise, workspace=workspace)
    return Kernel(decl, W4A4_FAMILY, args.NVFP4_LINEAR)


def _exact(name: str, rule: LinearRule) -> Kernel:
    kernel = linear(name, args.NVFP4_LINEAR, rule)
    promise = "bf16 products, f32 sums; activations as they are, of W4A4 linears too"
    return replace(kernel, decl=replace(kernel.decl, promise=promise, exact=True))


def kernels(shared_bytes: int) -> tuple[Kernel, ...]:
    """The rows, for devices whose blocks have so much shared memory."""
    return (
        _exact("nvfp4_gemv_rowmajor", _FEW),
        _w4a4("nvfp4_w4a4_smallm", _W4A4_FEW, _small_m),
        *(_w4a4(gemm_name(k), _CutlassRule(k), _large_m) for k in _TILES),
        _exact("nvfp4_gemm_rowmajor", _MANY),
        dense_gemv(shared_bytes),
        *attention(shared_bytes),
    )


def gemm_name(tile_k: int) -> str:
    """The CUTLASS kernel of a tile."""
    return f"nvfp4_w4a4_gemm_k{tile_k}"


# ---- sources -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Unit:
    """A translation unit besides its family's: a template, what it may ask, and its own flags.

    `heavy`: it takes more than a minute and 5 GB to compile.
    """

    template: str
    name: str
    facts: Mapping[str, object]
    flags: tuple[str, ...] = ()
    heavy: bool = False

    def twin(self) -> Unit:
        """The unit for a device without the instructions of sm_120. CUTLASS has no twin of them:
        a plain reading of the same bytes stands in for it.
        """
        if not self.heavy:
            return self
        return replace(self, template="nvfp4_w4a4_stand_in.cu", flags=(), heavy=False)


_CUTLASS_FLAGS = ("--expt-relaxed-constexpr", "-DNDEBUG")


def tiles_of(names: frozenset[str]) -> tuple[int, ...]:
    """The CUTLASS tiles that kernels of these names use."""
    return tuple(k for k in sorted(_TILES) if gemm_name(k) in names)


def units(names: frozenset[str]) -> tuple[Unit, ...]:
    """What the launchers of nvfp4_w4a4.cu call, for kernels of these names."""
    found = [Unit(f"{name}.cu", f"{name}.cu", {}) for name in ("nvfp4_quantize",
             "nvfp4_w4a4_smallm")]  # fmt: skip
    for tile_k in tiles_of(names):
        for out in ("bf16", "f32"):
            name = f"nvfp4_w4a4_cutlass_k{tile_k}_{out}.cu"
            facts = {"tile_k": tile_k, "out": out}
            found.append(Unit("nvfp4_w4a4_cutlass.cu", name, facts, _CUTLASS_FLAGS, heavy=True))
    return tuple(found)
