"""Sessions, generations and models over a stand-in library that checks how it is called."""

import argparse
import io
import json
import math
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

import halfbyte.bench_command as bench_command
import halfbyte.run_command as run_command
from halfbyte.ir.errors import ModelError, TargetError
from halfbyte.runtime import Model, load
from halfbyte.runtime.threads import default_threads
from tests.fake_model import EOS, VOCAB, FakeNative, byte_tokenizer, write_artifact

Script = Callable[[Sequence[int]], int]
ROOT = Path(__file__).resolve().parent.parent
HELLO = [{"role": "user", "content": "hi"}]


def encode(text: str) -> list[int]:
    from halfbyte.runtime.tokenizer import Tokenizer

    return Tokenizer(byte_tokenizer(), None, None, "t").encode(text)


def says(answer: str, prompt: int) -> Script:
    """After a prompt of that many tokens: the tokens of `answer`, then the end token."""
    tokens = [*encode(answer), EOS]
    return lambda cache: tokens[min(len(cache) - prompt, len(tokens) - 1)]


def count_up(cache: Sequence[int]) -> int:
    """A next token that depends on all before it."""
    return (sum(cache) + len(cache)) % 256


@pytest.fixture
def open_model(tmp_path: Path) -> Callable[[Script], tuple[Model, FakeNative]]:
    write_artifact(tmp_path / "m.hb")

    def make(script: Script) -> tuple[Model, FakeNative]:
        native = FakeNative(script)
        return load(tmp_path / "m.hb", native=native, threads=2), native

    return make


Opener = Callable[[Script], tuple[Model, FakeNative]]


def test_prefill_goes_in_chunks(open_model: Opener) -> None:
    model, native = open_model(count_up)
    prompt = list(range(37))
    generation = model.generate(prompt, max_tokens=3)
    list(generation)
    assert native.calls == [("prefill", 16), ("prefill", 16), ("prefill", 5)] + [("decode", 1)] * 2
    expected = list(prompt)
    for _ in range(3):
        expected.append(count_up(expected))
    assert generation.tokens == expected[37:]
    assert model.session.tokens == expected[:-1]  # the last one was chosen, not run


def test_one_token_left_over_goes_through_decode(open_model: Opener) -> None:
    model, native = open_model(count_up)
    list(model.generate(list(range(17)), max_tokens=1))
    assert native.calls == [("prefill", 16), ("decode", 1)]


def test_text_streams_and_ends_at_eos(open_model: Opener) -> None:
    model, _ = open_model(says("Grüße!", 2))
    generation = model.generate("hi", max_tokens=50)
    pieces = list(generation)
    assert "".join(pieces) == "Grüße!" and pieces[2] == "ü"
    done = generation.statistics
    assert (done.finish, done.prompt_tokens, done.new_tokens, done.decode_steps) == (
        "stop", 2, 8, 8)  # fmt: skip
    assert done.prefill_seconds > 0 and done.decode_rate > 0


@pytest.mark.parametrize(("limit", "finish", "text"), [(3, "length", "abc"), (0, "length", "")])
def test_length(open_model: Opener, limit: int, finish: str, text: str) -> None:
    model, _ = open_model(says("abcdef", 2))
    generation = model.generate("hi", max_tokens=limit)
    assert "".join(generation) == text
    assert generation.statistics.finish == finish


def test_stop_string_over_tokens(open_model: Opener) -> None:
    model, _ = open_model(says("one\nUser: two", 2))
    generation = model.generate("hi", stop=["\nUser:"])
    assert "".join(generation) == "one" and generation.statistics.finish == "stop"
    generation = model.generate("hi", stop="never\n", max_tokens=4)
    assert "".join(generation) == "one\n"


def test_half_a_character_at_the_end_is_shown(open_model: Opener) -> None:
    model, _ = open_model(says("a€", 2))
    assert "".join(model.generate("hi", max_tokens=2)) == "a\ufffd"


def test_end_of_context(open_model: Opener) -> None:
    model, _ = open_model(count_up)
    generation = model.generate(list(range(60)))
    list(generation)
    assert generation.statistics.finish == "context" and generation.statistics.new_tokens == 5
    full = model.generate(list(range(64)))
    list(full)
    assert full.statistics.finish == "context" and len(full.tokens) == 1


def test_bad_prompts_are_refused_before_anything_runs(open_model: Opener) -> None:
    model, native = open_model(count_up)
    with pytest.raises(ModelError, match="at most 64 tokens.*found 65.*--context 65"):
        model.generate([1] * 65)
    with pytest.raises(ModelError, match="no tokens"):
        model.generate([])
    with pytest.raises(ModelError, match="no tokens"):
        model.generate("")
    with pytest.raises(ModelError, match="token 258 is not in the vocabulary"):
        list(model.generate([258]))
    with pytest.raises(ModelError, match="token -1"):
        model.logits([1, -1])
    with pytest.raises(ModelError, match="token -1 is not in the vocabulary"):
        model.generate([-1])
    with pytest.raises(ModelError, match="max_tokens: out of range.*found -5"):
        model.generate([1], max_tokens=-5)
    with pytest.raises(ModelError, match="not UTF-8 text from character 1 on"):
        model.generate(b"a\xff".decode("utf-8", "surrogateescape"))
    assert native.calls == []


def test_ctrl_c_leaves_a_usable_model(open_model: Opener) -> None:
    model, native = open_model(count_up)
    prompt = list(range(20))
    expected = list(model.generate(prompt, max_tokens=6))
    for at in range(1, 7):
        native.calls.clear()
        native.fail_after = at
        generation = model.generate(prompt, max_tokens=6)
        with pytest.raises(KeyboardInterrupt):
            list(generation)
        assert generation.statistics.finish == "interrupted"
        assert list(model.generate(prompt, max_tokens=6)) == expected


def test_two_generations_at_once(open_model: Opener) -> None:
    model, _ = open_model(count_up)
    first = model.generate([1, 2])
    next(first)
    second = model.generate([1, 2])
    next(second)
    with pytest.raises(RuntimeError, match="ended by a later call"):
        list(first)
    assert next(second)
    second.close()
    assert list(second) == []


def test_chat_reuses_the_turns_before(open_model: Opener) -> None:
    model, native = open_model(lambda cache: EOS)
    list(model.chat(HELLO))
    before = len(model.session.tokens)
    turns = [*HELLO, {"role": "assistant", "content": "ok"}, {"role": "user", "content": "x"}]
    generation = model.chat(turns)
    list(generation)
    assert generation.statistics.reused_tokens == before
    whole = sum(count for name, count in native.calls if name != "destroy")
    assert whole == generation.statistics.prompt_tokens
    list(model.generate(model.session.tokens))
    assert sum(count for _, count in native.calls) == 2 * whole  # no reuse outside of a chat


def test_same_chat_twice_still_has_logits(open_model: Opener) -> None:
    model, native = open_model(lambda cache: EOS)
    list(model.chat(HELLO))
    native.calls.clear()
    list(model.chat(HELLO))
    assert native.calls == [("decode", 1)]


def test_logits(open_model: Opener) -> None:
    model, native = open_model(count_up)
    ids = list(range(40))
    logits = model.logits(ids)
    assert logits.shape == (40, VOCAB) and logits.dtype == np.float32
    assert logits.argmax(axis=1).tolist() == [count_up(ids[: i + 1]) for i in range(40)]
    assert native.calls == [("prefill", 16), ("prefill", 16), ("prefill", 8)]


def test_perplexity(open_model: Opener) -> None:
    model, _ = open_model(lambda cache: (cache[-1] + 1) % 256)
    right = math.log(math.exp(5) + VOCAB - 1) - 5
    assert model.perplexity(list(range(60))) == pytest.approx(math.exp(right))
    wrong = right + 5
    mixed = [*range(30), *range(30)]
    expected = math.exp((58 * right + wrong) / 59)
    assert model.perplexity(mixed) == pytest.approx(expected)
    long = [i % 256 for i in range(64 * 2 + 1)]  # windows of 64, 64 and 1 token
    assert model.perplexity(long) == pytest.approx(math.exp(right))
    with pytest.raises(ModelError, match="too short"):
        model.perplexity([1])


def test_nan_logits(open_model: Opener) -> None:
    model, native = open_model(count_up)

    def broken(out: np.ndarray, end: int) -> None:
        out[:] = np.nan

    native._fill = broken  # pyright: ignore[reportPrivateUsage]  # the fault to inject
    with pytest.raises(ModelError, match="nan, expected finite"):
        list(model.generate([1, 2]))
    with pytest.raises(ModelError, match="not finite"):
        model.perplexity([1, 2])


def test_load_and_close(tmp_path: Path) -> None:
    write_artifact(tmp_path / "m.hb")
    native = FakeNative(count_up)
    with pytest.raises(TargetError, match="'cuda:0', the artifact holds cpu"):
        load(tmp_path / "m.hb", device="cuda:0", native=native)
    with pytest.raises(TargetError, match="needs AMX"):
        load(tmp_path / "m.hb", isa="amx", native=native)
    with pytest.raises(TargetError, match="cannot load it"):
        load(tmp_path / "m.hb")
    with pytest.raises(ModelError, match="threads"):
        load(tmp_path / "m.hb", threads=0, native=native)
    with load(tmp_path / "m.hb", native=native) as model:
        assert model.session.threads == default_threads() and model.session.isa == "scalar"
    model.close()
    assert native.calls == [("destroy", 0)]
    with pytest.raises(ModelError, match="closed"):
        model.logits([1])


def test_library_of_another_model(tmp_path: Path) -> None:
    artifact = write_artifact(tmp_path / "m.hb")

    class Other(FakeNative):
        def decode(self, handle: int, token: int, position: int, logits: np.ndarray) -> None:
            raise ValueError("decode: logits has extent 258, expected 99")

        def prefill(self, handle: int, ids: object, position: int, rows: object, logits: object):
            raise IndexError("prefill: ids[0] is out of range")

    model = load(artifact.folder, native=Other(count_up))
    for ids in ([1], [1, 2]):
        with pytest.raises(ModelError, match="do not belong together.*expected 99|ids"):
            list(model.generate(ids))
        assert model.session.tokens == []

    class Old(FakeNative):
        def __getitem__(self, name: str, /) -> Callable[..., object]:
            raise AttributeError(f"Module has no function '{name}'")

    with pytest.raises(ModelError, match="no function 'prefill'"):
        load(artifact.folder, native=Old(count_up))


def test_the_tokenizers_end_token_counts(tmp_path: Path) -> None:
    artifact = write_artifact(tmp_path / "m.hb")
    manifest = artifact.folder / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"eos": [\n   257\n  ]', '"eos": []'))
    model = load(artifact.folder, native=FakeNative(says("yes", 2)))
    assert model.artifact.manifest.model.eos == () and model.eos == {EOS}
    assert "".join(model.generate("hi")) == "yes"


def test_without_a_tokenizer_ids_still_work(tmp_path: Path) -> None:
    artifact = write_artifact(tmp_path / "m.hb")
    manifest = artifact.folder / "manifest.json"
    data = json.loads(manifest.read_text())
    del data["parts"]["tokenizer.json"]
    manifest.write_text(json.dumps(data))
    model = load(artifact.folder, native=FakeNative(lambda cache: len(cache)))
    assert "".join(model.generate([1, 2], max_tokens=3)) == "2 3 4 "
    with pytest.raises(ModelError, match=r"tokenizer\.json: missing"):
        model.generate("hi")


def test_running_needs_nothing_that_compiling_needs(tmp_path: Path) -> None:
    """What is imported to answer a prompt; jinja2 comes only with a chat."""
    write_artifact(tmp_path / "m.hb")
    code = f"""
import sys
for name in ("ml_dtypes", "safetensors", "gguf", "onnx", "torch", "tvm", "jinja2"):
    sys.modules[name] = None
from halfbyte.runtime import load
from tests.fake_model import FakeNative
model = load({str(tmp_path / "m.hb")!r}, native=FakeNative(lambda cache: 1))
assert len(list(model.generate("hi", max_tokens=3))) > 0
import tvm_ffi
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_threads_by_topology(tmp_path: Path) -> None:
    import os

    cpus = sorted(os.sched_getaffinity(0))
    for cpu in cpus:
        folder = tmp_path / f"cpu{cpu}" / "topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text("all of them")
    assert default_threads(tmp_path, tmp_path / "none") == 1
    quota = tmp_path / "cpu.max"
    nothing = tmp_path / "nothing"
    quota.write_text("max 100000\n")
    assert default_threads(nothing, quota) == len(cpus)
    quota.write_text("50000 100000\n")
    assert default_threads(nothing, quota) == 1
    quota.write_text("nonsense")
    assert default_threads(nothing, quota) == len(cpus)


# ---- the commands ------------------------------------------------------------------------------


@pytest.fixture
def cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Runs `halfbyte <words>` on an artifact whose answer to anything is `yes`."""
    write_artifact(tmp_path / "m.hb")
    answer = [*encode("yes"), EOS]

    def script(cache: Sequence[int]) -> int:
        said = 0
        while said < 3 and list(cache[len(cache) - said - 1 :]) != answer[: said + 1]:
            said += 1
        return answer[(said + 1) % 4 if said < 3 else 0]

    def fake_load(path: Path, **options: object) -> Model:
        options.pop("native", None)
        return load(path, native=FakeNative(script), threads=1)

    monkeypatch.setattr(run_command, "load", fake_load)
    monkeypatch.setattr(bench_command, "load", fake_load)

    def run(command: str, *words: str) -> int:
        parser = argparse.ArgumentParser()
        subparsers = parser.add_subparsers(dest="command")
        module = {"run": run_command, "bench": bench_command}[command]
        module.add_parser(subparsers)
        return module.main(parser.parse_args([command, str(tmp_path / "m.hb"), *words]))

    return run


Captured = pytest.CaptureFixture[str]


def test_run_streams_to_stdout(cli: Callable[..., int], capsys: Captured) -> None:
    assert cli("run", "--prompt", "hi") == 0
    out, err = capsys.readouterr()
    assert out == "yes\n" and "tok/s | stop | 1 threads, scalar" in err
    assert cli("run", "--chat", "hi", "--system", "be brief", "--max-tokens", "2") == 0
    assert capsys.readouterr().out == "ye\n"
    assert cli("run", "--chat", "hi", "--json", "--stop", "s", "--temperature", "0") == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["text"] == "ye" and shown["finish"] == "stop" and len(shown["tokens"]) == 3


def test_run_logits_and_perplexity(
    cli: Callable[..., int], capsys: Captured, tmp_path: Path
) -> None:
    assert cli("run", "--ids", "1,2,3", "--logits", str(tmp_path / "l.npy")) == 0
    assert np.load(tmp_path / "l.npy").shape == (3, VOCAB)
    capsys.readouterr()
    (tmp_path / "text").write_text("some text")
    assert cli("run", "--perplexity", str(tmp_path / "text"), "--json") == 0
    assert json.loads(capsys.readouterr().out)["tokens"] == 9
    with pytest.raises(ModelError, match="cannot read"):
        cli("run", "--perplexity", str(tmp_path / "none"))
    with pytest.raises(ModelError, match=r"l\.npy: cannot write: No such file"):
        cli("run", "--ids", "1", "--logits", str(tmp_path / "none/l.npy"))
    with pytest.raises(ModelError, match="--ids"):
        cli("run", "--prompt", "x", "--logits", "l.npy")
    with pytest.raises(SystemExit):
        cli("run", "--ids", "1,x")


def test_run_interactive(
    cli: Callable[..., int], capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(f"hi\n/help\n{'long ' * 30}\n/clear\nhi"))
    assert cli("run", "--interactive") == 0
    out, err = capsys.readouterr()
    assert out == "yes\nyes\n" and "too long" in err and err.count("tok/s | stop") == 2
    assert "/help: no such command" in err


def test_bench(cli: Callable[..., int], capsys: Captured) -> None:
    assert cli("bench", "-p", "20", "-n", "5", "-r", "3", "--profile") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [cell.strip() for cell in lines[0].split("|")[1:-1]] == [
        "model", "size", "params", "backend", "threads", "test", "t/s"]  # fmt: skip
    assert "pp20" in lines[2] and "tg5" in lines[3] and "±" in lines[3]
    assert any("nvfp4_gemv" in line for line in lines) and "µs in Python" in lines[-1]
    assert cli("bench", "-p", "0", "-n", "4", "-r", "1", "-o", "json") == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row["test"] == "tg4" and row["tokens_per_second"] > 0
    assert cli("bench", "-p", "0,8,16", "-n", "4", "-d", "3", "-r", "1", "-o", "json") == 0
    tests = [row["test"] for row in json.loads(capsys.readouterr().out)]
    assert tests == ["pp8", "pp16", "tg4 @ d3"]
    with pytest.raises(ModelError, match="at most 64"):
        cli("bench", "-p", "65")
    with pytest.raises(ModelError, match="-b over 1 needs a device"):
        cli("bench", "-b", "1,8")
