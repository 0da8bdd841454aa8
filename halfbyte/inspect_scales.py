"""`inspect --scales`: the audit of a checkpoint's global and input scales.

A scale read upside down or in the wrong units shows here, as a number orders of magnitude from its
neighbours, before it shows as text without sense.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from .inspect_format import table, wrapped
from .inspect_source import Scale, Source

OUTLIER = 8.0
"""A scale this many times above the median of its role, or below it, is named."""

ROLES = ("q", "k", "v", "qkv", "o", "gate", "up", "gate_up", "down", "head")
NAMES = {"weight_global": "weight", "input": "input", "kv_cache": "KV cache"}
GROUPS = (("q", "k", "v"), ("gate", "up"))
"""Linears that read one input, and so become one launch."""


@dataclass(frozen=True, slots=True)
class Outlier:
    """A scale far from the others of its role."""

    module: str
    value: float
    times_median: float


@dataclass(frozen=True, slots=True)
class Audit:
    """The scales of one role: `kind` is a key of NAMES; all as multipliers."""

    role: str
    kind: str
    count: int
    min: float
    max: float
    mean: float
    median: float
    outliers: tuple[Outlier, ...]

    @property
    def range(self) -> float:
        return self.max / self.min if self.min > 0 else float("inf")


@dataclass(frozen=True, slots=True)
class Group:
    """Linears of one input: in how many layers their scales differ, and by how much at most."""

    roles: tuple[str, ...]
    kind: str
    layers: int
    unequal: int
    most: float


@dataclass(frozen=True, slots=True)
class Scales:
    """The audit of a checkpoint."""

    dialects: tuple[str, ...]
    count: int
    audits: tuple[Audit, ...]
    groups: tuple[Group, ...]


def role_of(module: str) -> str:
    """`q` of `model.layers.0.self_attn.q_proj`; `head` of `lm_head`."""
    last = module.rpartition(".")[2]
    return "head" if last == "lm_head" else last.removesuffix("_proj")


def scales(source: Source) -> Scales:
    """The audit of the scales that import recorded."""
    by_role: dict[tuple[str, str], list[Scale]] = {}
    for s in source.scales:
        by_role.setdefault((s.role, role_of(s.module)), []).append(s)
    keys = sorted(by_role, key=lambda key: (key[0] != "weight_global", _rank(key[1])))
    kinds = dict.fromkeys(kind for kind, _ in keys)
    groups = [_group(roles, kind, source.scales) for kind in kinds for roles in GROUPS]
    return Scales(
        dialects=tuple(dict.fromkeys(s.dialect for s in source.scales if s.dialect)),
        count=len(source.scales),
        audits=tuple(_audit(role, kind, by_role[kind, role]) for kind, role in keys),
        groups=tuple(g for g in groups if g.layers),
    )


def _rank(role: str) -> tuple[int, str]:
    return (ROLES.index(role), "") if role in ROLES else (len(ROLES), role)


def _audit(role: str, kind: str, found: Sequence[Scale]) -> Audit:
    values = [s.value for s in found]
    median = statistics.median(values)
    outliers = [
        Outlier(s.module, s.value, s.value / median)
        for s in found
        if median > 0 and not 1 / OUTLIER <= s.value / median <= OUTLIER
    ]
    return Audit(
        role, kind, len(values), min(values), max(values), statistics.fmean(values), median,
        tuple(sorted(outliers, key=lambda o: -o.times_median)),
    )  # fmt: skip


def _group(roles: tuple[str, ...], kind: str, found: Sequence[Scale]) -> Group:
    members: dict[str, list[float]] = {}
    for s in found:
        if s.role == kind and role_of(s.module) in roles:
            members.setdefault(s.module.rpartition(".")[0], []).append(s.value)
    ratios = [max(v) / min(v) for v in members.values() if len(v) == len(roles) and min(v) > 0]
    unequal = sum(ratio != 1.0 for ratio in ratios)
    return Group(roles, kind, len(ratios), unequal, max(ratios, default=1.0))


def scales_text(facts: Scales) -> list[str]:
    """A row per role, then outliers by name, then the groups that share an input."""
    if not facts.count:
        return ["no scales: the checkpoint has no NVFP4 linear and no FP8 KV cache"]
    spelling = f" from {', '.join(facts.dialects)}" if facts.dialects else ""
    lines = [f"{facts.count} scales{spelling}, all as multipliers", ""]
    head = ("scale", "role", "count", "min", "median", "mean", "max", "max/min", "outliers")
    rows = [
        (NAMES.get(a.kind, a.kind), a.role, a.count, f"{a.min:.4g}", f"{a.median:.4g}",
         f"{a.mean:.4g}", f"{a.max:.4g}", f"{a.range:.1f}x", len(a.outliers) or "-")
        for a in facts.audits
    ]  # fmt: skip
    lines += table(rows, head, right=range(2, 9))
    lines += ["", f"outliers (more than {OUTLIER:.0f} times the median of their role, or below "
              f"1/{OUTLIER:.0f} of it)"]  # fmt: skip
    named = [(o.module, f"{o.value:.4g}", f"{o.times_median:.3g}x the median of {a.role}")
             for a in facts.audits for o in a.outliers]  # fmt: skip
    lines += table(named, right=(1,), indent=2) or ["  none"]
    return lines + _groups(facts.groups)


def _groups(groups: Sequence[Group]) -> list[str]:
    lines = ["", "linears of one input"] if groups else []
    for g in groups:
        what = f"{', '.join(g.roles)}: {NAMES.get(g.kind, g.kind)} scales "
        if not g.unequal:
            lines += wrapped(f"{what}equal in all {g.layers} layers", "  ", "    ")
            continue
        fate = (
            "each shard keeps its own, nothing is requantised" if g.kind == "weight_global"
            else "where activations are 4-bit, these stay separate launches"
        )  # fmt: skip
        text = f"{what}differ in {g.unequal} of {g.layers} layers, by up to {g.most:.4g}x: {fate}"
        lines += wrapped(text, "  ", "    ")
    return lines
