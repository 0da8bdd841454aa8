"""Generation: prefill, then token by token: a stream of text pieces, statistics at its end."""

import dataclasses
import time
from collections.abc import Collection, Generator, Iterator, Sequence
from typing import Literal

from .sampling import Sampler
from .session import Session
from .stream import Detokenizer, StopFilter

Finish = Literal["stop", "length", "context", "interrupted"]


@dataclasses.dataclass(frozen=True, slots=True)
class Statistics:
    """What one generation did. `finish`: an end or stop string, max_tokens, the context's end, or
    the caller (Ctrl-C, or an iteration that was not finished). Times exclude the caller's own.
    """

    prompt_tokens: int
    reused_tokens: int  # of the prompt, found in the KV cache
    new_tokens: int
    decode_steps: int  # the first token comes from the prefill
    prefill_seconds: float
    decode_seconds: float
    finish: Finish

    @property
    def prefill_rate(self) -> float:
        """Prompt tokens per second."""
        return _rate(self.prompt_tokens - self.reused_tokens, self.prefill_seconds)

    @property
    def decode_rate(self) -> float:
        """Decoded tokens per second."""
        return _rate(self.decode_steps, self.decode_seconds)


@dataclasses.dataclass(frozen=True, slots=True)
class Limits:
    """When to stop: end tokens (not shown), stop strings (not shown), number of tokens."""

    eos: Collection[int] = ()
    stops: Sequence[str] = ()
    max_tokens: int | None = None  # None: to the end of the context


class Generation(Iterator[str]):
    """The pieces of text of one answer; afterwards `statistics`, and at any time `tokens`.

    It runs as it is iterated. Another call on the same model ends it with a RuntimeError at its
    next step, since both share one KV cache.
    """

    def __init__(
        self,
        session: Session,
        prompt: Sequence[int],
        sampler: Sampler,
        limits: Limits,
        text: Detokenizer | None = None,
        reuse: bool = False,
    ) -> None:
        """`prompt` is the whole context. `text` None: pieces are token numbers with a space each.

        `reuse` keeps the part of the KV cache that the prompt begins with: faster, but logits may
        differ in their last bits from those of a fresh prefill.
        Raises ModelError for a prompt that does not fit.
        """
        session.require_fit(len(prompt))
        self.tokens: list[int] = []
        self._prompt_tokens, self._reused, self._steps = len(prompt), 0, 0
        self._prefill_seconds, self._decode_seconds = 0.0, 0.0
        self._finish: Finish = "interrupted"
        self._session, self._sampler, self._limits, self._text = session, sampler, limits, text
        self._ticket = session.begin()
        session.rewind(min(session.shared_prefix(prompt), len(prompt) - 1) if reuse else 0)
        self._pieces = self._run(list(prompt))

    def __next__(self) -> str:
        return next(self._pieces)

    def close(self) -> None:
        """Ends the generation early."""
        self._pieces.close()

    def _run(self, prompt: list[int]) -> Generator[str]:
        session, limits, clock = self._session, self._limits, time.perf_counter
        stop, finish = StopFilter(limits.stops), None
        self._require_current()
        self._reused, start = len(session.tokens), clock()
        logits = session.feed(prompt[self._reused :])
        self._prefill_seconds = clock() - start
        start, spent = clock(), 0.0
        while finish is None:
            token = self._sampler.choose(logits)
            piece, finish = self._accept(token, stop)
            if piece:
                spent += clock() - start
                yield piece
                start = clock()
            if finish is None:
                self._require_current()
                logits = session.step(token)
                self._steps += 1
                self._decode_seconds = spent + clock() - start
        rest = "" if stop.stopped else stop.push(self._text.finish() if self._text else "")
        self._finish = finish
        if rest := rest + stop.finish():
            yield rest

    def _accept(self, token: int, stop: StopFilter) -> tuple[str, Finish | None]:
        """Books a chosen token: the text it gives, and the reason to end, if there is one."""
        if self._limits.max_tokens is not None and self._limits.max_tokens <= 0:
            return "", "length"
        if token in self._limits.eos:
            return "", "stop"
        self.tokens.append(token)
        piece = stop.push(self._text.push(token) if self._text else f"{token} ")
        if stop.stopped:
            return piece, "stop"
        if len(self.tokens) == self._limits.max_tokens:
            return piece, "length"
        return piece, "context" if len(self._session.tokens) == self._session.context else None

    @property
    def statistics(self) -> Statistics:
        """What has been done so far; they stand also when the generation was broken off."""
        return Statistics(
            prompt_tokens=self._prompt_tokens,
            reused_tokens=self._reused,
            new_tokens=len(self.tokens),
            decode_steps=self._steps,
            prefill_seconds=self._prefill_seconds,
            decode_seconds=self._decode_seconds,
            finish=self._finish,
        )

    def _require_current(self) -> None:
        if not self._session.is_current(self._ticket):
            raise RuntimeError(
                "this generation was ended by a later call on the same model; finish one before "
                "starting the next, or load the model twice"
            )


def _rate(count: int, seconds: float) -> float:
    return count / seconds if seconds > 0 else 0.0
