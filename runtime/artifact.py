"""An artifact, `NAME.hb/`: opened cheaply by its manifest, written whole or not at all."""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Generator
from pathlib import Path
from types import TracebackType

from ..ir.errors import IRError, ModelError, TargetError
from .disk import replace_folder, require_space, sha256_of, sync_folder, writing
from .graph_record import FILE as GRAPHS
from .graph_record import BucketGraph, Enqueued, GraphRecord
from .manifest import (
    FORMAT,
    MANIFEST,
    PASSES,
    WEIGHTS,
    ArenaFacts,
    KernelChoice,
    KernelCode,
    Manifest,
    ModelFacts,
    NetFacts,
    Part,
    PhaseFacts,
    PortFacts,
    Refusal,
    Run,
    SelfTest,
    TargetFacts,
    WeightFacts,
    check,
    is_safe_name,
    read_manifest,
    sorted_names,
)
from .strict import refuse
from .weights import TensorSpec, WeightImage, WeightsFile, WeightsWriter, place

__all__ = [
    "FORMAT",
    "GRAPHS",
    "MANIFEST",
    "PASSES",
    "WEIGHTS",
    "ArenaFacts",
    "Artifact",
    "ArtifactWriter",
    "BucketGraph",
    "Enqueued",
    "GraphRecord",
    "KernelChoice",
    "KernelCode",
    "Manifest",
    "ModelFacts",
    "NetFacts",
    "Part",
    "PhaseFacts",
    "PortFacts",
    "Refusal",
    "Run",
    "SelfTest",
    "TargetFacts",
    "TensorSpec",
    "WeightFacts",
    "WeightImage",
    "WeightsFile",
    "WeightsWriter",
    "place",
]

_LARGEST_MANIFEST = 64 << 20  # bytes; ours are far below 10 MB
_STALE_SECONDS = 60  # a temporary folder this old that nobody locks was left by a killed compile


@dataclasses.dataclass(frozen=True, slots=True)
class Artifact:
    """A readable artifact. `folder` is resolved; the facts are in `manifest`."""

    folder: Path
    manifest: Manifest

    @classmethod
    def open(cls, path: str | os.PathLike[str], check: bool = False) -> "Artifact":
        """Reads the manifest and verifies names and sizes; with `check`, every SHA-256 too.

        Raises ModelError naming file and key.
        """
        folder = Path(path)
        if not folder.is_dir():
            raise ModelError(f"{folder}: not an artifact, expected a folder NAME.hb; compile one")
        artifact = cls(folder.resolve(), read_manifest(_manifest_bytes(folder), _name(folder)))
        for name, part in artifact.manifest.parts.items():
            artifact._verify(name, part, check)
        return artifact

    def path(self, name: str) -> Path:
        """The file of one part. Raises ModelError for a part it does not hold."""
        if name not in self.manifest.parts:
            held = sorted_names(self.manifest)
            raise ModelError(f"{self.folder}: part {name} is missing; it holds {held}")
        return self.folder / name

    def read_optional(self, name: str) -> bytes | None:
        """The bytes of a small part, None when the artifact has none."""
        return self.path(name).read_bytes() if name in self.manifest.parts else None

    def target(self, name: str) -> TargetFacts:
        """What was compiled for a target. Raises TargetError that names what there is."""
        targets = self.manifest.targets
        if name not in targets:
            raise TargetError(
                f"{self.folder}: no code for {name!r}, found {', '.join(sorted(targets))}; "
                f"compile with --target {name}"
            )
        return targets[name]

    def library(self, target: str) -> Path:
        """The compiled library for `target`. Raises TargetError that names what there is."""
        return self.path(self.target(target).library)

    def _verify(self, name: str, part: Part, digests: bool) -> None:
        path, where = self.folder / name, f"{_name(self.folder)}.parts[{name!r}]"
        try:
            real = path.resolve(strict=True)
            size = real.stat().st_size if real.is_file() else -1
        except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links
            raise refuse(where, "file is missing", "a file", str(error)) from error
        if not real.is_relative_to(self.folder):
            raise refuse(where, "link leaves the folder", f"below {self.folder}", str(real))
        if size != part.bytes:
            raise refuse(where, "wrong size", f"{part.bytes} bytes", size)
        if digests and sha256_of(path) != part.sha256:
            raise refuse(where, "contents changed", f"SHA-256 {part.sha256}", sha256_of(path))


def _name(folder: Path) -> str:
    return str(folder / MANIFEST)


def _manifest_bytes(folder: Path) -> bytes:
    path = folder / MANIFEST
    try:
        if not path.resolve().is_relative_to(folder.resolve()) or not path.is_file():
            raise ModelError(f"{path}: missing or no plain file; {folder} is not an artifact")
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            # Asked for more than the file has, read() would first allocate all of it.
            text = file.read(min(size, _LARGEST_MANIFEST))
    except (OSError, RuntimeError) as error:
        raise ModelError(f"{path}: cannot read: {error}; {folder} is not an artifact") from error
    if size > _LARGEST_MANIFEST:
        raise refuse(str(path), "too large", f"at most {_LARGEST_MANIFEST} bytes", size)
    return text


class ArtifactWriter:
    """Builds an artifact in a temporary sibling folder; `commit` renames it into place.

    with ArtifactWriter("model.hb") as out:
        out.add_bytes("tokenizer.json", data)
        with out.weights(place(specs)) as file:
            file.add(name, array)
        out.commit(manifest)            # with parts=out.parts

    Leaving without `commit` removes everything. An artifact that stood there is replaced in one
    step; any other file or non-empty folder is refused (ModelError); a full disk is a TargetError.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(os.path.abspath(path))
        self.parts: dict[str, Part] = {}
        self._lock: int | None = None
        _refuse_foreign(self.path)

    def __enter__(self) -> "ArtifactWriter":
        with writing(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            _remove_stale(self.path)
            folder = tempfile.mkdtemp(prefix=f".{self.path.name}.tmp-", dir=self.path.parent)
            self.folder = Path(folder)
            self.folder.chmod(0o755)  # mkdtemp's 0700 would hide the artifact from other users
            self._lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
            fcntl.flock(self._lock, fcntl.LOCK_EX)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None
        shutil.rmtree(self.folder, ignore_errors=True)  # gone already after a commit

    def add_bytes(self, name: str, data: bytes) -> Part:
        """Writes a small part, e.g. `tokenizer.json` or `passes/cpu/00_import.ir`."""
        path = self._new_path(name)
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        self.parts[name] = Part(len(data), hashlib.sha256(data).hexdigest())
        return self.parts[name]

    def add_file(self, name: str, source: Path) -> Part:
        """Copies a file, e.g. the compiled library."""
        return self.add_bytes(name, source.read_bytes())

    @contextlib.contextmanager
    def weights(self, image: WeightImage, name: str = WEIGHTS) -> Generator[WeightsWriter]:
        """The writer of a weight file; needs the disk space up front (else TargetError)."""
        require_space(self.folder, image.nbytes)
        writer = WeightsWriter(self._new_path(name), image)
        try:
            yield writer
            self.parts[name] = writer.close()
        finally:
            writer.abandon()

    def commit(self, manifest: Manifest) -> Artifact:
        """Writes the manifest, verifies that it reads back equal, and puts the folder in place."""
        where = str(self.path / MANIFEST)
        if dict(manifest.parts) != self.parts:
            raise IRError(f"{where}: its parts are not those written: {sorted(self.parts)}")
        check(manifest, where)
        text = manifest.to_json()
        if read_manifest(text, where) != manifest:
            raise IRError(f"{where}: does not read back equal")
        target = self.folder / MANIFEST
        with writing(target):
            with target.open("xb") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            sync_folder(self.folder)
            _refuse_foreign(self.path)  # somebody may have put something there meanwhile
            replace_folder(self.folder, self.path)
            sync_folder(self.path.parent)
        return Artifact(self.path, manifest)

    def _new_path(self, name: str) -> Path:
        if not is_safe_name(name) or name in self.parts or name == MANIFEST:
            raise IRError(f"{self.path}: {name!r} is no new part name")
        return self.folder / name


def _refuse_foreign(path: Path) -> None:
    """Raises ModelError unless `path` is free, an empty folder, or an artifact of any version."""
    if not path.exists() and not path.is_symlink():
        return
    if path.is_dir() and not path.is_symlink():
        if not any(path.iterdir()):
            return
        with contextlib.suppress(ModelError, ValueError, RecursionError):
            header = json.loads(_manifest_bytes(path))
            if isinstance(header, dict) and {"format", "producer", "parts"} <= header.keys():
                return
    raise ModelError(
        f"{path}: exists and is not an artifact, so it is not overwritten; choose another output "
        "with -o or remove it"
    )


def _remove_stale(path: Path) -> None:
    """Removes temporary folders that a killed compile left: old, and locked by nobody."""
    for folder in path.parent.glob(f".{path.name}.tmp-*"):
        with contextlib.suppress(OSError):
            handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if time.time() - folder.stat().st_mtime > _STALE_SECONDS:
                    shutil.rmtree(folder)
            finally:
                os.close(handle)
