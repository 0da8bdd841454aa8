"""An artifact on a CUDA device: load time, determinism, and where a decode step's time goes.

    python benchmarks/cuda_model.py model.hb [--json OUT] [--trace 1 --trace 8]

Load: from `halfbyte.load` to the first token in this process; run it twice for a warm page cache.
Determinism: a decode step's logits over 32 replays, and of single launches, byte for byte. The
trace (needs torch, for its profiler) attributes a graph's replay to its kernels by when each one
ended, since dependent launches overlap.
"""

from __future__ import annotations

import argparse
import importlib
import json
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from halfbyte.runtime import Model, Sampling, load
from halfbyte.runtime.cuda_session import CudaSession

PROMPT = [(31 * i + 7) % 1000 for i in range(512)]
REPLAYS = 32


def session_of(model: Model) -> CudaSession:
    session = model.session
    assert isinstance(session, CudaSession), "not on a device"
    return session


def logits_behind(session: CudaSession, ids: list[int], steps: int) -> bytes:
    """Logits of a prefill and of decode steps behind it."""
    session.begin()
    session.rewind()
    rows = [session.feed(ids).tobytes()]
    rows += [session.step(token).tobytes() for token in ids[:steps]]
    return b"".join(rows)


def replays_differ(session: CudaSession) -> int:
    """How many of 32 replays of one decode step gave other bytes than the first."""
    session.begin()
    session.rewind()
    session.feed(PROMPT)
    found: list[bytes] = []
    for _ in range(REPLAYS):
        session.rewind(len(PROMPT))
        found.append(session.step(5).tobytes())
    return sum(row != found[0] for row in found)


def trace(session: CudaSession, batch: int, steps: int = 16) -> list[dict[str, Any]]:
    """Microseconds of a replayed step by kernel: from the end of the kernel before to its own."""
    profiler: Any = importlib.import_module("torch.profiler")
    slots = list(range(batch))
    session.begin()
    for slot in slots:
        session.require_pages(slot, len(PROMPT) + 4 * steps)
        session.prefill_sampled(slot, PROMPT, 0, Sampling(temperature=0.0), seed=0)
    session.start(slots, [1] * batch, [len(PROMPT)] * batch)
    session.advance(4)
    session.drain()
    session.start(slots, [1] * batch, [len(PROMPT)] * batch)
    with profiler.profile(activities=[profiler.ProfilerActivity.CUDA]) as found:
        session.advance(steps)
        session.drain()
    on_device = [e for e in found.events() if str(e.device_type).endswith("CUDA")]
    events = [e for e in on_device if not e.name.startswith("Mem")]
    events.sort(key=lambda e: e.time_range.end)
    by_kernel: defaultdict[str, list[float]] = defaultdict(list)
    for before, event in zip(events, events[1:], strict=False):
        by_kernel[event.name[:90]].append(event.time_range.end - before.time_range.end)
    rows = [
        {"kernel": name, "launches": len(us) / steps, "us": float(np.median(us)),
         "step_us": sum(us) / steps}
        for name, us in by_kernel.items()
    ]  # fmt: skip
    return sorted(rows, key=lambda row: -row["step_us"])


def print_trace(rows: list[dict[str, Any]], batch: int) -> None:
    total = sum(row["step_us"] for row in rows)
    print(f"decode step of {batch}: {total:.0f} us")
    for row in rows[:16]:
        each = f"{row['launches']:6.1f} x {row['us']:6.2f} us"
        print(f"  {row['step_us']:8.1f} us {each}  {row['kernel']}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Load time, determinism, trace of an artifact.")
    parser.add_argument("artifact")
    parser.add_argument("--json", type=Path, metavar="OUT", help="also write the figures")
    parser.add_argument("--trace", type=int, action="append", default=[], metavar="BATCH")
    args = parser.parse_args()
    start = time.perf_counter()
    with load(args.artifact, "cuda:0") as model:
        session = session_of(model)
        loaded = time.perf_counter() - start
        session.step(1)
        first = time.perf_counter() - start
        size = sum(weight.bytes for weight in model.facts.weights)
        print(f"load {loaded:.2f} s, first token {first:.2f} s, {size / 1e9:.2f} GB", flush=True)
        differ = replays_differ(session)
        print(f"{differ} of {REPLAYS} replays differ", flush=True)
        rows = logits_behind(session, PROMPT, 4)
        traces = {batch: trace(session, batch) for batch in args.trace}
        counters = session.counters()
    for batch, found in traces.items():
        print_trace(found, batch)
    with load(args.artifact, "cuda:0", eager=True, sequences=1) as model:
        same = logits_behind(session_of(model), PROMPT, 4) == rows
    print(f"graphs {'equal' if same else 'DIFFER FROM'} single launches; {counters}", flush=True)
    if args.json:
        facts = {"load_s": loaded, "first_token_s": first, "bytes": size, "differ": differ,
                 "eager_equal": same, "counters": counters, "traces": traces}  # fmt: skip
        args.json.write_text(json.dumps(facts, indent=1))


if __name__ == "__main__":
    main()
