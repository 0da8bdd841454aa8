"""Types of values: a shape and an encoding. Both are frozen and compare by value.

An encoding says how numbers become bytes. A compound encoding (NVFP4) is still ONE value; its
buffers are its `parts`, so a pass moves one thing and only code generation sees three pointers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from .errors import IRError

Dim = int | str
"""An extent: a number, or a symbol bound later (`T` tokens, `R` rows of logits wanted)."""

UNKNOWN = "?"
"""An extent that only a run of the graph knows (ONNX: an output of NonZero)."""
UNRANKED = ("*",)
"""The shape of a value whose very rank only a run knows."""

LINEAR = "linear"
P16 = "p16"
SFATOM = "sfatom128x4"
WGMMA = "wgmma128x64"
PAGED = "paged16"

DTYPE_BYTES: dict[str, int] = {
    "f64": 8, "f32": 4, "bf16": 2, "f16": 2, "f8e4m3": 1, "f8e5m2": 1, "f8e8m0": 1,
    "i64": 8, "i32": 4, "i16": 2, "i8": 1, "u64": 8, "u32": 4, "u16": 2, "u8": 1, "bool": 1,
    "f8e4m3fnuz": 1, "f8e5m2fnuz": 1, "f4e2m1": 1, "i4": 1, "u4": 1, "i2": 1, "u2": 1,
}  # fmt: skip
"""Bytes of an element in memory; a type of less than a byte takes one (its code, sign-extended)."""
FLOATS = ("f64", "f32", "bf16", "f16", "f8e4m3", "f8e5m2", "f8e8m0")

ALIGNMENT = 64
"""Bytes: a cache line, and the widest vector load."""

PANEL_ROWS = 16
"""Output rows of one p16 panel: the 32-bit lanes of a 512-bit register."""
SUPER_BLOCK_K = 64
"""Inputs covered by one NVFP4 p16 super-block."""
SUPER_BLOCK_BYTES = 576
"""64 B of scales (16 rows x 4 blocks) and 512 B of e2m1 codes."""

TILE_ROWS, TILE_K = 128, 64
"""Of a wgmma128x64 tile, and of a SfAtom: 128 rows x 4 block scales."""
CODE_ROW_K = 32
"""k of a row of sfatom128x4 codes is padded to a multiple: rows of whole 16-byte loads."""
PAGE = 16
"""Positions in a page of a paged cache."""

GGUF_BLOCKS: dict[str, tuple[int, int]] = {
    "q8_0": (32, 34), "q4_0": (32, 18), "q4_1": (32, 20), "q4_k": (256, 144), "q5_k": (256, 176),
    "q6_k": (256, 210), "nvfp4": (64, 36),
}  # fmt: skip
"""GGUF block types by name: (elements per block, bytes per block), from ggml-common.h."""


@dataclass(frozen=True, slots=True)
class Part:
    """One buffer of a value: `suffix` completes its name, `shape` counts `dtype` elements."""

    suffix: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return DTYPE_BYTES[self.dtype] * math.prod(self.shape)


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def align(nbytes: int) -> int:
    """Up to the next cache line: every buffer of a weight file or an arena starts on one."""
    return ceil_div(nbytes, ALIGNMENT) * ALIGNMENT


def _rows_of(shape: tuple[int, ...], what: str) -> tuple[int, int]:
    if len(shape) != 2:
        raise IRError(f"{what}: expected a matrix [N, K], found {len(shape)} dimensions {shape}")
    return shape[0], shape[1]


@dataclass(frozen=True, slots=True)
class Plain:
    """Numbers of one dtype. Other layouts than linear:

    `p16`      matrices [N, K]: [ceil(N/16)][K][16 rows];
    `paged16`  caches [heads, positions, D]: [positions/16][heads][16][D], a page per 16 positions.
    """

    dtype: str
    layout: str = LINEAR

    def __post_init__(self) -> None:
        if self.dtype not in DTYPE_BYTES:
            raise IRError(f"unknown dtype {self.dtype!r}, expected one of {sorted(DTYPE_BYTES)}")
        if self.layout not in (LINEAR, P16, PAGED):
            raise IRError(f"{self.dtype}: unknown layout {self.layout!r}")

    def __str__(self) -> str:
        return self.dtype if self.layout == LINEAR else f"{self.dtype}<layout={self.layout}>"

    def parts(self, shape: tuple[int, ...]) -> tuple[Part, ...]:
        if self.layout == LINEAR:
            return (Part("", self.dtype, shape),)
        if self.layout == PAGED:
            heads, positions, dim = shape
            return (Part("", self.dtype, (ceil_div(positions, PAGE), heads, PAGE, dim)),)
        n, k = _rows_of(shape, str(self))
        return (Part("", self.dtype, (ceil_div(n, PANEL_ROWS), k, PANEL_ROWS)),)


@dataclass(frozen=True, slots=True)
class Nvfp4:
    """e2m1 codes, one e4m3 scale for each `block` of the last axis, f32 global scale(s).

    `shards` counts the output rows that each global scale covers, in order; () means one scale for
    all. Layouts (reference of each: docs/numerics.md):
    `linear`       codes [N, K/2] (even k in the low nibble), scales [N, K/16];
    `p16`          super-blocks [N/16][K/64][576 B], one f32 row scale per (padded) output row;
    `sfatom128x4`  codes as linear but rows padded to 16 bytes, scales in CUTLASS's 128x4 atoms,
                   one f32 row scale per output row, padded to whole atoms;
    `wgmma128x64`  codes in tiles of 128 rows x 64 k as wgmma fragments, scales and row scales as
                   sfatom128x4.
    """

    block: int = 16
    layout: str = LINEAR
    shards: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.layout not in (LINEAR, P16, SFATOM, WGMMA):
            raise IRError(f"nvfp4: unknown layout {self.layout!r}")

    def __str__(self) -> str:
        facts = [f"block={self.block}"]
        if self.layout != LINEAR:
            facts.append(f"layout={self.layout}")
        if self.shards:
            facts.append(f"shards=[{', '.join(map(str, self.shards))}]")
        return f"nvfp4<{', '.join(facts)}>"

    def parts(self, shape: tuple[int, ...]) -> tuple[Part, ...]:
        n, k = _rows_of(shape, "nvfp4")
        if k % self.block:
            raise IRError(f"nvfp4: last axis {k} is not a multiple of {self.block}")
        if self.shards and sum(self.shards) != n:
            raise IRError(f"nvfp4: shards {self.shards} cover {sum(self.shards)} rows, found {n}")
        scales = Part("gs", "f32", (len(self.shards) or 1,))
        if self.layout == P16:
            panels, blocks = ceil_div(n, PANEL_ROWS), ceil_div(k, SUPER_BLOCK_K)
            codes = Part("", "u8", (panels, blocks, SUPER_BLOCK_BYTES))
            return codes, Part("gs", "f32", (panels * PANEL_ROWS,))
        if self.layout == LINEAR:
            codes = Part("", "u8", (n, k // 2))
            return codes, Part("sf", "f8e4m3", (n, k // self.block)), scales
        tiles = (ceil_div(n, TILE_ROWS), ceil_div(k, TILE_K))
        shape = (*tiles, TILE_ROWS * TILE_K // 2)
        if self.layout == SFATOM:
            shape = (n, ceil_div(k, CODE_ROW_K) * CODE_ROW_K // 2)
        rows = Part("gs", "f32", (tiles[0] * TILE_ROWS,))
        return Part("", "u8", shape), Part("sf", "f8e4m3", (*tiles, 512)), rows

    def part_layout(self, suffix: str) -> str:
        """The layout of one part: equal where layouts differ in other parts only."""
        return SFATOM if self.layout == WGMMA and suffix else self.layout


@dataclass(frozen=True, slots=True)
class Gguf:
    """Rows of GGUF blocks, bytes as in the file: u8 [N, K / elements * bytes]."""

    kind: str

    def __post_init__(self) -> None:
        if self.kind not in GGUF_BLOCKS:
            raise IRError(
                f"unknown GGUF block {self.kind!r}, expected one of {sorted(GGUF_BLOCKS)}"
            )

    def __str__(self) -> str:
        return f"gguf<{self.kind}>"

    def parts(self, shape: tuple[int, ...]) -> tuple[Part, ...]:
        elements, nbytes = GGUF_BLOCKS[self.kind]
        if shape[-1] % elements:
            raise IRError(f"{self}: last axis {shape[-1]} is not a multiple of {elements}")
        return (Part("", "u8", (*shape[:-1], shape[-1] // elements * nbytes)),)


FP8_CACHE = "f8e4m3"
"""The dtype of a quantised KV cache; its scales are attributes of the ops that touch it."""
QUANTISED_CACHES = (Plain(FP8_CACHE), Plain(FP8_CACHE, PAGED))

Encoding = Plain | Nvfp4 | Gguf
"""Open: a new encoding is a dataclass here with `parts`, and one line in `text.py` to read it."""


@dataclass(frozen=True, slots=True)
class TensorType:
    """`tensor<5120x5120, nvfp4<block=16, layout=p16>>`: a shape and an encoding."""

    shape: tuple[Dim, ...]
    enc: Encoding

    def __str__(self) -> str:
        dims = "x".join(map(str, self.shape)) if self.shape else "scalar"
        return f"tensor<{dims}, {self.enc}>"

    @property
    def static(self) -> tuple[int, ...]:
        """The shape as numbers. Raises IRError where a symbol is left."""
        dims = tuple(d for d in self.shape if isinstance(d, int))
        if len(dims) != len(self.shape):
            raise IRError(f"{self}: expected a static shape")
        return dims

    @property
    def last(self) -> int:
        """The last extent, which is always a number for activations and weights."""
        if not self.shape or not isinstance(self.shape[-1], int):
            raise IRError(f"{self}: expected a static last dimension")
        return self.shape[-1]

    @property
    def count(self) -> Dim:
        """The leading extent: how many rows, tokens, or the symbol for it."""
        return self.shape[0] if self.shape else 1

    @property
    def nbytes(self) -> int:
        """Bytes of all parts of a static type."""
        return sum(p.nbytes for p in self.enc.parts(self.static))

    def placed_parts(self) -> tuple[tuple[int, Part], ...]:
        """Each part with its offset when they stand one behind the other, each aligned."""
        placed: list[tuple[int, Part]] = []
        offset = 0
        for part in self.enc.parts(self.static):
            placed.append((offset, part))
            offset += align(part.nbytes)
        return tuple(placed)

    @property
    def placed_nbytes(self) -> int:
        """Bytes of all parts with the gaps that alignment leaves."""
        return sum(align(p.nbytes) for p in self.enc.parts(self.static))

    def with_enc(self, enc: Encoding) -> TensorType:
        return TensorType(self.shape, enc)

    def with_shape(self, *shape: Dim) -> TensorType:
        return TensorType(shape, self.enc)


def tensor(dtype: str, *shape: Dim) -> TensorType:
    """Shorthand: `tensor("f32", "T", 576)` is `tensor<Tx576, f32>`."""
    return TensorType(shape, Plain(dtype))
