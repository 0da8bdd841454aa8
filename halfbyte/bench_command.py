"""`halfbyte bench`: llama-bench's table for an artifact, and where the time of a step goes."""

import argparse
import json
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np

from .ir.errors import ModelError
from .run_command import ISAS, upload_progress
from .runtime import Model, Sampling, load
from .runtime.cuda_session import STEPS_AHEAD, CudaSession

_HELP = "time prefill (pp) and decode (tg) as llama-bench does"


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Registers `bench` with argparse's subparsers."""
    parser: argparse.ArgumentParser = subparsers.add_parser("bench", help=_HELP, description=_HELP)
    parser.add_argument("artifact", help="folder NAME.hb that `halfbyte compile` made")
    parser.add_argument("-p", type=_numbers, default=[512], metavar="N[,N...]",
                        help="prompt tokens; 0: skip")  # fmt: skip
    parser.add_argument("-n", type=int, default=128, metavar="N", help="tokens to decode; 0: skip")
    parser.add_argument("-d", type=int, default=0, metavar="N",
                        help="tokens in the cache when decoding begins")  # fmt: skip
    parser.add_argument("-b", type=_numbers, default=[1], metavar="N[,N...]",
                        help="sequences that are decoded at once (more than 1: devices only); "
                        "t/s counts the tokens of all")  # fmt: skip
    parser.add_argument("-r", type=int, default=5, metavar="N", help="repetitions")
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda or cuda:N")
    parser.add_argument("--threads", type=int, metavar="N", help="default: the physical cores")
    parser.add_argument("--isa", default="auto", choices=ISAS)
    parser.add_argument("--profile", action="store_true", help="also: time of each kernel, and the "
                        "host's overhead per decoded token")  # fmt: skip
    parser.add_argument("-o", choices=("md", "json"), default="md", help="output format")
    return parser


def main(args: argparse.Namespace) -> int:
    """Runs the command. Raises ModelError or TargetError; returns the exit status."""
    _check(args)
    with load(
        args.artifact,
        device=args.device,
        threads=args.threads,
        isa=args.isa,
        progress=upload_progress,
    ) as model:
        rows = [_row(model, f"pp{p}", p, _prefill(model, p, args.r)) for p in args.p if p]
        if args.n:
            rows += [_row(model, _test(args, b), b * args.n, _decode(model, args, b))
                     for b in args.b]  # fmt: skip
        profile = _profile(model, args) if args.profile else None
    if args.o == "json":
        result = rows if profile is None else {"tests": rows, "profile": profile}
        print(json.dumps(result, indent=1))
    else:
        print(_table(rows))
        print(_profile_text(profile) if profile else "", end="")
    return 0


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _check(args: argparse.Namespace) -> None:
    if args.r < 1 or min(args.p) < 0 or args.n < 0 or args.d < 0 or min(args.b) < 1:
        raise ModelError(
            "bench: expected -r >= 1, -p >= 0, -n >= 0, -d >= 0 and -b >= 1; correct the numbers"
        )
    if max(args.b) > 1 and args.device == "cpu":
        raise ModelError("bench: -b over 1 needs a device that decodes batches; add --device cuda")


def _test(args: argparse.Namespace, batch: int) -> str:
    depth = f" @ d{args.d}" if args.d else ""
    return f"tg{args.n}{depth}" + (f" x {batch}" if batch > 1 else "")


def _prefill(model: Model, tokens: int, repetitions: int) -> list[float]:
    """Seconds of prefilling so many tokens into an empty cache, logits of the last one only."""
    ids = _random_ids(model, tokens)

    def run() -> None:
        model.session.begin()
        model.session.rewind()
        model.session.feed(ids)

    return _timed(run, repetitions)


def _decode(model: Model, args: argparse.Namespace, batch: int) -> list[float]:
    """Seconds of decoding `-n` tokens of each sequence behind `-d` cached ones."""
    session = model.session
    session.require_fit(args.d + args.n)
    session.begin()
    session.rewind()
    prompt, ids = _random_ids(model, args.d), _random_ids(model, args.n)
    if batch > 1:
        if not isinstance(session, CudaSession):
            raise ModelError("bench: -b over 1 needs a device that decodes batches")
        return _timed(_batch(session, prompt, ids[0], args.n, batch), args.r)
    if prompt:
        session.feed(prompt)

    def run() -> None:
        session.rewind(args.d)
        session.decode(ids)

    return _timed(run, args.r)


def _batch(
    session: CudaSession, prompt: list[int], token: int, steps: int, batch: int
) -> Callable[[], None]:
    """What decodes so many steps of sequences that all begin with the prompt: see Batch."""
    if batch > session.sequences:
        raise ModelError(f"bench: -b: expected at most {session.sequences}, found {batch}")
    slots = list(range(batch))
    for slot in slots:
        session.require_pages(slot, len(prompt) + steps)
        if prompt:
            session.prefill_sampled(slot, prompt, 0, Sampling(), seed=0)

    def run() -> None:
        session.start(slots, [token] * batch, [len(prompt)] * batch)
        left = steps
        while left or session.ahead:
            if more := min(left, STEPS_AHEAD - session.ahead):
                session.advance(more)
                left -= more
            session.poll()

    return run


def _timed(run: Callable[[], None], repetitions: int) -> list[float]:
    run()  # warm: pages of the weights, threads, clocks
    seconds: list[float] = []
    for _ in range(repetitions):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return seconds


def _row(model: Model, test: str, tokens: int, seconds: list[float]) -> dict[str, object]:
    facts, session, made = model.artifact.manifest.model, model.session, model.facts
    rates = [tokens / s for s in seconds]
    return {
        "model": " ".join(filter(None, (facts.name, made.recipe))),
        "size": sum(weight.bytes for weight in made.weights),
        "params": facts.parameters,
        "backend": session.backend,
        "threads": session.threads,
        "test": test,
        "tokens_per_second": statistics.mean(rates),
        "deviation": statistics.stdev(rates) if len(rates) > 1 else 0.0,
        "samples": rates,
    }


def _table(rows: list[dict[str, Any]]) -> str:
    cells = [["model", "size", "params", "backend", "threads", "test", "t/s"]]
    for row in rows:
        speed = f"{row['tokens_per_second']:.2f} ± {row['deviation']:.2f}"
        size, params = f"{row['size'] / 2**20:.2f} MiB", f"{row['params'] / 1e6:.2f} M"
        cells.append([row["model"], size, params, row["backend"], str(row["threads"]),
                      row["test"], speed])  # fmt: skip
    return _markdown(cells, left=(0, 3))


def _profile(model: Model, args: argparse.Namespace) -> dict[str, Any]:
    """The kernels of a decode step after `-n` tokens, and the Python side of real decoding."""
    session, made = model.session, model.facts
    launches = [k for k in made.kernels if k.bucket == made.buckets[0]]
    steps = min(max(args.n, 2), session.context - 1)
    native, host = _decode_split(model, steps)
    runs = [session.profile(1, 1, steps // 2, len(launches)) for _ in range(args.r + 1)][1:]
    times = np.median(np.stack(runs), axis=0)
    by_kernel: defaultdict[str, list[float]] = defaultdict(list)
    for launch, microseconds in zip(launches, times, strict=False):
        by_kernel[launch.kernel].append(float(microseconds))
    return {
        "kernels": {name: {"launches": len(us), "us": sum(us)} for name, us in by_kernel.items()},
        "step_us": float(times[-1]),
        "native_us_per_step": native,
        "host_us_per_step": host,
        "steps": steps,
    }


def _decode_split(model: Model, steps: int) -> tuple[float, float]:
    """Microseconds of a decode step inside the library's call, and outside of it: medians."""
    session = model.session
    generation = model.start([0], steps, Sampling(), (), reuse=False)
    marks = [(time.perf_counter(), session.native_seconds, 0)]
    for _ in generation:
        marks.append((time.perf_counter(), session.native_seconds, len(generation.tokens)))
    inside: list[float] = []
    outside: list[float] = []
    for (t0, n0, c0), (t1, n1, c1) in zip(marks[1:], marks[2:], strict=False):  # 0: the prefill
        inside.append((n1 - n0) / max(c1 - c0, 1) * 1e6)
        outside.append((t1 - t0 - (n1 - n0)) / max(c1 - c0, 1) * 1e6)
    return (statistics.median(inside), statistics.median(outside)) if inside else (0.0, 0.0)


def _profile_text(profile: dict[str, Any]) -> str:
    total = sum(entry["us"] for entry in profile["kernels"].values()) or 1.0
    cells = [["kernel (decode)", "launches", "µs/step", "share"]]
    for name, entry in sorted(profile["kernels"].items(), key=lambda item: -item[1]["us"]):
        cells.append([name, str(entry["launches"]), f"{entry['us']:.1f}",
                      f"{entry['us'] / total:.1%}"])  # fmt: skip
    return (
        f"\n{_markdown(cells, left=(0,))}\n\n"
        f"decode step: {profile['native_us_per_step']:.1f} µs in the library, "
        f"{profile['host_us_per_step']:.1f} µs in Python (sampling and text), "
        f"medians of {profile['steps']} steps\n"
    )


def _markdown(cells: list[list[str]], left: tuple[int, ...]) -> str:
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    rule = ["-" * w if i in left else "-" * (w - 1) + ":" for i, w in enumerate(widths)]

    def line(row: list[str]) -> str:
        sized = enumerate(zip(row, widths, strict=True))
        padded = [cell.ljust(w) if i in left else cell.rjust(w) for i, (cell, w) in sized]
        return "| " + " | ".join(padded) + " |"

    return "\n".join(line(row) for row in (cells[0], rule, *cells[1:]))


def _random_ids(model: Model, count: int) -> list[int]:
    vocab = model.artifact.manifest.model.vocab
    return np.random.default_rng(0).integers(0, vocab, count).tolist()
