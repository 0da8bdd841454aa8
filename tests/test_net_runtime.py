"""The runtime of ONNX graphs beside the rest: its table of types, and what it says to a chat."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto

import halfbyte
from halfbyte.cli import main
from halfbyte.ir.onnx_ops import DTYPES
from halfbyte.runtime.net_tensors import NUMBERS, head_of, read_head
from tests.onnx_files import model, node

F = TensorProto.FLOAT


def test_types_have_the_numbers_of_onnx() -> None:
    """The runtime does not import the IR: its table is a second one."""
    assert {number: name for name, number in NUMBERS.items()} == DTYPES
    assert set(DTYPES) <= set(TensorProto.DataType.values())
    assert DTYPES[TensorProto.BFLOAT16] == "bf16" and DTYPES[TensorProto.INT2] == "i2"


@pytest.mark.parametrize("shape", [(), (0, 3), (1, 2, 3, 4, 5, 6, 7, 8)], ids=str)
def test_a_head_reads_back(shape: tuple[int, ...]) -> None:
    assert read_head(head_of("i4", shape)) == ("i4", shape)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("net")
    nodes = [node("Add", ["x", "w"], ["a"]), node("Relu", ["a"], ["b"]),
             node("Mul", ["a", "b"], ["y"])]  # fmt: skip
    proto = model(nodes, {"x": (F, [2, 3])}, ["y"], {"w": np.ones(3, np.float32)})
    (folder / "net.onnx").write_bytes(proto.SerializeToString())
    halfbyte.compile(folder / "net.onnx", folder / "net.hb")
    return folder / "net.hb"


@pytest.mark.parametrize("words", [["--chat", "hi"], ["--prompt", "hi"], ["--ids", "1,2"]], ids=str)
def test_a_graph_is_no_language_model(
    artifact: Path, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", str(artifact), *words]) != 0
    said = capsys.readouterr().err
    assert "an ONNX graph, not a language model" in said and "--input x=x.npy" in said


def test_memory_of_a_graph_is_its_weights_and_what_lives(
    artifact: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", "--memory", str(artifact)]) == 0
    said = capsys.readouterr().out
    assert "weights" in said and "12 B" in said
    assert "at most 3 of them at once" in said  # a, b and y while y is made
    assert "72 B" in said  # these, of 2 x 3 floats each


def test_a_convolution_larger_than_three_samples_is_tested(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Random inputs of unknown extents start small: a window of 128 takes larger ones."""
    w = np.random.default_rng(1).standard_normal((4, 1, 128)).astype(np.float32)
    nodes = [node("Conv", ["x", "w"], ["a"]), node("Squeeze", ["s"], ["b"], name="squeeze"),
             node("RandomNormalLike", ["b"], ["c"]), node("Add", ["b", "c"], ["d"])]  # fmt: skip
    proto = model(nodes, {"x": (F, [None, 1, None]), "s": (F, [None, 4])}, ["a", "d"], {"w": w})
    (tmp_path / "net.onnx").write_bytes(proto.SerializeToString())
    halfbyte.compile(tmp_path / "net.onnx", tmp_path / "net.hb")
    assert main(["inspect", str(tmp_path / "net.hb")]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "not tested: random_normal_like generation" in said
