"""How `inspect` prints: tables, sizes, and names of modules made short."""

from __future__ import annotations

import os.path
import re
import textwrap
from collections.abc import Iterable, Sequence

WIDTH = 100
"""Columns of every view; only lines of IR may be longer."""

_JOIN = " + "
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


def size(nbytes: int) -> str:
    """Bytes for people: 640 B, 3.1 KiB, 96.4 MiB, 13.5 GiB."""
    if nbytes < 1 << 10:
        return f"{nbytes} B"
    for unit, shift in (("KiB", 10), ("MiB", 20)):
        if nbytes < 1 << (shift + 10):
            return f"{nbytes / (1 << shift):.1f} {unit}"
    return f"{nbytes / (1 << 30):.2f} GiB"


def count(n: int, what: str) -> str:
    """`1 linear`, `3 linears`."""
    return f"{n:,} {what}" if n == 1 else f"{n:,} {what}s"


def table(
    rows: Sequence[Sequence[object]],
    head: Sequence[str] = (),
    right: Iterable[int] = (),
    indent: int = 0,
) -> list[str]:
    """Aligned columns, two spaces apart, under `head`. Columns in `right` are right-aligned."""
    cells = [[str(cell) for cell in row] for row in ([head] if head else []) + list(rows)]
    if not cells:
        return []
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    to_right = set(right)
    lines = [
        "  ".join(
            cell.rjust(width) if i in to_right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in cells
    ]
    return [" " * indent + line.rstrip() for line in lines]


def wrapped(text: str, first: str = "", rest: str | None = None) -> list[str]:
    """`text` in lines of WIDTH; the first begins with `first`, the others with `rest` (spaces)."""
    return textwrap.wrap(
        text,
        WIDTH,
        initial_indent=first,
        subsequent_indent=" " * len(first) if rest is None else rest,
        break_long_words=False,
        break_on_hyphens=False,
    )


def heading(text: str) -> list[str]:
    """A title, underlined."""
    return [text, "-" * min(len(text), WIDTH)]


def modules_of(loc: str) -> list[str]:
    """The modules of a location: a fused op has several."""
    return loc.split(_JOIN) if loc else []


def short(loc: str) -> str:
    """`a.b.q_proj + a.b.k_proj` as `a.b.{q,k}_proj`."""
    names = modules_of(loc)
    if len(names) < 2:
        return loc
    front = os.path.commonprefix(names)
    front = front[: front.rfind(".") + 1]
    tails = [name.removeprefix(front) for name in names]
    back = os.path.commonprefix([tail[::-1] for tail in tails])[::-1]
    back = back[back.find("_") :] if "_" in back else ""
    return f"{front}{{{','.join(tail.removesuffix(back) for tail in tails)}}}{back}"


def ranges(numbers: Iterable[int]) -> str:
    """`0-3,7` for 0, 1, 2, 3, 7."""
    runs: list[tuple[int, int]] = []
    for n in sorted(set(numbers)):
        if runs and n == runs[-1][1] + 1:
            runs[-1] = (runs[-1][0], n)
        else:
            runs.append((n, n))
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def token_spans(chosen: Iterable[int], buckets: Sequence[int]) -> str:
    """The token counts that run in some of the buckets: `9..512` for 64 and 512 of 1, 8, 64, 512.

    A step of T tokens runs in the smallest bucket that holds it.
    """
    spans: list[tuple[int, int]] = []
    for bucket in chosen:
        low = max((b for b in buckets if b < bucket), default=0) + 1
        if spans and spans[-1][1] == low - 1:
            spans[-1] = (spans[-1][0], bucket)
        else:
            spans.append((low, bucket))
    return ", ".join(str(a) if a == b else f"{a}..{b}" for a, b in spans)


def layer_of(loc: str) -> int | None:
    """The number of the layer in a location, None where there is none."""
    found = _NUMBER.search(loc)
    return int(found[0]) if found else None


def pattern_of(loc: str) -> str:
    """The location with `*` for the number of its layer: equal in alike layers."""
    return _NUMBER.sub("*", loc)


def with_layers(pattern: str, layers: Iterable[int]) -> str:
    """A pattern with its layers back: `model.layers.{0-29}.mlp.down_proj`."""
    numbers = ranges(layers)
    shown = f"{{{numbers}}}" if not numbers.isdigit() else numbers
    return pattern.replace("*", shown, 1).replace("*", shown)


def collapsed(locs: Iterable[str]) -> list[str]:
    """Locations that differ only in their layer as one, in the order of their first."""
    groups: dict[str, list[int]] = {}
    for loc in locs:
        layer = layer_of(loc)
        groups.setdefault(pattern_of(loc), []).extend([] if layer is None else [layer])
    return [with_layers(pattern, layers) for pattern, layers in groups.items()]
