"""The kernel table: every kernel exists in C++, every refusal has a reason, constraints hold."""

from __future__ import annotations

import re

import pytest

from halfbyte.codegen import declarations
from halfbyte.codegen.args import ARGS
from halfbyte.codegen.isa import ISAS
from halfbyte.codegen.kernels import BY_NAME, FAMILIES, GEMV_ROWS, KERNELS
from halfbyte.codegen.lower import lower
from halfbyte.codegen.render import source
from halfbyte.codegen.table import table_of
from halfbyte.codegen.tolerance import RULES
from halfbyte.ir.graph import Op, Place, Value
from halfbyte.ir.ops import OPS
from halfbyte.ir.types import Encoding, Nvfp4, Plain, TensorType, tensor

LINEARS = [kernel for kernel in KERNELS if "fused_linear" in kernel.decl.serves]


def linear(enc: Encoding, act: str = "f32", *roles: str) -> Op:
    """A fused linear 64 -> 48 over a weight of this encoding, every operand placed."""
    types = {"x": tensor("f32", "T", 64), "w": TensorType((48, 64), enc)}
    names = ("x", "w", *roles, *(("input_scale",) if act == "nvfp4" else ()))
    values = [
        Value(
            name,
            types.get(name, tensor("f32", 48)),
            Place("arena" if name == "x" else "weights", 64 * i, 64),
        )
        for i, name in enumerate(names)
    ]
    out = Value("y", tensor("f32", "T", 48), Place("arena", 0, 192))
    return Op("fused_linear", tuple(values), (out,), {"act": act, "roles": names}, "layer")


P16 = Nvfp4(layout="p16")


@pytest.mark.parametrize(
    ("op", "tokens", "kernel"),
    [
        (linear(P16), 1, "nvfp4_gemv"),
        (linear(P16), GEMV_ROWS, "nvfp4_gemv"),
        (linear(P16), GEMV_ROWS + 1, "nvfp4_gemm"),
        (linear(P16, "nvfp4"), 1, "nvfp4_w4a4_gemv"),
        (linear(P16, "nvfp4"), 512, "nvfp4_w4a4_gemm"),
        (linear(Plain("bf16", "p16")), 1, "dense_gemv_bf16"),
        (linear(Plain("f16", "p16"), "f32", "bias"), 64, "dense_gemm_f16"),
        (linear(Plain("f32", "p16"), "f32", "row_scale"), 1, "dense_gemv_f32"),
        (linear(Nvfp4()), 1, "nvfp4_rowmajor_linear"),
        (linear(Nvfp4(shards=(16, 32))), 512, "nvfp4_rowmajor_linear"),
    ],
)
def test_the_first_kernel_that_takes_it(op: Op, tokens: int, kernel: str) -> None:
    served = [k.decl for k in KERNELS if op.name in k.decl.serves]
    refusals = {k.name: k.refuses(op, tokens) for k in served}
    assert next(name for name, why in refusals.items() if why is None) == kernel
    assert all(why is None or len(why) > 10 for why in refusals.values())
    workspace = BY_NAME[kernel].decl.workspace(op, tokens)
    assert workspace.shared >= 0 and workspace.per_thread >= 0
    struct = BY_NAME[kernel].args
    assert struct.initialiser(lower(op, struct)).startswith("{.x = {2, 0}, .w = {1, 64}")


@pytest.mark.parametrize(
    ("kernel", "op", "tokens", "reason"),
    [
        ("nvfp4_gemv", linear(Nvfp4()), 1, "weight layout is linear, kernel reads p16"),
        ("nvfp4_gemv", linear(P16), 512, "M = 1..8 only, bucket has 512"),
        ("nvfp4_gemm", linear(Plain("bf16", "p16")), 1, "weight is bf16, kernel reads nvfp4"),
        ("nvfp4_w4a4_gemm", linear(P16), 1, "activation is f32, kernel sums nvfp4"),
        ("dense_gemm_f32", linear(Plain("f32", "p16"), "nvfp4"), 1, "activation is nvfp4"),
        ("nvfp4_gemm", linear(P16, "f32", "row_scale"), 64, "row_scale of its own"),
        ("nvfp4_rowmajor_linear", linear(Nvfp4(shards=(4,) * 12)), 1, "12 global scales"),
    ],
)
def test_refusals_say_what_and_why(kernel: str, op: Op, tokens: int, reason: str) -> None:
    assert reason in (BY_NAME[kernel].decl.refuses(op, tokens) or "")


def test_names_ops_and_structs_exist() -> None:
    assert len(BY_NAME) == len(KERNELS) == len(declarations())
    for kernel in KERNELS:
        assert kernel.decl.serves <= set(OPS), kernel.name
        assert kernel.args in ARGS and kernel.family in FAMILIES
        assert kernel.decl.promise
    assert [kernel.name for kernel in KERNELS if kernel.decl.fallback] == ["nvfp4_rowmajor_linear"]
    tables = map(table_of, ("cpu", "sm_90a"))
    used = {kernel.args.name for table in tables for kernel in table.kernels}
    assert used == {struct.name for struct in ARGS}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_kernel_is_defined_by_its_template(family: str) -> None:
    names = {kernel.name for kernel in KERNELS if kernel.family == family}
    for isa in FAMILIES[family]:
        text = source(f"{family}.cc", isa).text
        pattern = r"^void (\w+)\(const Step&(?: step)?, const void\*(?: \w+)?, Team&(?: team)?\)"
        assert names <= set(re.findall(pattern, text, re.M)), isa
        assert f"namespace hb::{isa.name}" in text


def test_every_isa_of_a_family_leads_to_a_variant() -> None:
    by_name = {isa.name: isa for isa in ISAS}
    for variants in FAMILIES.values():
        for isa in ISAS:
            while isa not in variants:
                isa = by_name[isa.base]


def test_every_launched_op_has_a_tolerance_rule() -> None:
    served = {name for kernel in KERNELS for name in kernel.decl.serves}
    assert served == set(RULES)
