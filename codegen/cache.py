"""A directory of build products by content hash, safe against crashes and bit rot.

An entry is a file and, beside it, the SHA-256 of its bytes. Both are written to a temporary name
and renamed, the hash last: an entry without a matching hash was never finished or has rotted, and
is not served.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path


def digest(*facts: object) -> str:
    """SHA-256 of facts that JSON can spell (mappings are sorted)."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_atomic(path: Path, data: bytes) -> None:
    """Write `data` so that `path` holds either all of it or what it held before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


@dataclass(frozen=True, slots=True)
class Store:
    """The cache: `get` serves verified entries only, `put` copies a finished file in."""

    root: Path

    def path(self, key: str, suffix: str) -> Path:
        """Where an entry of this key lies, whether it is there or not."""
        return self.root / key[:2] / f"{key}{suffix}"

    def get(self, key: str, suffix: str) -> Path | None:
        """The entry's path, or None when it is absent or its bytes are not those once stored."""
        path = self.path(key, suffix)
        try:
            stored = _beside(path).read_text().strip()
            return path if stored == sha256_file(path) else None
        except FileNotFoundError:
            return None

    def put(self, key: str, suffix: str, data: bytes) -> Path:
        """Store `data` under `key`, replacing whatever lay there."""
        path = self.path(key, suffix)
        write_atomic(path, data)
        write_atomic(_beside(path), hashlib.sha256(data).hexdigest().encode() + b"\n")
        return path


def _beside(path: Path) -> Path:
    return path.with_name(path.name + ".sha256")
