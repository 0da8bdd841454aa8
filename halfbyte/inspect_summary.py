"""`inspect` without a flag: one screen about an artifact."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass

from .inspect_format import count, size, table, wrapped
from .inspect_source import Source
from .kv_cache_words import kv_cache_words
from .runtime.devices import is_cuda
from .runtime.manifest import ModelFacts, NetFacts, PortFacts, SelfTest, TargetFacts
from .untested import untested


@dataclass(frozen=True, slots=True)
class Summary:
    """The facts of an artifact that fit one screen. Sizes in bytes."""

    path: str
    producer: str
    created: str
    model: ModelFacts
    target: str
    recipe: str
    bytes: int
    weights: dict[str, int]
    targets: dict[str, tuple[str, ...]]
    buckets: tuple[int, ...]
    launches: int
    kernels: dict[str, dict[str, int]]
    fallbacks: int
    phases: tuple[str, ...]
    changed: tuple[str, ...]
    compile_ms: float
    selftests: int
    untested: tuple[str, ...]
    worst: SelfTest | None
    arena_per_token: int
    workspace: int
    state: int
    kv_cache: str
    generation: dict[str, object]
    net: NetFacts | None


def summary(source: Source) -> Summary:
    """The manifest, summed up."""
    m, t = source.manifest, source.facts
    weights: Counter[str] = Counter()
    for weight in t.weights:
        weights[weight.type.partition(", ")[2].removesuffix(">") or weight.type] += weight.bytes
    return Summary(
        path=str(source.artifact.folder),
        producer=m.producer,
        created=m.created,
        model=m.model,
        target=source.target,
        recipe=t.recipe,
        bytes=sum(part.bytes for part in m.parts.values()),
        weights=dict(weights.most_common()),
        targets={name: facts.isas for name, facts in m.targets.items()},
        buckets=t.buckets,
        launches=sum(c.bucket == t.buckets[0] for c in t.kernels),
        kernels=_kernels(t),
        fallbacks=len({(c.loc, c.op) for c in t.kernels if c.fallback}),
        phases=tuple(p.id for p in t.phases) or source.phases,
        changed=tuple(p.id for p in t.phases if p.changed),
        compile_ms=sum(p.ms for p in t.phases),
        selftests=len(t.selftest),
        untested=untested({c.kernel for c in t.kernels}, t.selftest),
        worst=max(t.selftest, key=share, default=None),
        arena_per_token=t.arena.per_token,
        workspace=t.arena.workspace,
        state=t.arena.state,
        kv_cache=kv_cache_words(source.last) if source.phases and m.net is None else "",
        generation=dict(m.generation),
        net=m.net,
    )


def share(test: SelfTest) -> float:
    """The part of its tolerance that a self-test used up."""
    return test.max_abs / test.tolerance if test.tolerance else 0.0


def _kernels(t: TargetFacts) -> dict[str, dict[str, int]]:
    """Launches by kernel, in the smallest bucket (decode) and in the largest (prefill)."""
    found: dict[str, dict[str, int]] = {}
    for name, bucket in (("decode", t.buckets[0]), ("prefill", t.buckets[-1])):
        found[name] = dict(Counter(c.kernel for c in t.kernels if c.bucket == bucket).most_common())
    return found


def summary_text(s: Summary) -> list[str]:
    """One fact a line, the longest wrapped."""
    m = s.model
    kind = f", {s.recipe.upper()}" if s.recipe else ""
    rows = [
        *_model(s, kind),
        ("made from", ", ".join(f"{name} ({h[:12]})" for name, h in m.sources.items()) or "?"),
        ("made by", f"{s.producer}, {s.created}"),
        ("target", _targets(s)),
        ("artifact", f"{s.path}, {size(s.bytes)}"),
        ("weights", ", ".join(f"{name} {size(n)}" for name, n in s.weights.items())),
        *_step(s),
        *((_when(name, s), _counted(kernels)) for name, kernels in s.kernels.items()),
        ("fallbacks", str(s.fallbacks)),
        ("phases", f"{len(s.phases)}, {len(s.changed)} of them changed the graph; "
                   f"{s.compile_ms / 1e3:.1f} s"),
        ("self-test", _selftest(s)),
        ("generation", json.dumps(s.generation) if s.generation else "no defaults given"),
    ]  # fmt: skip
    lines = [line for name, text in rows for line in wrapped(text or "-", f"{name:11} ")]
    return [*lines, "", *_next(s.path)]


def _selftest(s: Summary) -> str:
    if not s.selftests and is_cuda(s.target):
        return "none: compiled, and not run, for want of a device"
    worst = (
        f"; the nearest to its tolerance is {s.worst.kernel} at {share(s.worst):.0%} of it"
        if s.worst
        else ""
    )
    oracle = "onnx" if s.net else "the interpreter"
    left = f"; not tested: {', '.join(s.untested)}" if s.untested else ""
    return f"{count(s.selftests, 'case')} against {oracle}{worst}{left}"


def _model(s: Summary, kind: str) -> list[tuple[str, str]]:
    """What it is, and what it takes and gives."""
    m = s.model
    if s.net is None:
        return [
            ("model", f"{m.name}: {m.family}, {_millions(m.parameters)} parameters{kind}"),
            ("vocabulary", f"{m.vocab:,} tokens, context {m.context:,}"),
        ]
    return [
        ("model", f"{m.name}: ONNX, opset {s.net.opset}{kind}"),
        ("inputs", ", ".join(map(_port, s.net.inputs))),
        ("outputs", ", ".join(map(_port, s.net.outputs))),
    ]


def _when(name: str, s: Summary) -> str:
    """What the smallest and the largest bucket stand for: of a graph, rows of its linears."""
    return {"decode": "one row", "prefill": "many rows"}[name] if s.net else name


def _port(port: PortFacts) -> str:
    dims = "of any rank" if port.dims is None else f"[{', '.join(port.dims)}]"
    return f"{port.name} {port.dtype} {dims}"


def _step(s: Summary) -> list[tuple[str, str]]:
    if s.net is not None:
        return [("memory", "shapes are facts of a run, which uses the memory of the one before")]
    return [
        ("memory", f"arena {size(s.arena_per_token)} a token, workspace {size(s.workspace)}, "
                   f"KV cache {size(s.state)}{f' in {s.kv_cache}' if s.kv_cache else ''}"),
        ("buckets", f"{', '.join(map(str, s.buckets))} tokens; {s.launches} launches a step"),
    ]  # fmt: skip


def _targets(s: Summary) -> str:
    """What there is; of several targets also which one the rest tells of."""
    found = "; ".join(f"{name} ({', '.join(isas)})" for name, isas in s.targets.items())
    told = f"; below: {s.target}, others with --target NAME" if len(s.targets) > 1 else ""
    return found + told


def _millions(n: int) -> str:
    return f"{n / 1e6:,.1f} M" if n >= 1e6 else f"{n:,}"


def _counted(kernels: dict[str, int]) -> str:
    return ", ".join(f"{n} x {name}" for name, n in kernels.items())


def _next(path: str) -> list[str]:
    """What to ask next."""
    rows = [
        ("--layer NAME", "one module from checkpoint to kernel"),
        ("--kernels", "which kernel runs where, and why not a faster one"),
        ("--phases", "what the compiler did; --phase ID, --diff A B show it"),
        ("--memory, --scales, --check", "the arena drawn; scales audited; integrity"),
    ]
    return ["ask on:", *table(rows, indent=2)]
