"""A stand-in for the library of a CUDA target: the same exports, checks and books, no device.

Its next token is `script(all tokens of the slot so far)`, so that several sequences can be told
apart and any mistake about slots, positions or pages shows in the text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from tests.fake_model import VOCAB

PAGE, RING = 16, 64
Script = Callable[[Sequence[int]], int]


class FakeCuda:
    """See the module. `capability`, `driver` and `free` are what the device says of itself."""

    def __init__(self, script: Script, capability: tuple[int, int] = (9, 0)) -> None:
        self.script, self.capability = script, capability
        self.driver, self.free = 13000, 80 << 30
        self.page_bytes, self.fixed_bytes = 1 << 20, 1 << 30
        self.calls: list[tuple[str, int]] = []
        self.slots: list[list[int]] = []
        self.held: list[list[int]] = []
        self.loop: list[int] = []  # slots
        self.inputs: list[int] = []
        self.positions: list[int] = []
        self.ring: list[list[int]] = []
        self.uploaded = 0
        self.is_ready = False

    def __getitem__(self, name: str, /) -> Callable[..., Any]:
        return getattr(self, name)

    def device(self, index: int, out: Any) -> str:
        """Facts of device 0."""
        if index:
            raise ValueError(f"device: there is no device {index}, this machine has 1")
        if self.driver == 0:
            raise RuntimeError("device: looking for devices: cudaErrorInsufficientDriver (…)")
        out[:] = (*self.capability, self.driver, 13000, 132, 80 << 30, self.free)
        return "NVIDIA Test"

    def memory(self, slots: int, pages: int) -> int:
        """Bytes of a session."""
        return self.fixed_bytes + pages * self.page_bytes

    def create(self, device: int, slots: int, pages: int, eager: int) -> int:
        """A handle."""
        self.calls.append(("create", pages))
        self.slots, self.held = [[] for _ in range(slots)], [[] for _ in range(slots)]
        self.page_count = pages
        return 1

    def upload(self, handle: int, offset: int, weights: Any) -> None:
        """In order."""
        assert offset == self.uploaded
        self.uploaded += len(weights)

    def ready(self, handle: int) -> None:
        """After all weights."""
        self.is_ready = True

    def destroy(self, handle: int) -> None:
        """Counts."""
        self.calls.append(("destroy", 0))

    def pages(self, handle: int, slot: int, first: int, pages: Any) -> None:
        """No page may be held twice."""
        assert pages.dtype == np.int32 and first <= len(self.held[slot])
        self.held[slot][first:] = pages.tolist()
        every = [page for held in self.held for page in held]
        assert len(set(every)) == len(every) and all(0 <= p < self.page_count for p in every)

    def sampling(self, handle: int, slot: int, values: Any, seed: int) -> None:
        """Remembers."""
        assert values.dtype == np.float64 and values.shape == (4,) and seed >= 0
        self.calls.append(("sampling", slot))

    def prefill(
        self, handle: int, slot: int, ids: Any, position: int, logits: Any, sample: int
    ) -> None:
        """A chunk."""
        assert self.is_ready and not self.ring and len(logits) <= 1
        self.calls.append(("prefill", len(ids)))
        for i, token in enumerate(ids.tolist()):
            self._write(slot, position + i, token)
        if len(logits):
            self._fill(logits[0], slot)
        if sample:
            self.loop = [slot]
            self.ring.append([self.script(self.slots[slot])])

    def decode(self, handle: int, slots: Any, tokens: Any, positions: Any, logits: Any) -> None:
        """One token each."""
        assert not self.ring and len(logits) in (0, len(slots))
        for slot in set(slots.tolist()):
            assert len(set((positions[slots == slot] // PAGE).tolist())) == 1, "several pages"
        self.calls.append(("decode", len(slots)))
        rows = zip(slots.tolist(), tokens.tolist(), positions.tolist(), strict=True)
        for row, (slot, token, position) in enumerate(rows):
            self._write(slot, position, token)
            self._fill(logits[row], slot)

    def start(self, handle: int, slots: Any, tokens: Any, positions: Any) -> None:
        """A new loop."""
        assert not self.ring and len(set(slots.tolist())) == len(slots)
        self.calls.append(("start", len(slots)))
        self.loop, self.inputs = slots.tolist(), tokens.tolist()
        self.positions = positions.tolist()

    def advance(self, handle: int, steps: int) -> None:
        """Decodes and samples."""
        for _ in range(steps):
            assert len(self.ring) < RING
            for slot, token, position in zip(self.loop, self.inputs, self.positions, strict=True):
                self._write(slot, position, token)
            self.inputs = [self.script(self.slots[slot]) for slot in self.loop]
            self.positions = [position + 1 for position in self.positions]
            self.ring.append(list(self.inputs))
        self.calls.append(("advance", steps))

    def poll(self, handle: int, least: int, out: Any) -> int:
        """One step at a time, or as many as are wanted."""
        assert out.shape[1] == len(self.loop) and least <= len(self.ring)
        steps = max(least, min(1, len(self.ring)))
        out[:steps] = self.ring[:steps]
        del self.ring[:steps]
        return steps

    def profile(self, handle: int, bucket: int, tokens: int, position: int, out: Any) -> None:
        """Made-up times."""
        for slot in range(tokens if bucket <= 32 else 1):
            assert position // PAGE < len(self.held[slot])
        out[:] = np.arange(len(out))

    def _write(self, slot: int, position: int, token: int) -> None:
        assert 0 <= token < VOCAB
        assert position <= len(self.slots[slot]), "a gap in the cache"
        assert position // PAGE < len(self.held[slot]), "no page"
        self.slots[slot][position:] = [token]

    def _fill(self, out: Any, slot: int) -> None:
        out[:] = 0
        out[self.script(self.slots[slot])] = 5
