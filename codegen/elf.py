"""What a shared library needs and offers, read from its ELF dynamic section.

Only what the check of a linked library asks: NEEDED names, exported symbols, and the newest version
of each versioned dependency (GLIBC_2.14 …). 64-bit little-endian, which is every cpu we build for.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ..ir.errors import IRError

_DYNAMIC, _DYNSYM, _VERNEED = 6, 11, 0x6FFFFFFE  # section types of the ELF gABI and GNU
_DT_NEEDED = 1
_UNDEFINED = 0


@dataclass(frozen=True, slots=True)
class Library:
    """`needed` in link order; `exports` are defined dynamic symbols; `versions` like GLIBC_2.14."""

    needed: tuple[str, ...]
    exports: frozenset[str]
    versions: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Section:
    type: int
    offset: int
    size: int
    link: int
    info: int


def read(path: Path) -> Library:
    """Read the dynamic part of a shared library. IRError: not an ELF64 file, or a damaged one."""
    data = path.read_bytes()
    try:
        return _parse(data)
    except (struct.error, IndexError, ValueError) as error:
        raise IRError(f"{path}: not a readable ELF64 shared library: {error}") from error


def _parse(data: bytes) -> Library:
    if data[:6] != b"\x7fELF\x02\x01":
        raise ValueError(f"expected ELF64 little-endian, found {data[:6]!r}")
    (table,) = struct.unpack_from("<Q", data, 0x28)
    size, count = struct.unpack_from("<HH", data, 0x3A)
    sections = [_section(data, table + size * i) for i in range(count)]
    needed: list[str] = []
    exports: set[str] = set()
    versions: set[str] = set()
    for section in sections:
        strings = sections[section.link].offset if section.link else 0
        if section.type == _DYNAMIC:
            needed += [_string(data, strings + at) for at in _needed(data, section)]
        elif section.type == _DYNSYM:
            exports.update(_string(data, strings + at) for at in _defined(data, section))
        elif section.type == _VERNEED:
            versions.update(_string(data, strings + at) for at in _versions(data, section))
    return Library(tuple(needed), frozenset(exports), tuple(sorted(versions)))


def _section(data: bytes, at: int) -> _Section:
    _, kind, _, _, offset, size, link, info = struct.unpack_from("<IIQQQQII", data, at)
    return _Section(kind, offset, size, link, info)


def _string(data: bytes, at: int) -> str:
    return data[at : data.index(b"\0", at)].decode()


def _needed(data: bytes, section: _Section) -> Iterator[int]:
    for at in range(section.offset, section.offset + section.size, 16):
        tag, value = struct.unpack_from("<qQ", data, at)
        if tag == _DT_NEEDED:
            yield value


def _defined(data: bytes, section: _Section) -> Iterator[int]:
    for at in range(section.offset + 24, section.offset + section.size, 24):
        name, _, _, index = struct.unpack_from("<IBBH", data, at)
        if index != _UNDEFINED:
            yield name


def _versions(data: bytes, section: _Section) -> Iterator[int]:
    at = section.offset
    for _ in range(section.info):
        _, count, _, first, following = struct.unpack_from("<HHIII", data, at)
        entry = at + first
        for _ in range(count):
            _, _, _, name, step = struct.unpack_from("<IHHII", data, entry)
            yield name
            entry += step
        at += following
