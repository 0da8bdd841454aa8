"""Graphs made to hurt, and files that are damaged: a ModelError that names file and node, nothing
read outside the model's folder, bounded memory, and never another exception.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import AttributeProto, GraphProto, ModelProto, TensorProto, helper, numpy_helper

from halfbyte.frontend.onnx_importer import import_onnx
from halfbyte.ir.errors import ModelError
from halfbyte.ir.text import from_text, to_text
from tests.onnx_files import NEWEST, model, node, with_every_operator
from tests.test_fuzz_readers import bounded

F = TensorProto.FLOAT
FUZZ = settings(
    max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture(autouse=True)
def every_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    with_every_operator(monkeypatch)


def refused(proto: ModelProto | bytes, folder: Path, match: str) -> None:
    """Importing ends in a ModelError, soon, which names the file."""
    data = proto if isinstance(proto, bytes) else proto.SerializeToString()
    path = folder / "model.onnx"
    path.write_bytes(data)
    with bounded(len(data)), pytest.raises(ModelError, match=match) as error:
        import_onnx(path)
    assert str(path) in str(error.value)


def sound() -> ModelProto:
    w = np.arange(600, dtype=np.float32).reshape(2, 300)
    two = numpy_helper.from_array(np.array([2], np.float32))
    branch = helper.make_graph(
        [node("Relu", ["h"], ["r"])], "b", [], [helper.make_tensor_value_info("r", F, None)]
    )
    nodes = [
        node("MatMul", ["x", "w"], ["h"], name="first"), node("Shape", ["h"], ["s"]),
        node("ReduceMax", ["s"], ["m"], keepdims=0), node("Greater", ["m", "k"], ["c"]),
        node("If", ["c"], ["y"], then_branch=branch, else_branch=branch),
        node("ConstantOfShape", ["s"], ["z"], value=two),
        node("Add", ["y", "z"], ["out"]),
    ]  # fmt: skip
    return model(nodes, {"x": (F, ["n", 2])}, ["out"], {"w": w, "k": np.int64(2)})


def test_the_original_is_sound(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(sound().SerializeToString())
    assert import_onnx(path).graphs


# ---- graphs --------------------------------------------------------------------------------------

X: dict[str, tuple[int, Any]] = {"x": (F, ["n", 4])}
RELU = node("Relu", ["x"], ["y"], name="r")
GRAPHS: dict[str, tuple[Callable[[], ModelProto], str]] = {
    "cycle": (
        lambda: model(
            [node("Add", ["x", "b"], ["a"], name="one"), node("Relu", ["a"], ["b"])], X, ["b"]
        ),
        r"node 'one' \(Add\): node reads 'b', which nothing before it makes",
    ),
    "itself": (
        lambda: model([node("Add", ["x", "y"], ["y"])], X, ["y"]),
        "reads 'y', which nothing",
    ),
    "undefined": (
        lambda: model([node("Relu", ["z"], ["y"])], X, ["y"]),
        "reads 'z', which nothing",
    ),
    "undefined output": (lambda: model([RELU], X, ["q"]), "graph output reads 'q'"),
    "twice": (lambda: model([RELU, RELU], X, ["y"]), "node 'r' .*'y' is defined twice"),
    "twice a weight": (
        lambda: model([node("Relu", ["x"], ["w"])], X, ["w"], {"w": np.ones(4)}),
        "'w' is defined twice",
    ),
    "unknown operator": (
        lambda: model([node("Frob", ["x"], ["y"], name="f")], X, ["y"]),
        rf"node 'f' \(Frob\): opset {NEWEST} has no operator 'Frob'",
    ),
    "unknown domain": (
        lambda: model([node("Relu", ["x"], ["y"], domain="evil")], X, ["y"], domains=["evil"]),
        "unknown operator 'evil.Relu', expected one of ONNX",
    ),
    "not yet": (
        lambda: model([node("Gelu", ["x"], ["y"])], X, ["y"], opset=13),
        "opset 13 has no operator 'Gelu'",
    ),
    "from the future": (
        lambda: model([RELU], X, ["y"], opset=NEWEST + 1),
        f"opset {NEWEST + 1}, and the installed",
    ),
    "operands": (
        lambda: model([node("Relu", ["x", "x"], ["y"])], X, ["y"]),
        "2 operands, expected 1 to 1",
    ),
    "left out": (
        lambda: model([node("Add", ["", "x"], ["y"])], X, ["y"]),
        "operand 0 .A. is left out",
    ),
    "attribute": (
        lambda: model([node("Relu", ["x"], ["y"], q=1)], X, ["y"]),
        "unknown attribute 'q'",
    ),
    "attribute type": (
        lambda: model([node("Softmax", ["x"], ["y"], axis=1.5)], X, ["y"]),
        "axis is of type 1, expected INT",
    ),
    "attribute missing": (
        lambda: model([node("Cast", ["x"], ["y"])], X, ["y"]),
        "attribute to is missing",
    ),
    "strings": (
        lambda: model([RELU], {"x": (TensorProto.STRING, [2])}, ["y"]),
        "'x' is a tensor of string",
    ),
    "rank": (lambda: model([RELU], {"x": (F, [1] * 9)}, ["y"]), "9 dimensions, expected at most 8"),
    "recursion": (lambda: _calls_itself(), "call each other more than"),
    "explosion": (lambda: _doubles(30), "more than [0-9]+ nodes once functions"),
    "unfinished export": (
        lambda: model([node("TRT_FP4QDQ", ["x"], ["y"], domain="trt")], X, ["y"], domains=["trt"]),
        "placeholder of an export that was not finished",
    ),
    "body's arity": (lambda: _loop_of(1), "its body takes 1 and gives 1, expected 3 and 2"),
}


def _calls_itself() -> ModelProto:
    f = helper.make_function(
        "m", "F", ["a"], ["b"], [node("F", ["a"], ["b"], domain="m")], [helper.make_opsetid("m", 1)]
    )
    return model([node("F", ["x"], ["y"], domain="m")], X, ["y"], functions=[f], domains=["m"])


def _doubles(levels: int) -> ModelProto:
    """2^levels nodes out of a few hundred bytes."""
    functions = [
        helper.make_function(
            "m", f"F{i}", ["a"], ["c"],
            [node(f"F{i + 1}", ["a"], ["b"], domain="m"), node(f"F{i + 1}", ["b"], ["c"],
                domain="m")],
            [helper.make_opsetid("m", 1)],
        )
        for i in range(levels)
    ]  # fmt: skip
    last = helper.make_function(
        "m", f"F{levels}", ["a"], ["c"], [node("Relu", ["a"], ["c"])], [helper.make_opsetid("", 13)]
    )
    call = node("F0", ["x"], ["y"], domain="m")
    return model([call], X, ["y"], functions=[*functions, last], domains=["m"])


def _nested(levels: int) -> ModelProto:
    """About as deep as protobuf itself lets a graph be built."""
    info = helper.make_tensor_value_info("y", F, None)
    leaf = helper.make_graph([node("Relu", ["x"], ["y"])], "g", [], [info])
    inner = leaf
    for _ in range(levels):
        branch = node("If", ["c"], ["y"], then_branch=inner, else_branch=leaf)
        inner = helper.make_graph([branch], "g", [], [info])
    return model(list(inner.node), {**X, "c": (TensorProto.BOOL, [])}, ["y"])


def test_deep_graphs_are_read_and_deeper_bytes_refused(tmp_path: Path) -> None:
    deep = _nested(28).SerializeToString()
    survives(tmp_path / "model.onnx", deep)
    for _ in range(40):  # a graph in an attribute in a node in a graph
        for tag in (0x32, 0x2A, 0x0A):
            deep = bytes([tag]) + _varint(len(deep)) + deep
    refused(_framed(0x3A, deep) + _framed(0x42, b"\x10\x0d"), tmp_path, "nested more than")


def _framed(tag: int, body: bytes) -> bytes:
    return bytes([tag]) + _varint(len(body)) + body


def _varint(value: int) -> bytes:
    low = bytes([value & 0x7F | (0x80 if value > 0x7F else 0)])
    return low if value <= 0x7F else low + _varint(value >> 7)


def _loop_of(inputs: int) -> ModelProto:
    infos = [helper.make_tensor_value_info(f"i{i}", TensorProto.INT64, []) for i in range(inputs)]
    out = helper.make_tensor_value_info("go", TensorProto.BOOL, [])
    turn = helper.make_graph([node("Equal", ["i0", "i0"], ["go"])], "b", infos, [out])
    loop = node("Loop", ["k", "t"], ["y"], body=turn)
    loop.input.append("k")
    return model([loop], X, ["y"], {"k": np.int64(2), "t": np.array(True)})


@pytest.mark.parametrize("case", GRAPHS, ids=str)
def test_graphs_that_are_no_graphs(tmp_path: Path, case: str) -> None:
    make, match = GRAPHS[case]
    refused(make(), tmp_path, match)


def test_a_name_full_of_newlines_stays_on_its_line(tmp_path: Path) -> None:
    evil = "a\n  return %x\n}\u2028"
    path = tmp_path / "model.onnx"
    path.write_bytes(model([node("Relu", ["x"], [evil], name=evil)], X, [evil]).SerializeToString())
    text = to_text(import_onnx(path).graphs[0])
    assert to_text(from_text(text)) == text and len(text.splitlines()) == 4


def test_an_einsum_of_constants_is_not_worked_out(tmp_path: Path) -> None:
    """Ten to the fifteenth products out of twenty kilobytes."""
    given = {n: np.ones(1000, np.float32) for n in "abcde"}
    nodes = [
        node("Einsum", list(given), ["s"], equation="a,b,c,d,e->"),
        node("Add", ["s", "x"], ["y"]),
    ]
    survives(tmp_path / "model.onnx", model(nodes, X, ["y"], given).SerializeToString())


# ---- tensors -------------------------------------------------------------------------------------


def with_weight(tensor: TensorProto) -> ModelProto:
    return model([node("Add", ["x", "w"], ["y"])], X, ["y"], {"w": tensor})


def raw(dims: list[int], data: bytes, kind: int = F) -> TensorProto:
    return TensorProto(name="w", data_type=kind, dims=dims, raw_data=data)


TENSORS: dict[str, tuple[TensorProto, str]] = {
    "short": (raw([4], bytes(15)), r"tensor 'w': f32 \[4\] takes 16 bytes, found 15"),
    "long": (raw([4], bytes(4000)), "takes 16 bytes, found 4000"),
    "huge dims": (raw([2**40, 2**40], bytes(16)), "bytes, found 16"),
    "negative dims": (raw([-4], bytes(16)), r"dims \[-4\], expected at most 8"),
    "many dims": (raw([1] * 9, bytes(4)), "expected at most 8 extents"),
    "no type": (raw([4], bytes(16), 0), "type undefined, expected one of f32"),
    "strange type": (raw([4], bytes(16), 99), "type 99, expected one of"),
    "complex": (raw([2], bytes(16), TensorProto.COMPLEX64), "type complex64"),
    "strings": (TensorProto(name="w", data_type=8, dims=[1], string_data=[b"a"]), "type string"),
    "typed, too few": (
        TensorProto(name="w", data_type=F, dims=[2**40], float_data=[1]),
        "do not fit",
    ),
    "nothing": (TensorProto(name="w", data_type=F, dims=[4]), "do not fit"),
    "segment": (
        TensorProto(
            name="w",
            data_type=F,
            dims=[1],
            float_data=[1],
            segment=TensorProto.Segment(begin=0, end=1),
        ),
        "stored in segments",
    ),
}


@pytest.mark.parametrize("case", TENSORS, ids=str)
def test_tensors_that_lie(tmp_path: Path, case: str) -> None:
    tensor, match = TENSORS[case]
    refused(with_weight(tensor), tmp_path, match)


def external(folder: Path, **facts: str) -> ModelProto:
    tensor = TensorProto(name="w", data_type=F, dims=[4], data_location=TensorProto.EXTERNAL)
    for key, value in facts.items():
        tensor.external_data.add(key=key, value=value)
    return with_weight(tensor)


OUTSIDE = "lies outside"
EXTERNAL: dict[str, tuple[dict[str, str], str]] = {
    "parent": ({"location": "../secret"}, OUTSIDE),
    "through a folder": ({"location": "in/../../secret"}, OUTSIDE),
    "absolute": ({"location": "/etc/passwd"}, OUTSIDE),
    "a link": ({"location": "link"}, OUTSIDE),
    "a linked folder": ({"location": "links/secret"}, OUTSIDE),
    "windows": ({"location": "..\\secret"}, OUTSIDE),
    "nul": ({"location": "a\0b"}, OUTSIDE),
    "nowhere": ({"location": ""}, OUTSIDE),
    "the folder itself": ({"location": "."}, "is missing"),
    "missing": ({"location": "nope"}, "is missing"),
    "long name": ({"location": "a" * 5000}, "is missing|lies outside"),
    "beyond the end": ({"location": "data", "offset": "60"}, "takes 16 bytes, found 4"),
    "far beyond": (
        {"location": "data", "offset": "999", "length": "16"},
        "bytes 999 to 1015 of data",
    ),
    "negative": (
        {"location": "data", "offset": "-8", "length": "16"},
        "offset of its external data",
    ),
    "wrong length": ({"location": "data", "length": "8"}, "takes 16 bytes, found 8"),
}


@pytest.mark.parametrize("case", EXTERNAL, ids=str)
def test_external_data_stay_in_the_folder(tmp_path: Path, case: str) -> None:
    facts, match = EXTERNAL[case]
    home = tmp_path / "home"
    (home / "in").mkdir(parents=True)
    (tmp_path / "secret").write_bytes(bytes(64))
    (home / "data").write_bytes(bytes(64))
    (home / "link").symlink_to(tmp_path / "secret")
    (home / "links").symlink_to(tmp_path)
    refused(external(home, **facts), home, match)


# ---- files ---------------------------------------------------------------------------------------


def test_files_that_are_not_onnx(tmp_path: Path) -> None:
    data = sound().SerializeToString()
    refused(b"\x08", tmp_path, "at byte 1: a number runs over the end")
    refused(b"{}" * 50, tmp_path, "wire type 3|ends at|not an ONNX model")
    refused(data[:-1], tmp_path, "at byte")
    refused(ModelProto(ir_version=10).SerializeToString(), tmp_path, "no graph or no opset")
    with pytest.raises(ModelError, match="cannot be read"):
        import_onnx(tmp_path / "none.onnx")
    (tmp_path / "empty.onnx").write_bytes(b"")
    with pytest.raises(ModelError, match="cannot be read"):
        import_onnx(tmp_path / "empty.onnx")


def test_every_truncation(tmp_path: Path) -> None:
    data = sound().SerializeToString()
    path = tmp_path / "model.onnx"
    for length in range(1, len(data), 13):
        path.write_bytes(data[:length])
        with pytest.raises(ModelError):
            import_onnx(path)


def survives(path: Path, data: bytes) -> None:
    """Import and read every weight: all of it, or a ModelError."""
    path.write_bytes(data)
    with bounded(len(data)):
        try:
            found = import_onnx(path)
            for graph in found.graphs:
                for op in graph.ops:
                    if op.name == "weight":
                        found.weights(op.get("source", ""))
        except ModelError:
            pass


@FUZZ
@given(st.data())
def test_mutated_files(tmp_path: Path, data: st.DataObject) -> None:
    original = bytearray(sound().SerializeToString())
    head = [i for i in range(len(original)) if not 150 < i < 2400]  # structure, hardly weights
    for _ in range(data.draw(st.integers(1, 4))):
        original[data.draw(st.sampled_from(head))] = data.draw(st.integers(0, 255))
    survives(tmp_path / "model.onnx", bytes(original))


@FUZZ
@given(st.binary(max_size=300))
def test_any_bytes(tmp_path: Path, data: bytes) -> None:
    if data:
        survives(tmp_path / "model.onnx", data)


def _graphs(graph: GraphProto) -> list[GraphProto]:
    inner = [a.g for n in graph.node for a in n.attribute if a.type == AttributeProto.GRAPH]
    return [graph, *(g for i in inner for g in _graphs(i))]


@FUZZ
@given(st.data())
def test_shuffled_graphs(tmp_path: Path, data: st.DataObject) -> None:
    """Valid protobuf, wrong graph: names, operators and attributes trade places."""
    proto = sound()
    nodes = [n for g in _graphs(proto.graph) for n in g.node]
    words = sorted({w for n in nodes for w in (*n.input, *n.output)} | {"", "q"})
    kinds = sorted({n.op_type for n in nodes} | {"Loop", "Scan", "Constant", "Reshape", "Gather"})
    for _ in range(data.draw(st.integers(1, 3))):
        chosen = data.draw(st.sampled_from(nodes))
        match data.draw(st.integers(0, 4)):
            case 0 if chosen.input:
                chosen.input[0] = data.draw(st.sampled_from(words))
            case 1 if chosen.output:
                chosen.output[0] = data.draw(st.sampled_from(words))
            case 2:
                chosen.op_type = data.draw(st.sampled_from(kinds))
            case 3:
                chosen.input.append(data.draw(st.sampled_from(words)))
            case _:
                other = data.draw(st.sampled_from(nodes))
                del chosen.attribute[:]
                chosen.attribute.extend(other.attribute)
    survives(tmp_path / "model.onnx", proto.SerializeToString())
