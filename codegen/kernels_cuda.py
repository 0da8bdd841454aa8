"""THE kernel table of the CUDA targets: which kernels there are, whom they serve, their promise.

Order is preference. The name of a kernel is the name of its launcher; `family` is the template that
defines it (templates/cuda/<family>.cu.jinja). Workspace formulas are those stated on top of the
templates; each counts from the start of the workspace, whose first bytes are counters.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from ..ir.graph import Op
from ..ir.kernel import KernelDecl, Refusal, Workspace
from ..ir.types import FP8_CACHE, LINEAR, QUANTISED_CACHES, WGMMA
from . import args
from .args import ArgsStruct
from .constraints import EmbedRule, HeadRule, LinearRule, PlainRule
from .kernels import LINEAR_OPS, Kernel, ceil_to, shape_of_linear

CUDA = frozenset({"cuda"})
HOPPER = frozenset({"cuda", "wgmma", "tma"})
HOPPER_SHARED = 227 * 1024

COUNTER_BYTES = 65536  # kCounterBytes of hb_cuda.h
DECODE_ROWS = 32
"""Most rows that the kernels of a decode step take: tokens of as many sequences."""

GEMV_ROWS = 16  # kMaxTokens of nvfp4_gemv.cu
DENSE_GEMV_ROWS = 8  # kTokens of dense_gemv.cu
_SPLIT_TOKENS = (32, 64)  # tiles of nvfp4_gemm.cu whose K it may split in memory

HEAD_DIMS = (16, 32, 48, 64, 96, 128, 256)
"""Head dimensions that the attention templates are instantiated for."""

_SCRATCH = 6144  # bytes of a block's shared memory that dense_gemv.cu keeps from rows of x
MOST_SMS = 256  # multiprocessors of any device: a plan is made without one
_BF16 = 2.0**-9  # activations are rounded to bf16 before the products


def head_dims(shared_bytes: int) -> tuple[int, ...]:
    """Those of HEAD_DIMS whose keys and values fit the shared memory of a block."""
    return tuple(d for d in HEAD_DIMS if d <= 128 or shared_bytes >= HOPPER_SHARED)


def counters(op: Op, tokens: int) -> Workspace:
    """Only the counters, which every plan has."""
    return Workspace(COUNTER_BYTES)


def _prepared_rows(op: Op, tokens: int) -> Workspace:
    """bf16 rows behind a prologue: m * k * 2 bytes behind the counters."""
    _, k = shape_of_linear(op)
    scratch = 0 if op.get("prologue", "none") == "none" else tokens * k * 2
    return Workspace(COUNTER_BYTES + scratch)


def _split_tiles(op: Op, tokens: int) -> Workspace:
    """And the sums of a tile of nvfp4_gemm.cu for each multiprocessor, where it splits K."""
    prepared = _prepared_rows(op, tokens)
    columns = next((c for c in _SPLIT_TOKENS if tokens <= c), 0)
    return Workspace(ceil_to(prepared.shared, 256) + MOST_SMS * columns * 512)


def _attention_decode(op: Op, tokens: int) -> Workspace:
    """Sums, peak and total of each split of the keys of each head."""
    heads, kv_heads = op.get("heads", 0), op.get("kv_heads", 0)
    pairs = tokens * kv_heads * -(-heads // kv_heads // 16)
    resident = 3 if op.args[1].type.enc in QUANTISED_CACHES else 2
    splits = min(64, max(4, resident * MOST_SMS // pairs))
    return Workspace(COUNTER_BYTES + tokens * heads * splits * (op.get("head_dim", 0) + 2) * 4)


@dataclass(frozen=True, slots=True)
class _FewDense:
    """dense_gemv.cu: all rows of x stand in the shared memory of each block, of so many bytes."""

    shared_bytes: int

    def __call__(self, op: Op, tokens: int) -> str | None:
        if why := _FEW_DENSE(op, tokens):
            return why
        _, k = shape_of_linear(op)
        nbytes = tokens * (ceil_to(k, 128) * 2 + 64)
        if nbytes > self.shared_bytes - _SCRATCH:
            return f"{tokens} rows of {k} need {nbytes} bytes of shared memory, a block has less"
        return None


def dense_gemv(shared_bytes: int) -> Kernel:
    """The row of dense_gemv.cu where a block has so much shared memory."""
    rule = _FewDense(shared_bytes)
    return linear("dense_gemv_bf16", args.LINEAR, rule, workspace=counters)


def linear(
    name: str,
    struct: ArgsStruct,
    refuses: Refusal,
    needs: frozenset[str] = CUDA,
    workspace: Callable[[Op, int], Workspace] = _prepared_rows,
) -> Kernel:
    """A linear on bf16 tensor cores."""
    promise = "bf16 products, f32 sums"
    decl = KernelDecl(name, LINEAR_OPS, needs, refuses, promise, _BF16, workspace)
    return Kernel(decl, name.removesuffix("_bf16"), struct)


def _plain(
    name: str,
    struct: ArgsStruct,
    refuses: Refusal,
    promise: str,
    *,
    family: str = "elementwise",
    serves: tuple[str, ...] = (),
    workspace: Callable[[Op, int], Workspace] = counters,
) -> Kernel:
    ops = frozenset(serves or (name,))
    decl = KernelDecl(name, ops, CUDA, refuses, promise, _BF16, workspace)
    return Kernel(decl, family, struct)


def attention(shared_bytes: int) -> tuple[Kernel, ...]:
    """The rows of attention where a block has so much shared memory, for each dtype of cache."""
    return tuple(
        kernel
        for cache, suffix in (("bf16", ""), (FP8_CACHE, "_fp8"))
        for kernel in _attention(head_dims(shared_bytes), cache, suffix)
    )


def _attention(dims: tuple[int, ...], cache: str, suffix: str) -> tuple[Kernel, Kernel]:
    promise = f"{'f16' if suffix else 'bf16'} products, f32 sums, online softmax"
    decode = HeadRule(dims=dims, most_rows=DECODE_ROWS, cache=(cache,))
    prefill = HeadRule(dims=dims, least_rows=DECODE_ROWS + 1, cache=(cache,))
    few, many = f"attention_decode{suffix}", f"attention_prefill{suffix}"
    return (
        _plain(few, args.ATTENTION, decode, promise, family=few, serves=("attention",),
               workspace=_attention_decode),
        _plain(many, args.ATTENTION, prefill, promise, family=many, serves=("attention",)),
    )  # fmt: skip


_MANY = LinearRule("nvfp4", WGMMA, epilogue_scale=False, x="bf16")
_FEW = replace(_MANY, rows=GEMV_ROWS)
_DENSE = LinearRule("bf16", LINEAR, epilogue_scale=False, x="bf16", k_multiple=8)
_FEW_DENSE = replace(_DENSE, rows=DENSE_GEMV_ROWS)
_ANY = ("f32", "bf16")
_F32 = "f32 arithmetic"

KERNELS: tuple[Kernel, ...] = (
    linear("nvfp4_gemv", args.NVFP4_LINEAR, _FEW),
    linear("nvfp4_gemm", args.NVFP4_LINEAR, _MANY, HOPPER, _split_tiles),
    dense_gemv(HOPPER_SHARED),
    linear("dense_gemm_bf16", args.LINEAR, _DENSE),
    _plain("embed_bf16", args.EMBED, EmbedRule("bf16", LINEAR), "a copy to f32", serves=("embed",)),
    _plain(
        "rope_append",
        args.ROPE_APPEND,
        HeadRule(multiple=4, largest=512),
        _F32,
        family="rope_append",
    ),
    *attention(HOPPER_SHARED),
    _plain(
        "rmsnorm",
        args.NORM,
        PlainRule(dtypes=_ANY, multiple=8),
        _F32,
        serves=("rmsnorm", "head_rmsnorm"),
    ),
    _plain("add", args.BINARY, PlainRule((0, 1), _ANY, 8), "one rounding"),
    _plain("silu_mul", args.BINARY, PlainRule((0, 1), _ANY, 8), _F32),
    _plain("take_rows", args.TAKE_ROWS, PlainRule(multiple=8), "a copy"),
    _plain("rope", args.ROPE, HeadRule(multiple=4, largest=512), _F32, family="rope_append"),
    _plain(
        "kv_append",
        args.KV_APPEND,
        PlainRule((1,), ("bf16",), 4),
        "one rounding",
        family="rope_append",
    ),
)
