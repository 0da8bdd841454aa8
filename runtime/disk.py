"""Files for keeps: a full disk said plainly, fsync, and the swap of two folders in one step."""

import contextlib
import ctypes
import errno
import hashlib
import os
import shutil
from collections.abc import Generator
from pathlib import Path

from ..ir.errors import ModelError, TargetError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # linux/fcntl.h, linux/fs.h
_CHUNK = 1 << 20


@contextlib.contextmanager
def writing(path: Path) -> Generator[None]:
    """Turns an OSError while writing `path` into an error that says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise TargetError(
                f"{path}: the disk (or its quota) is full: {error.strerror}; free space there or "
                "choose another output"
            ) from error
        why = error.strerror or error
        raise ModelError(f"{path}: cannot write: {why}; choose another output") from error


def require_space(folder: Path, needed: int) -> None:
    """Raises TargetError when `needed` bytes surely do not fit, before hours of work are spent."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise TargetError(
            f"{folder}: not enough disk space, expected {needed:,} bytes free, found {free:,}; "
            "free space there or choose another output with -o"
        )


def sync_folder(folder: Path) -> None:
    """Makes names (creations, renames) in `folder` survive a power cut."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(_CHUNK):
            digest.update(piece)
    return digest.hexdigest()


def replace_folder(new: Path, old: Path) -> None:
    """Puts folder `new` at the path `old`; a folder that stood there is removed.

    Both names are exchanged by one renameat2(2), so there is no moment without an artifact. File
    systems that cannot do that get two renames.
    """
    if not old.exists():
        new.rename(old)
        return
    if _exchange(new, old):
        shutil.rmtree(new)
        return
    aside = new.with_name(new.name + ".old")
    old.rename(aside)
    try:
        new.rename(old)
    except OSError:
        aside.rename(old)
        raise
    shutil.rmtree(aside)


def _exchange(one: Path, other: Path) -> bool:
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "renameat2"):  # glibc < 2.28
        return False
    status: int = libc.renameat2(
        _AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE
    )
    return status == 0
