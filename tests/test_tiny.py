"""The whole house on one screen: a checkpoint, compiled, loaded, run. The pre-commit gate."""

from __future__ import annotations

from pathlib import Path

import numpy as np

import halfbyte
from halfbyte.frontend import import_model, open_checkpoint
from halfbyte.ir import interp


def test_tiny(root: Path, tmp_path: Path) -> None:
    checkpoint = root / "tests" / "data" / "llama_tied-modelopt"
    report = halfbyte.compile(checkpoint, tmp_path / "tiny.hb", context=64)
    assert report.fallbacks == 0 and report.worst_selftest < 1

    ids = [1, 5, 9, 2, 6]
    with halfbyte.load(tmp_path / "tiny.hb") as model:
        logits = model.logits(ids)
        greedy = list(model.generate(ids, max_tokens=4, temperature=0.0))

    imported = import_model(open_checkpoint(checkpoint), context=64)
    rows = np.arange(len(ids), dtype=np.int32)
    inputs: dict[str, interp.Data] = {
        "ids": np.array(ids, np.int32), "pos": np.array(0, np.int32), "rows": rows
    }  # fmt: skip
    from halfbyte.codegen import declarations
    from halfbyte.ir.target import target
    from halfbyte.passes import pipeline
    from halfbyte.passes.context import Context

    graph = pipeline.run(imported.graph, Context(target("cpu"), declarations(), imported.weights))
    expected = np.asarray(interp.run(graph, inputs, imported.weights)[0])
    assert np.abs(logits - expected).max() < 1e-4
    assert greedy is not None
