"""The families of kernels_net.py that CUDA targets have too, and what their launches read where.

A family here has a template templates/net_cuda/<family>.cu.jinja, for the operators and variants of
the host's but those left out. Where loops.h is all that differs, that template includes the host's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from ..ir.graph import Op, Value
from ..ir.kernel import KernelDecl, Refusal
from ..ir.ops_fused import EPILOGUES
from ..ir.types import LINEAR as ROWS
from ..ir.types import Plain
from . import args
from .constraints import LinearRule
from .isa import Isa
from .kernels import LINEAR_OPS, Kernel
from .kernels_net import BY_OP, C_TYPES, INTEGERS, KERNELS, NetKernel, control, declaration
from .kernels_sm120 import W4A4_FAMILY
from .render import Source, source
from .table import table_of

FOLDER = "net_cuda"
CUDA = Isa("cuda", 0, ("--extended-lambda", "-fmad=false", "-diag-suppress=186"))
"""The namespace of kernels that run on a device, and nvcc's flags for them.

What multiplies and adds in one rounding says fmaf: elsewhere results are the host's. Warning 186
is of comparisons with 0 in templates that signed and unsigned types share.
"""


@dataclass(frozen=True, slots=True)
class CudaFamily:
    """What of a family runs on a device.

    `without`: operators, `no_variants`: types or widths that it has no kernel for. `host_ins`: for
    operators (without `onnx_`), the operands whose values are read on the host, as sizes are.
    """

    without: tuple[str, ...] = ()
    no_variants: tuple[str, ...] = ()
    host_ins: Mapping[str, tuple[int, ...]] = field(default_factory=dict[str, tuple[int, ...]])


REDUCTIONS = (
    "max", "min", "sum", "mean", "prod", "l1", "l2", "sum_square", "log_sum", "log_sum_exp",
)  # fmt: skip

FAMILIES: dict[str, CudaFamily] = {
    "arithmetic": CudaFamily(host_ins={"clip": (1, 2)}),
    "attention": CudaFamily(),
    "mat_mul": CudaFamily(without=("det",)),
    "integer_mat_mul": CudaFamily(),
    "activation": CudaFamily(),
    "bits": CudaFamily(),
    "cast": CudaFamily(),
    "compare": CudaFamily(),
    "pow": CudaFamily(),
    "select": CudaFamily(),
    "quantize": CudaFamily(),
    "dequantize": CudaFamily(),
    "dropout": CudaFamily(host_ins={"dropout": (1, 2)}),
    "transpose": CudaFamily(),
    "copy": CudaFamily(
        host_ins={
            "split": (1,), "slice": (1, 2, 3, 4), "expand": (1,), "tile": (1,), "trilu": (1,),
        }
    ),
    "pad": CudaFamily(host_ins={"pad": (1, 2, 3), "center_crop_pad": (1,)}),
    "gather": CudaFamily(),
    "scatter": CudaFamily(),
    "generate": CudaFamily(
        host_ins={"constant_of_shape": (0, 1), "range": (0, 1, 2), "one_hot": (1, 2)}
    ),
    "reduce": CudaFamily(host_ins={f"reduce_{name}": (1,) for name in REDUCTIONS}),
    "softmax": CudaFamily(),
    "normalize": CudaFamily(),
    "dynamic_quantize": CudaFamily(),
    "channel_norm": CudaFamily(),
    "cumulative": CudaFamily(host_ins={"cum_sum": (1,), "cum_prod": (1,)}),
    "order": CudaFamily(without=("unique",), host_ins={"top_k": (1,)}),
    "rotary": CudaFamily(),
}  # fmt: skip

VIEWS = "views"
"""The family that looks at shapes alone: it runs on the host, and leaves operand 0 where it is."""

HOST, DEVICE = "host", "device"
BY_LINEAR = ("mat_mul", "bf16")
"""The family and variant whose kernels call one of language models, dense_gemm_bf16."""
PLAIN_LINEAR = "plain_linear"
"""The family of linears that read f32 rows; those of language models read bf16."""
_CUDA = "cuda"


def family_of(kernel: NetKernel) -> CudaFamily | None:
    """What CUDA targets have of the kernel's family, None where they lack this operator."""
    found = FAMILIES.get(kernel.family)
    return None if found is None or kernel.name in found.without else found


def variants_of(kernel: NetKernel) -> tuple[str, ...]:
    """The variants of a kernel that a device runs; none where it has none at all."""
    found = family_of(kernel)
    return () if found is None else tuple(v for v in kernel.variants if v not in found.no_variants)


def host_ins(kernel: NetKernel) -> tuple[int, ...]:
    """The operands whose values a launch on the device reads on the host."""
    found = family_of(kernel)
    return () if found is None else tuple(found.host_ins.get(kernel.name, ()))


def unit(family: str, variant: str) -> Source:
    """The translation unit of one family and variant: <family>[.<variant>].cuda.cu."""
    facts = {"variant": variant, "c_type": C_TYPES.get(variant, "")}
    name = ".".join(filter(None, (family, variant, CUDA.name, "cu")))
    return replace(source(f"{family}.cu", CUDA, FOLDER, **facts), name=name)


# ---- linears -------------------------------------------------------------------------------------


def _plain_linear(dtype: str) -> Kernel:
    """Our own product of f32 rows with a plain weight, which rounds nothing."""
    rule = LinearRule(dtype, ROWS, epilogue_scale=False, epilogues=EPILOGUES)
    decl = KernelDecl(f"plain_linear_{dtype}", LINEAR_OPS, frozenset({_CUDA}), rule, "f32 sums")
    return Kernel(decl, PLAIN_LINEAR, args.LINEAR)


def linears(target: str) -> tuple[Kernel, ...]:
    """The linears of a target, in order of preference: those of language models (kernels_cuda.py),
    whose rows are rounded to bf16 in front of them, and our own for weights that are not.
    """
    found = [
        kernel
        for kernel in table_of(target).kernels
        if kernel.decl.serves == LINEAR_OPS and kernel.family != W4A4_FAMILY
    ]
    rounded = (
        replace(k, decl=replace(k.decl, refuses=_of_rounded_rows(k.decl.refuses))) for k in found
    )
    return (*rounded, _plain_linear("f32"), _plain_linear("f16"))


def _of_rounded_rows(refuses: Refusal) -> Refusal:
    """What a kernel says of a linear whose rows are bf16."""

    def answer(op: Op, rows: int) -> str | None:
        if op.get("prologue", "none") != "none":
            return f"the linear has a prologue, {op.get('prologue', '')}"
        x = Value(op.args[0].name, op.args[0].type.with_enc(Plain("bf16")))
        attrs = {k: v for k, v in op.attrs.items() if k != "epilogue"}  # linear.cu's own
        return refuses(Op(op.name, (x, *op.args[1:]), op.outs, attrs, op.loc), rows)

    return answer


# ---- the table as phase 35 reads it --------------------------------------------------------------


def _on_host(kernel: NetKernel) -> KernelDecl:
    decl = declaration(kernel, kernel.variants, _CUDA)
    looks = kernel.family == VIEWS
    return replace(decl, name=f"{HOST}.{kernel.name}", side=HOST, looks_at_shapes=looks)


def _on_device(kernel: NetKernel) -> KernelDecl:
    decl = declaration(kernel, variants_of(kernel), _CUDA)
    return replace(decl, side=DEVICE, host_ins=host_ins(kernel))


def serves(op: Op) -> bool:
    """Whether an op of these operands may have a kernel on CUDA targets: on the device or, of
    integers, on the host."""
    kernel = BY_OP.get(op.name)
    if kernel is None or kernel.family == VIEWS:
        return True
    variant = kernel.variant(op)
    if variant in variants_of(kernel):
        return True
    counts = all(
        isinstance(v.type.enc, Plain) and v.type.enc.dtype in (*INTEGERS, "bool") for v in op.outs
    )
    return counts and variant in kernel.variants


def declarations(target: str) -> tuple[KernelDecl, ...]:
    """Those of FAMILIES on the device, every operator on the host, linears, and control flow."""
    return (
        *(_on_device(kernel) for kernel in KERNELS if family_of(kernel)),
        *map(_on_host, KERNELS),
        *(kernel.decl for kernel in linears(target)),
        control(_CUDA),
    )
