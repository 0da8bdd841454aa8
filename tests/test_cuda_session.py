"""Sessions, batches and pages of a CUDA device, over a stand-in library that checks every call."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from halfbyte.ir.errors import IRError, ModelError, TargetError
from halfbyte.runtime import Model, load
from halfbyte.runtime.artifact import ArtifactWriter
from halfbyte.runtime.cuda_session import CudaSession
from halfbyte.runtime.devices import cuda_index, fits
from halfbyte.runtime.pages import PAGE, PagePool, PageTable
from tests.fake_cuda import FakeCuda
from tests.fake_model import EOS, VOCAB, write_artifact

Opener = Callable[..., tuple[Model, FakeCuda]]


def count_up(cache: Sequence[int]) -> int:
    """A next token that depends on all before it, and never is the end."""
    return (sum(cache) * 7 + len(cache)) % 250


def expected(prompt: Sequence[int], count: int) -> list[int]:
    cache = list(prompt)
    for _ in range(count):
        cache.append(count_up(cache))
    return cache[len(prompt) :]


def cuda_artifact(path: Path, *targets: str) -> Path:
    """The stand-in artifact of the tests, for other targets than the cpu, context 64."""
    made = write_artifact(path.with_name("cpu.hb"))
    names = {name: f"kernels-{name}.so" for name in targets}
    with ArtifactWriter(path) as out:
        for name in made.manifest.parts:
            data = made.path(name).read_bytes()
            out.add_bytes(name, data)
        for library in names.values():
            if library not in out.parts:
                out.add_bytes(library, b"not a library")
        facts = made.manifest.targets["cpu"]
        held = {
            name: dataclasses.replace(
                facts,
                library=library,
                library_sha256=out.parts[library].sha256,
                isas=(name,),
                buckets=(1, 2, 4, 64),
                driver_min="580",
                kernels=(),
            )
            for name, library in names.items()
        }
        out.commit(dataclasses.replace(made.manifest, targets=held, parts=out.parts))
    return path


@pytest.fixture
def open_model(tmp_path: Path) -> Opener:
    path = cuda_artifact(tmp_path / "m.hb", "sm_90a")

    def make(
        script: Callable[[Sequence[int]], int] = count_up, sequences: int = 4, pages: int = 0
    ) -> tuple[Model, FakeCuda]:
        native = FakeCuda(script)
        if pages:
            native.free = native.fixed_bytes + (512 << 20) + (pages + 1) * native.page_bytes
        return load(path, "cuda:0", native=native, sequences=sequences), native

    return make


# --- pages ----------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 80)), max_size=40))
def test_no_page_is_ever_held_twice(requests: list[tuple[int, int]]) -> None:
    pool = PagePool(12)
    tables = [PageTable(pool) for _ in range(4)]
    for which, positions in requests:
        if positions == 0:
            tables[which].clear()
        else:
            before, free = list(tables[which].pages), pool.free
            new = tables[which].grow(positions)
            missing = max(0, -(-positions // PAGE) - len(before))
            assert (new is None) == (missing > free)
            assert tables[which].pages == before + (new or [])
            assert new is None or tables[which].positions >= positions
        every = [page for table in tables for page in table.pages]
        assert len(set(every)) == len(every) and len(every) + pool.free == pool.count


def test_the_pool_takes_the_lowest_and_refuses_nonsense() -> None:
    pool = PagePool(4)
    assert pool.take(3) == [0, 1, 2]
    pool.give([1])
    assert pool.take(2) == [1, 3] and pool.free == 0
    with pytest.raises(IRError, match="1 pages asked for, 0 are free"):
        pool.take(1)
    with pytest.raises(IRError, match="page 9 given back"):
        pool.give([9])


# --- devices --------------------------------------------------------------------------------------


def test_names_of_devices_and_targets() -> None:
    assert [cuda_index(name) for name in ("cpu", "cuda", "cuda:3")] == [None, 0, 3]
    with pytest.raises(TargetError, match="'gpu': unknown, expected"):
        cuda_index("gpu")
    assert fits("sm_90a", (9, 0)) and not fits("sm_90a", (12, 0)) and not fits("cpu", (9, 0))
    assert fits("sm_120f", (12, 1)) and not fits("sm_120a", (12, 1)) and not fits("sm_120f", (9, 0))


def test_a_card_that_does_not_fit_is_refused_before_any_upload(tmp_path: Path) -> None:
    path = cuda_artifact(tmp_path / "m.hb", "sm_90a", "cpu")
    native = FakeCuda(count_up, capability=(12, 0))
    with pytest.raises(TargetError) as error:
        load(path, "cuda:0", native=native)
    for word in ("NVIDIA Test", "compute capability 12.0", "cpu, sm_90a", "--target sm_120a"):
        assert word in str(error.value)
    assert native.uploaded == 0 and not native.calls


def test_each_card_gets_its_own_library(tmp_path: Path) -> None:
    path = cuda_artifact(tmp_path / "m.hb", "sm_120a", "sm_90a")
    for capability, target in (((9, 0), "sm_90a"), ((12, 0), "sm_120a")):
        with load(path, "cuda", native=FakeCuda(count_up, capability)) as model:
            assert model.session.isa == target and model.session.backend == f"NVIDIA Test {target}"


def test_device_errors_name_what_is_missing(tmp_path: Path) -> None:
    path = cuda_artifact(tmp_path / "m.hb", "sm_90a")
    cases: list[tuple[str, dict[str, int], str]] = [
        ("cuda:0", {"driver": 0}, r"cudaErrorInsufficientDriver.*driver 580 or newer"),
        ("cuda:0", {"driver": 12080}, r"too old, expected CUDA 13 \(driver 580\), found CUDA 12.8"),
        ("cuda:7", {}, "no device 7"),
        ("cuda:0", {"free": 1 << 30}, "too little memory, expected 1.5 GiB"),
    ]
    for device, facts, message in cases:
        native = FakeCuda(count_up)
        for name, value in facts.items():
            setattr(native, name, value)
        with pytest.raises(TargetError, match=message):
            load(path, device, native=native)
        assert native.uploaded == 0
    with pytest.raises(TargetError, match="no code for 'cpu', found sm_90a"):
        load(path, "cpu")


# --- one sequence ---------------------------------------------------------------------------------


def test_one_sequence_decodes_on_the_device(open_model: Opener) -> None:
    model, native = open_model()
    prompt = list(range(10))
    answer = model.generate(prompt, max_tokens=20, temperature=0.0)
    text = "".join(answer)
    assert answer.tokens == expected(prompt, 20) and text
    assert model.session.tokens == [*prompt, *answer.tokens[:-1]]
    names = [name for name, _ in native.calls]
    assert "decode" not in names and names.count("start") == 1
    assert sum(n for name, n in native.calls if name == "advance") == 19  # none too many
    s = answer.statistics
    assert (s.new_tokens, s.decode_steps, s.finish) == (20, 19, "length")


def test_the_end_token_ends_and_what_ran_ahead_is_dropped(open_model: Opener) -> None:
    def script(cache: Sequence[int]) -> int:
        return EOS if len(cache) >= 9 else count_up(cache)

    model, _ = open_model(script)
    answer = model.generate([1, 2, 3], max_tokens=40, temperature=0.0)
    list(answer)
    assert len(answer.tokens) == 6 and answer.statistics.finish == "stop"
    again = model.generate([1, 2, 3], max_tokens=40, temperature=0.0)
    list(again)
    assert again.tokens == answer.tokens


def test_the_context_ends_a_sequence(open_model: Opener) -> None:
    model, _ = open_model()
    answer = model.generate(list(range(60)), temperature=0.0)
    list(answer)
    assert len(answer.tokens) == 5 and answer.statistics.finish == "context"
    assert model.session.tokens == [*range(60), *answer.tokens[:-1]]


def test_chat_turns_reuse_the_cache(open_model: Opener) -> None:
    model, native = open_model()
    hello = [{"role": "user", "content": "hi"}]
    first = model.chat(hello, max_tokens=4, temperature=0.0)
    text = "".join(first)
    native.calls.clear()
    turns = [*hello, {"role": "assistant", "content": text}, {"role": "user", "content": "more"}]
    second = model.chat(turns, max_tokens=2, temperature=0.0)
    list(second)
    assert second.statistics.reused_tokens >= first.statistics.prompt_tokens
    prefilled = sum(n for name, n in native.calls if name == "prefill")
    assert prefilled == second.statistics.prompt_tokens - second.statistics.reused_tokens


def test_a_penalty_is_sampled_on_the_host(open_model: Opener) -> None:
    model, native = open_model()
    answer = model.generate([1, 2], max_tokens=4, temperature=0.0, repetition_penalty=1.1)
    list(answer)
    assert [name for name, _ in native.calls].count("decode") == 3


def test_logits_of_a_sequence_come_of_decode_steps(open_model: Opener) -> None:
    model, native = open_model()
    logits = model.logits(range(11))
    assert logits.shape == (11, VOCAB)
    wanted = [count_up(list(range(n + 1))) for n in range(11)]
    assert logits.argmax(axis=1).tolist() == wanted
    assert [call for call in native.calls if call[0] == "decode"] == [
        ("decode", 4), ("decode", 4), ("decode", 3)
    ]  # fmt: skip


def test_profile_and_close(open_model: Opener) -> None:
    model, native = open_model()
    assert len(model.session.profile(4, 4, 20, 7)) == 8
    model.close()
    model.close()
    assert native.calls.count(("destroy", 0)) == 1
    with pytest.raises(ModelError, match="closed"):
        model.logits([1])


def test_an_error_of_the_device_is_a_target_error(open_model: Opener) -> None:
    model, native = open_model()

    def fails(*_: object) -> None:
        raise RuntimeError("advance: graph launch: cudaErrorIllegalAddress (…)")

    setattr(native, "advance", fails)  # noqa: B010
    with pytest.raises(TargetError, match="device 0 .NVIDIA Test.*cudaErrorIllegalAddress"):
        list(model.generate([1, 2], max_tokens=4, temperature=0.0))


# --- many sequences -------------------------------------------------------------------------------


def prompts_of(count: int) -> list[list[int]]:
    return [[i + 1, *range(i % 5)] for i in range(count)]


@pytest.mark.parametrize("order", ["one by one", "interleaved", "backwards"])
@pytest.mark.parametrize("count", [1, 3, 4, 9])
def test_many_prompts_give_what_each_gives_alone(
    open_model: Opener, count: int, order: str
) -> None:
    model, native = open_model()
    prompts = prompts_of(count)
    answers = model.generate(prompts, max_tokens=12, temperature=0.0)
    if order == "interleaved":
        live = list(answers)
        while live:
            live = [answer for answer in live if next(answer, None) is not None]
    for answer in reversed(answers) if order == "backwards" else answers:
        list(answer)
    for prompt, answer in zip(prompts, answers, strict=True):
        assert answer.tokens == expected(prompt, 12) and answer.statistics.finish == "length"
    assert max(n for name, n in native.calls if name == "start") == min(count, 4)


def test_sequences_join_as_others_leave(open_model: Opener) -> None:
    def script(cache: Sequence[int]) -> int:
        return EOS if len(cache) >= 4 + 5 * cache[0] else count_up(cache)

    model, native = open_model(script)
    prompts = [[n, 7] for n in (1, 6, 2, 5, 3, 1, 2)]
    answers = model.generate(prompts, temperature=0.0)
    for answer in answers:
        list(answer)
    lengths = [len(answer.tokens) for answer in answers]
    assert lengths == [2 + 5 * n for n, _ in prompts]
    assert all(answer.statistics.finish == "stop" for answer in answers)
    starts = [n for name, n in native.calls if name == "start"]
    assert starts[0] == 4 and len(starts) > 3


def test_few_pages_make_sequences_wait(open_model: Opener) -> None:
    model, native = open_model(pages=5)
    session = model.session
    assert isinstance(session, CudaSession) and session.pool.count == 5
    prompts = prompts_of(5)
    answers = model.generate(prompts, max_tokens=20, temperature=0.0)
    for answer, prompt in zip(answers, prompts, strict=True):
        list(answer)
        assert answer.tokens == expected(prompt, 20)
    assert max(n for name, n in native.calls if name == "start") == 2


def test_a_closed_generation_leaves_its_place(open_model: Opener) -> None:
    model, _ = open_model()
    answers = model.generate(prompts_of(6), max_tokens=15, temperature=0.0)
    next(answers[0])
    answers[0].close()
    answers[5].close()
    for i in range(1, 5):
        list(answers[i])
        assert answers[i].tokens == expected(prompts_of(6)[i], 15)
    assert answers[0].statistics.finish == "interrupted"


def test_a_later_call_ends_the_batch(open_model: Opener) -> None:
    model, _ = open_model()
    answers = model.generate(prompts_of(3), max_tokens=15, temperature=0.0)
    next(answers[1])
    after = model.generate([5, 6, 7], max_tokens=9, temperature=0.0)
    list(after)
    assert after.tokens == expected([5, 6, 7], 9)
    with pytest.raises(RuntimeError, match="ended by a later call"):
        next(answers[2])


def test_many_prompts_are_refused_where_they_cannot_be(open_model: Opener, tmp_path: Path) -> None:
    model, _ = open_model()
    with pytest.raises(ModelError, match="repetition_penalty"):
        model.generate([[1], [2]], repetition_penalty=1.2)
    with pytest.raises(ModelError, match="no tokens"):
        model.generate([[1], []])
    with pytest.raises(ModelError, match="too long"):
        model.generate([[1], [2] * 65])
    with pytest.raises(ModelError, match="sequences: expected 1 to 4, found 9"):
        load(tmp_path / "m.hb", "cuda:0", native=FakeCuda(count_up), sequences=9)


def test_what_is_uploaded_is_the_whole_image(open_model: Opener) -> None:
    seen: list[tuple[int, int]] = []
    model, native = open_model()
    path = model.artifact.folder
    native = FakeCuda(count_up)

    def note(done: int, total: int) -> None:
        seen.append((done, total))

    with load(path, "cuda:0", native=native, progress=note) as loaded:
        assert isinstance(loaded.session, CudaSession)
    assert seen == [(native.uploaded, native.uploaded)] and native.uploaded > 0
    assert np.iinfo(np.int32).max > native.uploaded
