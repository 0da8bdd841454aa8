"""How many threads a model gets when the user does not say."""

import math
import os
from pathlib import Path

MAX_THREADS = 256
"""The most that a library takes (team.cc)."""

_TOPOLOGY = Path("/sys/devices/system/cpu")
_QUOTA = Path("/sys/fs/cgroup/cpu.max")


def default_threads(topology: Path = _TOPOLOGY, quota: Path = _QUOTA) -> int:
    """Physical cores this process may use, at least 1.

    CPUs of the affinity mask, siblings of one core counted once (a second hyper-thread adds no
    memory bandwidth), bounded by the CPU quota of the container (threads beyond it get suspended
    in the middle of a step, and the whole team waits for them).
    """
    cpus = os.sched_getaffinity(0)
    cores = {_siblings(topology, cpu) for cpu in cpus}
    return max(1, min(len(cores), _quota_cores(quota)))


def _siblings(topology: Path, cpu: int) -> str:
    try:
        return (topology / f"cpu{cpu}/topology/thread_siblings_list").read_text()
    except OSError:  # not mounted: count every CPU
        return str(cpu)


def _quota_cores(quota: Path) -> int:
    """cgroup v2 `cpu.max`: "<microseconds|max> <period>"."""
    try:
        limit, period = quota.read_text().split()
        return len(os.sched_getaffinity(0)) if limit == "max" else _ceil(int(limit), int(period))
    except (OSError, ValueError, ZeroDivisionError):
        return os.cpu_count() or 1


def _ceil(limit: int, period: int) -> int:
    return max(1, math.ceil(limit / period))
