"""A GGUF's tokenizer metadata as tokenizer.json (huggingface tokenizers) and tokenizer_config.json.

`gpt2` vocabularies are byte-level BPE with a named pre-tokenizer; `llama` ones are SentencePiece
BPE, whose merges follow from the scores (a merge ranks as its result scores), with byte fallback.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

from ..ir.errors import ModelError
from .bounded_json import Object
from .gguf_header import AGAIN, GgufFile
from .tokenizer_files import CONFIG, TOKENIZER, checked_tokenizer

UNKNOWN, CONTROL, USER_DEFINED = 2, 3, 4
SPACE = "▁"
MAX_PIECE = 512
"""Characters of a SentencePiece piece; real ones have at most 64. Merges cost the square of it."""

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True, slots=True)
class PreTokenizer:
    """How text is cut before BPE. `regex` None: GPT-2's; `digits`: each digit stands alone."""

    regex: str | None = None
    digits: bool = False
    whole_words: bool = False
    """A word that is a token is taken before any merge (`ignore_merges`)."""
    nfc: bool = False
    bos: bool = False
    """A BOS token is added unless the file says otherwise."""


_GPT2 = PreTokenizer()
_DIGITS = PreTokenizer(digits=True)
PRE_TOKENIZERS: dict[str, PreTokenizer] = {
    "default": _GPT2, "gpt-2": _GPT2, "gpt2": _GPT2, "phi-2": _GPT2, "olmo": _GPT2,
    "smollm": _DIGITS, "starcoder": _DIGITS, "refact": _DIGITS, "command-r": _DIGITS,
    "codeshell": _DIGITS,
    "llama-bpe": PreTokenizer(_LLAMA3, whole_words=True, bos=True),
    "llama3": PreTokenizer(_LLAMA3, whole_words=True, bos=True),
    "llama-v3": PreTokenizer(_LLAMA3, whole_words=True, bos=True),
    "qwen2": PreTokenizer(_QWEN2, nfc=True), "deepseek-r1-qwen": PreTokenizer(_QWEN2, nfc=True),
    "tekken": PreTokenizer(_TEKKEN, whole_words=True, bos=True),
}  # fmt: skip
"""`tokenizer.ggml.pre` -> cutting rule, as llama.cpp's unicode_regex_split has them."""


def tokenizer_files(file: GgufFile) -> dict[str, bytes]:
    """The two files; {} where the GGUF has no vocabulary. Raises ModelError for an unknown kind."""
    kind = file.text("tokenizer.ggml.model", "none")
    if kind in ("none", "no_vocab"):
        return {}
    vocab = _Vocabulary(file)
    if kind == "gpt2":
        tokenizer = _byte_level(file, vocab)
    elif kind == "llama":
        tokenizer = _sentencepiece(file, vocab)
    else:
        raise ModelError(
            f"{file.path}: tokenizer.ggml.model is {kind[:80]!r}, expected gpt2 or llama; take a "
            "checkpoint with a tokenizer.json"
        )
    data = json.dumps(tokenizer).encode()
    return {
        TOKENIZER: checked_tokenizer(data, f"{file.path}: tokenizer"),
        CONFIG: json.dumps(_config(file, vocab, tokenizer), indent=1).encode(),
    }


class _Vocabulary:
    """Tokens by id, their types, and the special ones."""

    def __init__(self, file: GgufFile) -> None:
        self.tokens = file.strings("tokenizer.ggml.tokens")
        self.ids = {token: i for i, token in enumerate(self.tokens)}
        types = file.items("tokenizer.ggml.token_type")
        self.types = types if len(types) == len(self.tokens) else [1] * len(self.tokens)
        if not self.tokens or len(self.ids) != len(self.tokens):
            raise ModelError(
                f"{file.path}: tokenizer.ggml.tokens holds {len(self.tokens)} tokens, "
                f"{len(self.ids)} of them distinct, expected all; {AGAIN}"
            )
        if types and len(types) != len(self.tokens):
            raise ModelError(
                f"{file.path}: tokenizer.ggml.token_type has {len(types)} entries, expected "
                f"{len(self.tokens)}; {AGAIN}"
            )

    def special(self, file: GgufFile, name: str) -> str | None:
        """The text of `tokenizer.ggml.<name>_token_id`, None where it is absent."""
        index = file.number(f"tokenizer.ggml.{name}_token_id", -1)
        if index >= len(self.tokens):
            raise ModelError(
                f"{file.path}: {name}_token_id is {index}, expected below "
                f"{len(self.tokens)}; {AGAIN}"
            )
        return self.tokens[index] if index >= 0 else None

    def added(self) -> list[Object]:
        """Control and user-defined tokens, which are found in text before anything else."""
        return [
            {
                "id": i, "content": token, "single_word": False, "lstrip": False, "rstrip": False,
                "normalized": False, "special": kind != USER_DEFINED,
            }
            for i, (token, kind) in enumerate(zip(self.tokens, self.types, strict=True))
            if token and kind in (UNKNOWN, CONTROL, USER_DEFINED)
        ]  # fmt: skip


def _tokenizer(
    vocab: _Vocabulary, model: Object, normalizer: Object | None, pre: Object | None,
    decoder: Object, bos: str | None,
) -> Object:  # fmt: skip
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": vocab.added(),
        "normalizer": normalizer, "pre_tokenizer": pre, "decoder": decoder,
        "post_processor": _prefixed(vocab, bos),
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
            "ignore_merges": False, "vocab": vocab.ids, **model,
        },
    }  # fmt: skip


def _prefixed(vocab: _Vocabulary, bos: str | None) -> Object | None:
    """A post-processor that puts `bos` before every text."""
    if bos is None:
        return None
    first = {"SpecialToken": {"id": bos, "type_id": 0}}
    text, pair = {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}
    return {
        "type": "TemplateProcessing", "single": [first, text], "pair": [first, text, pair],
        "special_tokens": {bos: {"id": bos, "ids": [vocab.ids[bos]], "tokens": [bos]}},
    }  # fmt: skip


def _adds_bos(file: GgufFile, default: bool) -> bool:
    value = file.scalar("tokenizer.ggml.add_bos_token")
    return default if value is None else bool(value)


def _byte_level(file: GgufFile, vocab: _Vocabulary) -> Object:
    name = file.text("tokenizer.ggml.pre", "default")
    rule = PRE_TOKENIZERS.get(name)
    if rule is None:
        raise ModelError(
            f"{file.path}: unknown tokenizer.ggml.pre {name[:80]!r}, expected one of "
            f"{', '.join(PRE_TOKENIZERS)}; take a checkpoint with a tokenizer.json"
        )
    merges: list[list[str]] = []
    for merge in file.strings("tokenizer.ggml.merges"):
        at = merge.find(" ", 1)
        if at < 0:
            raise ModelError(f"{file.path}: merge {merge[:80]!r}: expected two tokens; {AGAIN}")
        merges.append([merge[:at], merge[at + 1 :]])
    return _tokenizer(
        vocab, {"merges": merges, "ignore_merges": rule.whole_words},
        {"type": "NFC"} if rule.nfc else None, _cutting(rule), _bytes(True, rule.regex is None),
        vocab.special(file, "bos") if _adds_bos(file, rule.bos) else None,
    )  # fmt: skip


def _bytes(trim: bool, regex: bool) -> Object:
    return {
        "type": "ByteLevel", "add_prefix_space": False, "trim_offsets": trim, "use_regex": regex,
    }  # fmt: skip


def _cutting(rule: PreTokenizer) -> Object:
    steps: list[Object] = []
    if rule.digits:
        steps.append({"type": "Digits", "individual_digits": True})
    if rule.regex is not None:
        split = {"Regex": rule.regex}
        steps.append({"type": "Split", "pattern": split, "behavior": "Isolated", "invert": False})
    return {"type": "Sequence", "pretokenizers": [*steps, _bytes(True, rule.regex is None)]}


def _sentencepiece(file: GgufFile, vocab: _Vocabulary) -> Object:
    scores = [float(s) for s in file.items("tokenizer.ggml.scores")]
    if len(scores) != len(vocab.tokens):
        raise ModelError(
            f"{file.path}: tokenizer.ggml.scores has {len(scores)} entries, expected "
            f"{len(vocab.tokens)}; {AGAIN}"
        )
    prefix = file.scalar("tokenizer.ggml.add_space_prefix")
    replace: Object = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    prepend: list[Object] = [{"type": "Prepend", "prepend": SPACE}] if prefix is not False else []
    strip: list[Object] = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}]
    back: Object = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
    decoders = [back, {"type": "ByteFallback"}, {"type": "Fuse"}, *(strip if prepend else [])]
    unknown = vocab.special(file, "unknown") or next(
        (t for t, kind in zip(vocab.tokens, vocab.types, strict=True) if kind == UNKNOWN), None
    )
    merges = _merges_of(file, vocab, scores)
    model: Object = {
        "merges": merges,
        "unk_token": unknown,
        "fuse_unk": True,
        "byte_fallback": True,
    }
    return _tokenizer(
        vocab, model, {"type": "Sequence", "normalizers": [*prepend, replace]}, None,
        {"type": "Sequence", "decoders": decoders},
        vocab.special(file, "bos") if _adds_bos(file, True) else None,
    )  # fmt: skip


def _merges_of(file: GgufFile, vocab: _Vocabulary, scores: list[float]) -> list[list[str]]:
    """Every split of a piece into two pieces, best score first (SentencePiece's greedy order)."""
    found: list[tuple[float, int, int, str, str]] = []
    for token, kind, score in zip(vocab.tokens, vocab.types, scores, strict=True):
        if kind != 1:
            continue
        if len(token) > MAX_PIECE:
            raise ModelError(
                f"{file.path}: a token has {len(token)} characters, expected at most "
                f"{MAX_PIECE}; {AGAIN}"
            )
        for at in range(1, len(token)):
            left, right = token[:at], token[at:]
            if left in vocab.ids and right in vocab.ids:
                found.append((-score, vocab.ids[left], vocab.ids[right], left, right))
    found.sort(key=lambda merge: merge[:3])
    return [[left, right] for *_, left, right in found]


def _config(file: GgufFile, vocab: _Vocabulary, tokenizer: Object) -> Object:
    config: Object = {"add_bos_token": tokenizer["post_processor"] is not None}
    for name, ours in (("bos", "bos_token"), ("eos", "eos_token"), ("unknown", "unk_token"),
                       ("padding", "pad_token")):  # fmt: skip
        token = vocab.special(file, name)
        if token is not None:
            config[ours] = token
    template = file.text("tokenizer.chat_template")
    return {**config, "chat_template": template} if template else config
