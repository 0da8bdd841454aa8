"""The argument structs of the kernels, declared once.

`args.h` (what the kernels read) and the initialisers of `plan.cc` (what the plan passes) are both
made from this table, and `args.h` asserts every offset computed here, so that Python and C++
cannot disagree about a struct without the compiler saying so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property
from typing import Literal

import numpy as np

from ..ir.errors import IRError

CType = Literal["Ref", "int32_t", "int64_t", "float"]

# (size, alignment) under the System V x86-64 ABI; Ref is {int32_t space; int64_t offset;}
_ABI: dict[CType, tuple[int, int]] = {
    "Ref": (16, 8),
    "int32_t": (4, 4),
    "int64_t": (8, 8),
    "float": (4, 4),
}


class Space(IntEnum):
    """Where an operand lives; the numbers are those of `hb::Space` in hb.h."""

    NONE = 0
    WEIGHTS = 1
    ARENA = 2
    STATE = 3
    LOGITS = 4


class Count(IntEnum):
    """Which row count of the step a kernel runs over; the numbers are `hb::Count`."""

    TOKENS = 0
    ROWS_WANTED = 1


class Prologue(IntEnum):
    """What a linear does to its input row first; the numbers are `hb::Prologue`."""

    NONE = 0
    RMSNORM = 1
    SILU_MUL = 2


class Epilogue(IntEnum):
    """What a linear does to its sums before a residual; the numbers are `hb::Epilogue`."""

    NONE = 0
    GELU = 1


class Element(IntEnum):
    """The dtype of an operand that exists in more than one; the numbers are `hb::Element`."""

    F32 = 0
    BF16 = 1
    F8E4M3 = 2


@dataclass(frozen=True, slots=True)
class Ref:
    """An address known at compile time: a space and an offset in it.

    ARENA offsets count bytes per token (address = arena + offset * bucket_tokens), STATE offsets of
    paged caches bytes per page; the others count bytes. The default is an absent operand.
    """

    space: Space = Space.NONE
    offset: int = 0


FieldValue = Ref | int | float | Sequence[int]


@dataclass(frozen=True, slots=True)
class Field:
    """One member of an argument struct; `count` > 1 makes it a C array."""

    name: str
    ctype: CType
    note: str = ""
    count: int = 1

    @property
    def declaration(self) -> str:
        array = f"[{self.count}]" if self.count > 1 else ""
        return f"{self.ctype} {self.name}{array};"


@dataclass(frozen=True)
class ArgsStruct:
    """A kernel argument struct: fields in the order of memory."""

    name: str
    doc: str
    fields: tuple[Field, ...]

    @cached_property
    def offsets(self) -> dict[str, int]:
        """Byte offset of every field."""
        return self._layout[0]

    @cached_property
    def size(self) -> int:
        """sizeof the struct in bytes."""
        return self._layout[1]

    @cached_property
    def _layout(self) -> tuple[dict[str, int], int]:
        offsets: dict[str, int] = {}
        at = 0
        for field in self.fields:
            size, align = _ABI[field.ctype]
            at = -(-at // align) * align
            offsets[field.name] = at
            at += size * field.count
        widest = max(_ABI[field.ctype][1] for field in self.fields)
        return offsets, -(-at // widest) * widest

    def initialiser(self, values: Mapping[str, FieldValue]) -> str:
        """A braced C++ initialiser with one designator per given field, in memory order.

        A field left out is zero (an absent Ref). IRError: a name the struct has not, or a value of
        another kind than its field.
        """
        unknown = sorted(set(values) - set(self.offsets))
        if unknown:
            raise IRError(
                f"{self.name}: no field {unknown[0]!r}, expected one of {', '.join(self.offsets)}"
            )
        parts = [
            f".{field.name} = {_literal(self.name, field, values[field.name])}"
            for field in self.fields
            if field.name in values
        ]
        return "{" + ", ".join(parts) + "}"


def _literal(struct: str, field: Field, value: FieldValue) -> str:
    where = f"{struct}.{field.name}"
    if isinstance(value, Ref):
        if field.ctype == "Ref":
            return f"{{{int(value.space)}, {value.offset}}}"
    elif field.count > 1:
        if isinstance(value, Sequence) and len(value) <= field.count:
            return "{" + ", ".join(str(int(item)) for item in value) + "}"
    elif isinstance(value, int | float) and field.ctype != "Ref":
        return _number(where, field.ctype, value)
    kind = field.declaration.removesuffix(";")
    raise IRError(f"{where}: value does not fit the field, expected {kind}, found {value!r}")


def _number(where: str, ctype: CType, value: int | float) -> str:
    if ctype == "float":
        single = np.float32(value)
        if not np.isfinite(single):
            raise IRError(f"{where}: not a finite float32, found {value!r}")
        text = str(single)
        return (text if any(mark in text for mark in ".en") else text + ".0") + "f"
    bits = 31 if ctype == "int32_t" else 63
    if value != int(value) or not -(1 << bits) <= value < 1 << bits:
        raise IRError(f"{where}: expected a value of {ctype}, found {value!r}")
    return str(int(value))


def _refs(*names: str) -> tuple[Field, ...]:
    return tuple(Field(name, "Ref") for name in names)


def _ints(*names: str) -> tuple[Field, ...]:
    return tuple(Field(name, "int32_t") for name in names)


_ROWS = Field("rows", "int32_t", "Count: which row count of the step this runs over")
_EPS = Field("eps", "float")
_OUT_TYPE = Field("out_type", "int32_t", "Element")
_SCALE = Field("scale", "float")
_CACHE_TYPE = Field("cache_type", "int32_t", "Element")
_X_STRIDE = Field("x_stride", "int64_t", "elements from one row of x to the next")

LINEAR = ArgsStruct(
    "LinearArgs",
    "y[m,n] = E(sum_k P(x)[m,k] * W[n,k] (+ bias[n])) (+ residual[m,n]); W in the target's\n"
    "layout.\n"
    "E by `epilogue`, of cpu kernels alone: none, or gelu, x/2 * (1 + erf(x / sqrt(2))).\n"
    "P by `prologue`: none; rmsnorm: x * rsqrt(mean(x^2) + eps) * gamma; silu_mul: the row of x\n"
    "is [gate(k) | up(k)] and P = silu(gate) * up. W4A4 kernels then quantise P by input_scale.\n"
    "out has a row stride of n floats and may be the residual itself.",
    (
        *_refs("x", "w", "row_scale", "gamma", "bias", "residual", "input_scale", "out"),
        *_ints("n", "k"),
        _ROWS,
        Field("prologue", "int32_t", "Prologue"),
        Field("epilogue", "int32_t", "Epilogue"),
        _EPS,
        _OUT_TYPE,
        _X_STRIDE,
    ),
)

NVFP4_LINEAR = ArgsStruct(
    "Nvfp4LinearArgs",
    "LinearArgs over an NVFP4 weight whose block scales are a buffer of their own:\n"
    "y[m,n] = sum_k P(x)[m,k] * W[n,k] * row_scale[n] (+ bias[n]) (+ residual[m,n]).\n"
    "W4A4 kernels first quantise P(x) by input_scale.",
    (
        *_refs("x", "w", "scales", "row_scale", "gamma", "bias", "residual", "input_scale", "out"),
        *_ints("n", "k"),
        _ROWS,
        Field("prologue", "int32_t", "Prologue"),
        _EPS,
        _OUT_TYPE,
        _X_STRIDE,
    ),
)

MAX_SHARDS = 8
ROWMAJOR_LINEAR = ArgsStruct(
    "RowmajorLinearArgs",
    "LinearArgs over an NVFP4 weight as its checkpoint stores it: packed e2m1 [n, k/2], e4m3\n"
    "block scales [n, k/16], one f32 global scale for each of `shards` ranges of output rows;\n"
    "range s ends before row shard_end[s].",
    (
        *_refs("x", "w", "scales", "global_scales", "gamma", "bias", "residual", "out"),
        *_ints("n", "k"),
        _ROWS,
        Field("prologue", "int32_t", "Prologue"),
        _EPS,
        Field("shards", "int32_t"),
        _X_STRIDE,
        Field("shard_end", "int32_t", count=MAX_SHARDS),
    ),
)

EMBED = ArgsStruct(
    "EmbedArgs",
    "out[t,:] = table[ids[t],:] * scale; table [n, k] in dense p16.",
    (*_refs("table", "out"), *_ints("n", "k"), _SCALE),
)

ROPE_APPEND = ArgsStruct(
    "RopeAppendArgs",
    "qkv [T, (heads + 2*kv_heads) * head_dim] -> q rotated [T, heads*head_dim] in out; k rotated\n"
    "and v written to cache[head][pos + t][:]. Optional RMS norm per head (q_gamma, k_gamma)\n"
    "before the rotation. rotate-half pairs; angle pos * inv_freq; cos and sin times `scale`.\n"
    "A cache of F8E4M3 holds e4m3(k / k_scale) and e4m3(v / v_scale), saturating.",
    (
        *_refs("qkv", "q_gamma", "k_gamma", "inv_freq", "k_cache", "v_cache", "out"),
        *_ints("heads", "kv_heads", "head_dim"),
        _EPS,
        _SCALE,
        _CACHE_TYPE,
        Field("k_scale", "float"),
        Field("v_scale", "float"),
    ),
)

ATTENTION = ArgsStruct(
    "AttentionArgs",
    "Causal attention over the cache: the query of token t sees keys 0..pos+t, and of those only\n"
    "the last `window` when window > 0. q, out [T, heads*head_dim]; caches [kv_heads, context,\n"
    "head_dim]. Scores q . k * scale become softcap * tanh(score / softcap) when softcap > 0.\n"
    "Keys of F8E4M3 have their scale in `scale`; values are times v_scale, elsewhere 1.",
    (
        *_refs("q", "k_cache", "v_cache", "out"),
        *_ints("heads", "kv_heads", "head_dim", "window"),
        _SCALE,
        Field("softcap", "float"),
        Field("v_scale", "float"),
    ),
)

NORM = ArgsStruct(
    "NormArgs",
    "out = x * rsqrt(mean(x^2) + eps) * gamma over rows of k floats, `groups` of them per token\n"
    "(1, or the heads of a qk-norm).",
    (
        *_refs("x", "gamma", "out"),
        *_ints("k", "groups"),
        _ROWS,
        _EPS,
        Field("x_type", "int32_t", "Element"),
    ),
)

BINARY = ArgsStruct(
    "BinaryArgs",
    "out = a op b, rows of k floats; out may alias a or b.",
    (
        *_refs("a", "b", "out"),
        *_ints("k"),
        _ROWS,
        *(Field(f"{name}_type", "int32_t", "Element") for name in ("a", "b", "out")),
    ),
)

TAKE_ROWS = ArgsStruct(
    "TakeRowsArgs",
    "out[r,:] = x[step.rows[r],:], k floats.",
    (*_refs("x", "out"), *_ints("k")),
)

ROPE = ArgsStruct(
    "RopeArgs",
    "out = rotate_half(x) [T, heads*head_dim]; angle pos * inv_freq; cos and sin times `scale`.",
    (*_refs("x", "inv_freq", "out"), *_ints("heads", "head_dim"), _SCALE),
)

KV_APPEND = ArgsStruct(
    "KvAppendArgs",
    "cache[head][pos + t][:] = x[t, head, :]; e4m3(x / cache_scale) in a cache of F8E4M3.",
    (*_refs("x", "cache"), *_ints("heads", "head_dim"), _CACHE_TYPE, Field("cache_scale", "float")),
)

ARGS: tuple[ArgsStruct, ...] = (
    LINEAR,
    NVFP4_LINEAR,
    ROWMAJOR_LINEAR,
    EMBED,
    ROPE_APPEND,
    ATTENTION,
    NORM,
    BINARY,
    TAKE_ROWS,
    ROPE,
    KV_APPEND,
)
