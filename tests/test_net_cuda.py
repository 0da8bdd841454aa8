"""ONNX graphs on CUDA targets, as far as a machine without a device can tell."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import halfbyte

pytest.importorskip("onnx")

from onnx import NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper  # noqa: E402

from halfbyte.codegen import find_compiler  # noqa: E402
from halfbyte.codegen import kernels_net_cuda as table  # noqa: E402
from halfbyte.codegen.kernels_net import KERNELS  # noqa: E402
from halfbyte.codegen.nvcc import CudaCompiler, find_cuda_compiler  # noqa: E402
from halfbyte.codegen.plan_cuda import arch_of  # noqa: E402
from halfbyte.codegen.render import TEMPLATES  # noqa: E402
from halfbyte.driver import Options, compile_model  # noqa: E402
from halfbyte.ir.errors import ModelError, TargetError  # noqa: E402
from halfbyte.ir.target import target  # noqa: E402
from halfbyte.runtime.artifact import Artifact  # noqa: E402


def test_the_table_is_sound() -> None:
    families = {kernel.family for kernel in KERNELS}
    names = {kernel.name for kernel in KERNELS}
    for name, family in table.FAMILIES.items():
        assert name in families and {*family.without, *family.host_ins} <= names
        assert (TEMPLATES / table.FOLDER / f"{name}.cu.jinja").exists(), name


@pytest.mark.parametrize("name", table.FAMILIES)
def test_a_family_renders(name: str) -> None:
    kernels = [kernel for kernel in KERNELS if kernel.family == name]
    for variant in {v for kernel in kernels for v in table.variants_of(kernel)}:
        unit = table.unit(name, variant)
        for kernel in kernels:
            if variant in table.variants_of(kernel):
                symbol = f"{kernel.name}_{variant}" if variant else kernel.name
                assert f"bool {symbol}(Call& call)" in unit.text, symbol
        assert "namespace hb::net::cuda" in unit.text
        assert Path(unit.name).suffix == ".cu"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "arch"), [("copy", "sm_90a"), ("reduce", "sm_120a"), ("attention", "sm_120a")]
)
def test_a_family_compiles(
    name: str, arch: str, tmp_path: Path, pytestconfig: pytest.Config
) -> None:
    """Some here; all of them are compiled where tests/onnx/test_cuda.py runs."""
    toolchain = toolchain_of(arch, pytestconfig)
    kernel = next(kernel for kernel in KERNELS if kernel.family == name)
    unit = table.unit(name, table.variants_of(kernel)[0])
    for file, text in {**unit.headers, unit.name: unit.text}.items():
        (tmp_path / file).write_text(text)
    command = (*toolchain.command_of(unit.name), *toolchain.flags_of(unit.name), *unit.flags)
    ran = subprocess.run(
        (*command, "-c", unit.name, "-o", "unit.o"), cwd=tmp_path, capture_output=True, text=True
    )
    assert ran.returncode == 0 and "warning" not in ran.stderr, ran.stderr


def toolchain_of(arch: str, config: pytest.Config) -> CudaCompiler:
    """nvcc for a target; skips the test where there is none."""
    assert config.cache is not None
    cache = Path(config.cache.mkdir("objects"))
    try:
        return find_cuda_compiler(find_compiler(None, cache), arch_of(target(arch)), None)
    except TargetError as error:
        pytest.skip(str(error))


# --- graphs ---------------------------------------------------------------------------------------


def value(
    name: str, shape: Sequence[str | int] | None, type_: int = TensorProto.FLOAT
) -> ValueInfoProto:
    return helper.make_tensor_value_info(name, type_, shape)


def written(file: Path, nodes: Sequence[NodeProto], ins: Sequence[ValueInfoProto],
            outs: Sequence[ValueInfoProto], **stored: Any) -> Path:  # fmt: skip
    kept = [numpy_helper.from_array(np.asarray(data), name) for name, data in stored.items()]
    graph = helper.make_graph(list(nodes), "graph", list(ins), list(outs), kept)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)])
    file.write_bytes(model.SerializeToString())
    return file


def reshaped(folder: Path) -> Path:
    """A linear, and a Reshape to twice and half of the rows, which the host works out."""
    node = helper.make_node
    nodes = [
        node("MatMul", ["x", "w"], ["y"], name="linear"),
        node("Relu", ["y"], ["r"], name="relu"),
        node("Shape", ["x"], ["shape"], name="shape", end=1),
        node("Mul", ["shape", "two"], ["twice"], name="twice"),
        node("Concat", ["twice", "rest"], ["to"], name="to", axis=0),
        node("Reshape", ["r", "to"], ["z"], name="reshape"),
    ]
    w = np.linspace(-1, 1, 64 * 32, dtype=np.float32).reshape(64, 32)
    return written(folder / "reshaped.onnx", nodes, [value("x", ["N", 64])], [value("z", None)],
                   w=w, two=np.array([2]), rest=np.array([16]))  # fmt: skip


def test_what_is_of_shapes_is_placed_on_the_host(tmp_path: Path) -> None:
    texts: list[str] = []
    options = Options(reshaped(tmp_path), None, "sm_90a", compile_to="35", print_ir=texts.append)
    report = compile_model(options)
    assert dict(report.kernels) == {
        "plain_linear_f32": 1, "relu": 1, "host.shape": 1, "host.mul": 1, "host.concat": 1,
        "host.reshape": 1,
    }  # fmt: skip
    assert 'side="host"' in texts[-1] and 'side="device"' in texts[-1]


def test_every_operator_without_a_kernel_is_told(tmp_path: Path) -> None:
    node = helper.make_node
    nodes = [
        node("Relu", ["x"], ["a"], name="first"),
        node("Conv", ["a", "w"], ["b"], name="conv1"),
        node("Conv", ["b", "w"], ["c"], name="conv2"),
        node("GlobalAveragePool", ["c"], ["y"], name="pool"),
    ]
    file = written(tmp_path / "conv.onnx", nodes, [value("x", [1, 3, 9, 9])], [value("y", None)],
                   w=np.zeros((3, 3, 3, 3), np.float32))  # fmt: skip
    with pytest.raises(ModelError) as error:
        halfbyte.compile(file, tmp_path / "conv.hb", target="sm_90a,cpu")
    words = str(error.value)
    assert words.endswith("Conv: conv1, conv2\n  GlobalAveragePool: pool"), words
    assert "(opset 21): 2 operator(s) without a kernel for sm_90a; --target cpu has them" in words
    assert not (tmp_path / "conv.hb").exists()


@pytest.mark.slow
def test_an_artifact_for_several_targets(tmp_path: Path, pytestconfig: pytest.Config) -> None:
    toolchain_of("sm_90a", pytestconfig)
    out = tmp_path / "net.hb"
    halfbyte.compile(reshaped(tmp_path), out, target="sm_90a,sm_120a,cpu", quantize="nvfp4")
    manifest = Artifact.open(out).manifest
    assert set(manifest.targets) == {"sm_90a", "sm_120a", "cpu"}
    for name in ("sm_90a", "sm_120a"):
        facts = manifest.targets[name]
        assert not facts.selftest and facts.code
        assert not [c for c in facts.code if c.spilled and "gem" not in c.unit]
        assert any(f"compute capability {name[3:-2]}." in f for f in facts.features)
    assert manifest.targets["cpu"].selftest
    x = np.linspace(-1, 1, 3 * 64, dtype=np.float32).reshape(3, 64)
    with halfbyte.load(out) as net:
        assert net.run({"x": x})["z"].shape == (6, 16)
    if not any(Path("/dev").glob("nvidia[0-9]*")):
        with pytest.raises(TargetError, match="cuda:0: .*halfbyte doctor"):
            halfbyte.load(out, "cuda:0")
