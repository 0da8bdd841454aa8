"""What the compiler writes down about each phase: text, diff, decisions, and a summary.

00_import.ir
10_promote_nvfp4.ir   .diff against the phase before   .log one decision a line
log.json              every decision, for programs
summary.txt           a line per phase
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from .ir.rewrite import LogEntry
from .passes.pipeline import Report
from .runtime.disk import writing


@dataclass(frozen=True, slots=True)
class PhaseLine:
    """A phase in the summary."""

    id: str
    why: str
    ms: float
    ops: int
    changed: bool
    digest: str
    fired: int
    missed: int

    def __str__(self) -> str:
        what = f"{'changed' if self.changed else 'unchanged':9}  {self.digest}"
        counts = f"{self.fired} fired, {self.missed} missed"
        return f"{self.id:22} {self.ms:9.1f} ms  ops {self.ops:5}  {what}  {counts}"


@dataclass(slots=True)
class Dumps:
    """The files of `passes/`, gathered while phases run."""

    files: dict[str, bytes] = field(default_factory=dict[str, bytes])
    lines: list[PhaseLine] = field(default_factory=list[PhaseLine])
    decisions: list[dict[str, object]] = field(default_factory=list[dict[str, object]])

    def add(self, report: Report, ms: float) -> PhaseLine:
        """Keep a phase's report; returns its line of the summary."""
        self.files[f"{report.id}.ir"] = report.after.encode()
        if report.before:
            self.files[f"{report.id}.diff"] = report.diff().encode()
        self.log(report.id, report.log)
        fired = sum(e.fired for e in report.log)
        line = PhaseLine(
            report.id, report.why, ms, len(report.graph.ops), report.changed, report.digest,
            fired, len(report.log) - fired,
        )  # fmt: skip
        self.lines.append(line)
        return line

    def log(self, phase: str, entries: tuple[LogEntry, ...]) -> None:
        """A phase's decisions, as text and for log.json."""
        self.files[f"{phase}.log"] = "".join(f"{e}\n" for e in entries).encode()
        self.decisions.extend({"phase": phase, **asdict(e)} for e in entries)

    def finish(self) -> dict[str, bytes]:
        """All files, with the log and the summary."""
        log = json.dumps(self.decisions, indent=0).encode()
        summary = "".join(f"{line}\n" for line in self.lines).encode()
        return {**self.files, "log.json": log, "summary.txt": summary}

    def write(self, folder: Path) -> None:
        """Write the files into `folder`, leaving what else is there alone.

        Raises ModelError or TargetError where it cannot be written.
        """
        with writing(folder):
            for name, data in self.finish().items():
                path = folder / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(data)
