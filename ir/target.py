"""What a target is: a row of facts. Kernels ask for features; nothing asks for a target's name."""

from __future__ import annotations

from dataclasses import dataclass, replace

from .errors import TargetError
from .types import LINEAR, P16, PAGED, SFATOM, WGMMA


@dataclass(frozen=True, slots=True)
class Target:
    """Facts of a target.

    `nvfp4_layout`, `dense_layout`: what phase 20 makes of weights. `w4a4_native`: whether 4-bit
    activations buy speed here; where they do not, recipe "auto" keeps activations exact (W4A16).
    `activation`, `cache_layout`: dtype of activations and of the KV cache, and how the cache lies.
    `fp8_cache`: whether kernels also read a KV cache in FP8, where the checkpoint has scales.
    `buckets`: largest token counts a step is compiled for, ascending. Up to `sequences` each token
    is of its own sequence (decode); above, all are one sequence's (prefill).
    `shared_bytes`: most shared memory that a block of a CUDA device may ask for; `sms`: streaming
    multiprocessors of its usual card, for what is said of launches where there is none.
    """

    name: str
    features: frozenset[str]
    nvfp4_layout: str
    dense_layout: str
    w4a4_native: bool
    activation: str
    cache_layout: str
    buckets: tuple[int, ...]
    sequences: int
    graph_capture: bool
    shared_bytes: int = 0
    sms: int = 0
    fp8_cache: bool = False


_SM_120A = Target(
    name="sm_120a",
    features=frozenset({"cuda", "mma_nvfp4"}),
    nvfp4_layout=SFATOM,
    dense_layout=LINEAR,
    w4a4_native=True,
    activation="bf16",
    cache_layout=PAGED,
    buckets=(1, 2, 4, 8, 16, 32, 64, 512, 2048),
    sequences=32,
    graph_capture=True,
    shared_bytes=99 * 1024,
    sms=170,
    fp8_cache=True,
)

TARGETS: dict[str, Target] = {
    "cpu": Target(
        name="cpu",
        features=frozenset({"cpu"}),
        nvfp4_layout=P16,
        dense_layout=P16,
        w4a4_native=False,
        activation="f32",
        cache_layout=LINEAR,
        buckets=(1, 8, 64, 512),
        sequences=1,
        graph_capture=False,
    ),
    "sm_90a": Target(
        name="sm_90a",
        features=frozenset({"cuda", "wgmma", "tma"}),
        nvfp4_layout=WGMMA,
        dense_layout=LINEAR,
        w4a4_native=False,
        activation="bf16",
        cache_layout=PAGED,
        buckets=(1, 2, 4, 8, 16, 32, 64, 512, 2048),
        sequences=32,
        graph_capture=True,
        shared_bytes=227 * 1024,
        sms=132,
        fp8_cache=True,
    ),
    "sm_120a": _SM_120A,
    # The same kernels, as code that the later minor versions of the family (12.1) run too.
    "sm_120f": replace(_SM_120A, name="sm_120f"),
}


def target(name: str) -> Target:
    """The target of this name. Raises TargetError listing the known ones."""
    if name not in TARGETS:
        raise TargetError(f"target {name!r}: unknown, expected one of {', '.join(sorted(TARGETS))}")
    return TARGETS[name]
