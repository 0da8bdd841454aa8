"""The journey of a module as a text to read from top to bottom."""

from __future__ import annotations

import os.path
from collections.abc import Sequence

from .inspect_format import WIDTH, short, size, table, wrapped
from .inspect_layer import SELECT, Journey, Step, Stored, Tensor, Tested
from .inspect_source import Decision


def story(j: Journey) -> list[str]:
    """All of it, by the stations of the way."""
    return [
        *_title(j),
        *_section("In the checkpoint", _origin(j)),
        *_section("Phase by phase", _phases(j)),
        *_section("In the artifact", [line for s in j.stored for line in _stored(s, j)]),
        *_section("Kernels", _kernels(j)),
        *_section("Self-test", _tests(j)),
    ]


def _title(j: Journey) -> list[str]:
    shape = f", {j.k} inputs, {j.n} outputs" if j.op == "linear" else ""
    lines = [j.module, "=" * len(j.module), f"{j.op}{shape}"]
    if len(j.joint) > 1:
        lines += wrapped(f"runs as part of one joint launch: {short(j.runs_as)}")
    elif j.runs_as and j.runs_as != j.module:
        lines += wrapped(f"runs inside {short(j.runs_as)}")
    if j.stored and j.kernels:
        enc = j.stored[0].type.partition(", ")[2].removesuffix(">")
        lines += wrapped(f"stored as {enc}; computed by {_chosen(j)}")
    return lines


def _section(title: str, lines: Sequence[str]) -> list[str]:
    return ["", title, "-" * WIDTH, *lines] if lines else []


# --- stations -------------------------------------------------------------------------------------


def _origin(j: Journey) -> list[str]:
    """The scheme, the module as the checkpoint calls it, and its tensors by the ends of names."""
    if not j.tensors:
        return ["  reads none of its tensors"]
    spelling = f", as {j.dialect} spells it" if j.dialect not in ("", j.scheme) else ""
    front = os.path.commonprefix([t.name for t in j.tensors]).rpartition(".")[0]
    rows = [
        (t.value, t.name.removeprefix(front), _type(t), size(t.bytes), _meaning(t))
        for t in j.tensors
    ]
    lines = wrapped(f"{j.scheme}{spelling}: {front}", "  ")
    return [*lines, *table(rows, right=(3,), indent=2)]


def _meaning(t: Tensor) -> str:
    if t.scale is None:
        return t.role
    role, comma, rest = t.role.partition(",")
    return f"{role} {t.scale:.6g}{comma}{rest}"


def _type(t: Tensor) -> str:
    """`u8 [48, 24]`."""
    shape, _, enc = t.type.removeprefix("tensor<").removesuffix(">").partition(", ")
    return f"{enc} [{shape.replace('x', ', ')}]" if shape != "scalar" else f"{enc} scalar"


def _phases(j: Journey) -> list[str]:
    lines: list[str] = []
    quiet: list[str] = []
    for i, step in enumerate(j.steps):
        if not step.changed and not step.decisions and not _selects(step, j):
            quiet.append(step.phase)
            continue
        lines += _passed(quiet)
        quiet.clear()
        lines += _step(step, j, first=i == 0)
    return (lines + _passed(quiet))[:-1]


def _passed(quiet: Sequence[str]) -> list[str]:
    return [*wrapped(f"{', '.join(quiet)}: nothing to do here"), ""] if quiet else []


def _step(step: Step, j: Journey, first: bool) -> list[str]:
    lines = wrapped(step.why, f"{step.phase}  ") if step.why else [step.phase]
    for sign, ops in (("-", step.removed), (" " if first else "+", step.added)):
        for op in ops:
            lines += wrapped(op, f"  {sign} ", "        ")
    if step.operands:
        lines += wrapped("; ".join(step.operands), "    where ")
    for note in step.notes:
        lines += wrapped(note, "    ")
    if _selects(step, j):
        lines += wrapped(f"chosen: {_chosen(j)} (reasons below)", "    ")
    for d in step.decisions:
        lines += _decision(d, j)
    return [*lines, ""]


def _selects(step: Step, j: Journey) -> bool:
    return step.phase.endswith(SELECT) and bool(j.kernels)


def _chosen(j: Journey) -> str:
    return ", ".join(f"{k.kernel} for T={k.tokens}" for k in j.kernels)


def _decision(d: Decision, j: Journey) -> list[str]:
    verb = "did" if d.fired else "not"
    at = "" if d.at == j.module else f"  [at {short(d.at)}]"
    return wrapped(f"{d.rule}: {d.detail}{at}", f"    {verb}  ", "         ")


def _stored(s: Stored, j: Journey) -> list[str]:
    lines = [f"  %{s.name}: {s.type}"]
    numbers = f"{size(s.bytes)}, {s.bits_per_number:.2f} bits a number"
    lines.append(f"    {numbers}" + (f", padded with zeros: {s.padding}" if s.padding else ""))
    if s.rows[1] - s.rows[0] == j.n and len(j.joint) > 1:
        others = ", ".join(m.rpartition(".")[2] for m in j.joint if m != j.module)
        rows = f"rows {s.rows[0]}..{s.rows[1] - 1} are this module's; the others are {others}'s"
        lines += wrapped(rows, "    ")
    rows = [
        (b.suffix or "data", b.dtype, "x".join(map(str, b.shape)), size(b.bytes),
         f"image {b.offset:#x}", f"{b.file} {b.file_offset:#x}")
        for b in s.buffers
    ]  # fmt: skip
    return [*lines, *table(rows, right=(3,), indent=4)]


def _kernels(j: Journey) -> list[str]:
    lines: list[str] = []
    for k in j.kernels:
        fallback = "   FALLBACK, permitted by name" if k.fallback else ""
        lines.append(f"  T={k.tokens}: {k.kernel}{fallback}")
        for r in k.refused:
            lines += wrapped(f"{r.kernel}: {r.reason}", "      refused  ")
    if j.launch >= 0:
        arguments = f"; its arguments: {j.arguments}" if j.arguments else ""
        lines.append(f"  launch {j.launch} of every step{arguments}")
    return lines


def _tests(j: Journey) -> list[str]:
    rows = [
        (t.kernel, f"bucket {t.bucket}", f"off by {t.max_abs:.3g}", f"allowed {t.tolerance:.3g}",
         _share(t))
        for t in j.selftests
    ]  # fmt: skip
    lines = table(rows, right=(4,), indent=2)
    for at in dict.fromkeys(t.at for t in j.selftests if t.at != j.runs_as):
        lines += wrapped(f"measured at {short(at)}: the same kernel and shape", "  ")
    return lines


def _share(t: Tested) -> str:
    return f"{t.max_abs / t.tolerance:.0%}" if t.tolerance else "exact" if not t.max_abs else "off"
