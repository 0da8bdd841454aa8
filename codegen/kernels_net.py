"""THE kernel table of ONNX graphs: which operators there are on which target, and for which types.

A kernel's name is its operator's in the op table without `onnx_`; its C++ function is that name
and the variant: `add_f32`, `gather_b4`. A family is a template (templates/net/<family>.cc.jinja),
rendered once for each variant that a graph needs, and each of these is an object in the cache.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..ir.graph import Op
from ..ir.onnx_ops import dtype
from ..ir.types import DTYPE_BYTES
from .isa import AVX2, AVX512, SCALAR, Isa

FLOATS = ("f32", "f64", "f16", "bf16")
SIGNED = ("i64", "i32", "i16", "i8")
UNSIGNED = ("u64", "u32", "u16", "u8")
INTEGERS = SIGNED + UNSIGNED
NUMBERS = FLOATS + INTEGERS
WIDTHS = ("b1", "b2", "b4", "b8")

C_TYPES: dict[str, str] = {
    "f32": "float", "f64": "double", "f16": "F16Bits", "bf16": "BF16Bits", "i64": "int64_t",
    "i32": "int32_t", "i16": "int16_t", "i8": "int8_t", "u64": "uint64_t", "u32": "uint32_t",
    "u16": "uint16_t", "u8": "uint8_t", "bool": "bool", "b1": "uint8_t", "b2": "uint16_t",
    "b4": "uint32_t", "b8": "uint64_t",
}  # fmt: skip
"""The C++ element type of a variant; types without one have no variant of their own."""

Variant = Callable[[Op], str]
"""The variant an op needs, "" where a kernel has but one."""


def by_type(i: int) -> Variant:
    """The dtype of operand i; -1: of the result."""

    def variant(op: Op) -> str:
        return str(op.out.type.enc) if i < 0 else dtype(op, i)

    return variant


def by_width(i: int) -> Variant:
    """The bytes of an element of operand i: what only moves elements does not ask what they are."""

    def variant(op: Op) -> str:
        return f"b{DTYPE_BYTES[dtype(op, i)]}"

    return variant


def by_one_type(*operands: int) -> Variant:
    """The dtype that these operands share; none where they differ, though ONNX lets them."""

    def variant(op: Op) -> str:
        found = {dtype(op, i) for i in operands}
        return found.pop() if len(found) == 1 else ""

    return variant


def single(op: Op) -> str:
    """One variant, which looks at types as it runs."""
    return ""


@dataclass(frozen=True, slots=True)
class NetKernel:
    """One operator's kernel: the template that defines it, how a variant is chosen, which exist."""

    op: str
    family: str
    variant: Variant
    variants: tuple[str, ...]

    @property
    def name(self) -> str:
        return self.op.removeprefix("onnx_")


FAMILIES: dict[str, tuple[Isa, ...]] = {
    "elementwise": (SCALAR, AVX2, AVX512),
    "reduce": (SCALAR, AVX2, AVX512),
    "order": (SCALAR,),
    "scan": (SCALAR,),
    "boxes": (SCALAR,),
    "softmax": (SCALAR, AVX2, AVX512),
    "normalize": (SCALAR, AVX2, AVX512),
    "channel_norm": (SCALAR, AVX2, AVX512),
    "pool": (SCALAR, AVX2, AVX512),
    "conv": (SCALAR, AVX2, AVX512),
}
"""The ISAs each family has a variant of. Where a family is for floats, f32 and f64 alone have more
than SCALAR."""


def _family(
    name: str, variant: Variant, variants: tuple[str, ...], *ops: str
) -> tuple[NetKernel, ...]:
    return tuple(NetKernel(f"onnx_{op}", name, variant, variants) for op in ops)


KERNELS: tuple[NetKernel, ...] = (
    *_family("elementwise", by_type(0), NUMBERS, "add"),
    *_family("elementwise", by_type(0), FLOATS + SIGNED, "relu"),
    # reductions, orders, normalisation, matrix products
    *_family("reduce", by_type(0), (*NUMBERS, "bool"), "reduce_max", "reduce_min"),
    *_family("reduce", by_type(0), NUMBERS, "reduce_sum", "reduce_mean", "reduce_prod"),
    *_family("reduce", by_type(0), NUMBERS, "reduce_l1", "reduce_l2", "reduce_sum_square"),
    *_family("reduce", by_type(0), FLOATS, "reduce_log_sum", "reduce_log_sum_exp"),
    *_family("order", by_type(0), NUMBERS, "arg_max", "arg_min", "top_k"),
    *_family("order", by_type(0), (*NUMBERS, "bool"), "unique"),
    *_family("scan", by_type(0), NUMBERS, "cum_sum", "cum_prod"),
    *_family("boxes", single, ("",), "non_max_suppression"),
    *_family("softmax", by_type(0), FLOATS, "softmax", "log_softmax", "hardmax"),
    *_family("normalize", by_one_type(0, 1), FLOATS, "layer_normalization", "rms_normalization"),
    *_family("normalize", by_type(0), FLOATS, "group_normalization", "instance_normalization"),
    *_family("channel_norm", by_type(0), FLOATS, "batch_normalization", "lrn", "lp_normalization"),
    # windows over images, resampling, recurrence
    *_family("pool", by_type(0), FLOATS + ("i8", "u8"), "max_pool"),
    *_family("pool", by_type(0), FLOATS, "average_pool", "lp_pool", "max_unpool"),
    *_family("pool", by_type(0), FLOATS, "global_average_pool", "global_max_pool"),
    *_family("pool", by_type(0), FLOATS, "global_lp_pool"),
    *_family("conv", by_type(0), FLOATS, "conv", "conv_transpose", "causal_conv_with_state"),
)
