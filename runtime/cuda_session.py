"""A session on a CUDA device: uploaded weights, a paged KV cache, several sequences at a time."""

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from ..ir.errors import ModelError, TargetError
from .devices import Device, device_call
from .manifest import Manifest
from .pages import PAGE, PagePool, PageTable, pages_for
from .sampling import Sampling
from .session import Logits, Native, Session, native_call

Progress = Callable[[int, int], None]
"""Told bytes uploaded and bytes in all."""

DECODE_ROWS = 32  # buckets up to here hold one token of each of several sequences
_PIECE = 1 << 30  # bytes of weights between two reports of progress
_SPARE = 512 << 20  # bytes of the device left to graphs, to the driver and to others
STEPS_AHEAD = 8  # steps that `decode` lets the device be ahead
_COUNTERS = ("steps", "graph_launches", "step_allocations", "step_copies", "setup_allocations",
             "setup_copies")  # fmt: skip


class CudaSession(Session):
    """A session on one device. Slot 0 holds the sequence of `tokens`; see batch.py for the others.

    The device can run ahead: `start` gives it sequences, `advance` lets it decode and sample steps
    on its own, `poll` returns their tokens. Whatever else is called first discards what was not
    polled.
    """

    def __init__(
        self,
        native: Native,
        image: Sequence[npt.NDArray[np.uint8]],
        manifest: Manifest,
        target: str,
        device: Device,
        sequences: int | None = None,
        eager: bool = False,
        progress: Progress | None = None,
    ) -> None:
        """`image`: the weights in pieces, in order. `sequences`: at most at once; None: as many as
        a decode step holds. `eager`: launches go one by one, without graphs.

        Raises TargetError (memory, driver) or ModelError (weights of another library).
        """
        buckets = manifest.targets[target].buckets
        self.rows = max(b for b in buckets if b <= DECODE_ROWS)
        super().__init__(native, manifest, chunk=buckets[-1], scored=self.rows)
        sequences = self.rows if sequences is None else sequences
        if not 1 <= sequences <= self.rows:
            raise ModelError(f"sequences: expected 1 to {self.rows}, found {sequences}")
        self.isa, self.device, self.sequences = target, device, sequences
        self.pool = PagePool(_pages(native, device, sequences, pages_for(self.context)))
        self._tables = [PageTable(self.pool) for _ in range(sequences)]
        self._ahead = self._ahead_rows = 0
        with native_call(), device_call(device):
            self._handle = int(
                native["create"](device.index, sequences, self.pool.count, int(eager))
            )
            try:
                self._upload(image, progress)
            except BaseException:
                self.close()
                raise

    @property
    def backend(self) -> str:
        return f"{self.device.name} {self.isa}"

    @property
    def ahead(self) -> int:
        """Steps of the token loop that were not polled yet."""
        return self._ahead

    def begin(self) -> int:
        """See Session.begin; only the sequence of slot 0 stays."""
        self.drain()
        for slot in range(1, self.sequences):
            self.release(slot)
        return super().begin()

    def counters(self) -> dict[str, int]:
        """Steps, graph launches, and allocations and synchronising copies in and outside steps."""
        out = np.zeros(len(_COUNTERS), np.int64)
        self._native["counters"](self._handle, out)
        return dict(zip(_COUNTERS, out.tolist(), strict=True))

    def graph(self, bucket: int) -> dict[str, int]:
        """Nodes of the graph of a bucket, by kind."""
        out = np.zeros(3, np.int64)
        self._native["graph"](self._handle, bucket, out)
        return dict(zip(("kernels", "memory", "other"), out.tolist(), strict=True))

    def profile(
        self, bucket: int, tokens: int, position: int, launches: int
    ) -> npt.NDArray[np.float64]:
        """See Session.profile. In a decode bucket each token is of a slot of its own."""
        self.drain()
        decoding = bucket <= DECODE_ROWS
        for slot in range(tokens if decoding else 1):
            self.require_pages(slot, position + (1 if decoding else tokens))
        return super().profile(bucket, tokens, position, launches)

    # --- sequences and their pages ----------------------------------------------------------------

    def reserve(self, slot: int, positions: int) -> bool:
        """Gives a slot pages for so many positions; False when too few are free."""
        table = self._tables[slot]
        first, new = len(table.pages), table.grow(positions)
        if new:
            self._native["pages"](self._handle, slot, first, np.array(new, np.int32))
        return new is not None

    def require_pages(self, slot: int, positions: int) -> None:
        """Like `reserve`; raises TargetError."""
        if not self.reserve(slot, positions):
            raise TargetError(
                f"{self.device}: the KV cache is full, {positions} positions asked for, "
                f"{self.pool.free} of {self.pool.count} pages are free; load with fewer sequences"
            )

    def release(self, slot: int) -> None:
        """Ends the sequence of a slot."""
        if self._tables[slot].pages:
            self._tables[slot].clear()
            self._native["pages"](self._handle, slot, 0, np.empty(0, np.int32))
        if slot == 0:
            self.rewind()

    # --- steps ------------------------------------------------------------------------------------

    def _decode_token(self, token: int) -> None:
        self._decode([token], len(self.tokens), self._logits)

    def _score_chunk(self, ids: Sequence[int], out: Logits) -> None:
        """Tokens of one sequence stand in a decode step like those of several.

        Only within one page: attention may read all pages but that of its own token before the
        step's keys are written.
        """
        done = 0
        while done < len(ids):
            position = len(self.tokens) + done
            end = min(len(ids), done + PAGE - position % PAGE)
            self._decode(ids[done:end], position, out[done:end])
            done = end

    def _decode(self, ids: Sequence[int], position: int, out: Logits) -> None:
        self.drain()
        self.require_pages(0, position + len(ids))
        slots, where = np.zeros(len(ids), np.int32), np.arange(position, position + len(ids))
        with device_call(self.device):
            self._native["decode"](
                self._handle, slots, np.array(ids, np.int32), where.astype(np.int32), out
            )

    def _prefill_chunk(self, ids: Sequence[int], is_last: bool) -> None:
        self.drain()
        self.require_pages(0, len(self.tokens) + len(ids))
        self._prefill(0, ids, len(self.tokens), self._logits[: int(is_last)], sample=False)

    def _prefill(
        self, slot: int, ids: Sequence[int], position: int, out: Logits, sample: bool
    ) -> None:
        chunk = np.array(ids, np.int32)
        with device_call(self.device):
            self._native["prefill"](self._handle, slot, chunk, position, out, int(sample))

    # --- the token loop ---------------------------------------------------------------------------

    def prefill_sampled(
        self, slot: int, ids: Sequence[int], position: int, sampling: Sampling, seed: int
    ) -> int:
        """Prefills tokens from `position` on; returns the token that the device samples behind."""
        self.drain()
        values = np.array(
            [sampling.temperature, sampling.top_p, sampling.min_p, sampling.top_k], np.float64
        )
        with native_call():
            self._native["sampling"](self._handle, slot, values, seed)
            for begin in range(0, len(ids), self._chunk):
                chunk = ids[begin : begin + self._chunk]
                is_last = begin + len(chunk) == len(ids)
                self._prefill(slot, chunk, position + begin, self._logits[:0], sample=is_last)
        self._ahead, self._ahead_rows = 1, 1
        return self.poll()[0][0]

    def start(self, slots: Sequence[int], tokens: Sequence[int], positions: Sequence[int]) -> None:
        """Sequences to decode on the device: each one's next token and its position."""
        self.drain()
        arrays = (np.array(values, np.int32) for values in (slots, tokens, positions))
        with native_call(), device_call(self.device):
            self._native["start"](self._handle, *arrays)
        self._ahead_rows = len(slots)

    def advance(self, steps: int) -> None:
        """Lets the device decode so many more steps. Pages must have been reserved."""
        with native_call(), device_call(self.device):
            self._native["advance"](self._handle, steps)
        self._ahead += steps

    def poll(self, least: int = 1) -> list[list[int]]:
        """Tokens of the steps that have ended, [steps][sequences]; waits for `least`."""
        out = np.empty((max(self._ahead, 1), self._ahead_rows), np.int32)
        with native_call(), device_call(self.device):
            steps = int(self._native["poll"](self._handle, least, out))
        self._ahead -= steps
        return out[:steps].tolist()

    def decode(self, ids: Sequence[int]) -> None:
        """See Session.decode."""
        position = len(self.tokens)
        self.require_pages(0, position + len(ids))
        self.start([0], ids[:1], [position])
        left = len(ids)
        while left or self._ahead:
            if more := min(left, STEPS_AHEAD - self._ahead):
                self.advance(more)
                left -= more
            self.tokens.extend(row[0] for row in self.poll())

    def drain(self) -> None:
        """Waits for what was enqueued, and discards its tokens."""
        if self._ahead:
            self.poll(self._ahead)

    def _upload(self, image: Sequence[npt.NDArray[np.uint8]], progress: Progress | None) -> None:
        done, total = 0, sum(map(len, image))
        for run in image:
            for begin in range(0, len(run), _PIECE):
                piece = run[begin : begin + _PIECE]
                self._native["upload"](self._handle, done, piece)
                done += len(piece)
                if progress is not None:
                    progress(done, total)
        self._native["ready"](self._handle)


def _pages(native: Native, device: Device, sequences: int, per_sequence: int) -> int:
    """Pages of the KV cache: a whole context for each sequence, or what the device has room for."""
    fixed = int(native["memory"](sequences, 1))
    page = (int(native["memory"](sequences, 1025)) - fixed) / 1024
    room = device.free_bytes - _SPARE - fixed
    pages = min(sequences * per_sequence, int(room / page) if page else sequences * per_sequence)
    if pages < per_sequence:
        need = (fixed + _SPARE + page * per_sequence) / 2**30
        raise TargetError(
            f"{device}: too little memory, expected {need:.1f} GiB (weights, arena, and the KV "
            f"cache of one context), found {device.free_bytes / 2**30:.1f} GiB free; compile with "
            "a smaller --context or free the device"
        )
    return pages
