"""The weights of the targets of an artifact: what is stored, where, and what targets share.

Each target reads an image of its own, in its layouts. A part that a target before it has stored, of
the same bytes, is not stored again. Whether bytes are equal is known without looking at them: parts
made of the same checkpoint tensors by the same ops, in layouts that agree on the part, are equal.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from ..ir.errors import IRError
from ..ir.graph import Graph, Op, Value
from ..ir.interp import WeightSource, fold
from ..ir.numerics import Array
from ..ir.opdef import Data
from ..ir.types import Nvfp4, Part, align
from ..runtime.artifact import WEIGHTS, Run, TensorSpec, WeightFacts, WeightImage, place
from .cache import digest
from .lower import place_of

# Weights evaluated at once, ahead of the writer; numpy works without the GIL. Each takes some times
# its weight of memory, so there are never many.
_WORKERS = max(2, min(8, os.cpu_count() or 1))
_LEAST_SHARED = 4096  # bytes; smaller parts are stored again: an image of few pieces loads faster
_DTYPES = {
    "f32": "F32", "bf16": "BF16", "f16": "F16", "f8e4m3": "F8_E4M3", "f8e8m0": "F8_E8M0",
    "u8": "U8", "i8": "I8", "i32": "I32", "i64": "I64", "bool": "BOOL", "f64": "F64",
    "f8e5m2": "F8_E5M2", "i16": "I16", "u16": "U16", "u32": "U32", "u64": "U64",
    "f8e4m3fnuz": "U8", "f8e5m2fnuz": "U8", "f4e2m1": "U8", "i4": "I8", "u4": "U8", "i2": "I8",
    "u2": "U8",
}  # fmt: skip
"""The name of a dtype in the weight file, which knows no smaller ones: those take a byte."""


_CODES = {"i4": np.int8, "i2": np.int8, "u4": np.uint8, "u2": np.uint8}
"""How codes of less than a byte are written: sign-extended."""


@dataclass(frozen=True, slots=True)
class Stored:
    """One part of a weight, at `offset` of its target's image; `key` is equal where bytes are."""

    value: Value
    part: Part
    offset: int
    key: str

    @property
    def name(self) -> str:
        suffix = self.part.suffix
        return f"{self.value.name}:{suffix}" if suffix else self.value.name

    @property
    def nbytes(self) -> int:
        """With what alignment leaves free behind it."""
        return align(self.part.nbytes)


@dataclass(frozen=True, slots=True)
class Known:
    """What targets have stored so far: their files, and key -> (file, offset in its image)."""

    files: list[str] = field(default_factory=list[str])
    at: dict[str, tuple[str, int]] = field(default_factory=dict[str, tuple[str, int]])


@dataclass(frozen=True, slots=True)
class Layout:
    """The weights of one target: the file of what it stores itself, and its image in pieces."""

    file: str
    own: tuple[Stored, ...]
    image: WeightImage
    runs: tuple[Run, ...]


def stored_values(graph: Graph) -> list[Value]:
    """The constants that launches read, in the order of the image."""
    found = [v for v in graph.values() if v.place is not None and v.place.space == "weights"]
    return sorted(found, key=lambda v: place_of(v).offset)


def stored_parts(graph: Graph) -> list[Stored]:
    """Their parts, in the order of the image. IRError: phase 40 left a hole or an overlap."""
    keys = _Keys(graph)
    parts = [
        Stored(value, part, place_of(value).offset + offset, keys.of_part(value, part))
        for value in stored_values(graph)
        for offset, part in value.type.placed_parts()
    ]
    end = 0
    for part in parts:
        if part.offset != end:
            raise IRError(f"{part.name}: planned at {part.offset}, stands at {end}")
        end += part.nbytes
    return parts


def lay_out(graph: Graph, target: str, known: Known, on_device: bool) -> Layout:
    """The weights of the next target, which is added to `known`.

    One that is uploaded to a device takes pieces from other files; one that is mapped needs its
    image in one piece, and so a file with all of it.
    """
    file = f"weights-{target}.safetensors" if known.files else WEIGHTS
    parts = stored_parts(graph)
    parts = [p for p in parts if p.part.nbytes]
    own = [p for p in parts if not (on_device and p.key in known.at)]
    image = place(TensorSpec(p.name, _DTYPES[p.part.dtype], p.part.shape) for p in own)
    begins = {p.name: (file, at) for p, at in zip(own, image.offsets, strict=True)}
    runs = _runs((begins.get(p.name) or known.at[p.key], p) for p in parts)
    for p in own:
        if p.part.nbytes >= _LEAST_SHARED:
            known.at.setdefault(p.key, begins[p.name])
    known.files.append(file)
    return Layout(file, tuple(own), image, runs)


def _runs(parts: Iterator[tuple[tuple[str, int], Stored]]) -> tuple[Run, ...]:
    """Neighbours in both the file and the image as one."""
    runs: list[Run] = []
    for (file, begin), part in parts:
        last = runs[-1] if runs else None
        if last and last.file == file and last.begin + last.bytes == begin:
            runs[-1] = Run(file, last.begin, last.offset, last.bytes + part.nbytes)
        else:
            runs.append(Run(file, begin, part.offset, part.nbytes))
    return tuple(runs)


class _Keys:
    """What constants are made of, as digests."""

    def __init__(self, graph: Graph) -> None:
        self._producers = graph.producers()
        self._of: dict[Value, str] = {}

    def of_part(self, value: Value, part: Part) -> str:
        """Layouts that agree on a part (see Nvfp4.part_layout) give it one key."""
        op, enc = self._producers[value], value.type.enc
        if op.name == "relayout" and isinstance(enc, Nvfp4):
            layout = enc.part_layout(part.suffix)
            return digest("part", self.of(op.args[0]), part.suffix, layout, part.shape)
        return digest("part", self.of(value), part.suffix)

    def of(self, value: Value) -> str:
        """The ops and checkpoint tensors behind a constant; names of values do not matter."""
        if value not in self._of:
            op = self._producers[value]
            attrs = sorted((k, str(v)) for k, v in op.attrs.items())
            args = [self.of(v) for v in op.args]
            self._of[value] = digest(op.name, attrs, args, str(value.type))
        return self._of[value]


# --- data -----------------------------------------------------------------------------------------


def evaluated(
    parts: Sequence[Stored], graph: Graph, weights: WeightSource
) -> Iterator[tuple[str, Array]]:
    """Each part with its data, in order, evaluated a few values ahead."""
    values = list(dict.fromkeys(p.value for p in parts))
    wanted = {p.name for p in parts}
    with ThreadPoolExecutor(_WORKERS) as pool:
        ahead: deque[tuple[Value, Future[list[Data]]]] = deque()
        for value in values:
            ahead.append((value, pool.submit(fold, [value], graph, weights)))
            if len(ahead) > _WORKERS:
                first, future = ahead.popleft()
                yield from _parts(first, future.result()[0], wanted)
        for value, future in ahead:
            yield from _parts(value, future.result()[0], wanted)


def _parts(value: Value, data: Data, wanted: set[str]) -> Iterator[tuple[str, Array]]:
    for offset, part in value.type.placed_parts():
        name = Stored(value, part, offset, "").name
        array = data[part.suffix] if isinstance(data, dict) else data
        if array.shape != part.shape:
            raise IRError(f"{value}: part {part} came out as {array.shape}")
        if name in wanted:
            yield name, array.astype(_CODES.get(part.dtype, array.dtype), copy=False)


def weight_facts(graph: Graph) -> tuple[WeightFacts, ...]:
    """One line per stored value: its IR name, the checkpoint tensors it is made of, its place."""
    producers = graph.producers()

    def sources(value: Value) -> list[str]:
        op: Op = producers[value]
        if op.name == "weight":
            return [op.get("source", "")]
        return list(dict.fromkeys(name for arg in op.args for name in sources(arg)))

    return tuple(
        WeightFacts(v.name, tuple(sources(v)), str(v.type), place_of(v).offset, v.type.nbytes)
        for v in stored_values(graph)
    )
