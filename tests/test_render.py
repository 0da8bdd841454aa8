"""Templates: delimiters that C++ survives, strictness, headers followed, one source per ISA."""

import pytest

from halfbyte.codegen.isa import ISAS, SCALAR
from halfbyte.codegen.kernels import FAMILIES
from halfbyte.codegen.render import TEMPLATES, environment, family_sources, render, source
from halfbyte.ir.errors import IRError


def test_delimiters_leave_cpp_alone() -> None:
    text = 'asm("{%0,%1};{{x}}{#y}"); a << b; f<<<1,2>>>(); // %\n'
    assert environment().from_string(text).render() == text
    shown = environment().from_string("/*% if on %*/\n@{ n }@\n/*% endif %*/\n/*# gone #*/x\n")
    assert shown.render(on=True, n=3) == "3\nx\n"
    assert (
        environment().from_string("//% for i in [1, 2]\n@{ i }@;\n//% endfor\n").render()
        == "1;\n2;\n"
    )


def test_an_undefined_name_is_an_error() -> None:
    with pytest.raises(IRError, match="isa"):
        render("dense_gemv.cc")


def test_an_unknown_template_is_an_error() -> None:
    with pytest.raises(IRError, match=r"nothing\.cc\.jinja: not found"):
        render("nothing.cc")


def test_headers_are_followed_transitively() -> None:
    unit = source("dense_gemv.cc", SCALAR)
    assert unit.name == "dense_gemv.scalar.cc"
    assert {"hb.h", "args.h", "panel.h"} <= set(unit.headers)
    assert "namespace hb::scalar" in unit.text


def test_one_source_per_family_and_isa() -> None:
    present = {
        name: isas for name, isas in FAMILIES.items() if (TEMPLATES / f"{name}.cc.jinja").exists()
    }
    units = family_sources(present)
    assert len({unit.name for unit in units}) == sum(map(len, present.values()))
    for unit in units:
        isa = next(isa for isa in ISAS if f".{isa.name}." in unit.name)
        assert unit.flags == isa.flags
        assert "@{" not in unit.text and "//%" not in unit.text
