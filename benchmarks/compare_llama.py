"""Halfbyte against llama.cpp on one machine: alternating runs, medians, and the ratio per test.

    python benchmarks/compare_llama.py --llama-bench PATH --threads 2 \\
        --pair "SmolLM2" smollm2.hb smollm2-q4_0.gguf --pair "0.87 B" 0.87b.hb 0.87b-q4_0.gguf

Each round times every test of every pair once by each engine, in turn, and turns the order round
from round to round, so that a machine that slows down or is shared slows both. The ratio is the
median of the rounds' own ratios; an engine's figure is the median of its rounds.

Measure on a quiet machine only: threads of llama.cpp spin at a barrier, and lose a factor of five
and more when something else wants a core. The load averages stand above the table.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

BUSY = 0.3  # one-minute load average above which figures are not worth quoting
Speeds = dict[str, float]  # test ("pp512", "tg128") -> tokens per second


@dataclass(frozen=True, slots=True)
class Setting:
    """What both engines are asked for, and how they are started."""

    llama_bench: Path
    halfbyte: tuple[str, ...]
    prompt: int
    generate: int
    repetitions: int
    threads: int

    @property
    def flags(self) -> list[str]:
        """The flags that llama-bench and `halfbyte bench` spell alike."""
        counts = ["-p", str(self.prompt), "-n", str(self.generate), "-r", str(self.repetitions)]
        return [*counts, "-o", "json"]

    def run_llama(self, model: Path) -> Speeds:
        """Speeds of one llama-bench run."""
        command = [str(self.llama_bench), "-m", str(model), "-t", str(self.threads), *self.flags]
        return speeds(_output(command))

    def run_halfbyte(self, artifact: Path) -> Speeds:
        """Speeds of one `halfbyte bench` run."""
        threads = ["--threads", str(self.threads)]
        return speeds(_output([*self.halfbyte, "bench", str(artifact), *threads, *self.flags]))


@dataclass(slots=True)
class Pair:
    """One model in both engines' files, and what every round measured."""

    name: str
    artifact: Path
    gguf: Path
    ours: list[Speeds] = field(default_factory=list["Speeds"])
    theirs: list[Speeds] = field(default_factory=list["Speeds"])

    def tests(self) -> list[str]:
        return [test for test in self.ours[0] if all(test in run for run in self.theirs)]

    def row(self, test: str) -> tuple[float, float, float]:
        """(llama.cpp median, halfbyte median, median of the rounds' ratios)."""
        ours = [run[test] for run in self.ours]
        theirs = [run[test] for run in self.theirs]
        ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
        return statistics.median(theirs), statistics.median(ours), statistics.median(ratios)


def speeds(text: str) -> Speeds:
    """Tests and speeds of either engine's JSON; a run's speed is the median of its samples.

    llama-bench: [{n_prompt, n_gen, samples_ts, …}, …]; halfbyte: [{test, samples, …}, …].
    """
    found: Speeds = {}
    rows: list[dict[str, Any]] = json.loads(text)
    for row in rows:
        if "test" in row:
            found[row["test"]] = statistics.median(row["samples"])
        else:
            name = f"pp{row['n_prompt']}" if row["n_prompt"] else f"tg{row['n_gen']}"
            found[name] = statistics.median(row["samples_ts"])
    return found


def _output(command: Sequence[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(command)}: exit status {done.returncode}\n{done.stderr}")
    return done.stdout


def measure(setting: Setting, pairs: Sequence[Pair], rounds: int) -> None:
    """Fill the pairs: `rounds` rounds, each engine first in every other one."""
    for number in range(rounds):
        for pair in pairs:
            print(f"round {number + 1}/{rounds}: {pair.name}", file=sys.stderr)
            if number % 2 == 0:
                pair.theirs.append(setting.run_llama(pair.gguf))
            pair.ours.append(setting.run_halfbyte(pair.artifact))
            if number % 2 == 1:
                pair.theirs.append(setting.run_llama(pair.gguf))


def processor() -> str:
    """The processor's name from /proc/cpuinfo, with the number of cores this process may use."""
    names = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    cores = len(os.sched_getaffinity(0))
    return f"{names[0] if names else platform.machine()}, {cores} cores"


def table(setting: Setting, pairs: Sequence[Pair], rounds: int, load: float) -> str:
    """The Markdown table, under a line with machine, date and method. `load`: before measuring."""
    lines = [
        f"{processor()}, {setting.threads} threads; {datetime.now(UTC):%Y-%m-%d}; {rounds} "
        f"alternating rounds of {setting.repetitions}; load average before {load:.1f}, "
        f"after {os.getloadavg()[0]:.1f}",
        "",
        "| model | test | llama.cpp tok/s | halfbyte tok/s | ratio |",
        "| --- | --- | ---: | ---: | ---: |",
    ]
    for pair in pairs:
        for test in pair.tests():
            theirs, ours, ratio = pair.row(test)
            label = f"{pair.name} ({pair.gguf.stem})"
            lines.append(f"| {label} | {test} | {theirs:.2f} | {ours:.2f} | {ratio:.2f}× |")
    return "\n".join(lines)


def main() -> None:
    """Measure the pairs of the command line and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--llama-bench", type=Path, required=True, help="llama.cpp's llama-bench")
    parser.add_argument(
        "--pair",
        nargs=3,
        action="append",
        required=True,
        metavar=("NAME", "ARTIFACT", "GGUF"),
        help="one model in both engines' files; may be repeated",
    )
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("-p", "--prompt", type=int, default=512)
    parser.add_argument("-n", "--generate", type=int, default=128)
    parser.add_argument("-r", "--repetitions", type=int, default=3, help="within one run")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="also write every round's speeds here")
    args = parser.parse_args()
    started = (sys.executable, "-m", "halfbyte")
    counts = (args.prompt, args.generate, args.repetitions, args.threads)
    setting = Setting(args.llama_bench, started, *counts)
    pairs = [Pair(name, Path(artifact), Path(model)) for name, artifact, model in args.pair]
    load = os.getloadavg()[0]
    if load > BUSY:
        print(f"load average {load:.1f}: this machine is busy, do not quote", file=sys.stderr)
    measure(setting, pairs, args.rounds)
    print(table(setting, pairs, args.rounds, load))
    if args.json:
        runs = {pair.name: {"halfbyte": pair.ours, "llama.cpp": pair.theirs} for pair in pairs}
        args.json.write_text(json.dumps(runs, indent=1) + "\n")


if __name__ == "__main__":
    main()
