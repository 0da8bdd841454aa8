"""What a checkpoint is to the importers, and which reader a path needs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from ..ir.errors import ModelError
from .bounded_json import Object
from .gguf import GgufCheckpoint
from .safetensors import SafetensorsCheckpoint
from .tensor_info import Array, TensorInfo


class Checkpoint(Protocol):
    """A model on disk, in Hugging Face's words whatever the file format. Reads are lazy views."""

    @property
    def path(self) -> Path: ...
    @property
    def files(self) -> tuple[Path, ...]:
        """The files that hold tensors."""
        ...

    @property
    def config(self) -> Object:
        """config.json, or what it would say."""
        ...

    @property
    def generation(self) -> Object:
        """generation_config.json, {} if none."""
        ...

    @property
    def quantization(self) -> tuple[tuple[str, Object], ...]:
        """(file, contents) of each place that speaks about quantisation, most trusted first."""
        ...

    @property
    def metadata(self) -> Mapping[str, str]: ...
    def names(self) -> tuple[str, ...]: ...
    def info(self, name: str) -> TensorInfo:
        """Raises ModelError for a name that is not there."""
        ...

    def read(self, name: str) -> Array:
        """Raises ModelError for a name that is not there."""
        ...

    def permuted_heads(self, name: str) -> int:
        """Heads whose rows are in interleaved-RoPE order (llama-arch GGUF); 0 for none."""
        ...

    def tokenizer_files(self) -> dict[str, bytes]:
        """tokenizer.json and tokenizer_config.json, {} where the checkpoint has none."""
        ...


def open_checkpoint(path: str | Path) -> Checkpoint:
    """The checkpoint at `path`: a folder with config.json and SafeTensors, a .gguf file, or a
    folder with one .gguf file. The content decides, not the name.

    Raises ModelError where there is none, or more than one.
    """
    path = Path(path)
    if path.is_file():
        return _open_file(path)
    if not path.is_dir():
        raise ModelError(
            f"{path}: no such file or folder; give a checkpoint folder or a .gguf file"
        )
    if (path / "config.json").is_file() and any(path.glob("*.safetensors")):
        return SafetensorsCheckpoint(path)
    ggufs = sorted(path.glob("*.gguf"))
    if len(ggufs) == 1:
        return GgufCheckpoint(ggufs[0])
    if ggufs:
        raise ModelError(
            f"{path}: holds {len(ggufs)} .gguf files ({', '.join(p.name for p in ggufs[:4])}), "
            "expected one; give the path of one of them"
        )
    raise ModelError(
        f"{path}: expected config.json with .safetensors files, or one .gguf file, found neither; "
        "give the folder of a checkpoint"
    )


def _open_file(path: Path) -> Checkpoint:
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror}); check the path") from None
    if magic == b"GGUF":
        return GgufCheckpoint(path)
    do = "give the folder that holds config.json and the .safetensors files, or a .gguf file"
    raise ModelError(f"{path}: not a GGUF file, found it to begin with {magic!r}; {do}")
