"""A folder's tokenizer as the two files an artifact carries: tokenizer.json and its config."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Tokenizer

from ..ir.errors import ModelError
from .bounded_json import Object, read_object

TOKENIZER = "tokenizer.json"
CONFIG = "tokenizer_config.json"


def read_tokenizer_files(folder: Path) -> dict[str, bytes]:
    """tokenizer.json as it is, its config with a separate chat template folded in; {} if none.

    Raises ModelError where a file is there but cannot be used.
    """
    found: dict[str, bytes] = {}
    config = _config(folder)
    if config:
        found[CONFIG] = json.dumps(config, indent=1).encode()
    path = folder / TOKENIZER
    if path.is_file():
        found[TOKENIZER] = checked_tokenizer(path.read_bytes(), str(path))
    return found


def checked_tokenizer(data: bytes, where: str) -> bytes:
    """`data`, which the tokenizers library has loaded once. Raises ModelError where it does not."""
    try:
        Tokenizer.from_buffer(data)
    except Exception as error:  # the library raises plain Exception
        raise ModelError(f"{where}: not a tokenizer ({error}); download the file again") from None
    return data


def _config(folder: Path) -> Object:
    path = folder / CONFIG
    config = read_object(path) if path.is_file() else {}
    if "chat_template" in config:
        return config
    template = folder / "chat_template.jinja"
    older = folder / "chat_template.json"
    if template.is_file():
        return {**config, "chat_template": template.read_text("utf-8", "replace")}
    if older.is_file():
        return {**config, "chat_template": read_object(older).get("chat_template", "")}
    return config
