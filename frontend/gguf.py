"""A GGUF file as a checkpoint that speaks Hugging Face: names, config, and NVFP4 blocks (type 40)
unfolded into ModelOpt's tensors, so that nothing behind this file knows where a model came from.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..ir.numerics import NUMPY_DTYPES
from .bounded_json import Object
from .gguf_config import hf_config, hf_name, permuted_heads
from .gguf_header import GgufFile, Tensor
from .gguf_tokenizer import tokenizer_files
from .tensor_info import Array, TensorInfo, fault

U8 = NDArray[np.uint8]
Unfold = Callable[[U8], U8]
BLOCK_BYTES, BLOCK_SCALES = 36, 4
CHUNK_BYTES = 16 << 20
"""Bytes of NVFP4 blocks that are unfolded at a time."""


@dataclass(frozen=True, slots=True)
class _Role:
    """A tensor as we name it: the file's tensor and which part of it ("", "codes", "sf", "gs")."""

    tensor: Tensor | None
    part: str = ""


class GgufCheckpoint:
    """One .gguf file. Raises ModelError where it is damaged or of an unsupported type."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = GgufFile(path)
        self._arch = self._file.text("general.architecture")
        self.config: Object = hf_config(self._file)
        self._roles = self._named_roles()

    def _named_roles(self) -> dict[str, _Role]:
        roles: dict[str, _Role] = {}
        for tensor in self._file.tensors.values():
            name = hf_name(tensor.name)
            if tensor.dtype == "nvfp4" and name.endswith(".weight") and len(tensor.shape) == 2:
                module = name.removesuffix(".weight")
                scale = self._file.tensors.get(tensor.name.removesuffix(".weight") + ".scale")
                roles[name] = _Role(tensor, "codes")
                roles[f"{module}.weight_scale"] = _Role(tensor, "sf")
                roles[f"{module}.weight_scale_2"] = _Role(scale, "gs")
            elif not self._is_global_scale(tensor):
                roles[name] = _Role(tensor)
        return roles

    def _is_global_scale(self, tensor: Tensor) -> bool:
        weight = self._file.tensors.get(tensor.name.removesuffix(".scale") + ".weight")
        return tensor.name.endswith(".scale") and weight is not None and weight.dtype == "nvfp4"

    @property
    def files(self) -> tuple[Path, ...]:
        return (self.path,)

    @property
    def metadata(self) -> Mapping[str, str]:
        """The scalar entries of the header, as text."""
        fields = self._file.fields
        return {key: self._file.text(key) for key, field in fields.items() if not field.is_array}

    @property
    def generation(self) -> Object:
        return {}

    @property
    def quantization(self) -> tuple[tuple[str, Object], ...]:
        return ()

    def names(self) -> tuple[str, ...]:
        return tuple(self._roles)

    def info(self, name: str) -> TensorInfo:
        role, file = self._role(name), str(self.path)
        if role.tensor is None:
            return TensorInfo(name, "f32", (), file)
        *rows, k = role.tensor.shape or (1,)
        if role.part == "codes":
            return TensorInfo(name, "u8", (*rows, k // 2), file)
        if role.part == "sf":
            return TensorInfo(name, "f8e4m3", (*rows, k // 16), file)
        return TensorInfo(name, role.tensor.dtype, role.tensor.shape, file)

    def read(self, name: str) -> Array:
        """The tensor: plain dtypes as they are, GGUF blocks as u8 [N, bytes of a row]."""
        role = self._role(name)
        if role.tensor is None:
            return np.ones((), np.float32)  # ggml: an absent `.scale` means 1
        data = self._file.bytes_of(role.tensor)
        if role.part == "codes":
            return _by_chunks(data, 2, _packed)
        if role.part == "sf":
            return _by_chunks(data, 16, _scales).view(NUMPY_DTYPES["f8e4m3"])
        return data

    def permuted_heads(self, name: str) -> int:
        return permuted_heads(self.config, self._arch, name)

    def tokenizer_files(self) -> dict[str, bytes]:
        return tokenizer_files(self._file)

    def _role(self, name: str) -> _Role:
        if name not in self._roles:
            raise fault(self.path, name, "is not in the file", "convert the model again")
        return self._roles[name]


def _by_chunks(blocks: U8, per: int, unfold: Unfold) -> U8:
    """`unfold` over rows of blocks, a bounded number of bytes at a time; K / per bytes a row."""
    n, row_bytes = blocks.shape
    k = row_bytes // BLOCK_BYTES * 64
    out = np.empty((n, k // per), np.uint8)
    step = max(1, CHUNK_BYTES // max(row_bytes, 1))
    for i in range(0, n, step):
        chunk = blocks[i : i + step].reshape(-1, BLOCK_BYTES)
        out[i : i + step] = unfold(chunk).reshape(-1, k // per)
    return out


def _packed(blocks: U8) -> U8:
    """Codes of [B, 36] blocks as [B, 32] bytes with the even element in the low nibble.

    ggml packs a sub-block of 16 as element j low, element j + 8 high.
    """
    nibbles = blocks[:, BLOCK_SCALES:].reshape(-1, 4, 8)
    codes = np.concatenate([nibbles & 15, nibbles >> 4], axis=-1)
    packed = np.bitwise_or(codes[..., 0::2], codes[..., 1::2] << 4, dtype=np.uint8)
    return packed.reshape(-1, 32)


def _scales(blocks: U8) -> U8:
    """The four scale bytes of each block. ggml ignores their sign bit and decodes 0x7F as zero."""
    scales = blocks[:, :BLOCK_SCALES] & 0x7F
    return np.where(scales == 0x7F, np.uint8(0), scales)
