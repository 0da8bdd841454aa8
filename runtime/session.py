"""One running model: the compiled library, its weights, and what stands in its KV cache."""

import importlib
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
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


class Session:
    """Runs steps and keeps the books of the KV cache. Not for use by several threads at once.

    `tokens` are those in the cache, in order; their number is the position of the next one. It
    changes only after a step has succeeded, so an interrupted step leaves a usable session. Logits
    are returned in a buffer of the session: valid until the next step.
    """

    def __init__(
        self,
        native: Native,
        image: npt.NDArray[np.uint8],
        manifest: Manifest,
        threads: int,
        isa: str = "auto",
    ) -> None:
        """Raises TargetError (isa, memory, threads) or ModelError (weights of another library)."""
        self.vocab, self.context = manifest.model.vocab, manifest.model.context
        self.threads = threads
        self.tokens: list[int] = []
        self._chunk = manifest.buckets[-1]
        self._image = image  # the library reads it as long as the handle lives
        self._native = native
        self._handle: int | None = None
        try:
            self._prefill, self._decode = native["prefill"], native["decode"]
            self._handle = _create(native, image, threads, isa)
        except _REFUSALS as error:
            raise _mismatch(error) from error
        self.isa = str(native["isa"](self._handle))
        self._logits = np.empty((1, self.vocab), np.float32)
        self._row = self._logits[0]
        self._runs = 0
        self.native_seconds = 0.0  # inside `decode`, all steps of this session

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
        try:
            self._decode(self._handle, token, len(self.tokens), self._row)
        except _REFUSALS as error:
            raise _mismatch(error) from error
        self.native_seconds += time.perf_counter() - start
        self.tokens.append(token)
        return self._row

    def feed(self, ids: Sequence[int]) -> Logits:
        """Appends tokens in chunks of the largest bucket; returns logits [vocab] after the last."""
        self._require_valid(ids)
        for begin in range(0, len(ids), self._chunk):
            chunk = ids[begin : begin + self._chunk]
            if len(chunk) == 1:
                self.step(chunk[0])
            else:
                is_last = begin + len(chunk) == len(ids)
                self._run(chunk, [len(chunk) - 1] if is_last else [], self._logits[: int(is_last)])
        return self._row

    def feed_all(self, ids: Sequence[int], out: Logits) -> None:
        """Appends tokens; writes the logits of every one to `out` [len(ids), vocab]."""
        self._require_valid(ids)
        for begin in range(0, len(ids), self._chunk):
            chunk = ids[begin : begin + self._chunk]
            self._run(chunk, range(len(chunk)), out[begin : begin + len(chunk)])

    def profile(
        self, bucket: int, tokens: int, position: int, launches: int
    ) -> npt.NDArray[np.float64]:
        """Microseconds of each launch of one step, then of the whole [launches + 1].

        The step runs on token 0 and overwrites the cache from `position` on.
        """
        times = np.zeros(launches + 1, np.float64)
        self.rewind(min(position, len(self.tokens)))
        try:
            self._native["profile"](self._handle, bucket, tokens, position, times)
        except _REFUSALS as error:
            raise _mismatch(error) from error
        return times

    def close(self) -> None:
        """Frees the native session; the weights may be unmapped afterwards. Twice does no harm."""
        if self._handle is not None:
            handle, self._handle = self._handle, None
            self._native["destroy"](handle)

    def _run(self, ids: Sequence[int], rows: Sequence[int], out: Logits) -> None:
        where = np.array(rows, np.int32)
        try:
            self._prefill(self._handle, np.array(ids, np.int32), len(self.tokens), where, out)
        except _REFUSALS as error:
            raise _mismatch(error) from error
        self.tokens.extend(ids)

    def _require_valid(self, ids: Sequence[int]) -> None:
        if self._handle is None:
            raise ModelError("model: it is closed; load it again")
        if not ids:
            raise ModelError("prompt: no tokens, expected at least one; give some text")
        wrong = next((token for token in ids if not 0 <= token < self.vocab), None)
        if wrong is not None:
            raise ModelError(
                f"prompt: token {wrong} is not in the vocabulary, expected ids in "
                f"[0, {self.vocab - 1}]; use the model's own tokenizer"
            )
        self.require_fit(len(self.tokens) + len(ids))


def _create(native: Native, image: npt.NDArray[np.uint8], threads: int, isa: str) -> int:
    try:
        return int(native["create"](image, threads, isa))
    except (RuntimeError, MemoryError) as error:  # no such ISA here, no memory, no threads
        raise TargetError(f"cpu: {error}; run `halfbyte doctor`") from error


# The library checks its arguments. They come of the manifest, so a refusal is a mismatch.
_REFUSALS = (ValueError, IndexError, TypeError, AttributeError)


def _mismatch(error: Exception) -> ModelError:
    return ModelError(
        f"artifact: manifest and library do not belong together: {error}; compile the model again"
    )
