"""Text and numbers of a plan as C++ literals."""

from __future__ import annotations

import json

import numpy as np


def text(words: str) -> str:
    """A C++ literal: JSON's escapes are C++'s but for bytes outside ASCII and question marks."""
    escaped = json.dumps(words.encode("ascii", "replace").decode())
    return escaped.replace("\\u00", "\\x").replace("??", "?\\?")


def real(value: float) -> str:
    if np.isnan(value):
        return '__builtin_nanf("")'
    if np.isinf(value):
        return "-__builtin_inff()" if value < 0 else "__builtin_inff()"
    text = str(np.float32(value))
    return (text if any(mark in text for mark in ".e") else text + ".0") + "f"


def integer(value: int) -> str:
    return "INT64_MIN" if value == -(2**63) else f"{int(value)}"
