"""Attention over bf16 and FP8 caches on a CUDA device, against the interpreter.

Run by `make test-gpu`. The self-test drives each kernel alone: codes that are appended must be the
interpreter's but where rounding may fall either way, attention is held to the bound of its sums.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import halfbyte
from halfbyte.codegen import declarations, ffi_options, find_compiler, selftest
from halfbyte.codegen.emit import Build, Request, compile_library, write_artifact
from halfbyte.codegen.nvcc import find_cuda_compiler
from halfbyte.codegen.plan_cuda import arch_of
from halfbyte.codegen.selftest_cuda import DeviceSession
from halfbyte.environment import cache_folder, cuda_home
from halfbyte.ir.errors import TargetError
from halfbyte.ir.graph import Op
from halfbyte.ir.opdef import Data
from halfbyte.ir.target import target
from halfbyte.passes import pipeline
from halfbyte.passes.context import Context
from halfbyte.runtime import load
from halfbyte.runtime.artifact import WEIGHTS, ModelFacts, SelfTest, WeightsFile
from halfbyte.runtime.cuda_session import CudaSession
from tests.graphs import Shape, decoder
from tests.kv_checkpoints import DIALECTS, calibrated, logits_of
from tests.test_oracle import cosines

pytestmark = pytest.mark.gpu
TARGET = "sm_90a"
SCALES = (0.021, 0.0083)


def tried(folder: Path, shape: Shape, phases: Sequence[str] = ()) -> list[SelfTest]:
    """Every kernel of a decoder, each alone; `phases` are left out."""
    made, chosen, cache = decoder(shape), target(TARGET), cache_folder()
    weights = made.data.__getitem__
    context = Context(chosen, declarations(TARGET), weights, recipe="w4a16")
    kept = [phase for phase in pipeline.PHASES if phase.id not in phases]
    graph = pipeline.run(made.graph, context, kept)
    compiler = find_cuda_compiler(find_compiler(None, cache), arch_of(chosen), cuda_home())
    library = compile_library(graph, chosen, compiler, ffi_options(cache))
    facts = ModelFacts("tiny", "tiny", library.plan.vocab, library.plan.context, None, (), {})
    request = Request(facts, "test", "2026-01-01T00:00:00Z")
    artifact = write_artifact(folder / "t.hb", [Build(graph, library)], weights, request)
    image = WeightsFile(artifact.path(WEIGHTS))
    with DeviceSession(library.built.path, image.image, library.plan) as session:
        tests = selftest.selftest(library.plan, session)
    image.close()
    print(selftest.summary(tests))
    return tests


SHAPES = {
    "one head": Shape(hidden=64, heads=1, kv_heads=1, head_dim=64, layers=1, context=512),
    "groups": Shape(hidden=64, heads=8, kv_heads=2, head_dim=128, layers=1, context=512),
    "wide groups": Shape(hidden=64, heads=40, kv_heads=2, head_dim=32, layers=1, context=511),
    "window": Shape(hidden=64, heads=4, kv_heads=2, head_dim=96, layers=1, context=457, window=77),
    "16": Shape(hidden=64, heads=3, kv_heads=1, head_dim=16, layers=1, context=403),
    "48": Shape(hidden=64, heads=6, kv_heads=3, head_dim=48, layers=1, context=369, window=130),
    "256": Shape(hidden=64, heads=4, kv_heads=1, head_dim=256, layers=1, context=512),
}


@pytest.mark.parametrize("softcap", [0.0, 5.0])
@pytest.mark.parametrize("scales", [None, SCALES], ids=["bf16", "fp8"])
@pytest.mark.parametrize("shape", SHAPES)
def test_kernels_equal_the_interpreter(
    tmp_path: Path, shape: str, scales: tuple[float, float] | None, softcap: float
) -> None:
    tests = tried(tmp_path, replace(SHAPES[shape], kv_scales=scales, softcap=softcap))
    suffix = "_fp8" if scales else ""
    names = {test.kernel for test in tests}
    assert {f"attention_decode{suffix}", f"attention_prefill{suffix}", "rope_append"} <= names


@pytest.mark.parametrize("scales", [None, SCALES], ids=["bf16", "fp8"])
def test_ops_that_were_not_fused(tmp_path: Path, scales: tuple[float, float] | None) -> None:
    shape = replace(SHAPES["groups"], kv_scales=scales)
    assert "kv_append" in {test.kernel for test in tried(tmp_path, shape, ["30_fuse"])}


@pytest.mark.parametrize("scales", [None, SCALES], ids=["bf16", "fp8"])
@pytest.mark.parametrize("window", [0, 1000])
def test_a_long_context(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scales: tuple[float, float] | None, window: int
) -> None:
    monkeypatch.setattr(selftest, "KEYS", 20_011)
    shape = replace(SHAPES["groups"], kv_scales=scales, context=24_000, window=window)
    tried(tmp_path, shape)


def test_a_wrong_scale_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check can fail: the interpreter with values of another scale."""
    evaluate = selftest.evaluate

    def wrong(op: Op, args: list[Data]) -> tuple[Data, ...]:
        attrs = {**op.attrs, "v_scale": SCALES[1] * 1.1} if op.name == "attention" else op.attrs
        return evaluate(replace(op, attrs=attrs), args)

    monkeypatch.setattr(selftest, "evaluate", wrong)
    with pytest.raises(TargetError, match="attention_decode_fp8"):
        tried(tmp_path, replace(SHAPES["groups"], kv_scales=SCALES))


# ---- whole models --------------------------------------------------------------------------------

IDS = [(7 * i + 3) % 500 for i in range(100)]
TINY = {"modelopt": "llama_tied-modelopt", "compressed-tensors": "qwen3-llmcompressor"}


@pytest.fixture(scope="module", params=DIALECTS)
def models(
    request: pytest.FixtureRequest, shared: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """A checkpoint with an FP8 cache, and its artifact."""
    source = shared / "models" / "tiny" / TINY[request.param]
    if not source.is_dir():
        pytest.skip(f"{source} is not here")
    folder = tmp_path_factory.mktemp("fp8")
    checkpoint = calibrated(source, folder / "model", IDS, request.param)
    artifact = folder / "model.hb"
    report = halfbyte.compile(checkpoint, artifact, target=TARGET, recipe="w4a16", context=256)
    assert report.kv_cache.startswith("f8e4m3 (")
    return checkpoint, artifact


def test_logits_of_decode_and_prefill(models: tuple[Path, Path]) -> None:
    checkpoint, artifact = models
    wanted = logits_of(checkpoint, IDS)
    with load(artifact, "cuda:0") as model:
        found = cosines(model.logits(IDS), wanted)
        print(f"cosine {found.min():.5f}, median {np.median(found):.5f}")
        assert np.median(found) >= 0.999 and found.min() >= 0.995
        session = model.session
        for end in (2, 17, 100):
            session.begin()
            session.rewind()
            row = session.feed(IDS[:end]).copy()
            assert cosines(row[None], wanted[end - 1][None]).min() >= 0.995, end


def test_graphs_give_the_bytes_of_single_launches(models: tuple[Path, Path]) -> None:
    found: list[list[bytes]] = []
    for eager in (False, True):
        with load(models[1], "cuda:0", eager=eager, sequences=32) as model:
            session = model.session
            assert isinstance(session, CudaSession)
            rows = [model.logits(IDS).tobytes() for _ in range(8)]
            assert len(set(rows)) == 1
            answers = model.generate([IDS[: i + 1] for i in range(40)], max_tokens=20)
            for answer in answers:
                list(answer)
            assert session.counters()["step_allocations"] == 0
            found.append([rows[0], *(bytes(str(a.tokens), "ascii") for a in answers)])
    assert found[0] == found[1]
