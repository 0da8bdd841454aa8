"""Text <-> tokens, by the model's own tokenizer.json."""

from collections.abc import Mapping, Sequence
from typing import cast

from ..ir.errors import ModelError
from .artifact import Artifact
from .stream import Detokenizer
from .strict import parse_json, refuse

TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
_SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token")


class Tokenizer:
    """Encodes prompts and decodes answers.

    The rule for the beginning-of-sequence token: `add_bos` true puts it there unless it stands
    there already; false leaves every special token out; None trusts tokenizer.json's own
    post-processor. A rendered chat template already holds its special tokens and is encoded with
    `special=False` (a doubled BOS is a classic).
    """

    def __init__(self, data: bytes, bos: int | None, add_bos: bool | None, where: str) -> None:
        """`data`: the bytes of tokenizer.json. Raises ModelError, naming `where`."""
        from tokenizers import Tokenizer  # here, so that reading an artifact's facts stays fast

        try:
            self._inner = Tokenizer.from_buffer(data)
            self._inner.no_truncation()  # some files keep the settings of a training run
            self._inner.no_padding()
        except BaseException as error:
            raise _refusal(error, f"{where}: not a tokenizer this library can read") from error
        self._bos, self._add_bos, self._where = bos, add_bos, where

    @classmethod
    def of(cls, artifact: Artifact) -> "Tokenizer":
        """The tokenizer of an artifact. Raises ModelError when it carries none."""
        data = artifact.read_optional(TOKENIZER)
        where = str(artifact.folder / TOKENIZER)
        if data is None:
            raise ModelError(f"{where}: missing, so no text; give token ids instead (--ids 1,2,3)")
        model = artifact.manifest.model
        stated = read_config(artifact).get("add_bos_token")
        add_bos = model.add_bos if model.add_bos is not None else stated
        return cls(data, model.bos, add_bos if isinstance(add_bos, bool) else None, where)

    def id_of(self, token: str | None) -> int | None:
        """The id of a token by its text, None when there is none."""
        return None if token is None else self._inner.token_to_id(token)

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Token ids of `text`; `special`: with what the model puts around a prompt."""
        wanted = special and self._add_bos is not False
        if not text.isascii():
            _require_utf8(text)
        try:
            ids = self._inner.encode(text, add_special_tokens=wanted).ids
        except BaseException as error:
            raise _refusal(error, f"{self._where}: cannot encode the text") from error
        if special and self._add_bos and self._bos is not None and ids[:1] != [self._bos]:
            return [self._bos, *ids]
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, without special tokens."""
        try:
            return self._inner.decode(ids, skip_special_tokens=True)
        except BaseException as error:
            what = f"{self._where}: cannot decode {list(ids[:8])}"
            raise _refusal(error, what) from error

    def stream(self, prompt: Sequence[int]) -> Detokenizer:
        """An incremental decoder of what follows `prompt`."""
        return Detokenizer(self.decode, prompt)


def read_config(artifact: Artifact) -> Mapping[str, object]:
    """tokenizer_config.json, {} when there is none."""
    data = artifact.read_optional(TOKENIZER_CONFIG)
    if data is None:
        return {}
    where = str(artifact.folder / TOKENIZER_CONFIG)
    value = parse_json(data, where, foreign=True)
    if not isinstance(value, dict):
        raise refuse(where, "wrong type", "an object", value)
    return cast(Mapping[str, object], value)


def special_tokens(config: Mapping[str, object]) -> dict[str, str]:
    """bos_token, eos_token, ... as text; the config spells them as a string or {"content": ...}."""
    found: dict[str, str] = {}
    for key in _SPECIAL:
        value = config.get(key)
        if isinstance(value, dict):
            value = cast(dict[str, object], value).get("content")
        if isinstance(value, str):
            found[key] = value
    return found


def _require_utf8(text: str) -> None:
    """Python spells bytes of a command line that are no UTF-8 as lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ModelError(
            f"prompt: not UTF-8 text from character {error.start} on; give it as UTF-8"
        ) from error


def _refusal(error: BaseException, what: str) -> BaseException:
    """tokenizers raises bare Exception, and on a panic of its Rust a BaseException."""
    if isinstance(error, KeyboardInterrupt | SystemExit | MemoryError):
        return error
    return ModelError(f"{what} ({error}); compile again from a sound tokenizer.json")
