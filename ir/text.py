"""The IR as text: printed the same for the same graph, parsed back exactly.

    graph @name(%ids: tensor<T, i32>) {buckets=[1, 512]} {
      %w = weight {source="model.norm.weight"} : tensor<576, f32>
      %h, %k = op(%x, %w) {eps=1e-06} : tensor<Tx576, f32>, tensor<4x8x2, f32> @state[0x0:0x80]
      return %h
    }

Weights' data are not in the text: a weight names its checkpoint tensor, so a text and the
checkpoint are enough to go on from.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import cast

from .errors import IRError
from .graph import Attr, Graph, Op, Place, Value
from .types import Dim, Encoding, Gguf, Nvfp4, Plain, TensorType


def _attr(value: Attr) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(_attr(v) for v in value)}]"
    text = json.dumps(value)
    return text.replace("{", "\\u007b").replace("}", "\\u007d") if isinstance(value, str) else text


def _attrs(attrs: Mapping[str, Attr]) -> str:
    if not attrs:
        return ""
    return " {" + ", ".join(f"{k}={_attr(attrs[k])}" for k in sorted(attrs)) + "}"


def _typed(v: Value) -> str:
    return f"{v.type} {v.place}" if v.place else str(v.type)


def op_text(op: Op) -> str:
    """One op on one line, without indentation."""
    outs = ", ".join(map(str, op.outs))
    args = f"({', '.join(map(str, op.args))})" if op.args else ""
    types = ", ".join(_typed(v) for v in op.outs)
    loc = f"  // {op.loc}" if op.loc else ""
    return f"{outs} = {op.name}{args}{_attrs(op.attrs)} : {types}{loc}"


def to_text(graph: Graph, marks: Mapping[int, str] | None = None) -> str:
    """The graph's text. `marks` underlines ops by index, with a reason, for error notes."""
    marks = marks or {}
    args = ", ".join(f"{v}: {_typed(v)}" for v in graph.args)
    lines = [f"graph @{graph.name}({args}){_attrs(graph.attrs)} {{"]
    for i, op in enumerate(graph.ops):
        text = op_text(op)
        lines.append(f"  {text}")
        if i in marks:
            lines.append("  " + "^" * min(len(text), 60) + f"-- {marks[i]}")
    lines.append(f"  return {', '.join(map(str, graph.outs))}")
    return "\n".join([*lines, "}", ""])


def excerpt(graph: Graph, marks: Mapping[int, str], around: int = 2) -> str:
    """Only the marked ops and their neighbours: what an error shows of a long graph."""
    lines: list[str] = []
    last = -1
    for i, op in enumerate(graph.ops):
        if not any(abs(i - m) <= around for m in marks):
            continue
        if i != last + 1:
            lines.append("  …")
        lines.append(f"  {op_text(op)}")
        if i in marks:
            lines.append("  " + "^" * min(len(op_text(op)), 60) + f"-- {marks[i]}")
        last = i
    return "\n".join(lines)


# --- parsing -------------------------------------------------------------------------------------

_NAME = r"[A-Za-z0-9_.]+"
_HEAD = re.compile(r"graph @(?P<name>[^\s(]+)\((?P<args>.*?)\)(?: (?P<attrs>\{.*\}))? \{$")
_OP = re.compile(
    rf"(?P<outs>%{_NAME}(?:, %{_NAME})*) = (?P<op>[a-z0-9_]+)(?:\((?P<args>[^)]*)\))?"
    r"(?: (?P<attrs>\{.*?\}))? : (?P<types>tensor<.*?)(?:  // (?P<loc>.*))?$"
)
_TYPE = re.compile(
    r"tensor<(?P<dims>[^,]+), (?P<enc>[a-z0-9_]+)(?:<(?P<facts>[^>]*)>)?>"
    r"(?: @(?P<space>[a-z]+)\[(?P<start>0x[0-9a-f]+):(?P<stop>0x[0-9a-f]+)\])?"
)
_FACT = re.compile(r"(\w+)=(\[[^\]]*\]|[^,]+)")


class _Cursor:
    """A line of the text and where it stands, for error messages."""

    def __init__(self, text: str) -> None:
        self.lines = text.splitlines()
        self.at = 0

    def fail(self, why: str) -> IRError:
        line = self.lines[self.at] if self.at < len(self.lines) else "<end of text>"
        return IRError(f"line {self.at + 1}: {why}\n  {line.strip()}")


def _parse_dims(text: str) -> tuple[Dim, ...]:
    if text == "scalar":
        return ()
    return tuple(int(d) if d.isdigit() else d for d in text.split("x"))


def _parse_encoding(name: str, facts: str | None) -> Encoding:
    given = dict(_FACT.findall(facts or ""))
    if name == "nvfp4":
        shards = tuple(int(n) for n in re.findall(r"\d+", given.get("shards", "")))
        return Nvfp4(int(given.get("block", 16)), given.get("layout", "linear"), shards)
    if name == "gguf":
        return Gguf(facts or "")
    return Plain(name, given.get("layout", "linear"))


def _parse_types(cursor: _Cursor, text: str) -> list[tuple[TensorType, Place | None]]:
    found: list[tuple[TensorType, Place | None]] = []
    for m in _TYPE.finditer(text):
        try:
            type_ = TensorType(_parse_dims(m["dims"]), _parse_encoding(m["enc"], m["facts"]))
        except IRError as error:
            raise cursor.fail(str(error)) from None
        place = None
        if m["space"]:
            start = int(m["start"], 16)
            place = Place(m["space"], start, int(m["stop"], 16) - start)
        found.append((type_, place))
    if not found:
        raise cursor.fail("expected a type")
    return found


def _attr_value(value: object) -> Attr:
    """A JSON value as an attribute: lists of integers, numbers or strings become tuples."""
    if isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list):
        items = cast("list[object]", value)
        ints = tuple(v for v in items if isinstance(v, int))
        strs = tuple(v for v in items if isinstance(v, str))
        if len(ints) == len(items):
            return ints
        floats = tuple(v for v in items if isinstance(v, float))
        if len(floats) == len(items):
            return floats
        if len(strs) == len(items):
            return strs
    raise IRError(f"attribute value {value!r}, expected a number, text, or a list of either")


def _parse_attrs(cursor: _Cursor, text: str | None) -> dict[str, Attr]:
    """`{eps=1e-06, sizes=[1, 2]}`: keys and JSON values."""
    if not text:
        return {}
    decoder = json.JSONDecoder()
    attrs: dict[str, Attr] = {}
    rest = text[1:-1]
    while rest:
        key, eq, rest = rest.partition("=")
        if not eq or not re.fullmatch(r"\w+", key):
            raise cursor.fail(f"expected key=value, found {key!r}")
        try:
            value, end = decoder.raw_decode(rest)
        except json.JSONDecodeError as error:
            raise cursor.fail(f"attribute {key}: {error.msg}") from None
        attrs[key] = _attr_value(value)
        rest = rest[end:].removeprefix(", ")
    return attrs


def _parse_names(text: str | None) -> list[str]:
    return [n.strip().removeprefix("%") for n in (text or "").split(",") if n.strip()]


def _parse_op(cursor: _Cursor, line: str, env: dict[str, Value]) -> Op:
    m = _OP.match(line)
    if not m:
        raise cursor.fail("expected `%out = op(%in, …) {…} : type`")
    args: list[Value] = []
    for name in _parse_names(m["args"]):
        if name not in env:
            raise cursor.fail(f"%{name} is used before it is defined")
        args.append(env[name])
    names, types = _parse_names(m["outs"]), _parse_types(cursor, m["types"])
    if len(names) != len(types):
        raise cursor.fail(f"{len(names)} results, {len(types)} types")
    outs = tuple(Value(n, t, p) for n, (t, p) in zip(names, types, strict=True))
    for value in outs:
        if value.name in env:
            raise cursor.fail(f"{value} is defined twice")
        env[value.name] = value
    return Op(m["op"], tuple(args), outs, _parse_attrs(cursor, m["attrs"]), m["loc"] or "")


def from_text(text: str) -> Graph:
    """The graph of a text. Raises IRError naming the line."""
    cursor = _Cursor(text)
    while cursor.at < len(cursor.lines) and not cursor.lines[cursor.at].startswith("graph "):
        cursor.at += 1
    m = _HEAD.match(cursor.lines[cursor.at]) if cursor.at < len(cursor.lines) else None
    if not m:
        raise cursor.fail("expected `graph @name(%arg: type, …) {`")
    arg_names = [n for n in re.findall(rf"%({_NAME}): ", m["args"])]
    arg_types = _parse_types(cursor, m["args"]) if arg_names else []
    args = tuple(Value(n, t, p) for n, (t, p) in zip(arg_names, arg_types, strict=True))
    env = {v.name: v for v in args}
    ops: list[Op] = []
    attrs = _parse_attrs(cursor, m["attrs"])
    for at in range(cursor.at + 1, len(cursor.lines)):
        cursor.at = at
        line = cursor.lines[cursor.at].strip()
        if line.startswith("return"):
            missing = [n for n in _parse_names(line.removeprefix("return")) if n not in env]
            if missing:
                raise cursor.fail(f"%{missing[0]} is not defined")
            outs = tuple(env[n] for n in _parse_names(line.removeprefix("return")))
            return Graph(m["name"], args, tuple(ops), outs, attrs)
        if line and not line.startswith("//"):
            ops.append(_parse_op(cursor, line, env))
    raise cursor.fail("expected `return`")
