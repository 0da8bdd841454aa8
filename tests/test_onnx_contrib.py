"""Operators of onnxruntime (com.microsoft) mean what its documentation says, in numpy."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import NodeProto, helper

from halfbyte.frontend.onnx_importer import OnnxImported
from tests.onnx_files import imported, model, names, node, with_every_operator
from tests.onnx_meaning import run

RNG = np.random.default_rng(7)


@pytest.fixture(autouse=True)
def every_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    with_every_operator(monkeypatch)


def normal(*shape: int) -> Any:
    return RNG.standard_normal(shape).astype(np.float32)


def contrib(
    nodes: list[NodeProto], tmp_path: Path, given: dict[str, Any], **inputs: Any
) -> tuple[OnnxImported, list[Any]]:
    for n in nodes:
        n.domain = "com.microsoft"
    types = {
        n: (helper.np_dtype_to_tensor_dtype(a.dtype), list(a.shape)) for n, a in inputs.items()
    }
    outs = [o for o in nodes[-1].output if o]
    found = imported(model(nodes, types, outs, given, domains=["com.microsoft"]), tmp_path)
    return found, run(found, inputs)


def layer_norm(h: Any, g: Any, b: Any = 0, eps: float = 1e-5) -> Any:
    d = h - h.mean(-1, keepdims=True)
    return d / np.sqrt((d * d).mean(-1, keepdims=True) + eps) * g + b


def test_skip_layer_normalization(tmp_path: Path) -> None:
    x, s, g, b, bias = normal(2, 3, 8), normal(2, 3, 8), normal(8), normal(8), normal(8)
    nodes = [
        node(
            "SkipLayerNormalization",
            ["x", "s", "g", "b", "bias"],
            ["y", "", "", "sum"],
            epsilon=1e-5,
        )
    ]
    _, (y, total) = contrib(nodes, tmp_path, {"g": g, "b": b, "bias": bias}, x=x, s=s)
    np.testing.assert_allclose(total, x + s + bias, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(y, layer_norm(x + s + bias, g, b), rtol=1e-4, atol=1e-5)


def test_simplified_norms_are_rms(tmp_path: Path) -> None:
    x, s, g = normal(2, 3, 8), normal(2, 3, 8), normal(8)
    nodes = [node("SkipSimplifiedLayerNormalization", ["x", "s", "g"], ["y"], epsilon=1e-5)]
    found, (y,) = contrib(nodes, tmp_path, {"g": g}, x=x, s=s)
    h = x + s
    np.testing.assert_allclose(
        y, h / np.sqrt((h * h).mean(-1, keepdims=True) + 1e-5) * g, rtol=1e-4
    )
    assert names(found) == ["onnx_add", "onnx_rms_normalization"]


def test_gelus_of_onnxruntime(tmp_path: Path) -> None:
    x, b = normal(2, 8), normal(8)
    erf = np.vectorize(math.erf)
    _, (y,) = contrib([node("BiasGelu", ["x", "b"], ["y"])], tmp_path, {"b": b}, x=x)
    np.testing.assert_allclose(
        y, (x + b) / 2 * (1 + erf((x + b) / math.sqrt(2))), rtol=1e-4, atol=1e-5
    )
    _, (y,) = contrib([node("QuickGelu", ["x"], ["y"], alpha=1.5)], tmp_path, {}, x=x)
    np.testing.assert_allclose(y, x / (1 + np.exp(-1.5 * x)), rtol=1e-4)


def test_fused_mat_mul(tmp_path: Path) -> None:
    a, b = normal(2, 3, 5, 4), normal(2, 3, 5, 4)
    nodes = [node("FusedMatMul", ["a", "b"], ["y"], alpha=0.25, transB=1)]
    _, (y,) = contrib(nodes, tmp_path, {}, a=a, b=b)
    np.testing.assert_allclose(y, 0.25 * a @ b.swapaxes(-1, -2), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("zeros", [False, True])
def test_mat_mul_nbits(tmp_path: Path, bits: int, zeros: bool) -> None:
    n, k, block = 6, 64, 32
    codes = RNG.integers(0, 1 << bits, (n, k // block, block), np.uint8)
    scale = np.abs(normal(n, k // block))
    points = RNG.integers(0, 1 << bits, (n, k // block), np.uint8)
    packed = codes if bits == 8 else codes[..., ::2] | codes[..., 1::2] << 4
    given: dict[str, Any] = {"w": packed, "s": scale.reshape(-1)}
    names_ = ["x", "w", "s"]
    if zeros:
        given["z"] = points if bits == 8 else points[:, ::2] | points[:, 1::2] << 4
        names_.append("z")
    middle = points[..., None].astype(np.float32) if zeros else np.float32(1 << (bits - 1))
    dense = ((codes - middle) * scale[..., None]).reshape(n, k).astype(np.float32)
    x = normal(2, k)
    nodes = [node("MatMulNBits", names_, ["y"], N=n, K=k, bits=bits, block_size=block)]
    found, (y,) = contrib(nodes, tmp_path, given, x=x)
    np.testing.assert_allclose(y, x @ dense.T, rtol=1e-4, atol=1e-3)
    assert names(found) == ["linear"]


@pytest.mark.parametrize("packed", [False, True])
def test_group_query_attention(tmp_path: Path, packed: bool) -> None:
    """Two key heads for four of queries, rotary positions behind a past of three."""
    heads, kv, d, past, new = 4, 2, 8, 3, 2
    q, k, v = normal(1, new, heads * d), normal(1, new, kv * d), normal(1, new, kv * d)
    pk, pv = normal(1, kv, past, d), normal(1, kv, past, d)
    angle = np.arange(16)[:, None] * (100.0 ** (-np.arange(d // 2) / (d // 2)))[None]
    given: dict[str, Any] = {
        "cos": np.cos(angle).astype(np.float32),
        "sin": np.sin(angle).astype(np.float32),
        "last": np.array([past + new - 1], np.int32),
        "total": np.int32(past + new),
    }
    data = {"q": np.concatenate([q, k, v], -1)} if packed else {"q": q, "k": k, "v": v}
    operands = [
        "q",
        *(["", ""] if packed else ["k", "v"]),
        "pk",
        "pv",
        "last",
        "total",
        "cos",
        "sin",
    ]
    nodes = [
        node(
            "GroupQueryAttention",
            operands,
            ["y", "nk", "nv"],
            num_heads=heads,
            kv_num_heads=kv,
            do_rotary=1,
        )
    ]
    _, (y, nk, nv) = contrib(nodes, tmp_path, given, **data, pk=pk, pv=pv)

    def rotated(x: Any, n: int) -> Any:
        split = x.reshape(new, n, d).transpose(1, 0, 2)
        a, b = split[..., : d // 2], split[..., d // 2 :]
        c, s = (given[t][past : past + new] for t in ("cos", "sin"))
        return np.concatenate([a * c - b * s, a * s + b * c], -1)

    keys = np.concatenate([pk[0], rotated(k, kv)], 1)
    values = np.concatenate([pv[0], v.reshape(new, kv, d).transpose(1, 0, 2)], 1)
    np.testing.assert_allclose(nk[0], keys, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(nv[0], values, rtol=1e-5)
    scores = rotated(q, heads) @ np.repeat(keys, 2, 0).swapaxes(-1, -2) / math.sqrt(d)
    scores[:, 0, -1] = -np.inf
    p = np.exp(scores - scores.max(-1, keepdims=True))
    wanted = (p / p.sum(-1, keepdims=True)) @ np.repeat(values, 2, 0)
    np.testing.assert_allclose(
        y[0], wanted.transpose(1, 0, 2).reshape(new, -1), rtol=1e-4, atol=1e-5
    )
