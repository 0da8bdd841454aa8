"""Ops on weights: all constant, evaluated once when the artifact is written."""

from __future__ import annotations

from typing import Any

import numpy as np

from . import layouts, layouts_cuda, numerics
from .errors import IRError
from .gguf_blocks import dequantize_gguf
from .graph import Op
from .numerics import NUMPY_DTYPES, Array
from .opdef import Data, OpDef, array, expect, nvfp4, parts, plain
from .types import (
    LINEAR,
    P16,
    PANEL_ROWS,
    SFATOM,
    TILE_ROWS,
    WGMMA,
    Gguf,
    Nvfp4,
    Plain,
    TensorType,
    tensor,
)  # fmt: skip


def _source(op: Op) -> TensorType:
    if not op.outs:
        raise IRError(f"{op.name}: the type of a source is declared, not inferred")
    return op.out.type


def _no_reference(op: Op, args: list[Data]) -> Data:
    raise IRError(f"{op.name}: its data comes from outside the graph")


def _same_type(op: Op) -> TensorType:
    return op.args[0].type


# --- dequantize: what a checkpoint's quantised tensor means --------------------------------------


def _infer_dequantize(op: Op) -> TensorType:
    form = op.get("format", "")
    if form == "gguf":
        type_ = op.args[0].type
        if not isinstance(type_.enc, Gguf):
            raise IRError(f"dequantize: operand 0 is {type_}, expected GGUF blocks")
        if len(op.args) > 1 and plain(op, 1, "f32").static not in ((), (1,)):
            raise IRError(f"dequantize: gguf scale is {op.args[1].type}, expected one f32")
        return type_.with_enc(Plain("f32"))
    if form == "fp8":
        n, k = plain(op, 0, "f8e4m3").static
        scale = plain(op, 1, "f32").static
        if scale not in ((), (1,), (n,), (n, 1)):
            raise IRError(f"dequantize: fp8 scale {scale}, expected one or one per row of {n}")
        return tensor("f32", n, k)
    if form != "nvfp4":
        raise IRError(f"dequantize: unknown format {form!r}, expected nvfp4, fp8 or gguf")
    return _infer_pack(op).with_enc(Plain("f32"))


def _dequantize(op: Op, args: list[Data]) -> Data:
    form = op.get("format", "")
    if form == "gguf":
        enc = op.args[0].type.enc
        assert isinstance(enc, Gguf)
        values = dequantize_gguf(enc.kind, array(args[0]))
        return values * array(args[1]).astype(np.float32).reshape(()) if args[1:] else values
    if form == "fp8":
        scale = array(args[1]).astype(np.float32).reshape(-1, 1)
        return array(args[0]).astype(np.float32) * scale
    packed, sf, gs = map(array, args)
    rows = np.full(packed.shape[0], gs.reshape(()), np.float32)
    return numerics.dequantize_nvfp4(packed, sf, rows).astype(np.float32)


# --- nvfp4 values --------------------------------------------------------------------------------


def _infer_pack(op: Op) -> TensorType:
    n, half = plain(op, 0, "u8").static
    expect(op, "shape of the block scales", plain(op, 1, "f8e4m3").static, (n, half * 2 // 16))
    if plain(op, 2, "f32").static not in ((), (1,)):
        raise IRError(f"{op.name}: global scale is {op.args[2].type}, expected one f32")
    return TensorType((n, half * 2), Nvfp4())


def _pack(op: Op, args: list[Data]) -> Data:
    packed, sf, gs = map(array, args)
    return {"": packed, "sf": sf, "gs": gs.astype(np.float32).reshape(1)}


def _infer_quantize_weight(op: Op) -> TensorType:
    n, k = plain(op, 0, "f32").static
    if k % numerics.BLOCK:
        raise IRError(f"quantize_weight: last axis {k} is not a multiple of {numerics.BLOCK}")
    return TensorType((n, k), Nvfp4())


def _quantize_weight(op: Op, args: list[Data]) -> Data:
    packed, sf, gs = numerics.quantize_weight(array(args[0]))
    return {"": packed, "sf": sf, "gs": np.array([gs], np.float32)}


def _infer_relayout(op: Op) -> TensorType:
    type_, layout = op.args[0].type, op.get("layout", "")
    enc = type_.enc
    if isinstance(enc, Plain) and enc.layout == LINEAR and layout == P16:
        return type_.with_enc(Plain(enc.dtype, P16))
    if isinstance(enc, Nvfp4) and enc.layout == LINEAR and layout in (P16, SFATOM, WGMMA):
        return type_.with_enc(Nvfp4(enc.block, layout))
    raise IRError(f"relayout: no way from {type_} to layout {layout!r}")


def row_scales(enc: Nvfp4, n: int, gs: Array) -> Array:
    """The global scale of each of the n output rows, from one scale per shard."""
    return np.repeat(gs.astype(np.float32), enc.shards or (n,))


def _relayout(op: Op, args: list[Data]) -> Data:
    type_ = op.args[0].type
    if isinstance(type_.enc, Plain):
        return layouts.dense_to_p16(array(args[0]))
    _, enc = nvfp4(op, 0)
    data = parts(args[0])
    rows = row_scales(enc, type_.static[0], data["gs"])
    if op.get("layout", "") == SFATOM:
        codes, atoms = layouts_cuda.nvfp4_to_sfatom(data[""], data["sf"])
        return {"": codes, "sf": atoms, "gs": layouts.pad_to(rows, TILE_ROWS)}
    if op.get("layout", "") == WGMMA:
        codes, atoms = layouts_cuda.nvfp4_to_wgmma(data[""], data["sf"])
        tiles = codes.reshape(*codes.shape[:2], -1)
        return {"": tiles, "sf": atoms, "gs": layouts.pad_to(rows, TILE_ROWS)}
    codes = layouts.nvfp4_to_p16(data[""], data["sf"])
    return {"": codes, "gs": layouts.pad_to(rows, PANEL_ROWS)}


# --- plain weights -------------------------------------------------------------------------------


def _infer_concat(op: Op) -> TensorType:
    types = [v.type for v in op.args]
    first, tails = types[0], {t.shape[1:] for t in types}
    if len(tails) != 1:
        raise IRError(f"concat: rows differ in shape: {[str(t) for t in types]}")
    shape = (sum(t.static[0] for t in types), *first.static[1:])
    if all(isinstance(t.enc, Nvfp4) and t.enc.layout == LINEAR for t in types):
        shards: list[int] = []
        for t in types:
            assert isinstance(t.enc, Nvfp4)
            shards.extend(t.enc.shards or (t.static[0],))
        return TensorType(shape, Nvfp4(shards=tuple(shards)))
    if len({t.enc for t in types}) != 1 or not isinstance(first.enc, Plain):
        raise IRError(f"concat: encodings differ: {[str(t) for t in types]}")
    return TensorType(shape, first.enc)


def _concat(op: Op, args: list[Data]) -> Data:
    if isinstance(args[0], dict):
        return {s: np.concatenate([parts(a)[s] for a in args]) for s in args[0]}
    return np.concatenate([array(a) for a in args])


def _infer_cast(op: Op) -> TensorType:
    return plain(op, 0).with_enc(Plain(op.get("to", "")))


def _cast(op: Op, args: list[Data]) -> Data:
    to: np.dtype[Any] = NUMPY_DTYPES[op.get("to", "")]
    with np.errstate(over="ignore"):
        return array(args[0]).astype(to)


def _infer_unpermute(op: Op) -> TensorType:
    type_, heads = plain(op, 0), op.get("heads", 0)
    if heads <= 0 or type_.static[0] % (2 * heads):
        raise IRError(f"unpermute_rows: {type_.static[0]} rows do not split into {heads} heads")
    return type_


def _unpermute(op: Op, args: list[Data]) -> Data:
    w, heads = array(args[0]), op.get("heads", 0)
    pairs = w.reshape(heads, w.shape[0] // heads // 2, 2, *w.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(w.shape)


def _reciprocal(op: Op, args: list[Data]) -> Data:
    return np.float32(1) / array(args[0]).astype(np.float32)


def _infer_reciprocal(op: Op) -> TensorType:
    return plain(op, 0, "f32")


def _infer_expand_rows(op: Op) -> TensorType:
    n = op.get("rows", 0)
    if plain(op, 0, "f32").static not in ((), (1,), (n,), (n, 1)):
        raise IRError(f"expand_rows: {op.args[0].type} does not spread over {n} rows")
    return tensor("f32", n)


def _expand_rows(op: Op, args: list[Data]) -> Data:
    flat = array(args[0]).astype(np.float32).reshape(-1)
    return np.ascontiguousarray(np.broadcast_to(flat, (op.get("rows", 0),)))


def _add_one(op: Op, args: list[Data]) -> Data:
    return array(args[0]).astype(np.float32) + np.float32(1)


OPS: dict[str, OpDef] = {
    "weight": OpDef("a tensor of the checkpoint", 0, 0, _source, _no_reference,
                    attrs={"source": "its name there"}),
    "state": OpDef("memory that outlives a step (KV cache), zero at first", 0, 0, _source,
                   _no_reference, attrs={"source": "its name"}),
    "dequantize": OpDef("quantised tensor to f32, as its producer means it", 1, 3,
                        _infer_dequantize, _dequantize, attrs={"format": "nvfp4, fp8, gguf"}),
    "pack_nvfp4": OpDef("codes, block scales, global scale become one nvfp4 value", 3, 3,
                        _infer_pack, _pack),
    "quantize_weight": OpDef("f32 weights to nvfp4", 1, 1, _infer_quantize_weight,
                             _quantize_weight),
    "relayout": OpDef("the same weights in a kernel's layout, a byte permutation", 1, 1,
                      _infer_relayout, _relayout, attrs={"layout": "of a kernel"}),
    "concat": OpDef("output rows of several weights, each keeping its global scale", 2, 64,
                    _infer_concat, _concat),
    "cast": OpDef("another dtype, rounded to nearest even", 1, 1, _infer_cast, _cast,
                  attrs={"to": "dtype"}),
    "unpermute_rows": OpDef("q/k rows of a llama-arch GGUF back to half-rotation order", 1, 1,
                            _infer_unpermute, _unpermute, attrs={"heads": "row groups"}),
    "reciprocal": OpDef("1 / x in f32 (compressed-tensors stores divisors)", 1, 1,
                        _infer_reciprocal, _reciprocal),
    "expand_rows": OpDef("one scale, or one per row, as one per row", 1, 1, _infer_expand_rows,
                         _expand_rows, attrs={"rows": "output rows"}),
    "add_one": OpDef("1 + w (norms stored around zero)", 1, 1, _same_type, _add_one),
}  # fmt: skip
