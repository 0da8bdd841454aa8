"""JSON out of files that strangers wrote: bounded in memory and depth, duplicate keys refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import cast

from ..ir.errors import ModelError

SLACK = 48 << 20
"""Bytes that parsed JSON may take beyond the size of the file it describes."""

Object = dict[str, object]


def _parsed_bytes(data: bytes) -> int:
    """An upper estimate of the memory CPython needs to decode and parse `data`.

    Per character as in CPython 3.11 on 64 bits: a list 56 + its slots, a dict 64 up to 232, a dict
    entry (hash, key, value, the pair that the duplicate check sees) up to 250, a string 49 + text.
    """
    text = len(data) if data.isascii() else 4 * len(data)
    cost = 2 * text + 100 * data.count(b"[") + 240 * data.count(b"{")
    return cost + 40 * data.count(b",") + 250 * data.count(b":") + 30 * data.count(b'"')


def _unique(pairs: list[tuple[str, object]]) -> Object:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"the key {key[:200]!r} stands twice in one object")
            seen.add(key)
    return found


def _no_constant(text: str) -> object:
    raise ValueError(f"{text} is not JSON")


def parse_object(data: bytes, where: str, *, described: int) -> Object:
    """The JSON object in `data`. `described` is the size in bytes of the file(s) it speaks about.

    Raises ModelError on anything that is not one object, on duplicate keys, NaN, and on JSON that
    would take more memory than `described` + 48 MiB.
    """
    need = _parsed_bytes(data)
    if need > described + SLACK:
        raise ModelError(
            f"{where}: {len(data)} bytes of JSON would take about {need} bytes of memory, expected "
            f"at most {described + SLACK}; the file is damaged or hostile, download it again"
        )
    try:
        value: object = json.loads(data, object_pairs_hook=_unique, parse_constant=_no_constant)
    except RecursionError:
        raise ModelError(f"{where}: JSON is nested too deeply; download the file again") from None
    except ValueError as error:  # JSONDecodeError, UnicodeDecodeError and huge integers among them
        raise ModelError(f"{where}: not valid JSON ({error}); download the file again") from None
    if not isinstance(value, dict):
        raise ModelError(f"{where}: expected a JSON object, found {type(value).__name__}")
    return cast(Object, value)


def read_object(path: Path, *, described: int | None = None) -> Object:
    """The JSON object in a file. Raises ModelError, also where the file cannot be read."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror}); check the path") from None
    return parse_object(data, str(path), described=len(data) if described is None else described)


def as_object(value: object, where: str) -> Object:
    """`value` as a JSON object; null counts as an empty one."""
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ModelError(f"{where}: expected an object, found {str(value)[:80]!r}")
    return cast(Object, value)


def as_list(value: object, where: str) -> list[object]:
    """`value` as a JSON array; null counts as an empty one."""
    if value is None:
        return []
    if not isinstance(value, list):
        raise ModelError(f"{where}: expected an array, found {str(value)[:80]!r}")
    return cast("list[object]", value)


def one_or_many(value: object) -> list[object]:
    """The items of an array, or the one value that stands instead of it; null counts as none."""
    if isinstance(value, list):
        return cast("list[object]", value)
    return [] if value is None else [value]


def as_strings(value: object, where: str) -> tuple[str, ...]:
    """`value` as an array of strings; null counts as an empty one."""
    items = as_list(value, where)
    for item in items:
        if not isinstance(item, str):
            raise ModelError(f"{where}: expected strings, found {str(item)[:80]!r}")
    return tuple(cast("list[str]", items))
