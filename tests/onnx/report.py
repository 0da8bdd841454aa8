"""Writes docs/onnx.md: which node cases of onnx pass on the cpu, and why the others are refused.

python tests/onnx/report.py docs/onnx.md
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
import warnings
from collections import Counter, defaultdict
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

from halfbyte.codegen import kernels_net_cuda as cuda  # noqa: E402
from halfbyte.codegen.kernels_net import KERNELS  # noqa: E402
from halfbyte.ir.ops import OPS  # noqa: E402
from tests.onnx.node_cases import KINDS, PASSED, Outcome, cases, run_case  # noqa: E402


def outcomes() -> list[Outcome]:
    """Of every case, in the order of onnx."""
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(_one, cases(), chunksize=8))


def _one(name: str) -> Outcome:
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        return run_case(name, Path(folder))


def reason(words: str) -> str:
    """The words of an error without what is only of one file: names, numbers, paths."""
    text = words.splitlines()[0]
    text = re.sub(r"^\S+\.onnx( \(opset \d+\))?: ", "", text)
    text = re.sub(r"'[^']*'", "'…'", text)
    text = re.sub(r"^node …? ?", "", text)
    return re.sub(r"\d+", "N", text)[:150].replace("|", "\\|")


def operators() -> str:
    """The operators of the op table, by name."""
    names = sorted({entry.onnx for entry in OPS.values() if entry.onnx})
    return ", ".join(names)


def on_devices() -> list[str]:
    """What CUDA targets have, by the kernel table."""
    held = {k.op for k in KERNELS if cuda.family_of(k) or k.family == cuda.VIEWS}
    names = sorted({entry.onnx for op, entry in OPS.items() if entry.onnx and op in held})
    return [
        "## On CUDA targets",
        "",
        "The operators below have a kernel there; If, Loop and Scan are walked by the host. A "
        "graph with any other is refused,",
        "in one error that lists them all (`make test-gpu` runs the node cases on a device).",
        "",
        f"{', '.join(names)}.",
    ]


def text(found: list[Outcome]) -> str:
    import onnx

    count = Counter(outcome.kind for outcome in found)
    share = 100 * count[PASSED] / len(found)
    lines = [
        "# ONNX on the cpu",
        "",
        "Written by `make test-onnx`, which compiles and runs every backend node case of the "
        "installed onnx",
        f"({onnx.__version__}): {len(found)} cases, opsets 1 to {onnx.defs.onnx_opset_version()}.",
        "",
        f"**{count[PASSED]} of {len(found)} pass ({share:.1f} %).** "
        + ", ".join(f"{count[kind]} {kind}" for kind in KINDS if kind != PASSED)
        + ".",
        "",
        "*refused*: a ModelError while it is compiled, naming node and operator; *wrong*: other "
        "values without an error;",
        "*failed*: any other end.",
    ]
    by_reason: dict[tuple[str, str], list[str]] = defaultdict(list)
    for outcome in found:
        if outcome.kind != PASSED:
            by_reason[outcome.kind, reason(outcome.words)].append(outcome.name)
    lines += ["", "## What does not pass", "", "| cases | end | why | as in |", "|---|---|---|---|"]
    for (kind, why), names in sorted(by_reason.items(), key=lambda item: -len(item[1])):
        lines.append(f"| {len(names)} | {kind} | {why} | `{names[0]}` |")
    lines += ["", "## Operators with an entry of their own", "", operators() + ".", ""]
    lines += [
        "Others that have an ONNX function body are inlined at import; so is one of these whose\n"
        "kernel does not take the types at hand (an integer mask of Attention).",
        "",
        *on_devices(),
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(text(outcomes()))
