"""Whole networks as ONNX graphs in the spelling of torch exports (opset 17): BERT and a Llama-like
decoder. No torch: the nodes are written here, the weights come from the caller.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

Weights = Mapping[str, Any]
OPSET = 17


@dataclass
class Writer:
    """Writes nodes and names what they make."""

    nodes: list[NodeProto] = field(default_factory=list[NodeProto])
    stored: dict[str, TensorProto] = field(default_factory=dict[str, TensorProto])

    def op(self, kind: str, *inputs: str, outputs: int = 1, **attrs: Any) -> str:
        name = f"{kind.lower()}_{len(self.nodes)}"
        outs = [name] if outputs == 1 else [f"{name}_{i}" for i in range(outputs)]
        self.nodes.append(helper.make_node(kind, list(inputs), outs, name=name, **attrs))
        return outs[0]

    def const(self, data: Any, name: str = "") -> str:
        name = name or f"c_{len(self.stored)}"
        self.stored.setdefault(name, numpy_helper.from_array(np.asarray(data), name))
        return name

    def ints(self, *values: int) -> str:
        return self.const(np.array(values, np.int64))

    def number(self, value: float) -> str:
        return self.const(np.float32(value))

    def linear(self, x: str, name: str, weights: Weights) -> str:
        w = self.const(weights[f"{name}.weight"], f"{name}.weight")
        y = self.op("MatMul", x, self.op("Transpose", w, perm=[1, 0]))
        bias = weights.get(f"{name}.bias")
        return y if bias is None else self.op("Add", self.const(bias, f"{name}.bias"), y)

    def heads(self, x: str, heads: int, width: int) -> str:
        """[B, T, heads * width] to [B, heads, T, width], its extents read off x."""
        shape = self.op("Shape", x)
        leading = self.op("Slice", shape, self.ints(0), self.ints(2))
        target = self.op("Concat", leading, self.ints(heads, width), axis=0)
        return self.op("Transpose", self.op("Reshape", x, target), perm=[0, 2, 1, 3])

    def joined(self, x: str, width: int) -> str:
        """[B, heads, T, ..] back to [B, T, width]."""
        turned = self.op("Transpose", x, perm=[0, 2, 1, 3])
        leading = self.op("Slice", self.op("Shape", turned), self.ints(0), self.ints(2))
        return self.op("Reshape", turned, self.op("Concat", leading, self.ints(width), axis=0))

    def attention(self, q: str, k: str, v: str, mask: str, width: int) -> str:
        flipped = self.op("Transpose", k, perm=[0, 1, 3, 2])
        scores = self.op("Div", self.op("MatMul", q, flipped), self.number(width**0.5))
        p = self.op("Softmax", self.op("Add", scores, mask), axis=-1)
        return self.op("MatMul", p, v)

    def model(self, inputs: dict[str, tuple[int, list[Any]]], output: str) -> ModelProto:
        self.nodes.append(helper.make_node("Identity", [output], ["output"]))
        graph = helper.make_graph(
            self.nodes, "network",
            [helper.make_tensor_value_info(n, t, d) for n, (t, d) in inputs.items()],
            [helper.make_tensor_value_info("output", TensorProto.FLOAT, None)],
            list(self.stored.values()),
        )  # fmt: skip
        opset = helper.make_opsetid("", OPSET)
        return helper.make_model(graph, opset_imports=[opset], ir_version=8)


# --- BERT -----------------------------------------------------------------------------------------


def bert(weights: Weights, layers: int, heads: int) -> ModelProto:
    """input_ids, attention_mask i64 [B, T] -> hidden states f32 [B, T, width].

    Weights by the names of a `BertModel` checkpoint.
    """
    w = Writer()
    table = w.const(
        weights["embeddings.word_embeddings.weight"], "embeddings.word_embeddings.weight"
    )
    width = weights["embeddings.word_embeddings.weight"].shape[1]
    length = w.op("Slice", w.op("Shape", "input_ids"), w.ints(1), w.ints(2))
    positions = w.const(weights["embeddings.position_embeddings.weight"], "positions")
    kinds = w.const(weights["embeddings.token_type_embeddings.weight"][0], "token_type")
    place = w.op("Slice", positions, w.ints(0), length, w.ints(0))
    h = w.op("Add", w.op("Add", w.op("Gather", table, "input_ids"), kinds), place)
    h = _layer_norm(w, h, "embeddings.LayerNorm", weights)
    kept = w.op("Cast", w.op("Unsqueeze", "attention_mask", w.ints(1, 2)), to=TensorProto.FLOAT)
    mask = w.op("Mul", w.op("Sub", w.number(1), kept), w.number(-3.4e38))
    for i in range(layers):
        h = _bert_layer(w, h, mask, f"encoder.layer.{i}", weights, heads, width // heads)
    ids: tuple[int, list[Any]] = (TensorProto.INT64, ["batch", "sequence"])
    return w.model({"input_ids": ids, "attention_mask": ids}, h)


def _bert_layer(
    w: Writer, h: str, mask: str, at: str, weights: Weights, heads: int, head: int
) -> str:
    q, k, v = (
        w.heads(w.linear(h, f"{at}.attention.self.{n}", weights), heads, head)
        for n in ("query", "key", "value")
    )
    a = w.joined(w.attention(q, k, v, mask, head), heads * head)
    h = w.op("Add", w.linear(a, f"{at}.attention.output.dense", weights), h)
    h = _layer_norm(w, h, f"{at}.attention.output.LayerNorm", weights)
    x = w.linear(h, f"{at}.intermediate.dense", weights)
    one_more = w.op("Add", w.op("Erf", w.op("Div", x, w.number(2**0.5))), w.number(1))
    x = w.op("Mul", w.op("Mul", x, one_more), w.number(0.5))
    h = w.op("Add", w.linear(x, f"{at}.output.dense", weights), h)
    return _layer_norm(w, h, f"{at}.output.LayerNorm", weights)


def _layer_norm(w: Writer, x: str, name: str, weights: Weights) -> str:
    """As exports before LayerNormalization was an operator."""
    d = w.op("Sub", x, w.op("ReduceMean", x, axes=[-1]))
    variance = w.op("ReduceMean", w.op("Pow", d, w.number(2)), axes=[-1])
    normal = w.op("Div", d, w.op("Sqrt", w.op("Add", variance, w.number(1e-12))))
    scaled = w.op("Mul", normal, w.const(weights[f"{name}.weight"], f"{name}.weight"))
    return w.op("Add", scaled, w.const(weights[f"{name}.bias"], f"{name}.bias"))


def bert_weights(layers: int = 2, width: int = 32, inner: int = 64, vocab: int = 50) -> Weights:
    """Random weights of a small BERT, by checkpoint names."""
    rng = np.random.default_rng(5)

    def normal(*shape: int) -> Any:
        return (rng.standard_normal(shape) / np.sqrt(shape[-1])).astype(np.float32)

    e = "embeddings."
    found = {f"{e}word_embeddings.weight": normal(vocab, width),
             f"{e}position_embeddings.weight": normal(24, width),
             f"{e}token_type_embeddings.weight": normal(2, width)}  # fmt: skip
    norms, linears = [f"{e}LayerNorm"], dict[str, tuple[int, int]]()
    for i in range(layers):
        at = f"encoder.layer.{i}."
        norms += [f"{at}attention.output.LayerNorm", f"{at}output.LayerNorm"]
        linears |= {f"{at}attention.self.{n}": (width, width) for n in ("query", "key", "value")}
        linears[f"{at}attention.output.dense"] = (width, width)
        linears[f"{at}intermediate.dense"] = (inner, width)
        linears[f"{at}output.dense"] = (width, inner)
    for name in norms:
        found |= {f"{name}.weight": 1 + normal(width) / 4, f"{name}.bias": normal(width)}
    for name, (n, k) in linears.items():
        found |= {f"{name}.weight": normal(n, k), f"{name}.bias": normal(n)}
    return found


# --- a Llama-like decoder -------------------------------------------------------------------------


@dataclass(frozen=True)
class LlamaShape:
    width: int = 32
    inner: int = 48
    heads: int = 4
    kv_heads: int = 2
    layers: int = 2
    vocab: int = 60


def llama(shape: LlamaShape = LlamaShape(), seed: int = 6) -> ModelProto:  # noqa: B008
    """input_ids i64 [B, T] -> logits f32 [B, T, vocab]; causal, grouped keys, rotary positions."""
    rng = np.random.default_rng(seed)
    w, head = Writer(), shape.width // shape.heads

    def normal(*dims: int) -> Any:
        return (rng.standard_normal(dims) / np.sqrt(dims[-1])).astype(np.float32)

    length = w.op("Slice", w.op("Shape", "input_ids"), w.ints(1), w.ints(2))
    last = w.op("Squeeze", length, w.ints(0))
    steps = w.op("Range", w.const(np.int64(0)), last, w.const(np.int64(1)))
    cos, sin = _tables(w, steps, head)
    rows, columns = w.op("Unsqueeze", steps, w.ints(1)), w.op("Unsqueeze", steps, w.ints(0))
    mask = w.op("Where", w.op("Greater", columns, rows), w.number(-3.4e38), w.number(0))
    table = w.const(normal(shape.vocab, shape.width), "embed.weight")
    h = w.op("Gather", table, "input_ids")
    sizes = {"q": shape.heads * head, "k": shape.kv_heads * head, "v": shape.kv_heads * head}
    for i in range(shape.layers):
        at = f"layers.{i}."
        x = _rms_norm(w, h, w.const(1 + normal(shape.width) / 4))
        weights = {f"{at}{n}.weight": normal(size, shape.width) for n, size in sizes.items()}
        weights |= {f"{at}o.weight": normal(shape.width, shape.width),
                    f"{at}gate.weight": normal(shape.inner, shape.width),
                    f"{at}up.weight": normal(shape.inner, shape.width),
                    f"{at}down.weight": normal(shape.width, shape.inner)}  # fmt: skip
        q = rotated(w, w.heads(w.linear(x, f"{at}q", weights), shape.heads, head), cos, sin, head)
        k = rotated(
            w, w.heads(w.linear(x, f"{at}k", weights), shape.kv_heads, head), cos, sin, head
        )
        v = w.heads(w.linear(x, f"{at}v", weights), shape.kv_heads, head)
        groups = shape.heads // shape.kv_heads
        a = w.attention(q, _repeated(w, k, groups, head), _repeated(w, v, groups, head), mask, head)
        h = w.op("Add", h, w.linear(w.joined(a, shape.width), f"{at}o", weights))
        x = _rms_norm(w, h, w.const(1 + normal(shape.width) / 4))
        gate = w.linear(x, f"{at}gate", weights)
        x = w.op("Mul", w.op("Mul", gate, w.op("Sigmoid", gate)), w.linear(x, f"{at}up", weights))
        h = w.op("Add", h, w.linear(x, f"{at}down", weights))
    h = _rms_norm(w, h, w.const(1 + normal(shape.width) / 4))
    logits = w.linear(h, "head", {"head.weight": normal(shape.vocab, shape.width)})
    return w.model({"input_ids": (TensorProto.INT64, ["batch", "sequence"])}, logits)


def _rms_norm(w: Writer, x: str, scale: str) -> str:
    mean = w.op("ReduceMean", w.op("Pow", x, w.number(2)), axes=[-1])
    root = w.op("Sqrt", w.op("Add", mean, w.number(1e-5)))
    return w.op("Mul", scale, w.op("Mul", x, w.op("Div", w.number(1), root)))


def _tables(w: Writer, steps: str, head: int) -> tuple[str, str]:
    """Cosines and sines [1, 1, T, head], each half twice, as transformers has them."""
    frequencies = w.const((10000.0 ** (-np.arange(0, head, 2) / head)).astype(np.float32)[None])
    column = w.op("Unsqueeze", w.op("Cast", steps, to=TensorProto.FLOAT), w.ints(1))
    angles = w.op("Unsqueeze", w.op("MatMul", column, frequencies), w.ints(0))
    both = w.op("Concat", angles, angles, axis=-1)
    cos, sin = (w.op("Unsqueeze", w.op(kind, both), w.ints(1)) for kind in ("Cos", "Sin"))
    return cos, sin


def rotated(w: Writer, x: str, cos: str, sin: str, head: int) -> str:
    """x cos + rotate_half(x) sin."""
    half, end = w.ints(head // 2), w.ints(2**63 - 1)
    low = w.op("Slice", x, w.ints(0), half, w.ints(3))
    high = w.op("Slice", x, half, end, w.ints(3))
    turned = w.op("Concat", w.op("Neg", high), low, axis=-1)
    return w.op("Add", w.op("Mul", x, cos), w.op("Mul", turned, sin))


def _repeated(w: Writer, x: str, times: int, head: int) -> str:
    """Each head `times` times, as transformers' repeat_kv."""
    shape = w.op("Shape", x)
    batch, heads, length = (w.op("Slice", shape, w.ints(i), w.ints(i + 1)) for i in range(3))
    wide = w.op("Concat", batch, heads, w.ints(times), length, w.ints(head), axis=0)
    spread = w.op("Expand", w.op("Unsqueeze", x, w.ints(2)), wide)
    many = w.op("Mul", heads, w.ints(times))
    return w.op("Reshape", spread, w.op("Concat", batch, many, length, w.ints(head), axis=0))
