"""The schema of an artifact's manifest.json: one frozen dataclass per object, read strictly.

The dataclasses are the schema: a field without a default is a required key. What types cannot say
(names that leave the folder, overlapping weights, unknown versions) `check` says. Units: bytes
unless the name says otherwise.
"""

import dataclasses
import json
import re
from collections.abc import Mapping
from typing import cast

from ..ir.errors import ModelError
from .strict import Json, decode, parse_json, refuse

FORMAT = 1
MANIFEST = "manifest.json"
WEIGHTS = "weights.safetensors"
ALIGN = 64  # bytes: a cache line, and what the kernels ask of every weight
LARGEST_VOCAB = 1 << 22  # bounds what a hostile manifest makes us allocate (one f32 row: 16 MB)
LARGEST_BUCKET = 1 << 16


@dataclasses.dataclass(frozen=True, slots=True)
class ModelFacts:
    """What the checkpoint was. `sources`: input shard -> SHA-256."""

    family: str
    name: str
    vocab: int
    context: int  # capacity of the KV cache, tokens
    bos: int | None
    eos: tuple[int, ...]
    sources: Mapping[str, str]
    parameters: int = 0  # numbers in the checkpoint, not bytes
    recipe: str = ""  # "w4a4" | "w4a16" | "" (no 4-bit linears)
    add_bos: bool | None = None  # None: as tokenizer_config.json and the tokenizer's own rule say


@dataclasses.dataclass(frozen=True, slots=True)
class TargetFacts:
    """One compiled library. `isas`: variants inside; `features`: what the weakest of them needs."""

    library: str
    library_sha256: str
    isas: tuple[str, ...]
    features: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, slots=True)
class Part:
    """One file of the artifact."""

    bytes: int
    sha256: str


@dataclasses.dataclass(frozen=True, slots=True)
class ArenaFacts:
    """The memory plan, bytes: arena per token of a bucket, workspace, KV cache (state)."""

    per_token: int
    workspace: int
    state: int


@dataclasses.dataclass(frozen=True, slots=True)
class Refusal:
    """A faster kernel that was not taken, and why."""

    kernel: str
    reason: str


@dataclasses.dataclass(frozen=True, slots=True)
class KernelChoice:
    """The kernel of one op in one bucket (bucket = token capacity). n, k: 0 where meaningless."""

    loc: str
    op: str
    bucket: int
    kernel: str
    n: int
    k: int
    refused: tuple[Refusal, ...] = ()
    fallback: bool = False  # a slow kernel that the user permitted by name


@dataclasses.dataclass(frozen=True, slots=True)
class KernelCode:
    """What a compiled kernel takes of a device. `unit`: its source; bytes per thread, but `shared`
    per block (static).
    """

    unit: str
    kernel: str
    registers: int
    stack: int
    spilled: int
    shared: int
    instruction: str = ""  # of the tensor cores, as its machine code has it; "" none or not asked


@dataclasses.dataclass(frozen=True, slots=True)
class WeightFacts:
    """One tensor of the weight image. `offset` counts from the start of the image (weights.py)."""

    name: str
    source: tuple[str, ...]  # the checkpoint tensors it was made of
    type: str  # text of the IR type
    offset: int
    bytes: int


@dataclasses.dataclass(frozen=True, slots=True)
class SelfTest:
    """Largest difference of one kernel from the interpreter, and what is allowed."""

    loc: str
    kernel: str
    bucket: int
    max_abs: float
    tolerance: float


@dataclasses.dataclass(frozen=True, slots=True)
class PhaseFacts:
    """One phase of the compiler: its time, the ops it left, whether it changed the graph."""

    id: str
    ms: float
    ops: int
    changed: bool
    why: str = ""


@dataclasses.dataclass(frozen=True, slots=True)
class Manifest:
    """Everything about an artifact that fits in a header."""

    format: int
    producer: str
    created: str  # ISO 8601
    model: ModelFacts
    targets: Mapping[str, TargetFacts]
    parts: Mapping[str, Part]  # every file but the manifest
    buckets: tuple[int, ...]  # ascending token capacities; the first is 1 (decode)
    arena: ArenaFacts
    kernels: tuple[KernelChoice, ...]  # per bucket: one per launch, in launch order
    weights: tuple[WeightFacts, ...]
    driver_min: str | None = None
    code: tuple[KernelCode, ...] = ()
    selftest: tuple[SelfTest, ...] = ()
    phases: tuple[PhaseFacts, ...] = ()
    generation: Mapping[str, object] = dataclasses.field(default_factory=dict[str, object])

    def to_json(self) -> bytes:
        """The bytes of manifest.json: two runs over the same facts give the same bytes."""
        text = json.dumps(dataclasses.asdict(self), indent=1, sort_keys=False, allow_nan=False)
        return text.encode() + b"\n"


def read_manifest(text: bytes, where: str) -> Manifest:
    """manifest.json -> Manifest. Raises ModelError naming `where` and the key."""
    value = parse_json(text, where)
    if not isinstance(value, dict):
        raise refuse(where, "not a manifest", "an object", value)
    version = value.get("format")
    if version != FORMAT or isinstance(version, bool):  # said first: other versions, other keys
        raise ModelError(
            f"{where}: format: version this halfbyte does not know, expected {FORMAT}, "
            f"found {version!r}; compile the model again or install the matching halfbyte"
        )
    manifest = decode(Manifest, cast(Json, value), where)
    check(manifest, where)
    return manifest


def check(manifest: Manifest, where: str) -> None:
    """What the types of the schema cannot say. Raises ModelError naming the key."""
    _check_model(manifest, where)
    _check_parts(manifest, where)
    _check_buckets(manifest, where)
    _check_weights(manifest, where)


def _check_model(manifest: Manifest, where: str) -> None:
    model = manifest.model
    _within(f"{where}.model.vocab", model.vocab, 1, LARGEST_VOCAB)
    _within(f"{where}.model.context", model.context, 1, 2**31 - 1)
    for key, token in [("bos", model.bos)] + [("eos", token) for token in model.eos]:
        if token is not None:
            _within(f"{where}.model.{key}", token, 0, model.vocab - 1)


def _check_parts(manifest: Manifest, where: str) -> None:
    for name, part in manifest.parts.items():
        if not is_safe_name(name) or name == MANIFEST:
            raise refuse(f"{where}.parts", "unsafe file name", "a path inside the folder", name)
        _check_digest(f"{where}.parts[{name!r}].sha256", part.sha256)
    for target, facts in manifest.targets.items():
        key = f"{where}.targets[{target!r}]"
        if facts.library not in manifest.parts:
            raise refuse(f"{key}.library", "no such part", sorted_names(manifest), facts.library)
        if facts.library_sha256 != manifest.parts[facts.library].sha256:
            expected = manifest.parts[facts.library].sha256
            raise refuse(f"{key}.library_sha256", "not its part's", expected, facts.library_sha256)


def _check_buckets(manifest: Manifest, where: str) -> None:
    buckets = manifest.buckets
    if not buckets or list(buckets) != sorted(set(buckets)) or buckets[0] != 1:
        raise refuse(f"{where}.buckets", "wrong order", "ascending sizes from 1", buckets)
    _within(f"{where}.buckets", buckets[-1], 1, LARGEST_BUCKET)
    for i, kernel in enumerate(manifest.kernels):
        if kernel.bucket not in buckets:
            raise refuse(f"{where}.kernels[{i}].bucket", "no such bucket", str(buckets), kernel)


def _check_weights(manifest: Manifest, where: str) -> None:
    if manifest.weights and WEIGHTS not in manifest.parts:
        raise refuse(f"{where}.parts", "part is missing", WEIGHTS, sorted(manifest.parts))
    size = manifest.parts[WEIGHTS].bytes if manifest.weights else 0
    for i, weight in enumerate(manifest.weights):
        key = f"{where}.weights[{i}] ({weight.name})"
        if weight.offset % ALIGN:
            raise refuse(f"{key}.offset", "not aligned", f"a multiple of {ALIGN}", weight.offset)
        if weight.offset + weight.bytes > size:
            raise refuse(key, "beyond the weights file", f"end <= {size}", weight)


def is_safe_name(name: str) -> bool:
    """True for a relative path of plain names, such as `passes/00_import.ir`."""
    return bool(re.fullmatch(r"[\w.+-]+(/[\w.+-]+)*", name, re.ASCII)) and not (
        {".", ".."} & set(name.split("/"))
    )


def sorted_names(manifest: Manifest) -> str:
    """The part names, for messages."""
    return ", ".join(sorted(manifest.parts))


def _check_digest(where: str, digest: str) -> None:
    if not re.fullmatch(r"[0-9a-f]{64}", digest):
        raise refuse(where, "not a SHA-256", "64 hexadecimal digits", digest)


def _within(where: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise refuse(where, "out of range", f"[{low}, {high}]", value)
