"""How each producer spells one quantised weight: ONE table of suffixes, and one normal form.

The dtypes of the tensors decide (nvfp4-formats.md 13.4): U8 codes with e4m3 block scales are NVFP4,
an e4m3 matrix is FP8. Missing sidecars, or sidecars of a weight that is dense, are errors.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from .container import Checkpoint
from .tensor_info import Array, TensorInfo, fault

EXPORT = "export the checkpoint again"
CHUNK = 4 << 20
"""Elements looked at together when a tensor is scanned for NaN."""


@dataclass(frozen=True, slots=True)
class Dialect:
    """Suffixes of one producer's format. `divisors`: global scales are stored as 1 / scale."""

    name: str
    kind: str
    codes_dtype: str
    codes: str
    scale: str
    global_scale: str = ""
    input_scale: str = ""
    divisors: bool = False


MODELOPT = Dialect(
    "modelopt", "nvfp4", "u8", "weight", "weight_scale", "weight_scale_2", "input_scale"
)
COMPRESSED = Dialect(
    "compressed-tensors", "nvfp4", "u8", "weight_packed", "weight_scale", "weight_global_scale",
    "input_global_scale", divisors=True,
)  # fmt: skip
FP8 = Dialect("fp8", "fp8", "f8e4m3", "weight", "weight_scale", "", "input_scale")
FP8_INV = Dialect("fp8-inv", "fp8", "f8e4m3", "weight", "weight_scale_inv", "", "activation_scale")
"""Mistral's and DeepSeek's names; despite `inv` the scale is a multiplier."""

DIALECTS = (COMPRESSED, MODELOPT, FP8, FP8_INV)
"""In the order in which they are tried; FP8 and FP8_INV differ by the scale that is there."""

_UNSUPPORTED = {
    "pre_quant_scale": "AWQ pre-quantisation scales",
    "svdquant_lora_a": "SVDQuant low-rank parts",
    "weight_zero_point": "weights with a zero point",
    "weight_g_idx": "GPTQ's column order",
    "qweight": "GPTQ or AWQ integer weights",
    "weight_blocks": "MXFP4 blocks",
}


_BITS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
_EXPONENTS = {
    "f64": 0x7FF0000000000000, "f32": 0x7F800000, "f16": 0x7C00, "bf16": 0x7F80, "f8e4m3": 0x7F,
    "f8e5m2": 0x7C,
}  # fmt: skip
"""Bits that are all set in every infinity and NaN of a dtype (e4m3fn: the one NaN pattern)."""


@dataclass(frozen=True, slots=True)
class QuantizedWeight:
    """Checkpoint names of one quantised weight, [N, K] = `shape`. Empty: there is no such part."""

    module: str
    dialect: str
    kind: str
    shape: tuple[int, int]
    packed: str
    block_scale: str
    global_scale: str = ""
    input_scale: str = ""
    divisors: bool = False

    @property
    def tensors(self) -> tuple[str, ...]:
        return tuple(
            filter(None, (self.packed, self.block_scale, self.global_scale, self.input_scale))
        )


def quantized_weight(
    checkpoint: Checkpoint, module: str, names: frozenset[str]
) -> QuantizedWeight | None:
    """The quantised weight of a linear; None where `module.weight` is dense.

    Checks shapes, dtypes and values: global and input scales finite and > 0, block scales neither
    NaN nor negative. Raises ModelError naming file and tensor.
    """
    for suffix, what in _UNSUPPORTED.items():
        if f"{module}.{suffix}" in names:
            raise _fault(
                checkpoint,
                f"{module}.{suffix}",
                f"{what} are not supported",
                "take an NVFP4, FP8 or unquantised checkpoint",
            )
    dialect = _dialect_of(checkpoint, module, names)
    if dialect is None:
        _check_no_orphan(checkpoint, module, names)
        return None
    codes = checkpoint.info(f"{module}.{dialect.codes}")
    if len(codes.shape) != 2:
        raise fault(
            codes.file, codes.name, f"expected a matrix, found shape {list(codes.shape)}", EXPORT
        )
    scale = _sidecar(checkpoint, names, codes, module, dialect.scale)
    found = _nvfp4 if dialect.kind == "nvfp4" else _fp8
    return found(checkpoint, names, module, dialect, codes, scale)


def _dialect_of(checkpoint: Checkpoint, module: str, names: frozenset[str]) -> Dialect | None:
    candidates = [d for d in DIALECTS if f"{module}.{d.codes}" in names]
    for dialect in candidates:
        info = checkpoint.info(f"{module}.{dialect.codes}")
        if info.dtype != dialect.codes_dtype:
            continue
        if dialect is FP8 and f"{module}.{FP8_INV.scale}" in names:
            return FP8_INV
        return dialect
    if candidates and candidates[0] is COMPRESSED:
        info = checkpoint.info(f"{module}.{COMPRESSED.codes}")
        raise fault(
            info.file,
            info.name,
            f"expected u8 NVFP4 codes, found {info.dtype}",
            "only NVFP4 is read from packed weights; take an NVFP4 checkpoint",
        )
    return None


def _check_no_orphan(checkpoint: Checkpoint, module: str, names: frozenset[str]) -> None:
    for dialect in DIALECTS:
        for suffix in (dialect.scale, dialect.global_scale, dialect.input_scale):
            name = f"{module}.{suffix}"
            if suffix and name in names:
                weight = f"{module}.weight"
                what = checkpoint.info(weight).dtype if weight in names else "missing"
                raise _fault(
                    checkpoint,
                    name,
                    f"a scale without a quantised weight: {weight!r} is "
                    f"{what}, expected u8 or f8e4m3",
                    EXPORT,
                )


def _sidecar(
    checkpoint: Checkpoint, names: frozenset[str], codes: TensorInfo, module: str, suffix: str
) -> TensorInfo:
    name = f"{module}.{suffix}"
    if name not in names:
        raise fault(
            codes.file,
            name,
            f"missing, but {codes.name!r} is {codes.dtype} codes, which mean nothing without it",
            EXPORT,
        )
    return checkpoint.info(name)


def _nvfp4(
    checkpoint: Checkpoint, names: frozenset[str], module: str, dialect: Dialect, codes: TensorInfo,
    scale: TensorInfo,
) -> QuantizedWeight:  # fmt: skip
    n, half = codes.shape
    k = 2 * half
    if scale.dtype != "f8e4m3":
        raise fault(
            scale.file,
            scale.name,
            f"expected f8e4m3 block scales, found {scale.dtype}",
            "of the 4-bit formats only NVFP4 is read; take such a checkpoint",
        )
    if k % 16 or scale.shape != (n, k // 16):
        raise fault(
            scale.file,
            scale.name,
            f"expected shape [{n}, {k}/16] for {codes.name!r} of "
            f"{list(codes.shape)} bytes, found {list(scale.shape)}",
            EXPORT,
        )
    _check_block_scales(checkpoint, scale)
    total = _sidecar(checkpoint, names, codes, module, dialect.global_scale)
    _check_scalar(checkpoint, total)
    inputs = f"{module}.{dialect.input_scale}"
    if inputs in names:
        _check_scalar(checkpoint, checkpoint.info(inputs))
    return QuantizedWeight(
        module, dialect.name, "nvfp4", (n, k), codes.name, scale.name, total.name,
        inputs if inputs in names else "", dialect.divisors,
    )  # fmt: skip


def _fp8(
    checkpoint: Checkpoint, names: frozenset[str], module: str, dialect: Dialect, codes: TensorInfo,
    scale: TensorInfo,
) -> QuantizedWeight:  # fmt: skip
    n, k = codes.shape
    if scale.shape not in ((), (1,), (n,), (n, 1)):
        raise fault(
            scale.file,
            scale.name,
            f"expected one FP8 scale or one per row of {n}, found shape {list(scale.shape)}",
            "block-scaled FP8 is not supported; take a "
            "checkpoint with scales per tensor or per channel",
        )
    _check_positive(checkpoint, scale, finite_inverse=False)
    inputs = f"{module}.{dialect.input_scale}"
    if inputs in names:
        _check_scalar(checkpoint, checkpoint.info(inputs))
    return QuantizedWeight(
        module, dialect.name, "fp8", (n, k), codes.name, scale.name,
        input_scale=inputs if inputs in names else "",
    )  # fmt: skip


def _check_scalar(checkpoint: Checkpoint, info: TensorInfo) -> None:
    """One float, shape [] or [1], finite, > 0, with a finite inverse. Raises ModelError."""
    if info.shape not in ((), (1,)):
        raise fault(
            info.file,
            info.name,
            f"expected one number ([] or [1]), found shape {list(info.shape)}",
            EXPORT,
        )
    _check_positive(checkpoint, info, finite_inverse=True)


def _check_positive(checkpoint: Checkpoint, info: TensorInfo, *, finite_inverse: bool) -> None:
    if info.dtype not in ("f32", "bf16", "f16"):
        raise fault(info.file, info.name, f"expected f32, bf16 or f16, found {info.dtype}", EXPORT)
    values = checkpoint.read(info.name).astype(np.float32).reshape(-1)
    good = np.isfinite(values) & (values > 0)
    if finite_inverse:
        with np.errstate(all="ignore"):
            inverse = np.float32(1) / values
        good &= np.isfinite(inverse) & (inverse > 0)
    if not good.all():
        bad = float(values[~good][0])
        raise fault(info.file, info.name, f"expected finite scales above 0, found {bad}", EXPORT)


def _check_block_scales(checkpoint: Checkpoint, info: TensorInfo) -> None:
    """e4m3 bytes above 0x7E are NaN (0x7F, 0xFF) or negative: neither can come from a quantiser."""
    for start, chunk in chunks(checkpoint.read(info.name).view(np.uint8)):
        bad = np.flatnonzero(chunk > 0x7E)
        if bad.size:
            row, column = divmod(start + int(bad[0]), info.shape[1])
            what = "NaN" if chunk[bad[0]] & 0x7F == 0x7F else "a negative scale"
            raise fault(
                info.file,
                info.name,
                f"block scale [{row}, {column}] is {what} (byte "
                f"{int(chunk[bad[0]]):#04x}), expected 0x00 to 0x7e",
                EXPORT,
            )


def chunks(values: Array) -> Iterator[tuple[int, Array]]:
    """(first index, piece) over the flattened array, so that a scan needs bounded memory."""
    flat = values.reshape(-1)
    for start in range(0, flat.size, CHUNK):
        yield start, flat[start : start + CHUNK]


def check_finite(info: TensorInfo, data: Array) -> None:
    """Raises ModelError where a float tensor holds an infinity or a NaN."""
    mask = _EXPONENTS.get(info.dtype)
    if mask is None:
        return
    bits = data.view(_BITS[data.dtype.itemsize])
    for start, chunk in chunks(bits):
        bad = np.flatnonzero((chunk & mask) == mask)
        if bad.size:
            raise fault(
                info.file, info.name, f"element {start + int(bad[0])} is not finite", EXPORT
            )


def _fault(checkpoint: Checkpoint, name: str, what: str, do: str) -> Exception:
    return fault(checkpoint.info(name).file, name, what, do)
