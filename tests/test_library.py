"""The library of an artifact outside our runtime: other loaders, several processes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import halfbyte
from halfbyte.runtime.artifact import WEIGHTS, Artifact
from halfbyte.runtime.weights import WeightsFile


@pytest.fixture(scope="module")
def artifact(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("library") / "tiny.hb"
    halfbyte.compile(root / "tests" / "data" / "llama_tied-modelopt", out, context=64)
    return out


def test_plain_tvm_loads_and_calls_the_same_library(artifact: Path) -> None:
    """With the extra `tvm`: `tvm.runtime.load_module` finds the same functions."""
    runtime = pytest.importorskip("tvm.runtime", reason="apache-tvm is not installed (extra tvm)")
    opened = Artifact.open(artifact)
    weights = WeightsFile(opened.path(WEIGHTS))
    module = runtime.load_module(str(opened.library("cpu")))
    handle = module["create"](weights.image, 1, "auto")
    ids, rows = np.array([1, 5, 9], np.int32), np.array([0, 1, 2], np.int32)
    logits = np.zeros((3, opened.manifest.model.vocab), np.float32)
    module["prefill"](handle, ids, 0, rows, logits)
    module["destroy"](handle)
    weights.close()
    with halfbyte.load(artifact, threads=1) as model:
        assert np.array_equal(model.logits([1, 5, 9]), logits)


_READ_AND_REPORT = """
import json, re, sys
import halfbyte
model = halfbyte.load(sys.argv[1], threads=1)
model.logits([1, 5, 9])
found, inside = {}, False
for line in open("/proc/self/smaps"):
    if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
        inside = line.rstrip().endswith("weights.safetensors")
    elif inside and (m := re.match(r"(Rss|Private_Dirty|Anonymous): +([0-9]+) kB", line)):
        found[m[1]] = found.get(m[1], 0) + int(m[2])
print(json.dumps(found))
"""


def test_processes_share_the_pages_of_the_weights(artifact: Path) -> None:
    """Weights are mapped from the file and never copied: no page of them is a process's own."""
    done = subprocess.run(
        [sys.executable, "-c", _READ_AND_REPORT, str(artifact)],
        capture_output=True, text=True, check=True, cwd=Path(halfbyte.__file__).parents[1],
    )  # fmt: skip
    pages = json.loads(done.stdout)
    assert pages["Rss"] > 0
    assert pages["Private_Dirty"] == 0 and pages["Anonymous"] == 0
