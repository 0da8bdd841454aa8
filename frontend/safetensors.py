"""SafeTensors folders, read by our own parser: `safetensors.numpy` has no F8_E4M3, and we promise
ModelError and bounded memory on hostile files. Format: 8 bytes header length, JSON header, payload;
the payload is covered by the tensors exactly, without holes, and is NOT aligned in real files.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ..ir.errors import ModelError
from ..ir.types import DTYPE_BYTES
from .bounded_json import Object, as_list, as_object, parse_object, read_object
from .tensor_info import Array, TensorInfo, fault, map_file, view
from .tokenizer_files import read_tokenizer_files

DTYPES: dict[str, str] = {
    "F64": "f64", "F32": "f32", "F16": "f16", "BF16": "bf16", "F8_E4M3": "f8e4m3",
    "F8_E5M2": "f8e5m2", "F8_E8M0": "f8e8m0", "I64": "i64", "I32": "i32", "I16": "i16", "I8": "i8",
    "U64": "u64", "U32": "u32", "U16": "u16", "U8": "u8", "BOOL": "bool",
}  # fmt: skip
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MAX_RANK = 8
AGAIN = "download the file again"


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of one file; `begin` and `end` are offsets into the payload."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class Shard:
    """One mapped file whose header has been checked against its size."""

    path: Path
    buffer: mmap.mmap
    payload: int
    entries: Mapping[str, Entry]
    metadata: Mapping[str, str]

    def read(self, name: str) -> Array:
        entry = self.entries[name]
        return view(self.buffer, entry.dtype, entry.shape, self.payload + entry.begin)


def open_shard(path: Path) -> Shard:
    """Map one file and check its header. Raises ModelError naming file and tensor."""
    buffer = map_file(path)
    size = len(buffer)
    if size < 10:
        raise ModelError(f"{path}: expected at least 10 bytes, found {size}; {AGAIN}")
    length = int.from_bytes(buffer[:8], "little")
    if length > size - 8:
        raise ModelError(
            f"{path}: header length {length} exceeds the file, expected at most {size - 8}; {AGAIN}"
        )
    header = parse_object(buffer[8 : 8 + length], f"{path}: header", described=size)
    metadata = as_object(header.pop("__metadata__", None), f"{path}: __metadata__")
    entries = {name: _entry(path, name, value) for name, value in header.items()}
    _check_coverage(path, entries, size - 8 - length)
    texts = {key: str(value) for key, value in metadata.items()}
    return Shard(path, buffer, 8 + length, entries, texts)


def _entry(path: Path, name: str, value: object) -> Entry:
    fields = as_object(value, f"{path}: tensor {name[:160]!r}")
    dtype = DTYPES.get(str(fields.get("dtype")))
    if dtype is None:
        raise fault(
            path,
            name,
            f"unknown dtype {str(fields.get('dtype'))[:40]!r}, expected one of {', '.join(DTYPES)}",
            "re-export the checkpoint with one of these",
        )
    shape = _naturals(path, name, fields.get("shape"), "shape")
    if len(shape) > MAX_RANK:
        raise fault(
            path, name, f"expected at most {MAX_RANK} dimensions, found {len(shape)}", AGAIN
        )
    offsets = _naturals(path, name, fields.get("data_offsets"), "data_offsets")
    if len(offsets) != 2:
        raise fault(path, name, f"expected two data_offsets, found {len(offsets)}", AGAIN)
    begin, end = offsets
    nbytes = math.prod(shape) * DTYPE_BYTES[dtype]
    if end - begin != nbytes:
        raise fault(
            path,
            name,
            f"{dtype}{list(shape)} needs {nbytes} bytes, found {end - begin} "
            f"(data_offsets {begin}..{end})",
            AGAIN,
        )
    return Entry(dtype, shape, begin, end)


def _naturals(path: Path, name: str, value: object, field: str) -> tuple[int, ...]:
    items = as_list(value, f"{path}: tensor {name[:160]!r}: {field}")
    numbers = tuple(i for i in items if type(i) is int and 0 <= i < 1 << 63)
    if value is None or len(numbers) != len(items):
        raise fault(path, name, f"{field} is {str(value)[:80]}, expected natural numbers", AGAIN)
    return numbers


def _check_coverage(path: Path, entries: Mapping[str, Entry], payload: int) -> None:
    at, before = 0, "the header"
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.end > payload:
            raise fault(
                path,
                name,
                f"ends at byte {entry.end} of the payload, found {payload} bytes",
                f"the file is cut short, {AGAIN}",
            )
        if entry.begin != at:
            what = "overlaps" if entry.begin < at else "leaves a hole after"
            raise fault(
                path,
                name,
                f"{what} {before[:160]!r}: expected offset {at}, found {entry.begin}",
                AGAIN,
            )
        at, before = entry.end, name
    if at != payload:
        raise ModelError(f"{path}: tensors cover {at} bytes, found {payload} bytes; {AGAIN}")


class SafetensorsCheckpoint:
    """A folder: config.json, one or many .safetensors files, tokenizer files."""

    def __init__(self, folder: Path) -> None:
        self.path = folder
        self.config = read_object(folder / "config.json")
        self._shards = _open_shards(folder)
        self._home: dict[str, Shard] = {}
        for shard in self._shards:
            for name in shard.entries:
                if name in self._home:
                    raise fault(
                        shard.path,
                        name,
                        f"stored in {self._home[name].path.name} too",
                        "keep one of the two files",
                    )
                self._home[name] = shard

    @property
    def files(self) -> tuple[Path, ...]:
        return tuple(shard.path for shard in self._shards)

    @property
    def metadata(self) -> Mapping[str, str]:
        return {key: text for shard in self._shards for key, text in shard.metadata.items()}

    @property
    def generation(self) -> Object:
        path = self.path / "generation_config.json"
        return read_object(path) if path.is_file() else {}

    @property
    def quantization(self) -> tuple[tuple[str, Object], ...]:
        """(file, contents) of each place that speaks about quantisation, most trusted first."""
        found: list[tuple[str, Object]] = []
        for holder in (self.config, as_object(self.config.get("text_config"), "text_config")):
            inner = holder.get("quantization_config")
            if inner is not None:
                where = str(self.path / "config.json")
                found.append((where, as_object(inner, f"{where}: quantization_config")))
        path = self.path / "hf_quant_config.json"
        if path.is_file():
            outer = read_object(path)
            found.append((str(path), {**outer, **as_object(outer.get("quantization"), str(path))}))
        return tuple(found)

    def names(self) -> tuple[str, ...]:
        return tuple(self._home)

    def info(self, name: str) -> TensorInfo:
        entry = self._shard(name).entries[name]
        return TensorInfo(name, entry.dtype, entry.shape, str(self._home[name].path))

    def read(self, name: str) -> Array:
        return self._shard(name).read(name)

    def permuted_heads(self, name: str) -> int:
        return 0

    def tokenizer_files(self) -> dict[str, bytes]:
        return read_tokenizer_files(self.path)

    def _shard(self, name: str) -> Shard:
        if name not in self._home:
            raise fault(self.path, name, "is not in the checkpoint", "re-export the checkpoint")
        return self._home[name]


def _open_shards(folder: Path) -> tuple[Shard, ...]:
    index = folder / INDEX
    if index.is_file():
        return _open_indexed(folder, index)
    single = folder / SINGLE
    paths = [single] if single.is_file() else sorted(folder.glob("*.safetensors"))
    if not paths:
        raise ModelError(f"{folder}: no .safetensors file here; give the folder of a checkpoint")
    return tuple(open_shard(path) for path in paths)


def _open_indexed(folder: Path, index: Path) -> tuple[Shard, ...]:
    described = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    contents = read_object(index, described=index.stat().st_size + described)
    weight_map = as_object(contents.get("weight_map"), f"{index}: weight_map")
    wanted: dict[str, list[str]] = {}
    for name, file in weight_map.items():
        if not isinstance(file, str) or not file or file != Path(file).name or "\\" in file:
            raise fault(
                index,
                name,
                f"lies in {str(file)[:160]!r}, expected a file name in the checkpoint's folder",
                AGAIN,
            )
        wanted.setdefault(file, []).append(name)
    if not wanted:
        raise ModelError(f"{index}: weight_map names no tensor; {AGAIN}")
    shards: list[Shard] = []
    for file, names in sorted(wanted.items()):
        if not (folder / file).is_file():
            raise fault(
                index,
                names[0],
                f"lies in {file[:160]!r} with {len(names) - 1} others, but that file is missing",
                "download the missing shard",
            )
        shard = open_shard(folder / file)
        for name in names:
            if name not in shard.entries:
                raise fault(shard.path, name, f"not in this file although {INDEX} says so", AGAIN)
        shards.append(shard)
    return tuple(shards)
