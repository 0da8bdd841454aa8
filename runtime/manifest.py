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

FORMAT = 3
MANIFEST = "manifest.json"
WEIGHTS = "weights.safetensors"
PASSES = "passes"  # the folder of the record of each target's phases
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
    add_bos: bool | None = None  # None: as tokenizer_config.json and the tokenizer's own rule say


@dataclasses.dataclass(frozen=True, slots=True)
class PortFacts:
    """An input or output of an ONNX graph. `dims`: numbers, symbols of the file, "?"; None where
    not even the rank is known."""

    name: str
    dtype: str
    dims: tuple[str, ...] | None


@dataclasses.dataclass(frozen=True, slots=True)
class NetFacts:
    """What an ONNX graph takes and gives."""

    opset: int
    inputs: tuple[PortFacts, ...]
    outputs: tuple[PortFacts, ...]


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
class Run:
    """Bytes of a weight file's image (weights.py) that stand at `offset` of a target's image."""

    file: str
    begin: int
    offset: int
    bytes: int


@dataclasses.dataclass(frozen=True, slots=True)
class TargetFacts:
    """What was compiled for one target: its library, plan, and weights.

    `isas`: variants inside; `features`: what the weakest of them needs. `image`: the weight image
    in pieces, in order and without holes; targets share the pieces that are equal.
    """

    library: str
    library_sha256: str
    isas: tuple[str, ...]
    features: tuple[str, ...]
    buckets: tuple[int, ...]  # ascending token capacities; the first is 1 (decode)
    arena: ArenaFacts
    kernels: tuple[KernelChoice, ...]  # per bucket: one per launch, in launch order
    weights: tuple[WeightFacts, ...]
    image: tuple[Run, ...]
    recipe: str = ""  # "w4a4" | "w4a16" | "" (no 4-bit linears)
    driver_min: str | None = None
    code: tuple[KernelCode, ...] = ()
    selftest: tuple[SelfTest, ...] = ()
    phases: tuple[PhaseFacts, ...] = ()

    @property
    def image_bytes(self) -> int:
        """Size of the weight image."""
        return sum(run.bytes for run in self.image)


@dataclasses.dataclass(frozen=True, slots=True)
class Manifest:
    """Everything about an artifact that fits in a header."""

    format: int
    producer: str
    created: str  # ISO 8601
    model: ModelFacts
    targets: Mapping[str, TargetFacts]  # in the order in which they were asked for
    parts: Mapping[str, Part]  # every file but the manifest
    generation: Mapping[str, object] = dataclasses.field(default_factory=dict[str, object])
    net: NetFacts | None = None  # of an ONNX graph; None: a language model

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
    for name, part in manifest.parts.items():
        if not is_safe_name(name) or name == MANIFEST:
            raise refuse(f"{where}.parts", "unsafe file name", "a path inside the folder", name)
        _check_digest(f"{where}.parts[{name!r}].sha256", part.sha256)
    if not manifest.targets:
        raise refuse(f"{where}.targets", "none", "at least one target", "{}")
    for name, facts in manifest.targets.items():
        key = f"{where}.targets[{name!r}]"
        _check_library(manifest, facts, key)
        _check_buckets(facts, key)
        _check_image(manifest, facts, key)
        _check_weights(facts, key)


def _check_model(manifest: Manifest, where: str) -> None:
    model = manifest.model
    if manifest.net is not None:
        return
    _within(f"{where}.model.vocab", model.vocab, 1, LARGEST_VOCAB)
    _within(f"{where}.model.context", model.context, 1, 2**31 - 1)
    for key, token in [("bos", model.bos)] + [("eos", token) for token in model.eos]:
        if token is not None:
            _within(f"{where}.model.{key}", token, 0, model.vocab - 1)


def _check_library(manifest: Manifest, facts: TargetFacts, key: str) -> None:
    if facts.library not in manifest.parts:
        raise refuse(f"{key}.library", "no such part", sorted_names(manifest), facts.library)
    if facts.library_sha256 != manifest.parts[facts.library].sha256:
        expected = manifest.parts[facts.library].sha256
        raise refuse(f"{key}.library_sha256", "not its part's", expected, facts.library_sha256)


def _check_buckets(facts: TargetFacts, key: str) -> None:
    buckets = facts.buckets
    if not buckets or list(buckets) != sorted(set(buckets)) or buckets[0] != 1:
        raise refuse(f"{key}.buckets", "wrong order", "ascending sizes from 1", buckets)
    _within(f"{key}.buckets", buckets[-1], 1, LARGEST_BUCKET)
    for i, kernel in enumerate(facts.kernels):
        if kernel.bucket not in buckets:
            raise refuse(f"{key}.kernels[{i}].bucket", "no such bucket", str(buckets), kernel)


def _check_image(manifest: Manifest, facts: TargetFacts, key: str) -> None:
    """Pieces of files that are there, one behind the other."""
    end = 0
    for i, run in enumerate(facts.image):
        at = f"{key}.image[{i}]"
        if run.file not in manifest.parts:
            raise refuse(f"{at}.file", "no such part", sorted_names(manifest), run.file)
        size = manifest.parts[run.file].bytes
        if run.offset != end or run.bytes < 1 or run.begin < 0 or run.begin + run.bytes > size:
            raise refuse(at, "out of place", f"offset {end}, within {size} bytes", run)
        if run.begin % ALIGN or run.bytes % ALIGN:
            raise refuse(at, "not aligned", f"multiples of {ALIGN}", run)
        end += run.bytes


def _check_weights(facts: TargetFacts, key: str) -> None:
    size = facts.image_bytes
    for i, weight in enumerate(facts.weights):
        at = f"{key}.weights[{i}] ({weight.name})"
        if weight.offset < 0 or weight.offset % ALIGN:
            raise refuse(f"{at}.offset", "not aligned", f"a multiple of {ALIGN}", weight.offset)
        if weight.offset + weight.bytes > size:
            raise refuse(at, "beyond the weight image", f"end <= {size}", weight)


def is_safe_name(name: str) -> bool:
    """True for a relative path of plain names, such as `passes/cpu/00_import.ir`."""
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
