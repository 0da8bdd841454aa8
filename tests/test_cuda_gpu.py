"""Real checkpoints on a CUDA device, against logits that their producers computed in f32.

Run by `make test-gpu`. Activations are bf16 there, so a row of logits is held to a cosine of 0.999,
and greedy tokens are compared up to the first whose margin rounding may turn.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import replace
from math import prod
from pathlib import Path

import numpy as np
import pytest

import halfbyte
from benchmarks.make_checkpoint import SHAPES, Recipe, write_checkpoint
from halfbyte.codegen import declarations, ffi_options, find_compiler
from halfbyte.codegen.emit import Build, Request, compile_library, write_artifact
from halfbyte.codegen.nvcc import find_cuda_compiler
from halfbyte.codegen.plan import Plan
from halfbyte.codegen.plan_cuda import arch_of
from halfbyte.codegen.selftest import Case, selftest, summary
from halfbyte.codegen.selftest_cuda import DeviceSession
from halfbyte.environment import cache_folder, cuda_home
from halfbyte.frontend import import_model, open_checkpoint
from halfbyte.ir.target import target
from halfbyte.ir.types import Nvfp4
from halfbyte.passes import pipeline
from halfbyte.passes.context import Context
from halfbyte.runtime import Model, load
from halfbyte.runtime.artifact import WEIGHTS, ModelFacts, WeightsFile
from halfbyte.runtime.cuda_session import CudaSession
from tests.test_oracle import TINY, cosines

pytestmark = pytest.mark.gpu
TARGET = "sm_90a"
COSINE, MARGIN = 0.999, 0.1
SMOLLM2 = "smollm2-135m-llmcompressor"
TOKENS, LARGEST = (8, 64, 2048), 5120 * 32768  # of linears that numpy computes in seconds


@pytest.fixture(scope="module")
def compiled(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Artifacts of the shared models, each compiled once; skips those that are not here."""
    folder = tmp_path_factory.mktemp("gpu")
    made: dict[str, Path] = {}

    def artifact(name: str) -> Path:
        source = shared / "models" / name
        if not source.is_dir():
            pytest.skip(f"{source} is not here")
        if name not in made:
            made[name] = folder / f"{name.replace('/', '-')}.hb"
            halfbyte.compile(source, made[name], target=TARGET, recipe="w4a16", context=1024)
        return made[name]

    return artifact


@contextmanager
def opened(path: Path, eager: bool = False) -> Generator[tuple[Model, CudaSession]]:
    with load(path, "cuda:0", eager=eager, sequences=32) as model:
        assert isinstance(model.session, CudaSession)
        yield model, model.session


def reference(shared: Path, name: str) -> dict[str, np.ndarray]:
    return dict(np.load(shared / "models" / name / "reference.npz"))


def integers(array: np.ndarray) -> list[int]:
    return [int(v) for v in array]


def last_row(session: CudaSession, ids: list[int]) -> np.ndarray:
    """The logits behind a prompt, by prefill."""
    session.begin()
    session.rewind()
    return session.feed(ids).copy()


class FullBuckets(DeviceSession):
    """Tries NVFP4 linears alone, with as many rows as the buckets of `TOKENS` have."""

    def cases(self, plan: Plan) -> list[Case]:
        return [
            replace(case, tokens=case.bucket)
            for case in super().cases(plan)
            if case.bucket in TOKENS
            for weight in case.op.args[1:2]
            if isinstance(weight.type.enc, Nvfp4) and prod(weight.type.static) <= LARGEST
        ]


def tried(source: Path, out: Path, kind: type[DeviceSession], context: int) -> set[str]:
    """The kernels of what `kind` tries, all found to agree with the interpreter."""
    imported = import_model(open_checkpoint(source), context=context)
    chosen, cache = target(TARGET), cache_folder()
    made = Context(chosen, declarations(TARGET), imported.weights, recipe="w4a16")
    graph = pipeline.run(imported.graph, made)
    compiler = find_cuda_compiler(find_compiler(None, cache), arch_of(chosen), cuda_home())
    library = compile_library(graph, chosen, compiler, ffi_options(cache))
    facts = ModelFacts("tiny", source.name, library.plan.vocab, context, None, (), {})
    request = Request(facts, "test", "2026-01-01T00:00:00Z")
    artifact = write_artifact(out, [Build(graph, library)], imported.weights, request)
    weights = WeightsFile(artifact.path(WEIGHTS))
    with kind(library.built.path, weights.image, library.plan) as session:
        tests = selftest(library.plan, session)
        expected = {case.kernel.name for case in session.cases(library.plan)}
    weights.close()
    print(summary(tests))
    assert {test.kernel for test in tests} == expected
    return expected


@pytest.mark.parametrize("name", TINY)
def test_every_kernel_equals_the_interpreter(shared: Path, tmp_path: Path, name: str) -> None:
    source = shared / "models" / "tiny" / name
    if not source.is_dir():
        pytest.skip(f"{source} is not here")
    assert "attention_prefill" in tried(source, tmp_path / "t.hb", DeviceSession, 512)


@pytest.mark.parametrize("name", ["8b", "24b"])
def test_linears_of_real_widths_equal_the_interpreter(tmp_path: Path, name: str) -> None:
    """Tiles that pairs of blocks share, and rows split between blocks, come with width alone."""
    shape = replace(SHAPES[name], layers=1, vocab=1024)
    source = tmp_path / "checkpoint"
    write_checkpoint(source, shape, Recipe(w4a4=False), limit=10**10, seed=0)
    found = tried(source, tmp_path / "t.hb", FullBuckets, 2048)
    assert found == {"nvfp4_gemv", "nvfp4_gemm"}


@pytest.mark.parametrize("name", TINY)
def test_logits_of_decode_and_prefill(
    shared: Path, compiled: Callable[[str], Path], name: str
) -> None:
    known = reference(shared, f"tiny/{name}")
    ids, wanted = integers(known["input_ids"]), known["w4a16_f32_logits"]
    with opened(compiled(f"tiny/{name}")) as (model, session):
        assert cosines(model.logits(ids), wanted).min() >= COSINE
        for end in (2, 17, len(ids)):
            found = last_row(session, ids[:end])
            assert cosines(found[None], wanted[end - 1][None]).min() >= COSINE, end


@pytest.mark.parametrize("name", TINY)
def test_greedy_text(shared: Path, compiled: Callable[[str], Path], name: str) -> None:
    known = reference(shared, f"tiny/{name}")
    wanted, margins = integers(known["w4a16_f32_greedy"]), known["w4a16_f32_greedy_margin"]
    sure = next((i for i, m in enumerate(margins.tolist()) if m < MARGIN), len(wanted))
    with opened(compiled(f"tiny/{name}")) as (model, _):
        answer = model.generate(integers(known["input_ids"]), max_tokens=24, temperature=0.0)
        list(answer)
    stop = min(sure, len(answer.tokens))
    assert answer.tokens[:stop] == wanted[:stop]


def test_graphs_give_the_bytes_of_single_launches(compiled: Callable[[str], Path]) -> None:
    path, ids = compiled("tiny/llama_tied-modelopt"), [(7 * i + 3) % 500 for i in range(70)]
    found: list[list[np.ndarray]] = []
    for eager in (False, True):
        with opened(path, eager) as (model, session):
            rows = [last_row(session, ids[:n]) for n in (1, 2, 40, 70)]
            rows += [session.step(token).copy() for token in (5, 6, 7)]
            answer = model.generate(ids[:9], max_tokens=30, temperature=0.8, seed=3)
            list(answer)
            found.append([*rows, model.logits(ids), np.array(answer.tokens)])
    for one, other in zip(*found, strict=True):
        assert one.tobytes() == other.tobytes()


def test_replays_are_byte_identical_and_allocate_nothing(compiled: Callable[[str], Path]) -> None:
    ids = [(11 * i + 1) % 500 for i in range(90)]
    with opened(compiled("tiny/llama_untied-modelopt")) as (model, session):
        first = (last_row(session, ids).tobytes(), model.logits(ids[:40]).tobytes())
        before = session.counters()
        for _ in range(32):
            assert (last_row(session, ids).tobytes(), model.logits(ids[:40]).tobytes()) == first
        answers = model.generate([ids[: i + 1] for i in range(40)], max_tokens=20, temperature=0.7)
        for answer in answers:
            list(answer)
        after = session.counters()
        assert after["graph_launches"] > before["graph_launches"] + 64
        for name in ("step_allocations", "step_copies"):
            assert after[name] == 0, name
        assert after["setup_allocations"] == before["setup_allocations"]
        for bucket in model.facts.buckets:
            assert session.graph(bucket)["memory"] == 0 < session.graph(bucket)["kernels"]


@pytest.mark.parametrize("count", [2, 5, 16, 32, 50])
def test_a_batch_gives_each_sequence_its_own_text(
    shared: Path, compiled: Callable[[str], Path], count: int
) -> None:
    known = reference(shared, "tiny/llama_tied-modelopt")
    ids = integers(known["input_ids"])
    wanted, margins = integers(known["w4a16_f32_greedy"]), known["w4a16_f32_greedy_margin"]
    sure = next((i for i, m in enumerate(margins.tolist()) if m < MARGIN), len(wanted))
    with opened(compiled("tiny/llama_tied-modelopt")) as (model, _):
        prompts = [ids if i % 3 else ids[: 5 + i % 7] for i in range(count)]
        answers = model.generate(prompts, max_tokens=20, temperature=0.0)
        for answer in answers:
            list(answer)
    for prompt, answer in zip(prompts, answers, strict=True):
        if prompt == ids:
            stop = min(sure, len(answer.tokens))
            assert answer.tokens[:stop] == wanted[:stop]


def test_sampling_depends_on_the_seed_alone(compiled: Callable[[str], Path]) -> None:
    with opened(compiled("tiny/llama_tied-modelopt")) as (model, _):
        texts: list[list[int]] = []
        for seed in (1, 1, 2):
            answer = model.generate([1, 2, 3], max_tokens=40, temperature=1.0, top_p=0.9, seed=seed)
            list(answer)
            texts.append(answer.tokens)
        top = list(model.generate([1, 2, 3], max_tokens=40, temperature=1.0, top_k=1, seed=5))
        assert top == list(model.generate([1, 2, 3], max_tokens=40, temperature=0.0))
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize("prompt", [0, 1, 2])
def test_smollm2_prompts(shared: Path, compiled: Callable[[str], Path], prompt: int) -> None:
    path = compiled(SMOLLM2)
    known, tag = reference(shared, SMOLLM2), f"w4a16_f32_p{prompt}"
    ids, wanted = integers(known[f"prompt{prompt}_ids"]), integers(known[f"{tag}_greedy"])
    margins = known[f"{tag}_greedy_margin"].tolist()
    sure = next((i for i, m in enumerate(margins) if m < MARGIN), len(wanted))
    with opened(path) as (model, session):
        found = last_row(session, ids)
        assert cosines(found[None], known[f"{tag}_last_logits"][None]).min() >= COSINE
        answer = model.generate(ids, max_tokens=len(wanted), temperature=0.0)
        list(answer)
    stop = min(sure, len(answer.tokens))
    assert answer.tokens[:stop] == wanted[:stop]


def test_smollm2_perplexity(shared: Path, compiled: Callable[[str], Path]) -> None:
    path = compiled(SMOLLM2)
    passage = integers(reference(shared, SMOLLM2)["passage_ids"])
    with opened(path) as (model, _):
        assert abs(model.perplexity(passage) / 37.37 - 1) <= 0.01
