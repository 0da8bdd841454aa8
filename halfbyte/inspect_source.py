"""An artifact as `inspect` reads it: the manifest, and the compiler's own record of one target.

Nothing here needs the checkpoint or the compiler: the record holds the IR of every phase as text.
"""

from __future__ import annotations

import dataclasses
import os
import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, TypeVar

from .inspect_format import modules_of
from .ir.errors import IRError, ModelError
from .ir.graph import Graph
from .ir.text import from_text
from .runtime.artifact import PASSES, Artifact
from .runtime.manifest import PhaseFacts
from .runtime.strict import decode, parse_json

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T", bound="DataclassInstance")


@dataclass(frozen=True, slots=True)
class Decision:
    """One decision of a phase: at which location, by which rule, taken or refused, and why."""

    phase: str
    rule: str
    at: str
    fired: bool
    detail: str

    @property
    def modules(self) -> list[str]:
        return modules_of(self.at)


@dataclass(frozen=True, slots=True)
class Scale:
    """One scale of the checkpoint, as a multiplier. `role`: weight_global, input or kv_cache."""

    module: str
    value: float
    role: str = "weight_global"
    dialect: str = ""


class Source:
    """The record of one target of an artifact (the first, if none is named), read when asked for.

    Raises ModelError naming the file, TargetError where there is no such target.
    """

    def __init__(self, path: str | os.PathLike[str], target: str | None = None) -> None:
        self.artifact = Artifact.open(path)
        self.manifest = self.artifact.manifest
        self.target = target or next(iter(self.manifest.targets))
        self.facts = self.artifact.target(self.target)
        self.folder = f"{PASSES}/{self.target}"
        self._graphs: dict[str, Graph] = {}

    @cached_property
    def phases(self) -> tuple[str, ...]:
        """Ids of the phases whose IR is recorded, in order; 00_import first."""
        pattern = re.compile(rf"{self.folder}/(\d\d_\w+)\.ir")
        found = (pattern.fullmatch(part) for part in self.manifest.parts)
        return tuple(sorted(m[1] for m in found if m))

    def phase(self, wanted: str) -> str:
        """The id of a phase given by id, number or name. Raises ModelError listing them."""
        for id_ in self.phases:
            number, _, name = id_.partition("_")
            if wanted in (id_, number, name):
                return id_
        raise ModelError(
            f"{self.artifact.folder}: phase {wanted!r}: no such record, expected one of "
            f"{', '.join(self.phases) or 'none (the artifact has no passes/ folder)'}"
        )

    def text(self, phase: str) -> str:
        """The IR after a phase, as it was printed."""
        return self._read(f"{self.folder}/{phase}.ir")

    def graph(self, phase: str) -> Graph:
        """The IR after a phase."""
        if phase not in self._graphs:
            name = f"{self.folder}/{phase}.ir"
            try:
                self._graphs[phase] = from_text(self.text(phase))
            except IRError as error:
                raise ModelError(
                    f"{self.artifact.path(name)}: not readable as IR: {error}; "
                    "inspect --check tells whether the file was changed"
                ) from error
        return self._graphs[phase]

    @property
    def first(self) -> Graph:
        """The graph as imported."""
        return self.graph(self._some_phases()[0])

    @property
    def last(self) -> Graph:
        """The graph as compiled: kernels chosen, places given, launches numbered."""
        return self.graph(self._some_phases()[-1])

    @cached_property
    def decisions(self) -> tuple[Decision, ...]:
        """All decisions of all phases; empty where none were recorded."""
        return tuple(self._records(Decision, f"{self.folder}/log.json"))

    @cached_property
    def scales(self) -> tuple[Scale, ...]:
        """The checkpoint's scales; empty where none were recorded."""
        return tuple(self._records(Scale, f"{self.folder}/scales.json"))

    @cached_property
    def phase_facts(self) -> dict[str, PhaseFacts]:
        return {phase.id: phase for phase in self.facts.phases}

    def file_place(self, offset: int) -> tuple[str, int]:
        """The file and the byte in it where `offset` of the target's weight image stands."""
        for run in self.facts.image:
            if run.offset <= offset < run.offset + run.bytes:
                return run.file, self._data_start(run.file) + run.begin + offset - run.offset
        return "", 0

    def _data_start(self, name: str) -> int:
        """Where a weight file's data begin: behind the length of its header and the header."""
        with self.artifact.path(name).open("rb") as file:
            prefix = file.read(8)
        return 8 + struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0

    def generated(self, name: str) -> Sequence[str]:
        """The lines of a generated source of 60_codegen; none where it is absent."""
        part = f"{self.folder}/60_codegen/{name}"
        return self._read(part).splitlines() if part in self.manifest.parts else ()

    def _some_phases(self) -> tuple[str, ...]:
        if not self.phases:
            raise ModelError(
                f"{self.artifact.folder}: no record of the phases, expected "
                f"{self.folder}/00_import.ir; compile the model again"
            )
        return self.phases

    def _read(self, part: str) -> str:
        path = self.artifact.path(part)
        try:
            return path.read_bytes().decode("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ModelError(f"{path}: cannot read: {error}; compile the model again") from error

    def _records(self, kind: type[T], part: str) -> list[T]:
        """The objects of a JSON list. Keys that `kind` does not know are of a newer compiler."""
        if part not in self.manifest.parts:
            return []
        where = str(self.artifact.path(part))
        value = parse_json(self._read(part).encode(), where)
        if not isinstance(value, list):
            raise ModelError(f"{where}: expected a list of objects; compile the model again")
        known = [field.name for field in dataclasses.fields(kind)]
        found: list[T] = []
        for i, item in enumerate(value):
            if isinstance(item, dict):
                item = {key: item[key] for key in known if item.get(key) is not None}
            found.append(decode(kind, item, f"{where}[{i}]"))
        return found
