"""The oracle itself: the interpreter against logits computed by the producers' own code.

W4A16 references hold the checkpoint's dequantised weights in a float32 transformers model; W4A4
ones quantise activations as well. See shared/models/MANIFEST.md.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from halfbyte.codegen import declarations
from halfbyte.frontend import import_model, open_checkpoint
from halfbyte.ir import interp
from halfbyte.ir.target import target
from halfbyte.passes import pipeline
from halfbyte.passes.context import Context

TINY = [
    "llama_tied-modelopt", "llama_untied-modelopt", "llama_untied-llmcompressor",
    "mistral-llmcompressor", "mistral3-modelopt", "qwen2-modelopt", "qwen3-llmcompressor",
]  # fmt: skip


def cosines(a: NDArray[np.float32], b: NDArray[np.float32]) -> NDArray[np.float32]:
    """Cosine of each row with its counterpart."""
    product = np.einsum("tv,tv->t", a.astype(np.float64), b.astype(np.float64))
    return (product / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)).astype(np.float32)


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize(("recipe", "tag"), [("w4a16", "w4a16_f32"), ("w4a4", "w4a4_emul_f32")])
def test_interpreter_equals_the_producers_logits(
    shared: Path, name: str, recipe: str, tag: str
) -> None:
    folder = shared / "models" / "tiny" / name
    reference = np.load(folder / "reference.npz")
    ids = reference["input_ids"].astype(np.int32)
    model = import_model(open_checkpoint(folder), context=ids.size)
    context = Context(target("cpu"), declarations(), model.weights, recipe=recipe)
    graph = pipeline.run(model.graph, context)
    rows = np.arange(ids.size, dtype=np.int32)
    inputs: dict[str, interp.Data] = {"ids": ids, "pos": np.array(0, np.int32), "rows": rows}
    logits = np.asarray(interp.run(graph, inputs, model.weights)[0])
    found = cosines(logits, reference[f"{tag}_logits"])
    assert found.min() >= 0.999999, (recipe, float(found.min()))
    assert np.abs(logits - reference[f"{tag}_logits"]).max() < 1e-4


def test_a_scale_read_upside_down_is_seen(shared: Path) -> None:
    """The check can fail: the divisor of compressed-tensors taken for a multiplier."""
    folder = shared / "models" / "tiny" / "llama_untied-llmcompressor"
    reference = np.load(folder / "reference.npz")
    ids = reference["input_ids"].astype(np.int32)[:4]
    model = import_model(open_checkpoint(folder), context=8)

    def upside_down(name: str) -> interp.Data:
        data = model.weights(name)
        return 1 / data if name.endswith("weight_global_scale") else data

    inputs: dict[str, interp.Data] = {
        "ids": ids, "pos": np.array(0, np.int32), "rows": np.arange(4, dtype=np.int32)
    }  # fmt: skip
    logits = np.asarray(interp.run(model.graph, inputs, upside_down)[0])
    assert cosines(logits, reference["w4a16_f32_logits"][:4]).min() < 0.9
