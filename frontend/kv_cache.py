"""The KV cache a checkpoint was calibrated for: what its files declare, and the scales of FP8.

Keys and values of a layer are stored as e4m3(x / scale), saturating (ModelOpt: `k_proj.k_scale`,
`v_proj.v_scale`, amax / 448; compressed-tensors: `k_scale`, `v_scale` of the attention module).
A scale is never guessed: a wrong one would cost accuracy without a word.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..ir.errors import ModelError
from .bounded_json import Object, as_object
from .container import Checkpoint
from .tensor_info import fault

AUTO, BF16, FP8 = "auto", "bf16", "fp8"
CHOICES = (AUTO, BF16, FP8)
"""auto: as the checkpoint declares; bf16: not quantised (f32 on the cpu)."""

_NONE = ("", "NONE", "AUTO")
_FP8 = "FP8"
REMEDY = "compile with --kv-cache bf16, which leaves the cache unquantised"


@dataclass(frozen=True, slots=True)
class KvCache:
    """Whether keys and values are stored in FP8. `why`: "" where nobody said anything."""

    quantised: bool = False
    why: str = ""


@dataclass(frozen=True, slots=True)
class _Declared:
    where: str
    format: str


def kv_cache_of(sources: Sequence[tuple[str, Object]], wanted: str) -> KvCache:
    """What comes of the declarations in (file, contents) and the user's wish, one of CHOICES.

    Raises ModelError for a declared format that is not FP8 with static scales.
    """
    declared = [d for where, contents in sources for d in _declarations(where, contents)]
    said = f", though {_name(declared[0])} declares {declared[0].format}" if declared else ""
    if wanted == BF16:
        return KvCache(why=f"asked for{said}" if said else "")
    if wanted == FP8:
        return KvCache(True, "asked for")
    for found in declared:
        if found.format != _FP8:
            raise ModelError(
                f"{found.where}: KV cache in {found.format}, expected FP8 or none; {REMEDY}"
            )
    return KvCache(True, f"{_name(declared[0])} declares {_FP8}") if declared else KvCache()


def _name(declared: _Declared) -> str:
    """The file's name: an artifact keeps it, and no path of this machine."""
    return Path(declared.where).name


def _declarations(where: str, contents: Object) -> Iterator[_Declared]:
    """ModelOpt's kv_cache_quant_algo, and the kv_cache_scheme that it shares with
    compressed-tensors.
    """
    algorithm = str(contents.get("kv_cache_quant_algo") or "")[:40].upper()
    if algorithm not in _NONE:
        yield _Declared(where, algorithm)
    scheme = as_object(contents.get("kv_cache_scheme"), f"{where}: kv_cache_scheme")
    if scheme:
        yield _Declared(where, _format_of(scheme))


def _format_of(scheme: Object) -> str:
    kind, bits = str(scheme.get("type", "float"))[:20], str(scheme.get("num_bits", 8))[:20]
    if kind == "float" and bits == "8" and not scheme.get("dynamic"):
        return _FP8
    return f"{bits}-bit {kind}{' with dynamic scales' if scheme.get('dynamic') else ''}"


def kv_scale(
    checkpoint: Checkpoint, names: frozenset[str], attention: str, kind: str, why: str
) -> tuple[str, float]:
    """The tensor with the scale of a layer's keys (kind "k") or values ("v"), and its value.

    `attention`: the module's name in the checkpoint; `why` the cache is FP8. Raises ModelError for
    a scale that is missing, not one number, or no finite number above zero, and for an offset.
    """
    spelled = (f"{attention}.{kind}_proj.{kind}_scale", f"{attention}.{kind}_scale",
               f"{attention}.qkv_proj.{kind}_scale", f"{attention}.kv_scale")  # fmt: skip
    name = next((name for name in spelled if name in names), None)
    if name is None:
        raise ModelError(
            f"{checkpoint.path}: {spelled[0]} (or {spelled[1]}): no such tensor, expected the "
            f"scale of the layer's FP8 KV cache ({why}); export it with its scales, or {REMEDY}"
        )
    _check_offset(checkpoint, names, f"{attention}.{kind}_proj.{kind}_bias")
    info, data = checkpoint.info(name), checkpoint.read(name)
    if data.size != 1 or info.dtype not in ("f32", "bf16", "f16"):
        found = f"{info.dtype} {list(info.shape)}"
        raise fault(info.file, name, f"expected one scale for all heads, found {found}", REMEDY)
    with np.errstate(over="ignore"):
        value = float(data.astype(np.float32).reshape(()))
    if not 0 < value < np.inf:
        what = f"expected a finite scale above 0, found {value}"
        raise fault(info.file, name, what, f"export it again, or {REMEDY}")
    return name, value


def _check_offset(checkpoint: Checkpoint, names: frozenset[str], name: str) -> None:
    if name in names and checkpoint.read(name).astype(np.float32).any():
        info = checkpoint.info(name)
        raise fault(info.file, name, "expected no offset of an FP8 KV cache, found one", REMEDY)
