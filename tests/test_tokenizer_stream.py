"""Text in pieces: whole characters, no piece of a stop string, nothing lost."""

import json
from pathlib import Path
from typing import Any, cast

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from halfbyte.ir.errors import ModelError
from halfbyte.runtime.stream import Detokenizer, StopFilter
from halfbyte.runtime.tokenizer import Tokenizer, special_tokens
from tests.fake_model import BOS, EOS, byte_tokenizer

BYTES = Tokenizer(byte_tokenizer(), BOS, None, "tokenizer.json")


def llama_tokenizer() -> Tokenizer:
    """SentencePiece's manner: spaces as U+2581, byte fallback, a stripped first space."""
    from tokenizers import AddedToken, decoders, models, processors
    from tokenizers import Tokenizer as Inner

    words = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    words += ["\u2581", "\u2581a", "b"]
    model = models.BPE({word: i for i, word in enumerate(words)}, [], byte_fallback=True)
    inner: Any = Inner(model)
    inner.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(),
         decoders.Strip(" ", 1, 0)]
    )  # fmt: skip
    inner.add_special_tokens([AddedToken("<s>"), AddedToken("</s>")])
    inner.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", 1)])
    return Tokenizer(inner.to_str().encode(), 1, None, "tokenizer.json")


LLAMA = llama_tokenizer()
_SPACE, _SPACE_A, _B = 259, 260, 261


def fallback(text: str) -> list[int]:
    return [3 + byte for byte in text.encode()]


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=20))
def test_whole_characters_only(text: str) -> None:
    stream, pieces = BYTES.stream([]), list[str]()
    for token in BYTES.encode(text):
        pieces.append(stream.push(token))
        assert "\ufffd" not in pieces[-1] or "\ufffd" in text
    assert "".join(pieces) + stream.finish() == text


@settings(max_examples=200, deadline=None)
@given(ids=st.lists(st.integers(0, 257), max_size=30))
def test_any_tokens_add_up(ids: list[int]) -> None:
    stream = BYTES.stream([])
    assert "".join(map(stream.push, ids)) + stream.finish() == BYTES.decode(ids)


@settings(max_examples=200, deadline=None)
@given(words=st.lists(st.sampled_from([[_SPACE_A], [_B], [_SPACE], [1], *map(fallback, "é€🌍")])))
def test_tokens_add_up_with_byte_fallback(words: list[list[int]]) -> None:
    ids = [token for word in words for token in word]
    stream = LLAMA.stream([])
    assert "".join(map(stream.push, ids)) + stream.finish() == LLAMA.decode(ids)


def test_a_character_comes_with_its_last_token() -> None:
    stream = LLAMA.stream([])
    pieces = [stream.push(token) for token in [_SPACE_A, *fallback("🌍"), _B]]
    assert pieces == ["a", "", "", "", "🌍", "b"]


def test_the_space_after_the_prompt_is_kept() -> None:
    assert LLAMA.stream([1, _B]).push(_SPACE_A) == " a"
    assert LLAMA.stream([]).push(_SPACE_A) == "a"


def test_prompt_that_ends_within_a_character() -> None:
    euro = BYTES.encode("€")
    stream = BYTES.stream(BYTES.encode("x") + euro[:2])
    assert stream.push(euro[2]) + stream.push(BYTES.encode("y")[0]) == "€y"


def test_broken_bytes_come_at_the_end() -> None:
    stream = BYTES.stream([])
    euro = BYTES.encode("€")
    assert [stream.push(token) for token in euro[:2]] == ["", ""]
    assert stream.finish() == "\ufffd"
    assert stream.finish() == ""


def test_steps_stay_cheap() -> None:
    longest = 0

    def decode(ids: object) -> str:
        nonlocal longest
        given = cast(list[int], ids)
        longest = max(longest, len(given))
        return BYTES.decode(given)

    stream = Detokenizer(decode)
    for token in BYTES.encode("hello " * 100):
        stream.push(token)
    assert longest <= 2


@settings(max_examples=600, deadline=None)
@example(text="aa\na", stops=["\n", "a\na"], cuts=[3])
@given(
    text=st.text("ab\n", max_size=24),
    stops=st.lists(st.text("ab\n", max_size=4), max_size=3),
    cuts=st.lists(st.integers(0, 24), max_size=8),
)
def test_stop_strings(text: str, stops: list[str], cuts: list[int]) -> None:
    """However the text is cut, what is shown is the text up to the first complete stop."""
    edges = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    filter_ = StopFilter(stops)
    shown = ""
    for begin, end in zip(edges, edges[1:], strict=False):
        shown += filter_.push(text[begin:end])
        assert not any(stop in shown for stop in stops if stop)
    was_stopped = filter_.stopped
    shown += filter_.finish()
    ends = [(text.find(stop) + len(stop), -len(stop)) for stop in stops if stop and stop in text]
    assert was_stopped == bool(ends)
    assert shown == (text[: sum(min(ends))] if ends else text)


def test_stop_string_is_held_back_no_longer_than_needed() -> None:
    filter_ = StopFilter(["\nUser:"])
    assert [filter_.push(p) for p in ["hi", "\n", "Use", "d", "\nUser", ": no"]] == [
        "hi", "", "", "\nUsed", "", ""
    ]  # fmt: skip
    assert filter_.stopped and filter_.finish() == ""


def test_bos_rules() -> None:
    data = byte_tokenizer()
    plain = BYTES.encode("hello there")
    assert len(plain) == 11  # the file's truncation to 4 is taken out
    added = Tokenizer(data, BOS, True, "t")
    assert added.encode("hello there") == [BOS, *plain]
    assert added.encode("<|im_start|>hi") == [BOS, *BYTES.encode("hi")]  # not doubled
    assert added.encode("hi", special=False) == BYTES.encode("hi")
    assert LLAMA.encode("b") == [1, _B]
    assert LLAMA.encode("b", special=False) == [_B]


def test_special_tokens() -> None:
    bos = {"content": "<s>", "lstrip": False}
    config = {"bos_token": bos, "eos_token": "</s>", "pad_token": None}
    assert special_tokens(config) == {"bos_token": "<s>", "eos_token": "</s>"}
    assert BYTES.decode([BOS, *BYTES.encode("x"), EOS]) == "x"


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"{}", b"\xff", b'{"model": {"type": "BPE"}}'])
def test_broken_tokenizer(data: bytes) -> None:
    with pytest.raises(ModelError, match=r"x\.json: not a tokenizer"):
        Tokenizer(data, None, None, "x.json")


def test_text_that_is_no_unicode() -> None:
    with pytest.raises(ModelError, match="not UTF-8 text from character 0"):
        BYTES.encode("\ud800")
    with pytest.raises(ModelError, match="cannot decode"):
        BYTES.decode([-1])


def test_real_tokenizer(shared: Path) -> None:
    folder = shared / "models" / "smollm2-135m-llmcompressor"
    tokenizer = Tokenizer((folder / "tokenizer.json").read_bytes(), 1, None, "tokenizer.json")
    text = "Grüße, 世界! 🌍🏳️\u200d🌈 ﷽ na\u0308ive\n\n\t12345 x=1;"
    stream = tokenizer.stream([])
    ids = tokenizer.encode(text)
    pieces = [stream.push(token) for token in ids]
    assert "".join(pieces) + stream.finish() == text
    assert not any("\ufffd" in piece for piece in pieces) and "" in pieces
    reference = json.loads((folder / "reference.json").read_text())
    answer = reference["text"]["w4a16_f32_p0"]
    assert tokenizer.decode(tokenizer.encode(answer)) == answer.removesuffix("<|im_end|>")
