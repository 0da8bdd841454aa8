"""A loaded artifact, as its user meets it."""

import functools
import os
from collections.abc import Sequence
from types import TracebackType
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from ..ir.errors import ModelError, TargetError
from .artifact import WEIGHTS, Artifact, WeightsFile
from .chat import ChatTemplate, Message
from .generate import Generation, Limits
from .sampling import Sampler, Sampling, defaults_from, eos_from
from .scoring import logits_of, perplexity
from .session import Native, Session, load_native
from .threads import default_threads
from .tokenizer import TOKENIZER, Tokenizer, read_config, special_tokens

Prompt: TypeAlias = str | Sequence[int]


def load(
    path: str | os.PathLike[str],
    device: str = "cpu",
    threads: int | None = None,
    isa: str = "auto",
    native: Native | None = None,
) -> "Model":
    """Opens an artifact to run it. `threads` None: one per physical core that this process may use.

    Raises ModelError (damaged artifact) or TargetError (device, instruction set, memory). `native`
    replaces the compiled library (tests).
    """
    artifact = Artifact.open(path)
    if device != "cpu":
        held = ", ".join(sorted(artifact.manifest.targets))
        raise TargetError(f"{path}: no runtime for device {device!r}, the artifact holds {held}; "
                          'load it with device="cpu"')  # fmt: skip
    library = artifact.library("cpu")
    if threads is not None and threads < 1:
        raise ModelError(f"threads: out of range, expected 1 or more, found {threads}")
    weights = WeightsFile(artifact.path(WEIGHTS))
    try:
        session = Session(
            native or load_native(library, artifact.manifest.targets["cpu"].library_sha256),
            weights.image,
            artifact.manifest,
            threads or default_threads(),
            isa,
        )
    except BaseException:
        weights.close()
        raise
    return Model(artifact, weights, session)


class Model:
    """One model with one KV cache: one generation at a time. `with` or `close` frees it."""

    def __init__(self, artifact: Artifact, weights: WeightsFile, session: Session) -> None:
        self.artifact, self.session = artifact, session
        self._weights = weights

    def __enter__(self) -> "Model":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer, read when first needed. Raises ModelError when there is none."""
        return Tokenizer.of(self.artifact)

    @functools.cached_property
    def chat_template(self) -> ChatTemplate:
        """The chat template. Raises ModelError when there is none."""
        return ChatTemplate.of(self.artifact)

    @functools.cached_property
    def sampling(self) -> Sampling:
        """The model's own sampling defaults (generation_config.json)."""
        return defaults_from(self.artifact.manifest.generation)

    @functools.cached_property
    def eos(self) -> frozenset[int]:
        """Every token that ends an answer: of config, generation config, and tokenizer config.

        The last is the one that chat models end their turn with where the others were forgotten.
        """
        manifest = self.artifact.manifest
        known = {*manifest.model.eos, *eos_from(manifest.generation)}
        if TOKENIZER in manifest.parts:
            named = special_tokens(read_config(self.artifact)).get("eos_token")
            token = self.tokenizer.id_of(named)
            known |= set() if token is None else {token}
        return frozenset(known)

    def logits(self, ids: Sequence[int]) -> npt.NDArray[np.float32]:
        """Logits after each token: float32 [len(ids), vocab]."""
        return logits_of(self.session, ids)

    def perplexity(self, ids: Sequence[int]) -> float:
        """Perplexity of tokens (of a text: `model.tokenizer.encode(text)`)."""
        return perplexity(self.session, ids)

    def generate(
        self,
        prompt: Prompt,
        max_tokens: int | None = None,
        *,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
        seed: int | None = None,
        stop: str | Sequence[str] = (),
    ) -> Generation:
        """Continues text or token ids: an iterator of text pieces. None: the model's own default.

        Raises ModelError for a prompt that does not fit or a sampling value out of range.
        """
        sampling = self.sampling.override(
            temperature, top_k, top_p, min_p, repetition_penalty, seed
        )
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
        return self.start(ids, max_tokens, sampling, stop, reuse=False)

    def chat(
        self,
        messages: Sequence[Message],
        max_tokens: int | None = None,
        *,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
        seed: int | None = None,
        stop: str | Sequence[str] = (),
        tools: Sequence[object] | None = None,
    ) -> Generation:
        """Answers a conversation, rendered by the chat template; turns before are not run again."""
        sampling = self.sampling.override(
            temperature, top_k, top_p, min_p, repetition_penalty, seed
        )
        text = self.chat_template.render(messages, tools=tools)
        ids = self.tokenizer.encode(text, special=False)
        return self.start(ids, max_tokens, sampling, stop, reuse=True)

    def start(
        self,
        ids: Sequence[int],
        max_tokens: int | None,
        sampling: Sampling,
        stop: str | Sequence[str],
        reuse: bool,
    ) -> Generation:
        """A generation with everything decided; see Generation for `reuse`."""
        if not ids:
            raise ModelError("prompt: no tokens, expected at least one; give some text")
        limits = Limits(self.eos, [stop] if isinstance(stop, str) else stop, max_tokens)
        has_text = TOKENIZER in self.artifact.manifest.parts
        text = self.tokenizer.stream(ids) if has_text else None
        return Generation(self.session, ids, Sampler(sampling, ids), limits, text, reuse)

    def close(self) -> None:
        """Frees the KV cache and unmaps the weights. The model cannot be used afterwards."""
        self.session.close()
        self._weights.close()
