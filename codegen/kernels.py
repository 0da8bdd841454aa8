"""THE kernel table of the cpu target: which kernels there are, whom they serve, what they promise.

Order is preference. The name of a kernel is the name of its C++ function; `family` is the template
that defines it, once per ISA (templates/cpu/<family>.cc.jinja). Workspace formulas are those stated
on top of the templates, where C++ asserts them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from ..ir.graph import Op
from ..ir.kernel import KernelDecl, Refusal, Workspace, no_workspace
from ..ir.ops_fused import EPILOGUES
from . import args
from .args import ArgsStruct
from .constraints import ROWMAJOR_RULE, EmbedRule, HeadRule, LinearRule, PlainRule
from .isa import AMX, AVX2, AVX512, SCALAR, Isa

CPU = frozenset({"cpu"})
LINEAR_OPS = frozenset({"fused_linear", "linear"})
VECTOR_ISAS = (SCALAR, AVX2, AVX512)
MATRIX_ISAS = (*VECTOR_ISAS, AMX)

FAMILIES: dict[str, tuple[Isa, ...]] = {
    "nvfp4_gemv": VECTOR_ISAS,
    "nvfp4_gemm": MATRIX_ISAS,
    "dense_gemv": VECTOR_ISAS,
    "dense_gemm": MATRIX_ISAS,
    "attention": VECTOR_ISAS,
    "elementwise": VECTOR_ISAS,
    "fallback": (SCALAR,),
}
"""The ISAs each family has a variant of; the others take the entry of `Isa.base`."""

GEMV_ROWS = 8


@dataclass(frozen=True, slots=True)
class Kernel:
    """A kernel as code generation sees it: the phases' view, its family and its argument struct."""

    decl: KernelDecl
    family: str
    args: ArgsStruct
    isa_precision: tuple[tuple[str, float], ...] = ()  # where it is not the declaration's

    def precision(self, isa: str) -> float:
        """How exactly it reads activations on this ISA (see KernelDecl.precision)."""
        return dict(self.isa_precision).get(isa, self.decl.precision)

    @property
    def name(self) -> str:
        return self.decl.name

    @property
    def isas(self) -> tuple[Isa, ...]:
        return FAMILIES[self.family]


def ceil_to(value: int, multiple: int) -> int:
    """`value` rounded up to a multiple."""
    return -(-value // multiple) * multiple


def shape_of_linear(op: Op) -> tuple[int, int]:
    """(n, k) of a linear's weight."""
    n, k = op.args[1].type.static
    return n, k


def _rows_f32(op: Op, tokens: int) -> Workspace:
    """Rows after the prologue, as f32: m * ceil16(k) * 4 bytes."""
    _, k = shape_of_linear(op)
    return Workspace(tokens * ceil_to(k, 16) * 4)


def _rows_plain(op: Op, tokens: int) -> Workspace:
    """Rows after the prologue, unpadded."""
    _, k = shape_of_linear(op)
    return Workspace(tokens * k * 4)


def _panels_f32(op: Op, tokens: int) -> Workspace:
    """Rows after the prologue, packed in tiles of at most 32 rows; a k chunk of W per thread."""
    _, k = shape_of_linear(op)
    return Workspace(4 * (tokens + 31) * ceil_to(k, 32), per_thread=65536)


def _attention(op: Op, tokens: int) -> Workspace:
    dim, kv_heads = op.get("head_dim", 0), op.get("kv_heads", 0)
    partial = kv_heads * 128 * (dim + 16)
    return Workspace(per_thread=2048 * ceil_to(dim, 32) + 32768 + partial)


def _planes(op: Op, tokens: int, line_bytes: int) -> Workspace:
    """One line per row and 16 of k, padded to 64 of k. Up to 256 lines, each thread has its own."""
    _, k = shape_of_linear(op)
    lines = tokens * 4 * ceil_to(k, 64) // 64
    shared = lines * line_bytes if lines > 256 else 0
    return Workspace(shared, per_thread=min(lines, 256) * line_bytes)


def _nvfp4_gemv(op: Op, tokens: int) -> Workspace:
    return _planes(op, tokens, 56)


def _w4a4_gemv(op: Op, tokens: int) -> Workspace:
    return _planes(op, tokens, 24)


def _nvfp4_gemm(op: Op, tokens: int) -> Workspace:
    """f32 rows, or as much for two bf16 parts (AMX), and weight chunks; words need less."""
    _, k = shape_of_linear(op)
    return Workspace(4 * (tokens + 31) * ceil_to(k, 64), per_thread=65536)


def _w4a4_gemm(op: Op, tokens: int) -> Workspace:
    """AMX's packed bf16 rows and weight chunks; the integers of the other ISAs need less."""
    _, k = shape_of_linear(op)
    return Workspace(2 * (tokens + 31) * ceil_to(k, 64), per_thread=65536)


_EXACT = 2.0**-24
_SPLIT_BF16 = 2.0**-16  # two bf16 numbers hold 16 significant bits of x
_WORDS = 2.0**-15  # int16 with one power-of-two scale per 16 values of x
_PLANES_24 = 2.0**-22  # three int8 planes with one power-of-two scale per 16 values of x


def _linear(
    name: str,
    family: str,
    rule: LinearRule,
    promise: str,
    workspace: Callable[[Op, int], Workspace],
    precision: float = _EXACT,
    isa_precision: tuple[tuple[str, float], ...] = (),
) -> Kernel:
    decl = KernelDecl(name, LINEAR_OPS, CPU, rule, promise, precision, workspace)
    return Kernel(decl, family, args.LINEAR, isa_precision)


def _dense(dtype: str) -> tuple[Kernel, ...]:
    rule, promise = LinearRule(dtype, epilogues=EPILOGUES), "f32 sums"
    by_isa: tuple[tuple[str, float], ...] = ()
    if dtype == "bf16":
        promise += "; on AMX, x as the sum of two bf16 numbers"
        by_isa = (("amx", _SPLIT_BF16),)
    few = replace(rule, rows=GEMV_ROWS)
    return (
        _linear(f"dense_gemv_{dtype}", "dense_gemv", few, "f32 sums", _rows_f32),
        _linear(
            f"dense_gemm_{dtype}", "dense_gemm", rule, promise, _panels_f32, isa_precision=by_isa
        ),
    )


def _nvfp4() -> tuple[Kernel, ...]:
    rule = LinearRule("nvfp4", epilogue_scale=False, epilogues=EPILOGUES)
    few = replace(rule, rows=GEMV_ROWS)
    planes = "x in 24 bits per block of 16 (three int8 planes), block sums exact, f32 across blocks"
    split = "f32 sums; on AVX-512, x in 16 bits per block of 16; on AMX, as two bf16 numbers"
    by_isa = (("avx512", _WORDS), ("amx", _SPLIT_BF16))
    exact = "block sums exact, f32 across blocks"
    w4a4, few_w4a4 = replace(rule, act="nvfp4"), replace(few, act="nvfp4")
    return (
        _linear("nvfp4_gemv", "nvfp4_gemv", few, planes, _nvfp4_gemv, _PLANES_24),
        _linear("nvfp4_gemm", "nvfp4_gemm", rule, split, _nvfp4_gemm, isa_precision=by_isa),
        _linear("nvfp4_w4a4_gemv", "nvfp4_gemv", few_w4a4, exact, _w4a4_gemv),
        _linear("nvfp4_w4a4_gemm", "nvfp4_gemm", w4a4, exact, _w4a4_gemm),
    )


def _plain(
    name: str,
    struct: ArgsStruct,
    refuses: Refusal,
    promise: str,
    *,
    family: str = "elementwise",
    serves: tuple[str, ...] = (),
    workspace: Callable[[Op, int], Workspace] = no_workspace,
) -> Kernel:
    """A kernel that serves the op of its own name unless `serves` says more."""
    ops = frozenset(serves or (name,))
    decl = KernelDecl(name, ops, CPU, refuses, promise, workspace=workspace)
    return Kernel(decl, family, struct)


def _embed(dtype: str) -> Kernel:
    decl = KernelDecl(
        f"embed_{dtype}", frozenset({"embed"}), CPU, EmbedRule(dtype), "one rounding to f32"
    )
    return Kernel(decl, "elementwise", args.EMBED)


def _fallback() -> Kernel:
    decl = KernelDecl(
        "nvfp4_rowmajor_linear",
        LINEAR_OPS,
        CPU,
        ROWMAJOR_RULE,
        "scalar f32 sums over an unconverted weight; slow",
        workspace=_rows_plain,
        fallback=True,
    )
    return Kernel(decl, "fallback", args.ROWMAJOR_LINEAR)


_NORM_OPS = ("rmsnorm", "head_rmsnorm")
_ROTATES = HeadRule(multiple=2, largest=512)
_VECTORS = PlainRule((0, 1))
_F32 = "f32 arithmetic"

KERNELS: tuple[Kernel, ...] = (
    *_nvfp4(),
    *(kernel for dtype in ("bf16", "f16", "f32") for kernel in _dense(dtype)),
    *(_embed(dtype) for dtype in ("bf16", "f16", "f32")),
    _plain("rope_append", args.ROPE_APPEND, _ROTATES, _F32),
    _plain(
        "attention",
        args.ATTENTION,
        HeadRule(),
        "f32, online softmax",
        family="attention",
        workspace=_attention,
    ),
    _plain("rmsnorm", args.NORM, _VECTORS, _F32, serves=_NORM_OPS),
    _plain("add", args.BINARY, _VECTORS, "one rounding"),
    _plain("silu_mul", args.BINARY, _VECTORS, _F32),
    _plain("take_rows", args.TAKE_ROWS, PlainRule(), "a copy"),
    _plain("rope", args.ROPE, _ROTATES, _F32),
    _plain("kv_append", args.KV_APPEND, PlainRule((1,)), "a copy"),
    _fallback(),
)

BY_NAME: dict[str, Kernel] = {kernel.name: kernel for kernel in KERNELS}
