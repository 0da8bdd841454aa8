"""Kernel argument structs: Python's offsets are the compiler's, initialisers say what they mean."""

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from halfbyte.codegen.args import ARGS, LINEAR, ROWMAJOR_LINEAR, Ref, Space
from halfbyte.codegen.render import source
from halfbyte.ir.errors import IRError

CXX = shutil.which("c++")


@pytest.mark.skipif(CXX is None, reason="no C++ compiler")
def test_header_asserts_hold_under_the_compiler(tmp_path: Path) -> None:
    unit = source("args.h")
    for name, text in {**unit.headers, "args.h": unit.text}.items():
        (tmp_path / name).write_text(text)
    lines = [f"const hb::{s.name} a{i} = {s.initialiser({})};" for i, s in enumerate(ARGS)]
    full = {"x": Ref(Space.ARENA, 64), "w": Ref(Space.WEIGHTS, 1 << 40), "eps": 1e-6, "n": 7}
    lines.append(f"const hb::LinearArgs full = {LINEAR.initialiser(full)};")
    (tmp_path / "t.cc").write_text('#include "args.h"\n' + "\n".join(lines))
    command = [str(CXX), "-std=c++17", "-Werror", "-fsyntax-only", "t.cc"]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr


def test_every_field_and_struct_is_asserted() -> None:
    text = source("args.h").text
    assert "offsetof(LinearArgs, n) == 128" in text
    assert text.count("offsetof(") == sum(len(struct.fields) for struct in ARGS)
    assert text.count("static_assert(sizeof(") == len(ARGS)


def test_initialiser_is_in_memory_order_and_exact() -> None:
    text = LINEAR.initialiser({"eps": 1e-5, "n": 3, "x": Ref(Space.ARENA, 128), "x_stride": 2**40})
    assert text == "{.x = {2, 128}, .n = 3, .eps = 1e-05f, .x_stride = 1099511627776}"
    third = LINEAR.initialiser({"eps": 1 / 3})
    assert np.float32(third.removeprefix("{.eps = ").removesuffix("f}")) == np.float32(1 / 3)
    assert ROWMAJOR_LINEAR.initialiser({"shard_end": (4, 9)}) == "{.shard_end = {4, 9}}"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"nn": 1}, "no field 'nn'"),
        ({"n": Ref()}, "expected int32_t n, found Ref"),
        ({"x": 3}, "expected Ref x, found 3"),
        ({"n": 1 << 31}, "expected a value of int32_t"),
        ({"n": 1.5}, "expected a value of int32_t"),
        ({"eps": float("inf")}, "not a finite float32"),
    ],
)
def test_initialiser_refuses(values: dict[str, Ref | int | float], message: str) -> None:
    with pytest.raises(IRError, match="LinearArgs") as error:
        LINEAR.initialiser(values)
    assert message in str(error.value)
