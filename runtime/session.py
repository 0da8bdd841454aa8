"""One running model: the compiled library, its weights, and what stands in its KV cache."""

import abc
import contextlib
import importlib
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import numpy.typing as npt

from ..ir.errors import ModelError, TargetError
from .manifest import Manifest

Logits = npt.NDArray[np.float32]


class Native(Protocol):
    """The exports of a compiled library (tvm_ffi.Module, or a stand-in in tests)."""

    def __getitem__(self, name: str, /) -> Callable[..., Any]: ...


def _import_tvm_ffi() -> Any:
    """tvm_ffi, imported when it is needed: reading an artifact's facts needs it not.

    Where torch is installed, tvm_ffi would import it (seconds) to exchange tensors we never have:
    unless the user has it already, it is hidden for the time of the import.
    """
    hidden = "torch" not in sys.modules
    if hidden:
        sys.modules["torch"] = cast(Any, None)
    try:
        return importlib.import_module("tvm_ffi")
    finally:
        if hidden:
            del sys.modules["torch"]


def load_native(library: Path, digest: str) -> Native:
    """Loads the library whose SHA-256 is `digest`. Raises TargetError when the system cannot.

    It is opened by a name of its own content: the dynamic linker takes a path it has seen before
    for the library it loaded then, also when the artifact there was compiled anew since.
    """
    try:
        tvm_ffi = _import_tvm_ffi()
        with tempfile.TemporaryDirectory(prefix="halfbyte-") as folder:
            alias = Path(folder) / f"{digest}.so"
            alias.symlink_to(library.resolve())
            return tvm_ffi.load_module(str(alias))
    except (OSError, RuntimeError) as error:
        raise TargetError(
            f"{library}: this system cannot load it ({error}); run `halfbyte doctor`"
        ) from error


class Session(abc.ABC):
    """Runs steps and keeps the books of the KV cache. Not for use by several threads at once.

    `tokens` are those in the cache, in order; their number is the position of the next one. It
    changes only after a step has succeeded, so an interrupted step leaves a usable session. Logits
    are returned in a buffer of the session: valid until the next step.
    """

    def __init__(self, native: Native, manifest: Manifest, chunk: int, scored: int) -> None:
        """`chunk`: tokens of a prefill step; `scored`: of one that returns logits of all."""
        self.vocab, self.context = manifest.model.vocab, manifest.model.context
        self.threads, self.isa = 1, ""
        self.tokens: list[int] = []
        self._chunk, self._scored = chunk, scored
        self._native = native
        self._handle: int | None = None
        self._logits = np.empty((1, self.vocab), np.float32)
        self._row = self._logits[0]
        self._runs = 0
        self.native_seconds = 0.0  # inside `step`, all steps of this session

    @property
    @abc.abstractmethod
    def backend(self) -> str:
        """What it runs on, in words."""

    @abc.abstractmethod
    def _decode_token(self, token: int) -> None:
        """A step of one token behind those cached; its logits to the session's row."""

    @abc.abstractmethod
    def _prefill_chunk(self, ids: Sequence[int], is_last: bool) -> None:
        """A step of several tokens; the last one's logits to the session's row if `is_last`."""

    @abc.abstractmethod
    def _score_chunk(self, ids: Sequence[int], out: Logits) -> None:
        """A step of several tokens; the logits of each to `out`."""

    def require_fit(self, count: int) -> None:
        """Raises ModelError unless `count` tokens in all fit the context."""
        if count > self.context:
            raise ModelError(
                f"prompt: too long, expected at most {self.context} tokens (the context it was "
                f"compiled for), found {count}; shorten it or compile with --context {count}"
            )

    def begin(self) -> int:
        """A ticket for a run of steps; whoever holds an older one must not step any more."""
        self._runs += 1
        return self._runs

    def is_current(self, ticket: int) -> bool:
        """True until another run has begun."""
        return ticket == self._runs and self._handle is not None

    def require_current(self, ticket: int) -> None:
        """Raises RuntimeError once another run has begun."""
        if not self.is_current(ticket):
            raise RuntimeError(
                "this generation was ended by a later call on the same model; finish one before "
                "starting the next, or load the model twice"
            )

    def rewind(self, length: int = 0) -> None:
        """Keeps the first `length` tokens of the cache (causal: what follows is overwritten)."""
        del self.tokens[length:]

    def shared_prefix(self, ids: Sequence[int]) -> int:
        """How many leading tokens of `ids` stand in the cache already."""
        same = min(len(self.tokens), len(ids))
        return next((i for i in range(same) if self.tokens[i] != ids[i]), same)

    def step(self, token: int) -> Logits:
        """Appends one token; returns logits [vocab] of the one to come."""
        start = time.perf_counter()
        with native_call():
            self._decode_token(token)
        self.native_seconds += time.perf_counter() - start
        self.tokens.append(token)
        return self._row

    def decode(self, ids: Sequence[int]) -> None:
        """Appends as many tokens one by one, for measurement: these, or on a device that decodes on
        its own, the first of them and what it chooses to follow.
        """
        for token in ids:
            self.step(token)

    def feed(self, ids: Sequence[int]) -> Logits:
        """Appends tokens in chunks of the largest bucket; returns logits [vocab] after the last."""
        self.require_valid(ids)
        for begin in range(0, len(ids), self._chunk):
            chunk = ids[begin : begin + self._chunk]
            if len(chunk) == 1:
                self.step(chunk[0])
                continue
            with native_call():
                self._prefill_chunk(chunk, is_last=begin + len(chunk) == len(ids))
            self.tokens.extend(chunk)
        return self._row

    def feed_all(self, ids: Sequence[int], out: Logits) -> None:
        """Appends tokens; writes the logits of every one to `out` [len(ids), vocab]."""
        self.require_valid(ids)
        for begin in range(0, len(ids), self._scored):
            chunk = ids[begin : begin + self._scored]
            with native_call():
                self._score_chunk(chunk, out[begin : begin + len(chunk)])
            self.tokens.extend(chunk)

    def profile(
        self, bucket: int, tokens: int, position: int, launches: int
    ) -> npt.NDArray[np.float64]:
        """Microseconds of each launch of one step, then of the whole [launches + 1].

        The step runs on token 0 and overwrites the cache from `position` on.
        """
        times = np.zeros(launches + 1, np.float64)
        self.rewind(min(position, len(self.tokens)))
        with native_call():
            self._native["profile"](self._handle, bucket, tokens, position, times)
        return times

    def close(self) -> None:
        """Frees the native session; the weights may be unmapped afterwards. Twice does no harm."""
        if self._handle is not None:
            handle, self._handle = self._handle, None
            self._native["destroy"](handle)

    def require_valid(self, ids: Sequence[int]) -> None:
        """Raises ModelError unless `ids` can be appended."""
        if self._handle is None:
            raise ModelError("model: it is closed; load it again")
        if not ids:
            raise ModelError("prompt: no tokens, expected at least one; give some text")
        self.require_known(ids)
        self.require_fit(len(self.tokens) + len(ids))

    def require_known(self, ids: Sequence[int]) -> None:
        """Raises ModelError unless all `ids` are tokens of the model."""
        wrong = next((token for token in ids if not 0 <= token < self.vocab), None)
        if wrong is not None:
            raise ModelError(
                f"prompt: token {wrong} is not in the vocabulary, expected ids in "
                f"[0, {self.vocab - 1}]; use the model's own tokenizer"
            )


class CpuSession(Session):
    """A session on the cores of this machine; the library reads the weights where they are."""

    def __init__(
        self,
        native: Native,
        image: npt.NDArray[np.uint8],
        manifest: Manifest,
        threads: int,
        isa: str = "auto",
    ) -> None:
        """Raises TargetError (isa, memory, threads) or ModelError (weights of another library)."""
        chunk = manifest.targets["cpu"].buckets[-1]
        super().__init__(native, manifest, chunk=chunk, scored=chunk)
        self.threads = threads
        self._image = image  # the library reads it as long as the handle lives
        with native_call():
            self._prefill, self._decode = native["prefill"], native["decode"]
            self._handle = _create(native, image, threads, isa)
        self.isa = str(native["isa"](self._handle))

    @property
    def backend(self) -> str:
        return f"cpu {self.isa}"

    def _decode_token(self, token: int) -> None:
        self._decode(self._handle, token, len(self.tokens), self._row)

    def _prefill_chunk(self, ids: Sequence[int], is_last: bool) -> None:
        rows = [len(ids) - 1] if is_last else []
        self._run(ids, rows, self._logits[: int(is_last)])

    def _score_chunk(self, ids: Sequence[int], out: Logits) -> None:
        self._run(ids, range(len(ids)), out)

    def _run(self, ids: Sequence[int], rows: Sequence[int], out: Logits) -> None:
        where = np.array(rows, np.int32)
        self._prefill(self._handle, np.array(ids, np.int32), len(self.tokens), where, out)


def _create(native: Native, image: npt.NDArray[np.uint8], threads: int, isa: str) -> int:
    try:
        return int(native["create"](image, threads, isa))
    except (RuntimeError, MemoryError) as error:  # no such ISA here, no memory, no threads
        raise TargetError(f"cpu: {error}; run `halfbyte doctor`") from error


# The library checks its arguments. They come of the manifest, so a refusal is a mismatch.
_REFUSALS = (ValueError, IndexError, TypeError, AttributeError)


@contextlib.contextmanager
def native_call() -> Generator[None]:
    """Turns a library's refusal of its arguments into a ModelError."""
    try:
        yield
    except _REFUSALS as error:
        raise ModelError(
            f"artifact: manifest and library do not belong together: {error}; compile the model "
            "again"
        ) from error
