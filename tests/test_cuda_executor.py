"""The real executor of a CUDA target over a stand-in runtime: everything but the kernels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from halfbyte.codegen import declarations, ffi_options, find_compiler
from halfbyte.codegen.build import build
from halfbyte.codegen.emit import Build, Library, Request, write_artifact
from halfbyte.codegen.nvcc import CudaCompiler, find_cuda_compiler
from halfbyte.codegen.plan import make_plan
from halfbyte.codegen.plan_cuda import SYMBOLS, arch_of, cuda_sources
from halfbyte.codegen.render import Source
from halfbyte.frontend import import_model, open_checkpoint
from halfbyte.ir.errors import ModelError, TargetError
from halfbyte.ir.target import target
from halfbyte.passes import pipeline
from halfbyte.passes.context import Context
from halfbyte.runtime import Model, load
from halfbyte.runtime.artifact import WEIGHTS, Artifact, ModelFacts, WeightsFile
from halfbyte.runtime.cuda_session import CudaSession
from halfbyte.runtime.session import load_native

CONTEXT = 96


@dataclass(frozen=True, slots=True)
class HostOnly(CudaCompiler):
    """The toolchain without the CUDA runtime: the stand-in takes its place."""

    @property
    def link_libraries(self) -> tuple[str, ...]:
        return "-lstdc++", "-lpthread", "-lm"


@pytest.fixture(scope="module")
def artifact(
    root: Path, pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The tiny checkpoint for sm_90a, its library built with the stand-in."""
    assert pytestconfig.cache is not None
    cache, chosen = Path(pytestconfig.cache.mkdir("objects")), target("sm_90a")
    try:
        real = find_cuda_compiler(find_compiler(None, cache), arch_of(chosen), None)
    except TargetError as error:
        pytest.skip(f"the executor needs CUDA's headers: {error}")
    checkpoint = root / "tests" / "data" / "llama_tied-modelopt"
    imported = import_model(open_checkpoint(checkpoint), context=CONTEXT)
    context = Context(chosen, declarations("sm_90a"), imported.weights)
    graph = pipeline.run(imported.graph, context)
    plan = make_plan(graph, chosen)
    sources = cuda_sources(plan, chosen)
    text = (root / "tests" / "fake_cudart.cc").read_text()
    headers = {k: v for s in sources for k, v in s.headers.items() if k.endswith(".h")}
    headers["host_cudart.h"] = (root / "tests" / "host_cudart.h").read_text()
    stand_in = Source("fake_cudart.cc", text, dict(sorted(headers.items())))
    units = [*(s for s in sources if s.name.endswith(".cc")), stand_in]
    compiler = HostOnly(real.host, real.nvcc, real.arch)
    built = build(units, SYMBOLS, compiler, ffi_options(cache))
    library = Library(chosen, plan, built, compiler, ("sm_90a",), {}, 0.0)
    facts = ModelFacts("llama", "tiny", plan.vocab, plan.context, None, (), {})
    out = tmp_path_factory.mktemp("executor") / "tiny.hb"
    request = Request(facts, "test", "2026-01-01T00:00:00Z")
    write_artifact(out, [Build(graph, library)], context.weights, request)
    return out


@pytest.fixture(params=["graphs", "eager"])
def model(artifact: Path, request: pytest.FixtureRequest) -> Any:
    with load(artifact, "cuda:0", eager=request.param == "eager", sequences=8) as loaded:
        yield loaded


def session_of(model: Model) -> CudaSession:
    assert isinstance(model.session, CudaSession)
    return model.session


def following(model: Model) -> Callable[[Sequence[int]], int]:
    """What the stand-in's head points at."""
    vocab = model.session.vocab
    return lambda cache: (len(cache) + 7 * sum(cache)) % (vocab - 8)


def expected(model: Model, prompt: Sequence[int], count: int) -> list[int]:
    cache = list(prompt)
    for _ in range(count):
        cache.append(following(model)(cache))
    return cache[len(prompt) :]


def test_weights_arrive_whole(model: Model, artifact: Path) -> None:
    native, handle = raw(model)
    weights = WeightsFile(Artifact.open(artifact).path(WEIGHTS))
    found = np.empty(len(weights.image), np.uint8)
    native["peek"](handle, 1, 0, found)
    assert np.array_equal(found, weights.image)
    weights.close()


def test_prefill_in_chunks_and_decode_agree(model: Model) -> None:
    prompt = [(5 * i + 1) % 100 for i in range(80)]
    logits = model.logits(prompt)
    wanted = [following(model)(prompt[: n + 1]) for n in range(80)]
    assert logits.argmax(axis=1).tolist() == wanted
    session = session_of(model)
    session.begin()
    session.rewind()
    assert int(session.feed(prompt).argmax()) == wanted[-1]
    session.rewind(40)
    assert int(session.feed(prompt[40:60]).argmax()) == wanted[59]
    assert int(session.step(prompt[60]).argmax()) == wanted[60]


def test_the_device_decodes_on_its_own(model: Model) -> None:
    answer = model.generate([3, 1, 4], max_tokens=70, temperature=0.0)
    list(answer)
    assert answer.tokens == expected(model, [3, 1, 4], 70)
    to_the_end = model.generate(list(range(90)), temperature=0.0)
    list(to_the_end)
    assert len(to_the_end.tokens) == CONTEXT - 90 + 1
    assert to_the_end.tokens == expected(model, list(range(90)), 7)


def test_many_sequences_share_pages_and_steps(model: Model) -> None:
    prompts = [[i + 1, *range(3 * i)] for i in range(13)]
    answers = model.generate(prompts, max_tokens=30, temperature=0.0)
    live = list(answers)
    while live:
        live = [answer for answer in live if next(answer, None) is not None]
    for prompt, answer in zip(prompts, answers, strict=True):
        assert answer.tokens == expected(model, prompt, 30)


def test_sampling_parameters_belong_to_their_slot(model: Model) -> None:
    answer = model.generate([3, 1, 4], max_tokens=1, temperature=2.0)
    list(answer)
    assert answer.tokens == [expected(model, [3, 1, 4], 1)[0] + 2]


def test_a_step_allocates_nothing_and_copies_nothing_twice(model: Model) -> None:
    session = session_of(model)
    before = session.counters()
    list(model.generate([1, 2, 3], max_tokens=20, temperature=0.0))
    model.logits([1, 2, 3])
    after = session.counters()
    assert after["steps"] > before["steps"] + 20
    for name in ("step_allocations", "step_copies"):
        assert after[name] == 0, name
    assert after["setup_allocations"] == before["setup_allocations"] > 0
    graph = session.graph(1)
    eager = after["graph_launches"] == 0
    assert graph["memory"] == graph["other"] == 0 and (graph["kernels"] == 0) == eager


def test_profile_times_every_launch(model: Model) -> None:
    session = session_of(model)
    launches = session.graph(4)["kernels"] or len(model.facts.kernels) // 9
    if launches:
        times = session.profile(4, 4, 20, launches)
        assert times.tolist() == [250.0] * (launches + 1)


def raw(model: Model) -> tuple[Any, int]:
    session = session_of(model)
    handle = session._handle  # pyright: ignore[reportPrivateUsage]  below the books
    assert handle is not None
    return session._native, handle  # pyright: ignore[reportPrivateUsage]


def i32(*values: int) -> Any:
    return np.array(values, np.int32)


def test_wrong_use_is_an_error_and_never_a_crash(model: Model) -> None:
    native, handle = raw(model)
    vocab = model.session.vocab
    none, one = np.empty((0, vocab), np.float32), np.empty((1, vocab), np.float32)
    session_of(model).require_pages(0, 32)
    cases: list[tuple[type[Exception], str, str, tuple[Any, ...]]] = [
        (ValueError, "leaves a gap", "decode", (i32(0), i32(1), i32(5), one)),
        (ValueError, "has no page", "decode", (i32(3), i32(1), i32(0), one)),
        (IndexError, "slots", "decode", (i32(8), i32(1), i32(0), one)),
        (IndexError, "vocab", "decode", (i32(0), i32(vocab), i32(0), one)),
        (ValueError, "expected rising", "decode", (i32(0, 0), i32(1, 1), i32(1, 0), none)),
        (ValueError, "of a page", "decode", (i32(0, 0), i32(1, 1), i32(0, 16), none)),
        (ValueError, "outside the context", "decode", (i32(0), i32(1), i32(CONTEXT), one)),
        (ValueError, "expected 1 to 32", "decode", (i32(), i32(), i32(), none)),
        (ValueError, "has no page", "prefill", (0, i32(*[1] * 40), 0, none, 0)),
        (IndexError, "slot 9", "prefill", (9, i32(1), 0, none, 0)),
        (IndexError, "pages", "pages", (0, 0, i32(1 << 20))),
        (IndexError, "outside its table", "pages", (0, 5, i32(1))),
        (ValueError, "appears twice", "start", (i32(0, 0), i32(1, 1), i32(0, 1))),
        (RuntimeError, "no loop was started", "advance", (1,)),
        (ValueError, "poll", "poll", (1, np.empty((1, 1), np.int32))),
        (ValueError, "out of range", "sampling", (0, np.array([-1.0, 1, 0, 0]), 0)),
        (RuntimeError, "ready already", "ready", ()),
        (IndexError, "outside space", "peek", (2, 1 << 50, np.empty(4, np.uint8))),
        (ValueError, "no such bucket", "graph", (3, np.empty(3, np.int64))),
    ]
    for kind, words, name, args in cases:
        with pytest.raises(kind, match=words):
            native[name](handle, *args)
    with pytest.raises(ValueError, match="not a session"):
        native["ready"](12345)
    with pytest.raises(ValueError, match="no device 5"):
        native["create"](5, 1, 1, 0)
    assert int(session_of(model).feed([1, 2]).argmax()) == following(model)([1, 2])


def test_a_session_without_its_weights_refuses_to_run(artifact: Path, model: Model) -> None:
    native, _ = raw(model)
    handle = native["create"](0, 1, 8, 0)
    with pytest.raises(RuntimeError, match="not ready"):
        native["decode"](
            handle, i32(0), i32(1), i32(0), np.empty((0, model.session.vocab), np.float32)
        )
    with pytest.raises(ValueError, match="of .* bytes of weights were uploaded"):
        native["ready"](handle)
    with pytest.raises(ValueError, match="out of order"):
        native["upload"](handle, 64, np.zeros(64, np.uint8))
    native["destroy"](handle)


def test_another_card_is_refused(artifact: Path) -> None:
    held = Artifact.open(artifact)
    facts = held.manifest.targets["sm_90a"]
    native = load_native(held.library("sm_90a"), facts.library_sha256)
    out = np.zeros(7, np.int64)
    assert native["device"](0, out) == "Host" and out[:3].tolist() == [9, 0, 13000]
    assert facts.features[-1] == "compute capability 9.0" and facts.driver_min == "580"
    with pytest.raises(ModelError, match="sequences"):
        load(artifact, "cuda:0", sequences=33)
