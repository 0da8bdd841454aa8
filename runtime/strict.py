"""Strict reading of JSON written by others into frozen dataclasses.

`decode(SomeDataclass, text, where)` accepts exactly the declared fields: a field without a default
is required, an unknown key is refused, a bool is no int, an int is in [0, 2**53], a float is
finite. A refusal is a ModelError `file.key: what is wrong, expected X, found Y; what to do`.
"""

import dataclasses
import json
import math
import types
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from ..ir.errors import ModelError

LARGEST_INT = 2**53  # what a double, and so every JSON reader, holds exactly
Json: TypeAlias = "None | bool | int | float | str | list[Json] | dict[str, Json]"
Decoder: TypeAlias = Callable[[Json, str], Any]
T = TypeVar("T")

_REMEDY = "the file is damaged or not ours; compile the model again"


def parse_json(text: bytes, where: str, foreign: bool = False) -> Json:
    """JSON text -> values. ModelError for bad UTF-8 or syntax, NaN, equal keys, deep nesting.

    `foreign`: a file of somebody else's, where NaN and equal keys (the last one counts) are theirs.
    """

    def refuse_constant(word: str) -> Json:
        raise ValueError(f"{word} is not JSON")

    def unique(pairs: list[tuple[str, Json]]) -> dict[str, Json]:
        found = dict(pairs)
        if len(found) != len(pairs):
            keys = [key for key, _ in pairs]
            raise ValueError(f"duplicate key {next(k for k in keys if keys.count(k) > 1)!r}")
        return found

    try:
        if foreign:
            return json.loads(text.decode("utf-8"))
        return json.loads(
            text.decode("utf-8"), parse_constant=refuse_constant, object_pairs_hook=unique
        )
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{where}: not readable as JSON ({error}); {_REMEDY}") from error


def decode(cls: type[T], value: Json, where: str) -> T:
    """JSON object -> an instance of the frozen dataclass `cls`. `where` names file (and key)."""
    return cast(T, _decoder(cls)(value, where))


def refuse(where: str, wrong: str, expected: str, found: object) -> ModelError:
    """The error for a value that must not stand there; long values are cut."""
    parts = [_cut(where, 400), wrong, _cut(expected, 200), _cut(repr(found), 80)]
    return ModelError("{}: {}, expected {}, found {}; ".format(*parts) + _REMEDY)


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length - 10]}...{text[-7:]}"


def _decoder(hint: object) -> Decoder:
    origin, arguments = get_origin(hint), get_args(hint)
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return _dataclass_decoder(hint)
    if origin is tuple and len(arguments) == 2 and arguments[1] is Ellipsis:
        return _tuple_decoder(_decoder(arguments[0]))
    if origin is Mapping:
        return _mapping_decoder(_decoder(arguments[1]))
    if origin in (Union, types.UnionType) and type(None) in arguments:
        inner = _decoder(next(a for a in arguments if a is not type(None)))
        return lambda value, where: None if value is None else inner(value, where)
    return _SCALARS[hint]


def _dataclass_decoder(cls: type) -> Decoder:
    hints = get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}
    decoders = {name: _decoder(hints[name]) for name in fields}
    required = [name for name, field in fields.items() if _is_required(field)]

    def read(value: Json, where: str) -> Any:
        if not isinstance(value, dict):
            raise refuse(where, "wrong type", "an object", value)
        for name in required:
            if name not in value:
                raise refuse(where, f"key {name!r} is missing", f"keys {required}", sorted(value))
        for name in value:
            if name not in decoders:
                raise refuse(where, f"unknown key {name!r}", f"only {sorted(decoders)}", name)
        return cls(**{name: decoders[name](v, f"{where}.{name}") for name, v in value.items()})

    return read


def _is_required(field: "dataclasses.Field[Any]") -> bool:
    missing = dataclasses.MISSING
    return field.default is missing and field.default_factory is missing


def _tuple_decoder(item: Decoder) -> Decoder:
    def read(value: Json, where: str) -> tuple[Any, ...]:
        if not isinstance(value, list):
            raise refuse(where, "wrong type", "a list", value)
        return tuple(item(v, f"{where}[{i}]") for i, v in enumerate(value))

    return read


def _mapping_decoder(item: Decoder) -> Decoder:
    def read(value: Json, where: str) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise refuse(where, "wrong type", "an object", value)
        return {key: item(v, f"{where}[{key!r}]") for key, v in value.items()}

    return read


def _read_int(value: Json, where: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= LARGEST_INT:
        raise refuse(where, "wrong value", f"an integer in [0, {LARGEST_INT}]", value)
    return value


def _read_float(value: Json, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise refuse(where, "wrong type", "a number", value)
    if isinstance(value, int) and abs(value) > LARGEST_INT or not math.isfinite(value):
        raise refuse(where, "wrong value", "a finite number", value)
    return float(value)


def _read_bool(value: Json, where: str) -> bool:
    if not isinstance(value, bool):
        raise refuse(where, "wrong type", "true or false", value)
    return value


def _read_str(value: Json, where: str) -> str:
    if not isinstance(value, str):
        raise refuse(where, "wrong type", "a string", value)
    return value


_SCALARS: dict[object, Decoder] = {
    int: _read_int,
    float: _read_float,
    bool: _read_bool,
    str: _read_str,
    object: lambda value, _: value,
}
