"""From nothing to first logits: a fresh process imports halfbyte, loads an artifact, runs one step.

    python benchmarks/startup.py model.hb [--runs 9] [--threads N]

Each run is a new process; the page cache is warm from the second on. Prints the median and the
range of: import, load, first logits, and their sum as the process itself sees it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys

_CHILD = """
import json, sys, time
start = time.perf_counter()
import halfbyte
imported = time.perf_counter()
model = halfbyte.load(sys.argv[1], threads=int(sys.argv[2]) or None)
loaded = time.perf_counter()
model.logits([1])
done = time.perf_counter()
print(json.dumps([imported - start, loaded - imported, done - loaded, done - start]))
"""
STEPS = ("import", "load", "first logits", "sum")


def run_once(artifact: str, threads: int) -> list[float]:
    """Seconds of each step in one fresh process."""
    command = [sys.executable, "-c", _CHILD, artifact, str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return [float(seconds) for seconds in json.loads(done.stdout)]


def main() -> None:
    parser = argparse.ArgumentParser(description="Time from nothing to first logits.")
    parser.add_argument("artifact")
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument("--threads", type=int, default=0, help="0: the physical cores")
    args = parser.parse_args()
    runs = [run_once(args.artifact, args.threads) for _ in range(args.runs)]
    for i, step in enumerate(STEPS):
        took = [run[i] * 1e3 for run in runs]
        middle = statistics.median(took)
        print(f"{step:13} {middle:7.1f} ms   ({min(took):.1f} .. {max(took):.1f})")


if __name__ == "__main__":
    main()
