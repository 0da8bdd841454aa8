"""Spellings that the importer recognises: each means the same, and misses with a reason."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import NodeProto, TensorProto

from halfbyte.frontend.onnx_importer import OnnxImported
from tests.onnx_files import agrees, model, names, node, with_every_operator

F = TensorProto.FLOAT
RNG = np.random.default_rng(7)


@pytest.fixture(autouse=True)
def every_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    with_every_operator(monkeypatch)


def normal(*shape: int) -> Any:
    return RNG.standard_normal(shape).astype(np.float32)


def decisions(found: OnnxImported, rule: str, fired: bool) -> list[str]:
    return [e.detail for e in found.log if e.rule == rule and e.fired is fired]


# ---- linears -------------------------------------------------------------------------------------

X: dict[str, tuple[int, Any]] = {"x": (F, ["b", "t", 8])}
W, B = normal(6, 8), normal(6)


def test_matmul_of_a_transposed_weight_reads_it_as_stored(tmp_path: Path) -> None:
    w = normal(80, 80)
    nodes = [node("Transpose", ["w"], ["wt"], perm=[1, 0]), node("MatMul", ["x", "wt"], ["m"]),
             node("Add", ["b", "m"], ["y"])]  # fmt: skip
    proto = model(nodes, {"x": (F, ["n", 3, 80])}, ["y"], {"w": w, "b": normal(80)})
    found = agrees(proto, tmp_path, {"x": normal(2, 3, 80)}, rtol=1e-4)
    assert names(found) == ["linear"]
    linear = found.graphs[0].ops[-1]
    assert len(linear.args) == 3
    sources = [op.get("source", "") for op in found.graphs[0].ops if op.name == "weight"]
    assert "w" in sources


def test_matmul_of_a_dense_weight(tmp_path: Path) -> None:
    proto = model([node("MatMul", ["x", "w"], ["y"])], X, ["y"], {"w": W.T.copy()})
    assert names(agrees(proto, tmp_path, {"x": normal(2, 3, 8)})) == ["linear"]


@pytest.mark.parametrize("flipped", [0, 1])
def test_gemm(tmp_path: Path, flipped: int) -> None:
    given = {"w": W if flipped else W.T.copy(), "b": B}
    proto = model(
        [node("Gemm", ["x", "w", "b"], ["y"], transB=flipped)], {"x": (F, ["n", 8])}, ["y"], given
    )
    assert names(agrees(proto, tmp_path, {"x": normal(3, 8)})) == ["linear"]


def test_products_that_are_no_linears_say_why(tmp_path: Path) -> None:
    proto = model(
        [node("Gemm", ["x", "w", "b"], ["y"], alpha=2.0, transB=1)],
        {"x": (F, ["n", 8])},
        ["y"],
        {"w": W, "b": B},
    )
    found = agrees(proto, tmp_path, {"x": normal(3, 8)})
    assert decisions(found, "linear of Gemm", False) == [
        "alpha, beta, transA are (2.0, 1.0, 0), expected 1, 1, 0"
    ]
    stacked = model([node("MatMul", ["x", "w"], ["y"])], X, ["y"], {"w": normal(2, 8, 6)})
    found = agrees(stacked, tmp_path, {"x": normal(2, 3, 8)})
    assert "3 dimensions" in decisions(found, "linear of MatMul", False)[0]


# ---- activations ---------------------------------------------------------------------------------

HALF, ONE, ROOT = np.float32(0.5), np.float32(1), np.float32(math.sqrt(2))
GELUS: dict[str, list[NodeProto]] = {
    "x (0.5 (1 + erf))": [
        node("Div", ["x", "root"], ["a"]),
        node("Erf", ["a"], ["e"]),
        node("Add", ["e", "one"], ["p"]),
        node("Mul", ["half", "p"], ["q"]),
        node("Mul", ["x", "q"], ["y"]),
    ],
    "(x (1 + erf)) 0.5": [
        node("Div", ["x", "root"], ["a"]),
        node("Erf", ["a"], ["e"]),
        node("Add", ["one", "e"], ["p"]),
        node("Mul", ["x", "p"], ["q"]),
        node("Mul", ["q", "half"], ["y"]),
    ],
    "(0.5 x) (1 + erf)": [
        node("Mul", ["x", "inverse"], ["a"]),
        node("Erf", ["a"], ["e"]),
        node("Add", ["e", "one"], ["p"]),
        node("Mul", ["x", "half"], ["h"]),
        node("Mul", ["h", "p"], ["y"]),
    ],
    "tanh": [
        node("Pow", ["x", "three"], ["c"]),
        node("Mul", ["c", "cubic"], ["k"]),
        node("Add", ["x", "k"], ["s"]),
        node("Mul", ["s", "factor"], ["a"]),
        node("Tanh", ["a"], ["e"]),
        node("Add", ["e", "one"], ["p"]),
        node("Mul", ["x", "half"], ["h"]),
        node("Mul", ["h", "p"], ["y"]),
    ],
    "tanh, x x x": [
        node("Mul", ["x", "x"], ["xx"]),
        node("Mul", ["x", "xx"], ["c"]),
        node("Mul", ["cubic", "c"], ["k"]),
        node("Add", ["k", "x"], ["s"]),
        node("Mul", ["factor", "s"], ["a"]),
        node("Tanh", ["a"], ["e"]),
        node("Add", ["one", "e"], ["p"]),
        node("Mul", ["half", "x"], ["h"]),
        node("Mul", ["p", "h"], ["y"]),
    ],
}
GIVEN = {"root": ROOT, "inverse": 1 / ROOT, "one": ONE, "half": HALF, "three": np.float32(3),
         "cubic": np.float32(0.044715), "factor": np.float32(math.sqrt(2 / math.pi))}  # fmt: skip


@pytest.mark.parametrize("case", GELUS, ids=str)
def test_gelu(tmp_path: Path, case: str) -> None:
    found = agrees(model(GELUS[case], X, ["y"], GIVEN), tmp_path, {"x": normal(2, 3, 8)})
    assert names(found) == ["onnx_gelu"]
    assert found.graphs[0].ops[-1].get("approximate", "") == ("tanh" if "tanh" in case else "none")


def test_an_erf_that_is_no_gelu_stays(tmp_path: Path) -> None:
    nodes = [
        *GELUS["x (0.5 (1 + erf))"][:3],
        node("Mul", ["p", "x"], ["q"]),
        node("Add", ["q", "e"], ["y"]),
    ]
    found = agrees(model(nodes, X, ["y"], GIVEN), tmp_path, {"x": normal(2, 3, 8)})
    assert "onnx_erf" in names(found)
    assert decisions(found, "gelu", False) == ["1 is not added to it, or it is read elsewhere too"]


def test_silu(tmp_path: Path) -> None:
    nodes = [node("Sigmoid", ["x"], ["s"]), node("Mul", ["x", "s"], ["y"])]
    assert names(agrees(model(nodes, X, ["y"]), tmp_path, {"x": normal(2, 3, 8)})) == ["onnx_swish"]


# ---- norms ---------------------------------------------------------------------------------------


def _norm(centred: bool, squared: str, divided: str, scale: bool, shift: bool) -> list[NodeProto]:
    nodes: list[NodeProto] = []
    d = "x"
    if centred:
        nodes += [node("ReduceMean", ["x", "axes"], ["m"]), node("Sub", ["x", "m"], ["d"])]
        d = "d"
    nodes.append(node("Pow", [d, "two"], ["q"]) if squared == "Pow" else node("Mul", [d, d], ["q"]))
    nodes += [
        node("ReduceMean", ["q", "axes"], ["v"]),
        node("Add", ["v", "eps"], ["e"]),
        node("Sqrt", ["e"], ["r"]),
    ]
    match divided:
        case "Div":
            nodes.append(node("Div", [d, "r"], ["n"]))
        case "Reciprocal":
            nodes += [node("Reciprocal", ["r"], ["i"]), node("Mul", [d, "i"], ["n"])]
        case _:
            nodes += [node("Div", ["one", "r"], ["i"]), node("Mul", ["i", d], ["n"])]
    last = "n"
    if scale:
        nodes.append(node("Mul", ["g", last], ["s"]))
        last = "s"
    if shift:
        nodes.append(node("Add", [last, "b"], ["t"]))
        last = "t"
    return [*nodes, node("Neg", [last], ["y"])]


@pytest.mark.parametrize("divided", ["Div", "Reciprocal", "one by"])
@pytest.mark.parametrize(
    ("squared", "centred"), [("Pow", True), ("Mul", True), ("Pow", False), ("Mul", False)]
)
@pytest.mark.parametrize("scale", [True, False])
def test_norms(tmp_path: Path, centred: bool, squared: str, divided: str, scale: bool) -> None:
    given = {"axes": np.array([-1]), "two": np.float32(2), "one": ONE, "eps": np.float32(1e-5),
             "g": normal(8), "b": normal(8)}  # fmt: skip
    proto = model(_norm(centred, squared, divided, scale, centred), X, ["y"], given)
    found = agrees(proto, tmp_path, {"x": normal(2, 3, 8)}, rtol=1e-4)
    kind = "onnx_layer_normalization" if centred else "onnx_rms_normalization"
    assert names(found) == [kind, "onnx_neg"]


def test_a_norm_over_another_axis_stays(tmp_path: Path) -> None:
    given = {"axes": np.array([1]), "two": np.float32(2), "one": ONE, "eps": np.float32(1e-5)}
    proto = model(_norm(False, "Pow", "Div", False, False), X, ["y"], given)
    assert "onnx_sqrt" in names(agrees(proto, tmp_path, {"x": normal(2, 3, 8)}))


# ---- attention -----------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("where", ["after", "both sides", "divided"])
@pytest.mark.parametrize("guard", [False, True])
def test_attention(tmp_path: Path, mask: bool, where: str, guard: bool) -> None:
    nodes = [node("Transpose", ["k"], ["kt"], perm=[0, 1, 3, 2])]
    q, kt, scores = "q", "kt", "scores"
    if where == "both sides":
        nodes += [node("Mul", ["q", "root"], ["qs"]), node("Mul", ["kt", "root"], ["ks"])]
        q, kt = "qs", "ks"
    nodes.append(node("MatMul", [q, kt], ["scores"]))
    if where != "both sides":
        nodes.append(
            node("Mul" if where == "after" else "Div", ["scores", where.split()[0]], ["scaled"])
        )
        scores = "scaled"
    if mask:
        nodes.append(node("Add", [scores, "mask"], ["masked"]))
        scores = "masked"
    nodes.append(node("Softmax", [scores], ["p"], axis=-1))
    if guard:
        nodes += [node("IsNaN", ["p"], ["nan"]), node("Where", ["nan", "zero", "p"], ["pp"])]
    nodes.append(node("MatMul", ["pp" if guard else "p", "v"], ["y"]))
    inputs: dict[str, tuple[int, Any]] = {n: (F, [2, 3, "t", 4]) for n in "qkv"}
    given = {
        "root": np.float32(0.5**0.5),
        "after": HALF,
        "divided": np.float32(2),
        "zero": np.float32(0),
    }
    proto = model(nodes, {**inputs, "mask": (F, [2, 1, 1, "t"])}, ["y"], given)
    data = {n: normal(2, 3, 5, 4) for n in "qkv"} | {
        "mask": np.float32(-1e4) * (normal(2, 1, 1, 5) > 0)
    }
    found = agrees(proto, tmp_path, data, rtol=1e-4)
    assert names(found) == ["onnx_attention"]
    attention = found.graphs[0].ops[-1]
    assert attention.get("scale", 0.0) == pytest.approx(0.5) and len(attention.args) == 3 + mask


def test_attention_of_keys_that_come_transposed(tmp_path: Path) -> None:
    """[B, T, H, D] to [B, H, D, T] in one go: the op takes k as it is without the flip."""
    nodes = [
        node("Transpose", ["k"], ["kt"], perm=[0, 2, 3, 1]), node("MatMul", ["q", "kt"], ["s"]),
        node("Softmax", ["s"], ["p"], axis=-1), node("MatMul", ["p", "q"], ["y"]),
    ]  # fmt: skip
    proto = model(nodes, {"q": (F, [2, 3, 5, 4]), "k": (F, [2, 5, 3, 4])}, ["y"])
    found = agrees(proto, tmp_path, {"q": normal(2, 3, 5, 4), "k": normal(2, 5, 3, 4)}, rtol=1e-4)
    assert names(found) == ["onnx_transpose", "onnx_attention"]


def test_a_softmax_over_other_things_stays(tmp_path: Path) -> None:
    nodes = [
        node("MatMul", ["q", "k"], ["s"]),
        node("Softmax", ["s"], ["p"], axis=-1),
        node("MatMul", ["p", "q"], ["y"]),
    ]
    proto = model(nodes, {"q": (F, [2, 3, 4, 4]), "k": (F, [2, 3, 4, 4])}, ["y"])
    found = agrees(proto, tmp_path, {"q": normal(2, 3, 4, 4), "k": normal(2, 3, 4, 4)}, rtol=1e-4)
    assert "onnx_attention" not in names(found)
    assert decisions(found, "attention", False) == [
        "its right side is no transpose of the last two axes"
    ]
