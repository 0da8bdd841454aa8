"""Checkpoints with an FP8 KV cache, made of ones without: scales calibrated by the interpreter."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from halfbyte.frontend import Imported, import_model, open_checkpoint
from halfbyte.ir.graph import substitute
from halfbyte.ir.interp import run
from halfbyte.ir.opdef import Data, array
from tests.checkpoint_files import Array, Tensors, safetensors_bytes

Json = dict[str, Any]
_SCHEME = {"type": "float", "num_bits": 8, "dynamic": False}


def _legacy(folder: Path) -> None:
    """hf_quant_config.json, as ModelOpt wrote it until 0.33."""
    path = folder / "hf_quant_config.json"
    outer: Json = json.loads(path.read_text()) if path.exists() else {"quantization": {}}
    outer["quantization"]["kv_cache_quant_algo"] = "FP8"
    path.write_text(json.dumps(outer))


def _scheme(folder: Path) -> None:
    """config.json, as compressed-tensors and newer ModelOpt write it."""
    path = folder / "config.json"
    config: Json = json.loads(path.read_text())
    config["quantization_config"]["kv_cache_scheme"] = _SCHEME
    path.write_text(json.dumps(config))


DIALECTS: dict[str, tuple[str, Callable[[Path], None]]] = {
    "modelopt": ("{at}.{kind}_proj.{kind}_scale", _legacy),
    "compressed-tensors": ("{at}.{kind}_scale", _scheme),
}
"""What a scale is called, and what declares the cache."""


def _inputs(ids: Sequence[int]) -> dict[str, Data]:
    count = len(ids)
    rows = np.arange(count, dtype=np.int32)
    return {"ids": np.array(ids, np.int32), "pos": np.array(0, np.int32), "rows": rows}


def _imported(folder: Path, ids: Sequence[int]) -> Imported:
    return import_model(open_checkpoint(folder), context=len(ids))


def _weight_only(model: Imported) -> Imported:
    """The model without the quantisation of activations."""
    fake = {op.out: op.args[0] for op in model.graph.ops if op.name == "quantize_dequantize"}
    kept = [substitute(op, fake) for op in model.graph.ops if op.name != "quantize_dequantize"]
    return replace(model, graph=model.graph.with_ops(kept))


def logits_of(folder: Path, ids: Sequence[int]) -> Array:
    """All rows of a checkpoint's logits by the interpreter, W4A16."""
    model = _weight_only(_imported(folder, ids))
    return array(run(model.graph, _inputs(ids), model.weights)[0])


def calibrated(source: Path, folder: Path, ids: Sequence[int], dialect: str) -> Path:
    """A copy of `source` that declares an FP8 cache, its scales amax / 448 over these tokens."""
    name, declare = DIALECTS[dialect]
    model, state = _imported(source, ids), dict[str, Data]()
    run(_weight_only(model).graph, _inputs(ids), model.weights, state)
    scales: Tensors = {}
    for cache, data in state.items():  # model.layers.0.self_attn.k_cache
        at, _, kind = cache.removesuffix("_cache").rpartition(".")
        amax = np.abs(array(data)).max()
        scales[name.format(at=at, kind=kind)] = np.array(amax / 448, np.float32)
    folder.mkdir(parents=True)
    for path in source.glob("*.json"):
        (folder / path.name).write_bytes(path.read_bytes())
    checkpoint = open_checkpoint(source)
    tensors = {name: checkpoint.read(name) for name in checkpoint.names()}
    (folder / "model.safetensors").write_bytes(safetensors_bytes({**tensors, **scales}))
    declare(folder)
    return folder
