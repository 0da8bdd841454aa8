"""Generation: prefill, then token by token: a stream of text pieces, statistics at its end."""

import dataclasses
import time
from collections.abc import Collection, Generator, Iterator, Sequence
from typing import Literal, Protocol

from ..ir.errors import ModelError
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

    def __post_init__(self) -> None:
        """Raises ModelError for a negative number of tokens."""
        if self.max_tokens is not None and self.max_tokens < 0:
            raise ModelError(
                f"max_tokens: out of range, expected 0 or more, found {self.max_tokens}"
            )


class TokenSource(Protocol):
    """Where the tokens of one answer come from: a session and a sampler, or a device's own loop.

    `reused`: tokens of the prompt that `first` found in the KV cache. Both methods raise
    RuntimeError once another call has taken the session over.
    """

    @property
    def reused(self) -> int: ...

    def first(self) -> int:
        """Prefills the prompt; returns the token behind it."""
        ...

    def following(self, token: int) -> int:
        """Appends `token`, the last one returned; returns the one behind it."""
        ...

    def close(self) -> None:
        """No more tokens are wanted."""
        ...


class HostTokens:
    """Tokens chosen on the host, from the logits that each step of a session returns."""

    def __init__(
        self, session: Session, prompt: Sequence[int], sampler: Sampler, reuse: bool = False
    ) -> None:
        """`reuse` keeps the part of the KV cache that the prompt begins with: faster, but logits
        may differ in their last bits from those of a fresh prefill.

        Raises ModelError for a prompt that does not fit.
        """
        session.require_fit(len(prompt))
        self._session, self._prompt, self._sampler = session, list(prompt), sampler
        self._ticket = session.begin()
        session.rewind(min(session.shared_prefix(prompt), len(prompt) - 1) if reuse else 0)
        self.reused = 0

    def first(self) -> int:
        """See TokenSource."""
        self._session.require_current(self._ticket)
        self.reused = len(self._session.tokens)
        return self._sampler.choose(self._session.feed(self._prompt[self.reused :]))

    def following(self, token: int) -> int:
        """See TokenSource."""
        self._session.require_current(self._ticket)
        return self._sampler.choose(self._session.step(token))

    def close(self) -> None:
        """See TokenSource."""


class Generation(Iterator[str]):
    """The pieces of text of one answer; afterwards `statistics`, and at any time `tokens`.

    It runs as it is iterated. Another call on the same model ends it with a RuntimeError at its
    next step, since both share one KV cache.
    """

    def __init__(
        self,
        source: TokenSource,
        prompt_tokens: int,
        context: int,
        limits: Limits,
        text: Detokenizer | None = None,
    ) -> None:
        """`text` None: pieces are token numbers with a space each."""
        self.tokens: list[int] = []
        self._source, self._prompt_tokens, self._context = source, prompt_tokens, context
        self._steps = 0
        self._prefill_seconds, self._decode_seconds = 0.0, 0.0
        self._finish: Finish = "interrupted"
        self._limits, self._text = limits, text
        self._pieces = self._run()

    def __next__(self) -> str:
        return next(self._pieces)

    def close(self) -> None:
        """Ends the generation early."""
        self._pieces.close()
        self._source.close()

    def _run(self) -> Generator[str]:
        source, clock, finish = self._source, time.perf_counter, None
        stop = StopFilter(self._limits.stops)
        start = clock()
        token = source.first()
        self._prefill_seconds = clock() - start
        start, spent = clock(), 0.0
        while finish is None:
            piece, finish = self._accept(token, stop)
            if piece:
                spent += clock() - start
                yield piece
                start = clock()
            if finish is None:
                token = source.following(token)
                self._steps += 1
                self._decode_seconds = spent + clock() - start
        source.close()
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
        is_full = self._prompt_tokens + self._steps == self._context
        return piece, "context" if is_full else None

    @property
    def statistics(self) -> Statistics:
        """What has been done so far; they stand also when the generation was broken off."""
        return Statistics(
            prompt_tokens=self._prompt_tokens,
            reused_tokens=self._source.reused,
            new_tokens=len(self.tokens),
            decode_steps=self._steps,
            prefill_seconds=self._prefill_seconds,
            decode_seconds=self._decode_seconds,
            finish=self._finish,
        )


def _rate(count: int, seconds: float) -> float:
    return count / seconds if seconds > 0 else 0.0
