"""The floor no implementation gets under: bytes a decode step must read, over what memory gives."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_PIECE = 64 << 20
"""Bytes read by each thread: far more than its share of any cache we know but the largest."""


@dataclass(frozen=True, slots=True)
class Floor:
    """Bytes per decoded token, the bandwidth measured here, and the speed that follows."""

    bytes_per_token: int
    gigabytes: float

    @property
    def tokens_per_second(self) -> float:
        return self.gigabytes * 1e9 / max(self.bytes_per_token, 1)


def _read(piece: NDArray[np.float32]) -> float:
    return float(np.dot(piece, piece))


def read_bandwidth(threads: int) -> float:
    """GB/s of dot products over memory by so many threads, the best of five.

    A dot product of a vector with itself reads it once, in the widest loads numpy has.
    """
    pieces = [np.ones(_PIECE // 4, np.float32) for _ in range(threads)]
    best = 0.0
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(5):
            start = time.perf_counter()
            list(pool.map(_read, pieces))
            best = max(best, threads * _PIECE / (time.perf_counter() - start))
    return best / 1e9
