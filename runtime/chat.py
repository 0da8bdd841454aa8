"""Conversations to prompts, by the model's own chat template, in a sandbox.

Follows transformers' utils/chat_template_utils.py: trim_blocks, lstrip_blocks, loop controls, the
globals raise_exception and strftime_now, the filter tojson that escapes no HTML, the special tokens
as variables. The rendered text holds its special tokens: encode it with `special=False`.
"""

import datetime
import json
from collections.abc import Mapping, Sequence
from typing import Any, cast

from ..ir.errors import ModelError
from .artifact import Artifact
from .tokenizer import TOKENIZER_CONFIG, read_config, special_tokens

CHAT_TEMPLATE = "chat_template.jinja"
LARGEST_TEMPLATE = 1 << 20  # characters; the longest of the field has some 20 thousand

_WIDEST_INDENT = 16
Message = Mapping[str, object]  # {"role": "user", "content": "..."} and what else the model knows


class ChatTemplate:
    """One template with the special tokens it may name."""

    def __init__(self, source: str, tokens: Mapping[str, str], where: str) -> None:
        """Raises ModelError, naming `where`, for an oversized template."""
        if len(source) > LARGEST_TEMPLATE:
            raise ModelError(
                f"{where}: chat template too long, expected at most {LARGEST_TEMPLATE} characters, "
                f"found {len(source)}; correct the checkpoint"
            )
        self._source, self._tokens, self._where = source, dict(tokens), where

    @classmethod
    def of(cls, artifact: Artifact) -> "ChatTemplate":
        """chat_template.jinja, else `chat_template` of tokenizer_config.json. Else ModelError."""
        config = read_config(artifact)
        data = artifact.read_optional(CHAT_TEMPLATE)
        where = str(artifact.folder / (TOKENIZER_CONFIG if data is None else CHAT_TEMPLATE))
        source = _named_default(config.get("chat_template"))
        if data is not None:
            source = data.decode("utf-8", errors="replace")
        if not isinstance(source, str):
            raise ModelError(f"{where}: no chat template; give a plain prompt instead (--prompt)")
        return cls(source, special_tokens(config), where)

    def render(
        self, messages: Sequence[Message], add_generation_prompt: bool = True, **variables: object
    ) -> str:
        """The prompt of a conversation. `variables`: what the template takes, e.g. `tools`.

        Raises ModelError when the template is broken, refuses the conversation, or does what the
        sandbox does not allow.
        """
        from jinja2.exceptions import TemplateError

        from .sandbox import BoundedSandbox

        sandbox = BoundedSandbox()
        sandbox.add_filter("tojson", _tojson)
        sandbox.add_global("raise_exception", _raise_exception)
        sandbox.add_global("strftime_now", _strftime_now)
        given: dict[str, Any] = {"tools": None, "documents": None, **self._tokens, **variables}
        try:
            return sandbox.from_string(self._source).render(
                messages=[dict(message) for message in messages],
                add_generation_prompt=add_generation_prompt,
                **given,
            )
        except TemplateError as error:
            raise ModelError(f"{self._where}: chat template: {error}; {_REMEDY}") from error
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            raise ModelError(f"{self._where}: chat template fails: {error!r}; {_REMEDY}") from error
        except (MemoryError, RecursionError, AssertionError) as error:
            raise ModelError(f"{self._where}: chat template runs away: {error!r}") from error


_REMEDY = "check the messages' roles, or give a plain prompt (--prompt)"


def _named_default(value: object) -> object:
    """The template text; older configs hold a list of {"name", "template"}."""
    if not isinstance(value, list):
        return value
    named = [cast(dict[str, object], v) for v in cast(list[object], value) if isinstance(v, dict)]
    return next((v.get("template") for v in named if v.get("name") == "default"), None)


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    if indent is not None and indent > _WIDEST_INDENT:
        _raise_exception(f"tojson: an indent of {indent} is too wide")
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise_exception(message: object) -> None:
    from jinja2.exceptions import TemplateError

    raise TemplateError(str(message))


def _strftime_now(form: str) -> str:
    return datetime.datetime.now().strftime(form)
