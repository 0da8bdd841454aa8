"""Ops -> kernel arguments: where each operand lies, as the fields of the kernel's struct."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate

from ..ir.errors import IRError
from ..ir.graph import Op, Place, Value
from ..ir.ops_fused import role
from ..ir.ops_model import rows_of
from ..ir.types import PAGED, Nvfp4, Plain, TensorType
from . import args
from .args import ArgsStruct, Count, Element, Epilogue, FieldValue, Prologue, Ref, Space

Fields = dict[str, FieldValue]

_SPACES = {
    "arena": Space.ARENA,
    "state": Space.STATE,
    "weights": Space.WEIGHTS,
    "out": Space.LOGITS,
}
PROLOGUES = {
    "none": Prologue.NONE,
    "rmsnorm": Prologue.RMSNORM,
    "silu_mul": Prologue.SILU_MUL,
}
EPILOGUES = {"none": Epilogue.NONE, "gelu": Epilogue.GELU}


def lower(op: Op, struct: ArgsStruct) -> Fields:
    """The argument fields of a launch of `op`. IRError: an operand has no place."""
    return _LOWER[struct.name](op)


def place_of(value: Value) -> Place:
    """Where phase 40 put a value. IRError: nowhere."""
    if value.place is None or value.place.space not in _SPACES:
        raise IRError(f"{value}: expected a place in {', '.join(_SPACES)}, found {value.place}")
    return value.place


def ref(value: Value | None, suffix: str = "") -> Ref:
    """The address of a value, or of one of its parts; absent for None."""
    if value is None:
        return Ref()
    place = place_of(value)
    offset = place.offset
    if place.space == "weights":
        at = {part.suffix: at for at, part in value.type.placed_parts()}
        if suffix not in at:
            raise IRError(f"{value}: {value.type} has no part {suffix!r}, expected {sorted(at)}")
        offset += at[suffix]
    if place.space == "state":
        offset //= pages_of(value.type)
    return Ref(_SPACES[place.space], offset)


def pages_of(cache: TensorType) -> int:
    """Pages of a paged cache of the whole context: its plan counts bytes per page. Else 1."""
    if isinstance(cache.enc, Plain) and cache.enc.layout == PAGED:
        return cache.enc.parts(cache.static)[0].shape[0]
    return 1


def _types(**operands: Value) -> Fields:
    """The Element of activations, where it is not f32, which is 0."""
    found: Fields = {}
    for name, value in operands.items():
        enc = value.type.enc
        if not isinstance(enc, Plain) or enc.dtype.upper() not in Element.__members__:
            raise IRError(f"{value}: expected f32, bf16 or f8e4m3, found {enc}")
        if enc.dtype != "f32":
            found[f"{name}_type"] = int(Element[enc.dtype.upper()])
    return found


def _rows(value: Value) -> int:
    """The Count of an activation: what its leading extent stands for."""
    return int(Count.ROWS_WANTED if rows_of(value.type.count) == "rows" else Count.TOKENS)


def _any_linear(op: Op) -> Fields:
    """What the structs of linears share."""
    x, w = op.args[:2]
    n, k = w.type.static
    operands = {name: ref(role(op, name)) for name in ("gamma", "bias", "residual")}
    return {
        "x": ref(x),
        "w": ref(w),
        **{name: at for name, at in operands.items() if at.space},
        "out": ref(op.out),
        "n": n,
        "k": k,
        "rows": _rows(op.out),
        "prologue": int(PROLOGUES[op.get("prologue", "none")]),
        "eps": op.get("eps", 0.0),
        "x_stride": x.type.last,
    }


def _linear(op: Op) -> Fields:
    fields = _any_linear(op)
    w = op.args[1]
    nvfp4 = isinstance(w.type.enc, Nvfp4)
    row_scale = ref(w, "gs") if nvfp4 else ref(role(op, "row_scale"))
    fields["epilogue"] = int(EPILOGUES[op.get("epilogue", "none")])
    optional = {"row_scale": row_scale, "input_scale": ref(role(op, "input_scale"))}
    return fields | {name: at for name, at in optional.items() if at.space} | _types(out=op.out)


def _nvfp4_linear(op: Op) -> Fields:
    w = op.args[1]
    parts: Fields = {"scales": ref(w, "sf"), "row_scale": ref(w, "gs")}
    if input_scale := role(op, "input_scale"):
        parts["input_scale"] = ref(input_scale)
    return _any_linear(op) | parts | _types(out=op.out)


def _rowmajor_linear(op: Op) -> Fields:
    w = op.args[1]
    if not isinstance(w.type.enc, Nvfp4):
        raise IRError(f"{op.loc}: expected an nvfp4 weight, found {w.type}")
    ends = tuple(accumulate(w.type.enc.shards or w.type.static[:1]))
    parts = {"scales": ref(w, "sf"), "global_scales": ref(w, "gs")}
    return _any_linear(op) | parts | {"shards": len(ends), "shard_end": ends}


def _embed(op: Op) -> Fields:
    n, k = op.args[1].type.static
    table, out = ref(op.args[1]), ref(op.out)
    return {"table": table, "out": out, "n": n, "k": k, "scale": op.get("scale", 1.0)}


def _heads(op: Op, *names: str) -> Fields:
    return {name: op.get(name, 0) for name in names}


def _cache_scales(op: Op, *names: str) -> Fields:
    """The scales of a quantised cache."""
    return {name: op.get(name, 0.0) for name in names if name in op.attrs}


def _rope_append(op: Op) -> Fields:
    qkv, keys, values, _, inv_freq, *gammas = op.args
    norms = {f"{which}_gamma": ref(g) for which, g in zip("qk", gammas, strict=False)}
    return {
        "qkv": ref(qkv),
        **norms,
        "inv_freq": ref(inv_freq),
        "k_cache": ref(keys),
        "v_cache": ref(values),
        "out": ref(op.out),
        **_heads(op, "heads", "kv_heads", "head_dim"),
        "eps": op.get("eps", 0.0),
        "scale": op.get("scale", 1.0),
        **_types(cache=keys),
        **_cache_scales(op, "k_scale", "v_scale"),
    }


def _attention(op: Op) -> Fields:
    names = ("q", "k_cache", "v_cache")
    return {
        **{name: ref(value) for name, value in zip(names, op.args, strict=False)},
        "out": ref(op.out),
        **_heads(op, "heads", "kv_heads", "head_dim", "window"),
        "scale": op.get("scale", 1.0) * op.get("k_scale", 1.0),
        **({"softcap": op.get("softcap", 0.0)} if "softcap" in op.attrs else {}),
        "v_scale": op.get("v_scale", 1.0),
    }


def _norm(op: Op) -> Fields:
    x, gamma = op.args
    k = gamma.type.last
    shape = {"k": k, "groups": x.type.last // k, "rows": _rows(x)}
    return {
        "x": ref(x),
        "gamma": ref(gamma),
        "out": ref(op.out),
        **shape,
        "eps": op.get("eps", 1e-6),
        **_types(x=x),
    }


def _binary(op: Op) -> Fields:
    a, b = op.args
    shape = {"k": a.type.last, "rows": _rows(a)}
    types = _types(a=a, b=b, out=op.out)
    return {"a": ref(a), "b": ref(b), "out": ref(op.out), **shape, **types}


def _take_rows(op: Op) -> Fields:
    return {"x": ref(op.args[0]), "out": ref(op.out), "k": op.out.type.last}


def _rope(op: Op) -> Fields:
    x, _, inv_freq = op.args
    operands: Fields = {"x": ref(x), "inv_freq": ref(inv_freq), "out": ref(op.out)}
    return operands | _heads(op, "heads", "head_dim") | {"scale": op.get("scale", 1.0)}


def _kv_append(op: Op) -> Fields:
    cache, x, _ = op.args
    heads, _, dim = cache.type.static
    operands: Fields = {"x": ref(x), "cache": ref(cache), "heads": heads, "head_dim": dim}
    return operands | _types(cache=cache) | _cache_scales(op, "cache_scale")


_LOWER: dict[str, Callable[[Op], Fields]] = {
    args.LINEAR.name: _linear,
    args.NVFP4_LINEAR.name: _nvfp4_linear,
    args.ROWMAJOR_LINEAR.name: _rowmajor_linear,
    args.EMBED.name: _embed,
    args.ROPE_APPEND.name: _rope_append,
    args.ATTENTION.name: _attention,
    args.NORM.name: _norm,
    args.BINARY.name: _binary,
    args.TAKE_ROWS.name: _take_rows,
    args.ROPE.name: _rope,
    args.KV_APPEND.name: _kv_append,
}
