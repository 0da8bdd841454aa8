"""THE kernel table of ONNX graphs: which operators there are on which target, and for which types.

A kernel's name is its operator's in the op table without `onnx_`; its C++ function is that name
and the variant: `add_f32`, `gather_b4`. A family is a template (templates/net/<family>.cc.jinja),
rendered once for each variant that a graph needs, and each of these is an object in the cache.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..ir.graph import Op
from ..ir.kernel import KernelDecl, Refusal
from ..ir.onnx_ops import dtype, is_given
from ..ir.types import DTYPE_BYTES
from .isa import AVX2, AVX512, SCALAR, Isa

FLOATS = ("f32", "f64", "f16", "bf16")
SIGNED = ("i64", "i32", "i16", "i8")
UNSIGNED = ("u64", "u32", "u16", "u8")
WIDE = ("i64", "i32", "u64", "u32")
INTEGERS = SIGNED + UNSIGNED
NUMBERS = FLOATS + INTEGERS
FLOATS8 = ("f8e4m3", "f8e4m3fnuz", "f8e5m2", "f8e5m2fnuz")
INTEGERS4 = ("i4", "u4", "i2", "u2")
TYPES = (*NUMBERS, "bool", *FLOATS8, *INTEGERS4, "f4e2m1", "f8e8m0")
WIDTHS = ("b1", "b2", "b4", "b8")

C_TYPES: dict[str, str] = {
    "f32": "float", "f64": "double", "f16": "F16Bits", "bf16": "BF16Bits", "i64": "int64_t",
    "i32": "int32_t", "i16": "int16_t", "i8": "int8_t", "u64": "uint64_t", "u32": "uint32_t",
    "u16": "uint16_t", "u8": "uint8_t", "bool": "bool", "b1": "uint8_t", "b2": "uint16_t",
    "b4": "uint32_t", "b8": "uint64_t", "f8e4m3": "F8E4M3Bits", "f8e4m3fnuz": "F8E4M3FNUZBits",
    "f8e5m2": "F8E5M2Bits", "f8e5m2fnuz": "F8E5M2FNUZBits", "f8e8m0": "F8E8M0Bits",
    "f4e2m1": "F4E2M1Bits", "i4": "I4Bits", "u4": "U4Bits", "i2": "I2Bits", "u2": "U2Bits",
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
    """The dtype that these operands (all, where none is listed) share; none where they differ."""

    def variant(op: Op) -> str:
        found = {dtype(op, i) for i in operands or range(len(op.args)) if is_given(op, i)}
        return found.pop() if len(found) == 1 else ""

    return variant


def bytes_only(*operands: int) -> Variant:
    """One variant, for operands of 8-bit integers: none where one is of another type."""

    def variant(op: Op) -> str:
        others = [found for i in operands if (found := dtype(op, i)) not in ("i8", "u8")]
        return others[0] if others else ""

    return variant


def attention_type(op: Op) -> str:
    """The dtype that all but mask and lengths share, if the mask is one that can be added."""
    mask = dtype(op, 3) if is_given(op, 3) else "bool"
    return by_one_type(0, 1, 2, 4, 5)(op) if mask in (*FLOATS, "bool") else ""


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
    "linear": (SCALAR,),
    "arithmetic": (SCALAR, AVX2, AVX512),
    "activation": (SCALAR, AVX2, AVX512),
    "bits": (SCALAR,),
    "cast": (SCALAR, AVX2, AVX512),
    "compare": (SCALAR, AVX2, AVX512),
    "dequantize": (SCALAR, AVX2, AVX512),
    "dynamic_quantize": (SCALAR, AVX2, AVX512),
    "pow": (SCALAR, AVX2, AVX512),
    "quantize": (SCALAR, AVX2, AVX512),
    "select": (SCALAR,),
    "views": (SCALAR,),
    "dropout": (SCALAR,),
    "transpose": (SCALAR,),
    "copy": (SCALAR,),
    "pad": (SCALAR,),
    "gather": (SCALAR,),
    "scatter": (SCALAR,),
    "generate": (SCALAR,),
    "reduce": (SCALAR, AVX2, AVX512),
    "order": (SCALAR,),
    "cumulative": (SCALAR,),
    "boxes": (SCALAR,),
    "softmax": (SCALAR, AVX2, AVX512),
    "normalize": (SCALAR, AVX2, AVX512),
    "channel_norm": (SCALAR, AVX2, AVX512),
    "mat_mul": (SCALAR, AVX2, AVX512),
    "einsum": (SCALAR, AVX2, AVX512),
    "integer_mat_mul": (SCALAR, AVX2, AVX512),
    "attention": (SCALAR, AVX2, AVX512),
    "rotary": (SCALAR, AVX2, AVX512),
    "signal": (SCALAR,),
    "pool": (SCALAR, AVX2, AVX512),
    "conv": (SCALAR, AVX2, AVX512),
    "recurrent": (SCALAR, AVX2, AVX512),
    "resize": (SCALAR, AVX2, AVX512),
    "grid_sample": (SCALAR, AVX2, AVX512),
    "conv_integer": (SCALAR, AVX2, AVX512),
    "regions": (SCALAR,),
    "loss": (SCALAR, AVX2, AVX512),
    "optimizer": (SCALAR, AVX2, AVX512),
    "random": (SCALAR,),
    "features": (SCALAR,),
}
"""The ISAs each family has a variant of. Where a family is for floats, f32 and f64 alone have more
than SCALAR."""


def isas_of(family: str, variant: str) -> tuple[Isa, ...]:
    """The ISAs that a family is compiled for, for one variant."""
    return FAMILIES[family] if variant in ("", "f32", "f64") else (SCALAR,)


def _family(
    name: str, variant: Variant, variants: tuple[str, ...], *ops: str
) -> tuple[NetKernel, ...]:
    return tuple(NetKernel(f"onnx_{op}", name, variant, variants) for op in ops)


KERNELS: tuple[NetKernel, ...] = (
    # elementwise, casts, quantisation
    *_family("arithmetic", by_one_type(), NUMBERS,
             "add", "sub", "mul", "div", "mod", "max", "min", "clip", "abs", "sign", "shrink"),
    *_family("arithmetic", by_one_type(), FLOATS + SIGNED, "neg", "relu"),
    *_family("arithmetic", by_one_type(), (*FLOATS, *WIDE), "prelu"),
    *_family("arithmetic", by_one_type(), FLOATS, "sum", "mean"),
    *_family("activation", by_type(0), FLOATS,
             "exp", "log", "sqrt", "floor", "ceil", "round", "sin", "cos", "tan", "asin", "acos",
             "atan", "sinh", "cosh", "tanh", "asinh", "acosh", "atanh", "erf", "sigmoid",
             "softplus", "softsign", "reciprocal", "mish", "hard_swish", "hard_sigmoid",
             "leaky_relu", "thresholded_relu", "elu", "selu", "celu", "swish", "gelu"),
    *_family("bits", by_one_type(), INTEGERS,
             "bitwise_and", "bitwise_or", "bitwise_xor", "bitwise_not", "bit_shift"),
    *_family("cast", by_type(0), TYPES, "cast", "cast_like"),
    *_family("cast", by_type(0), FLOATS + FLOATS8, "is_nan", "is_inf"),
    *_family("compare", by_one_type(), (*NUMBERS, "bool"), "equal"),
    *_family("compare", by_one_type(), NUMBERS,
             "greater", "less", "greater_or_equal", "less_or_equal"),
    *_family("compare", by_one_type(), ("bool",), "and", "or", "xor", "not"),
    *_family("pow", by_type(0), (*FLOATS, "i64", "i32"), "pow"),
    *_family("quantize", by_type(0), ("f32", "f16", "bf16", "i32"), "quantize_linear"),
    *_family("dequantize", by_type(0),
             ("i8", "u8", "i16", "u16", "i32", *FLOATS8, *INTEGERS4, "f4e2m1"),
             "dequantize_linear"),
    *_family("dynamic_quantize", single, ("",), "dynamic_quantize_linear"),
    *_family("select", by_width(1), WIDTHS, "where"),
    # movement and indexing
    *_family("views", single, ("",),
             "identity", "shape", "size", "reshape", "flatten", "squeeze", "unsqueeze"),
    *_family("dropout", single, ("",), "dropout"),
    *_family("transpose", by_width(0), WIDTHS, "transpose", "depth_to_space", "space_to_depth"),
    *_family("copy", by_width(0), WIDTHS,
             "concat", "split", "slice", "expand", "tile", "trilu", "reverse_sequence", "bit_cast"),
    *_family("pad", by_width(0), WIDTHS, "pad", "center_crop_pad"),
    *_family("gather", by_width(0), WIDTHS,
             "gather", "gather_elements", "gather_nd", "compress", "tensor_scatter"),
    *_family("scatter", by_one_type(0, 2), (*NUMBERS, "bool"),
             "scatter_elements", "scatter", "scatter_nd"),
    *_family("generate", single, ("",),
             "constant_of_shape", "eye_like", "range", "one_hot", "non_zero"),
    # reductions, orders, normalisation, matrix products
    *_family("reduce", by_type(0), (*NUMBERS, "bool"), "reduce_max", "reduce_min"),
    *_family("reduce", by_type(0), NUMBERS, "reduce_sum", "reduce_mean", "reduce_prod"),
    *_family("reduce", by_type(0), NUMBERS, "reduce_l1", "reduce_l2", "reduce_sum_square"),
    *_family("reduce", by_type(0), FLOATS, "reduce_log_sum", "reduce_log_sum_exp"),
    *_family("order", by_type(0), NUMBERS, "arg_max", "arg_min", "top_k"),
    *_family("order", by_type(0), (*NUMBERS, "bool"), "unique"),
    *_family("cumulative", by_type(0), NUMBERS, "cum_sum", "cum_prod"),
    *_family("boxes", single, ("",), "non_max_suppression"),
    *_family("softmax", by_type(0), FLOATS, "softmax", "log_softmax", "hardmax"),
    *_family("normalize", by_one_type(), FLOATS, "layer_normalization", "rms_normalization"),
    *_family("normalize", by_type(0), FLOATS, "group_normalization", "instance_normalization"),
    *_family("channel_norm", by_type(0), FLOATS, "batch_normalization", "lrn", "lp_normalization"),
    *_family("mat_mul", by_one_type(), (*FLOATS, *WIDE), "mat_mul", "gemm"),
    *_family("mat_mul", by_type(0), FLOATS, "det"),
    *_family("einsum", by_one_type(), NUMBERS, "einsum"),
    *_family("integer_mat_mul", bytes_only(0, 1), ("",), "mat_mul_integer"),
    *_family("integer_mat_mul", bytes_only(0, 3, 7), ("",), "qlinear_mat_mul"),
    *_family("attention", attention_type, FLOATS, "attention"),
    *_family("rotary", by_one_type(0, 1, 2), FLOATS, "rotary_embedding"),
    *_family("signal", by_type(0), FLOATS, "dft", "stft"),
    *_family("signal", by_type(-1), FLOATS, "mel_weight_matrix"),
    # windows over images, resampling, recurrence
    *_family("pool", by_type(0), FLOATS + ("i8", "u8"), "max_pool"),
    *_family("pool", by_type(0), FLOATS, "average_pool", "lp_pool", "max_unpool"),
    *_family("pool", by_type(0), FLOATS, "global_average_pool", "global_max_pool"),
    *_family("pool", by_type(0), FLOATS, "global_lp_pool"),
    *_family("conv", by_one_type(), FLOATS, "conv", "conv_transpose", "causal_conv_with_state"),
    *_family("recurrent", by_type(0), FLOATS, "rnn", "gru", "lstm"),
    *_family("resize", by_type(0), NUMBERS, "resize"),
    *_family("grid_sample", by_type(0), FLOATS, "grid_sample"),
    *_family("conv_integer", single, ("",), "conv_integer", "qlinear_conv"),
    *_family("regions", by_one_type(0, 1), FLOATS, "roi_align", "max_roi_pool"),
    *_family("regions", by_one_type(), FLOATS, "deform_conv"),
    *_family("regions", by_type(0), NUMBERS, "col2im"),
    *_family("loss", by_type(0), FLOATS, "negative_log_likelihood_loss"),
    *_family("loss", by_type(0), FLOATS, "softmax_cross_entropy_loss"),
    *_family("optimizer", by_type(2), ("f32", "f64"), "adagrad", "adam", "momentum"),
    *_family("random", by_type(-1), FLOATS, "random_uniform", "random_uniform_like"),
    *_family("random", by_type(-1), FLOATS, "random_normal", "random_normal_like"),
    *_family("random", by_type(-1), (*NUMBERS, "bool"), "bernoulli"),
    *_family("random", by_type(-1), ("i32", "i64"), "multinomial"),
    *_family("features", single, ("",), "tf_idf_vectorizer"),
    *_family("features", single, ("",), "binarizer", "array_feature_extractor"),
)  # fmt: skip

BY_OP: dict[str, NetKernel] = {kernel.op: kernel for kernel in KERNELS}


def serves(op: Op) -> bool:
    """Whether there is a kernel for the types of an op's operands; true of those not tabled."""
    kernel = BY_OP.get(op.name)
    return kernel is None or kernel.variant(op) in kernel.variants


BUCKETS = (1, 8, 65536)
"""Rows that a linear is chosen for: at most 8, or any number; an operator does not ask."""
FEW, MANY = BUCKETS[1], BUCKETS[2]


def _refusal(kernel: NetKernel, variants: tuple[str, ...]) -> Refusal:
    def refuses(op: Op, rows: int) -> str | None:
        variant = kernel.variant(op)
        if variant in variants:
            return None
        types = ", ".join(str(v.type.enc) for v in op.args)
        return f"for ({types}): not compiled, there is {', '.join(variants)}"

    return refuses


def _taken(op: Op, rows: int) -> str | None:
    return None


def declaration(kernel: NetKernel, variants: tuple[str, ...], features: str) -> KernelDecl:
    """A kernel as phase 35 reads it, for these variants on targets of these features."""
    needs = frozenset({features})
    promise = "as onnx's reference"
    return KernelDecl(
        kernel.name, frozenset({kernel.op}), needs, _refusal(kernel, variants), promise
    )


def control(features: str) -> KernelDecl:
    """If, Loop and Scan: the executor's own."""
    ops = frozenset({"onnx_if", "onnx_loop", "onnx_scan"})
    return KernelDecl("control", ops, frozenset({features}), _taken, "walks graphs")


def declarations() -> tuple[KernelDecl, ...]:
    """The table of the cpu as phase 35 reads it."""
    return (*(declaration(k, k.variants, "cpu") for k in KERNELS), control("cpu"))
