"""Several sequences on one device: they join and leave a running batch between steps."""

import dataclasses
from collections import deque
from collections.abc import Collection, Sequence

import numpy as np

from .cuda_session import CudaSession
from .sampling import Sampling

_AHEAD = 4  # steps the device may be ahead of the host: it never waits, and wastes few at an end


@dataclasses.dataclass(slots=True)
class Request:
    """One sequence: what it begins with, how it goes on, and what came of it so far."""

    prompt: Sequence[int]
    sampling: Sampling
    eos: Collection[int]
    limit: int  # tokens to sample, at least 1
    seed: int
    slot: int = -1  # -1: waits
    cached: int = 0  # leading tokens of the prompt that the slot holds already
    sampled: int = 0
    last: int = 0
    ended: bool = False
    queue: deque[int] = dataclasses.field(default_factory=deque[int])

    @property
    def position(self) -> int:
        """Of the last token sampled."""
        return len(self.prompt) + self.sampled - 1

    def accept(self, token: int) -> None:
        """Books a token that the device sampled; those behind the end are dropped."""
        if self.ended:
            return
        self.queue.append(token)
        self.last = token
        self.sampled += 1
        self.ended = token in self.eos or self.sampled == self.limit


class Batch:
    """The sequences of one call. The session must be driven by nobody else meanwhile."""

    def __init__(self, session: CudaSession) -> None:
        self.session = session
        self._ticket = session.begin()
        self._waiting: deque[Request] = deque()
        self._running: list[Request] = []
        self._free = list(range(session.sequences))
        self._changed = False

    def add(
        self,
        prompt: Sequence[int],
        sampling: Sampling,
        eos: Collection[int],
        max_tokens: int | None,
    ) -> "DeviceTokens":
        """A sequence that joins as soon as there is room. Raises ModelError: it cannot fit."""
        self.session.require_fit(len(prompt))
        room = self.session.context - len(prompt) + 1
        limit = room if max_tokens is None else min(max_tokens, room)
        seed = sampling.seed
        if seed is None:
            seed = int(np.random.default_rng().integers(1 << 62))
        request = Request(list(prompt), sampling, eos, max(1, limit), seed)
        self._waiting.append(request)
        self._changed = True
        return DeviceTokens(self, request)

    def begin_in_place(self, tokens: "DeviceTokens", reuse: bool) -> None:
        """For the only sequence of a batch: what slot 0 holds of its prompt stays, if `reuse`."""
        request, session = tokens.request, self.session
        kept = min(session.shared_prefix(request.prompt), len(request.prompt) - 1) if reuse else 0
        session.rewind(kept)
        request.cached = tokens.reused = kept

    def next_token(self, request: Request) -> int:
        """The next token of a request, running the whole batch until it is there."""
        self.session.require_current(self._ticket)
        while not request.queue:
            if request.ended:
                raise RuntimeError("this sequence has ended; nothing comes behind its last token")
            self._pump()
        return request.queue.popleft()

    def end(self, request: Request) -> None:
        """Nobody wants more of this request."""
        request.ended = True
        if request in self._waiting:
            self._waiting.remove(request)

    def _pump(self) -> None:
        """A round: sequences join and leave if they must, the device gets work, tokens come."""
        session = self.session
        if any(r.ended for r in self._running) or (self._changed and self._free):
            self._recompose()
        if not self._running:
            return
        left = min(r.limit - r.sampled for r in self._running)
        more = min(_AHEAD, left) - session.ahead
        if more > 0:
            session.advance(more)
        self._deliver(session.poll())

    def _deliver(self, steps: Sequence[Sequence[int]]) -> None:
        for tokens in steps:
            for request, token in zip(self._running, tokens, strict=True):
                request.accept(token)

    def _recompose(self) -> None:
        """Ended sequences leave, waiting ones join as far as slots and pages go."""
        if self.session.ahead:
            self._deliver(self.session.poll(self.session.ahead))
        for request in [r for r in self._running if r.ended]:
            self._leave(request)
        while self._waiting and self._free and self._join(self._waiting[0]):
            self._waiting.popleft()
        self._changed = False
        if self._running:
            rows = self._running
            self.session.start(
                [r.slot for r in rows], [r.last for r in rows], [r.position for r in rows]
            )

    def _join(self, request: Request) -> bool:
        """Prefills a request; False while there are too few pages for all it may become."""
        session, slot = self.session, self._free[0]
        if not request.cached:
            session.release(slot)
        if not session.reserve(slot, len(request.prompt) + request.limit - 1):
            if not self._running:
                session.require_pages(slot, len(request.prompt) + request.limit - 1)
            return False
        fresh = request.prompt[request.cached :]
        token = session.prefill_sampled(slot, fresh, request.cached, request.sampling, request.seed)
        if slot == 0:
            session.tokens[:] = request.prompt
        request.slot = self._free.pop(0)
        request.accept(token)
        if request.ended:
            self._free.insert(0, slot)
        else:
            self._running.append(request)
        return True

    def _leave(self, request: Request) -> None:
        self._running.remove(request)
        self._free.append(request.slot)
        self._free.sort()
        if request.slot:
            self.session.release(request.slot)


class DeviceTokens:
    """The tokens of one request, for a Generation (see generate.TokenSource)."""

    def __init__(self, batch: Batch, request: Request) -> None:
        self._batch, self.request = batch, request
        self.reused = 0

    def first(self) -> int:
        """Prefills, and returns the first token."""
        return self._batch.next_token(self.request)

    def following(self, token: int) -> int:
        """The token behind `token`, which was the last one returned."""
        following = self._batch.next_token(self.request)
        if self.request.slot == 0:
            self._batch.session.tokens.append(token)
        return following

    def close(self) -> None:
        """The request leaves the batch."""
        self._batch.end(self.request)
