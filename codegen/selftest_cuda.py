"""The self-test's driver for a library of a CUDA target, on a machine with such a device.

Not part of a compilation, which needs no device: `make test-gpu` runs it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import numpy as np
import tvm_ffi

from ..ir.errors import TargetError
from ..ir.graph import Value
from ..ir.numerics import Array
from ..ir.types import PAGE
from .args import Space
from .lower import ref
from .plan import Plan
from .selftest import Bytes, Case, Session, cases, dtype_name


class DeviceSession(Session):
    """A library with its weights on a device, driven launch by launch; one sequence in slot 0.

    Page p of the KV cache holds the positions from 16 p on.
    """

    def __init__(self, library: Path, image: Bytes, plan: Plan, device: int = 0) -> None:
        try:
            self._module = cast(Any, tvm_ffi).load_module(str(library))
        except (OSError, RuntimeError) as error:
            raise TargetError(f"{library}: this system cannot load it: {error}") from error
        self.image, self._pages = image, plan.pages
        self._handle = cast(int, self._module["create"](device, 1, plan.pages, 1))
        self._module["upload"](self._handle, 0, image)
        self._module["ready"](self._handle)
        self._module["pages"](self._handle, 0, 0, np.arange(plan.pages, dtype=np.int32))
        self.isa = "cuda"

    def cases(self, plan: Plan) -> list[Case]:
        """What there is to try: a prefill step has one row of logits."""
        return cases(plan, one_row=True)

    def write_cache(self, value: Value, data: Array) -> None:
        """The first positions of a paged cache: data [heads, positions, head_dim]."""
        heads, positions, dim = data.shape
        pages = np.zeros((heads, self._pages * PAGE, dim), data.dtype)
        pages[:, :positions] = data
        paged = pages.reshape(heads, self._pages, PAGE, dim).swapaxes(0, 1)
        self.poke(int(Space.STATE), ref(value).offset * self._pages, paged)

    def read_cache(self, value: Value, rows: slice) -> Array:
        """Positions of a paged cache [heads, positions, head_dim]."""
        heads, _, dim = value.type.static
        shape = self._pages, heads, PAGE, dim
        at, dtype = ref(value).offset * self._pages, dtype_name(value)
        found = self.peek(int(Space.STATE), at, shape, dtype)
        return found.swapaxes(0, 1).reshape(heads, self._pages * PAGE, dim)[:, rows]
