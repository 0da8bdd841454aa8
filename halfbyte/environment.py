"""What the environment says. Light: `doctor` asks it as well as the compiler."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """Where objects are kept: $HALFBYTE_CACHE, else $XDG_CACHE_HOME/halfbyte, else ~/.cache."""
    if own := os.environ.get("HALFBYTE_CACHE"):
        return Path(own)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "halfbyte"


def compiler_command() -> str | None:
    """The C++ compiler the user asks for, $CXX."""
    return os.environ.get("CXX")


def cuda_home() -> str | None:
    """The CUDA toolkit the user asks for, $CUDA_HOME."""
    return os.environ.get("CUDA_HOME")
