"""graphs.json, which the compiler writes and `inspect` reads: what a step enqueues on a device."""

from __future__ import annotations

import dataclasses
import json

FILE = "60_codegen/graphs.json"


@dataclasses.dataclass(frozen=True, slots=True)
class Enqueued:
    """A kernel as a step enqueues it. `kernel`: which of the manifest's `code`; `tile`: what a
    block makes, in words; `shared`: dynamic, bytes per block.
    """

    kernel: int
    grid: tuple[int, ...]
    block: tuple[int, ...]
    shared: int
    cluster: int
    tile: str


@dataclasses.dataclass(frozen=True, slots=True)
class BucketGraph:
    """For each launch of a bucket, and the sampler behind them, what it enqueues (of `kinds`)."""

    bucket: int
    launches: tuple[tuple[int, ...], ...]


@dataclasses.dataclass(frozen=True, slots=True)
class GraphRecord:
    """The file. `sms`: multiprocessors of the card that grids are for."""

    sms: int
    kinds: tuple[Enqueued, ...]
    graphs: tuple[BucketGraph, ...]

    def of(self, bucket: int) -> BucketGraph | None:
        return next((g for g in self.graphs if g.bucket == bucket), None)

    def to_json(self) -> bytes:
        return json.dumps(dataclasses.asdict(self)).encode()
