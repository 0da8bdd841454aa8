"""Which kernels of an artifact no self-test ran."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from .runtime.manifest import SelfTest

CONTROL = "control"
"""What If, Loop and Scan are counted as: the executor walks their bodies."""


def untested(kernels: Collection[str], tests: Sequence[SelfTest]) -> tuple[str, ...]:
    """Those that compute something and were not run, as they draw numbers of their own, say."""
    return tuple(sorted(set(kernels) - {test.kernel for test in tests} - {CONTROL}))
