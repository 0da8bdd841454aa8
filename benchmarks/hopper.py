"""Every figure of docs/benchmarks.md for a Hopper card, in one command.

    PYTHONPATH=. python benchmarks/hopper.py --work DIR [--shapes 8b 24b] [--skip gemm]

Needs torch and a CUDA 13 toolkit, and in DIR room for checkpoints and artifacts (12 GB for 8b, 32
GB for 24b; a RAM disk will do). Each part is a process of its own: what it prints comes as it goes,
its figures stay in DIR, and if one fails the others still run.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
CONTEXT = 2560  # positions: pp2048, and decoding behind 512
CACHE_DEPTHS = (512, 4096)  # behind which the two KV caches are compared

BARS: dict[str, float] = {
    "8b tg64 @ d512": 370, "8b tg64 @ d512 x 8": 2400, "8b tg64 @ d512 x 32": 6000,
    "24b tg64 @ d512": 137, "8b pp512": 30_000, "8b pp2048": 36_000, "24b pp2048": 11_000,
}  # fmt: skip
"""Tokens a second that are to be reached."""


@dataclass(frozen=True, slots=True)
class Bench:
    """Where things are, and what is wanted."""

    work: Path
    python: str
    skip: frozenset[str]
    repetitions: int

    def part(
        self, name: str, *command: str | Path, into: Path | None = None, timeout: float = 420
    ) -> bool:
        """Runs a part and says what became of it. `into`: a file for what it prints."""
        if name.split()[0] in self.skip:
            return False
        print(f"\n== {name}", flush=True)
        start = time.perf_counter()
        try:
            words = [self.python, *map(str, command)]
            with into.open("w") if into else contextlib.nullcontext() as out:
                code = subprocess.run(words, stdout=out, timeout=timeout, check=False).returncode
        except subprocess.TimeoutExpired:
            code = -1
        took = time.perf_counter() - start
        print(
            f"== {name}: {'done' if code == 0 else f'FAILED ({code})'} in {took:.1f} s", flush=True
        )
        return code == 0

    def figures(self, name: str) -> dict[str, Any]:
        """What a part has written, or nothing; rows of a table under "rows"."""
        path = self.work / name
        found: Any = json.loads(path.read_text() or "{}") if path.exists() else {}
        return {"rows": found} if isinstance(found, list) else found

    def rows(self, name: str) -> list[dict[str, Any]]:
        """The rows of a table that a part has written."""
        return self.figures(name).get("rows", [])


def artifact_of(bench: Bench, shape: str, kv_cache: str = "bf16", context: int = CONTEXT) -> Path:
    """Makes the checkpoint of a shape and compiles it, where that has not been done.

    The checkpoint declares a KV cache in FP8, so that both caches are compiled of one.
    """
    name = shape if kv_cache == "bf16" and context == CONTEXT else f"{shape}.{kv_cache}.{context}"
    checkpoint, artifact = bench.work / shape, bench.work / f"{name}.hb"
    if not checkpoint.exists():
        made = (HERE / "make_checkpoint.py", shape, checkpoint, "--kv-cache", "fp8")
        bench.part(f"checkpoint {shape}", *made)
    if not artifact.exists():
        command = ("-m", "halfbyte", "compile", checkpoint, "-o", artifact, "--target", "sm_90a")
        bench.part(f"compile {name}", *command, "--context", str(context), "--kv-cache", kv_cache)
    return artifact


def run_caches(bench: Bench, shape: str) -> None:
    """Decoding over a KV cache in bf16 and in FP8, short and long, by the same weights."""
    context = max(CACHE_DEPTHS) + 128
    for kv_cache in ("bf16", "fp8"):
        artifact = artifact_of(bench, shape, kv_cache, context)
        for depth in CACHE_DEPTHS:
            speed = bench.work / f"{shape}.{kv_cache}.{depth}.json"
            command = ["-m", "halfbyte", "bench", artifact, "--device", "cuda:0", "-o", "json"]
            prompt = "2048" if depth == CACHE_DEPTHS[0] else "0"
            tests = ["-p", prompt, "-n", "64", "-d", str(depth), "-b", "1,8,32", "-r", "3"]
            bench.part(f"kv {shape} {kv_cache} {depth}", *command, *tests, into=speed)


def cache_rows(bench: Bench, shape: str) -> list[str]:
    """The two caches side by side, as rows of a table."""
    found: list[str] = []
    for depth in CACHE_DEPTHS:
        theirs = {row["test"]: row for row in bench.rows(f"{shape}.bf16.{depth}.json")}
        for row in bench.rows(f"{shape}.fp8.{depth}.json"):
            before, now = theirs[row["test"]]["tokens_per_second"], row["tokens_per_second"]
            speeds = f"{before:.0f} | {now:.0f} | {now / before:.2f}"
            found.append(f"| {shape} {row['test']} | {speeds} |")
    return found


def run_shape(bench: Bench, shape: str) -> None:
    """Speed, load time, determinism and torch's speed of one shape."""
    artifact = artifact_of(bench, shape)
    speed = bench.work / f"{shape}.speed.json"
    command = ["-m", "halfbyte", "bench", artifact, "--device", "cuda:0", "-o", "json"]
    tests = ["-p", "512,2048", "-n", "64", "-d", "512", "-b", "1,8,32"]
    bench.part(f"speed {shape}", *command, *tests, "-r", str(bench.repetitions), into=speed)
    for row in bench.rows(speed.name):
        print(
            f"{shape} {row['test']}: {row['tokens_per_second']:.1f} ± {row['deviation']:.1f} tok/s"
        )
    traces = [word for batch in (1, 8, 32) for word in ("--trace", str(batch))]
    bench.part(f"model {shape}", HERE / "cuda_model.py", artifact, *traces,
               "--json", bench.work / f"{shape}.model.json")  # fmt: skip
    bench.part(f"torch {shape}", HERE / "torch_llama.py", shape,
               "--json", bench.work / f"{shape}.torch.json")  # fmt: skip


def summary(bench: Bench, shapes: Sequence[str]) -> None:
    """What was measured beside what is to be reached and what torch does."""
    print("\n| test | tok/s | bar | torch bf16 |\n|---|---:|---:|---:|")
    for shape in shapes:
        theirs = bench.figures(f"{shape}.torch.json")
        for row in bench.rows(f"{shape}.speed.json"):
            test = f"{shape} {row['test']}"
            name = row["test"].replace("tg64", "tg")
            other = theirs.get(name, theirs.get(f"{name} x 1", 0.0))
            bar = BARS.get(test)
            print(f"| {test} | {row['tokens_per_second']:.0f} | {bar or ''} | {other:.0f} |")
        if facts := bench.figures(f"{shape}.model.json"):
            print(f"| {shape} first token, s | {facts['first_token_s']:.2f} | 10 | |")
    if caches := [row for shape in shapes for row in cache_rows(bench, shape)]:
        print("\n| test | KV bf16, tok/s | KV FP8, tok/s | ratio |\n|---|---:|---:|---:|")
        print("\n".join(caches))
    for row in bench.rows("linears.json"):
        if row["what"] != "read":
            name = f"{row['what']} {row['shape']} M={row['m']}"
            print(f"| {name} | {row['us']:.2f} us | | {row['ratio']:.2f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description="Every figure of a Hopper card.")
    parser.add_argument("--work", type=Path, required=True, help="folder for what is made")
    parser.add_argument("--shapes", nargs="*", default=["8b", "24b"])
    parser.add_argument(
        "--skip", nargs="*", default=[], help="linears, torch, speed, model, kv ..."
    )
    parser.add_argument("-r", type=int, default=5, help="repetitions of each speed")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    bench = Bench(args.work, sys.executable, frozenset(args.skip), args.r)
    print(f"{platform.node()}, {time.strftime('%Y-%m-%d')}", flush=True)
    bench.part("linears", HERE / "cuda_linears.py", "--json", args.work / "linears.json")
    for shape in args.shapes:
        if not bench.skip >= {"speed", "model", "torch"}:
            run_shape(bench, shape)
    if "kv" not in bench.skip:
        run_caches(bench, args.shapes[0])
    summary(bench, args.shapes)


if __name__ == "__main__":
    main()
