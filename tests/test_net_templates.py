"""Templates of ONNX kernels: what can be said of them without compiling them."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest

from halfbyte.codegen import kernels_net, render

FOLDER = Path(render.TEMPLATES) / "net"
OF_THE_EXECUTOR = {"device", "device_linear", "executor", "linear", "memory", "net", "plan"}
"""Headers of what is compiled once; kernels are compiled once for each instruction set."""


@pytest.mark.parametrize("header", sorted(FOLDER.glob("*.h.jinja")), ids=lambda path: path.name)
def test_functions_of_headers_belong_to_one_instruction_set(header: Path) -> None:
    """Of functions of one name and external linkage the linker keeps one: that of any ISA."""
    text = header.read_text(encoding="utf-8")
    stem = header.name.partition(".")[0]
    assert stem in OF_THE_EXECUTOR or "\nnamespace {\n" in text or "HB_NET_INLINE" in text


@pytest.mark.parametrize("kernel", kernels_net.KERNELS, ids=lambda kernel: kernel.name)
def test_every_kernel_is_defined_for_every_variant_of_its_row(
    kernel: kernels_net.NetKernel,
) -> None:
    for variant in kernel.variants:
        name = f"{kernel.name}_{variant}" if variant else kernel.name
        assert f"bool {name}(Call& call)" in _rendered(kernel.family, variant)


@cache
def _rendered(family: str, variant: str) -> str:
    isa, c_type = kernels_net.FAMILIES[family][0], kernels_net.C_TYPES.get(variant, "")
    return render.render(f"{family}.cc", "net", isa=isa, variant=variant, c_type=c_type)
