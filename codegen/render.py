"""Templates -> C++ sources. Pure text: nothing here starts a compiler or writes a file.

Jinja's default delimiters collide with C++ (`{{`, `{#`), so these templates use `@{ value }@`,
`/*% block %*/`, `//% line` and `/*# comment #*/`. An undefined name is an error (StrictUndefined).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import jinja2

from ..ir.errors import IRError
from .args import ARGS, Count, Epilogue, Prologue, Space
from .isa import ISAS, Isa

TEMPLATES = Path(__file__).parent / "templates"
SHARED = "shared"
HEADERS = {"cpu": "hb.h", "cuda": "hb_cuda.h", "net": "hb.h", "net_cuda": "hb_cuda.h"}
"""What kernels, executor and plan of a folder share."""
LOOKED_IN = {"net": ("net", "cpu", SHARED), "net_cuda": ("net_cuda", "net", "cuda", SHARED)}
"""Where a folder's templates are looked for, if not in it and among the shared ones alone."""
_INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]+"([^"]+)"', re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Source:
    """One translation unit: its text, every header of ours it includes, and its own flags.

    `heavy`: it takes a minute and 5 GB to compile.
    """

    name: str
    text: str
    headers: Mapping[str, str]
    flags: tuple[str, ...] = ()
    heavy: bool = False


@cache
def environment(folder: str = "cpu") -> jinja2.Environment:
    """The environment of the templates of `folder`, which see the shared ones too."""
    folders = [TEMPLATES / name for name in LOOKED_IN.get(folder, (folder, SHARED))]
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(folders),
        undefined=jinja2.StrictUndefined,
        autoescape=False,
        keep_trailing_newline=True,
        trim_blocks=True,
        lstrip_blocks=True,
        variable_start_string="@{",
        variable_end_string="}@",
        block_start_string="/*%",
        block_end_string="%*/",
        comment_start_string="/*#",
        comment_end_string="#*/",
        line_statement_prefix="//%",
    )


def render(template: str, folder: str = "cpu", **values: object) -> str:
    """The text of `templates/<folder>/<template>.jinja`. IRError: there is none, or it fails."""
    facts = {"structs": ARGS, "spaces": tuple(Space), "counts": tuple(Count)}
    facts |= {
        "prologues": tuple(Prologue),
        "epilogues": tuple(Epilogue),
        "isas": ISAS,
        "header": HEADERS[folder],
    }
    try:
        return environment(folder).get_template(f"{template}.jinja").render(facts | values)
    except jinja2.TemplateNotFound as error:
        raise IRError(f"template {error.name}: not found in {TEMPLATES / folder}") from error
    except jinja2.TemplateError as error:
        line = getattr(error, "lineno", None)
        at = f"{template}.jinja" + (f":{line}" if line else "")
        raise IRError(f"template {at}: cannot be rendered: {error}") from error


def source(template: str, isa: Isa | None = None, folder: str = "cpu", **values: object) -> Source:
    """Render `template` (for one ISA: once per ISA) and every header of ours it includes."""
    stem, _, suffix = template.rpartition(".")
    if isa is None:
        name, flags = template, ()
        facts = dict(values)
    else:
        name, flags = f"{stem}.{isa.name}.{suffix}", isa.flags
        facts = {"isa": isa, **values}
    text = render(template, folder, **facts)
    return Source(name, text, _headers(text, folder, facts), flags)


def family_sources(families: Mapping[str, Iterable[Isa]]) -> list[Source]:
    """One source per kernel family and ISA; `families` maps a template stem to its ISAs."""
    return [source(f"{stem}.cc", isa) for stem, isas in families.items() for isa in isas]


def _headers(text: str, folder: str, facts: Mapping[str, object]) -> dict[str, str]:
    found: dict[str, str] = {}
    pending = _INCLUDE.findall(text)
    while pending:
        name = pending.pop()
        if name not in found:
            found[name] = render(name, folder, **facts)
            pending += _INCLUDE.findall(found[name])
    return dict(sorted(found.items()))
