"""Which device is meant, what it is, and which library of an artifact it can run."""

import contextlib
import dataclasses
import re
from collections.abc import Generator, Iterable

import numpy as np

from ..ir.errors import TargetError
from .session import Native

_DEVICE = re.compile(r"cuda(?::(\d+))?")
_TARGET = re.compile(r"sm_(\d+)(\d)([af]?)")


@dataclasses.dataclass(frozen=True, slots=True)
class Device:
    """A CUDA device; `driver` is the newest CUDA release that its driver serves, as 13000."""

    index: int
    name: str
    capability: tuple[int, int]
    driver: int
    multiprocessors: int
    total_bytes: int
    free_bytes: int

    def __str__(self) -> str:
        major, minor = self.capability
        return f"device {self.index} ({self.name}, compute capability {major}.{minor})"


def cuda_index(device: str) -> int | None:
    """The number of "cuda:N" ("cuda" is 0); None for "cpu". Raises TargetError for other names."""
    if device == "cpu":
        return None
    found = _DEVICE.fullmatch(device)
    if found is None:
        raise TargetError(f'device {device!r}: unknown, expected "cpu", "cuda" or "cuda:N"')
    return int(found[1] or 0)


def is_cuda(target: str) -> bool:
    """Whether code of this target runs on a CUDA device."""
    return _TARGET.fullmatch(target) is not None


def fits(target: str, capability: tuple[int, int]) -> bool:
    """Whether a device of this compute capability runs code of a target such as sm_90a.

    `a` is code for one capability alone; `f` and plain ones serve later minor versions too.
    """
    found = _TARGET.fullmatch(target)
    if found is None:
        return False
    made_for = int(found[1]), int(found[2])
    if found[3] == "a":
        return made_for == capability
    return made_for[0] == capability[0] and made_for[1] <= capability[1]


def choose_target(where: str, targets: Iterable[str], device: Device) -> str:
    """The target that the device runs. Raises TargetError that names both."""
    held = sorted(targets)
    for target in held:
        if fits(target, device.capability):
            return target
    wanted = f"sm_{device.capability[0]}{device.capability[1]}a"
    raise TargetError(
        f"{where}: {device} cannot run it, the artifact holds {', '.join(held)}; "
        f"compile with --target {wanted}"
    )


def read_device(native: Native, index: int, driver_min: str | None) -> Device:
    """The facts of a device. Raises TargetError: no such device, no driver, or one too old."""
    facts = np.zeros(7, np.int64)
    try:
        name = str(native["device"](index, facts))
    except (RuntimeError, ValueError, MemoryError) as error:
        needs = f" (needed: driver {driver_min} or newer)" if driver_min else ""
        raise TargetError(f"cuda:{index}: {error}{needs}; run `halfbyte doctor`") from error
    major, minor, driver, runtime, processors, total, free = (int(v) for v in facts)
    if driver < runtime // 1000 * 1000:  # a minor release of CUDA runs on any driver of its major
        raise TargetError(
            f"cuda:{index}: the driver is too old, expected CUDA {runtime // 1000} (driver "
            f"{driver_min}), found CUDA {driver // 1000}.{driver % 1000 // 10}; install a newer one"
        )
    return Device(index, name, (major, minor), driver, processors, total, free)


@contextlib.contextmanager
def device_call(device: Device) -> Generator[None]:
    """Turns an error of the device into a TargetError."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        raise TargetError(f"{device}: {error}; run `halfbyte doctor`") from error
