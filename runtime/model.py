"""A loaded artifact, as its user meets it."""

import functools
import os
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, TypeAlias, TypedDict, Unpack, cast, overload

import numpy as np
import numpy.typing as npt

from ..ir.errors import ModelError, TargetError
from .artifact import Artifact, TargetFacts
from .batch import Batch
from .chat import ChatTemplate, Message
from .cuda_session import CudaSession, Progress
from .devices import Device, choose_target, cuda_index, is_cuda, read_device
from .generate import Generation, HostTokens, Limits, TokenSource
from .sampling import Sampler, Sampling, defaults_from, eos_from
from .scoring import logits_of, perplexity
from .session import CpuSession, Native, Session, load_native
from .target_weights import TargetWeights
from .threads import MAX_THREADS, default_threads
from .tokenizer import TOKENIZER, Tokenizer, read_config, special_tokens

Prompt: TypeAlias = str | Sequence[int]


class Options(TypedDict, total=False):
    """How to choose tokens and when to stop; what is left out is the model's own default."""

    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float | None
    seed: int | None
    stop: str | Sequence[str]


def load(
    path: str | os.PathLike[str],
    device: str = "cpu",
    threads: int | None = None,
    isa: str = "auto",
    native: Native | None = None,
    sequences: int | None = None,
    eager: bool = False,
    progress: Progress | None = None,
) -> "Model":
    """Opens an artifact to run it on "cpu" or "cuda:N".

    On the cpu, `threads` None: one per physical core that this process may use. On a device,
    `sequences`: how many at once, each with its KV cache; `eager`: no CUDA graphs; `progress`: told
    the bytes uploaded and in all.
    Raises ModelError (damaged artifact) or TargetError (device, instruction set, memory). `native`
    replaces the compiled library (tests).
    """
    artifact = Artifact.open(path)
    index = cuda_index(device)
    if threads is not None and not 1 <= threads <= MAX_THREADS:
        raise ModelError(f"threads: out of range, expected 1 to {MAX_THREADS}, found {threads}")
    if artifact.manifest.net is not None:
        return _load_net(artifact, index, threads, isa, native)
    session: Session
    if index is None:
        target, made_for = "cpu", artifact.library("cpu")
        native = native or load_native(made_for, artifact.target(target).library_sha256)
        weights = TargetWeights(artifact, target)
        try:
            threads = threads or default_threads()
            session = CpuSession(native, weights.whole, artifact.manifest, threads, isa)
        except BaseException:
            weights.close()
            raise
    else:
        target, native = _cuda_library(artifact, index, native)
        found = read_device(native, index, artifact.target(target).driver_min)
        weights = TargetWeights(artifact, target)
        try:
            session = CudaSession(
                native, weights.pieces, artifact.manifest, target, found, sequences, eager, progress
            )
        except BaseException:
            weights.close()
            raise
    return Model(artifact, target, weights, session)


def _load_net(
    artifact: Artifact, index: int | None, threads: int | None, isa: str, native: Native | None
) -> "Model":
    """An ONNX graph, on the cpu or on a device, where the host's part of it has one thread."""
    from .net import Net  # it is a Model

    found: Device | None = None
    if index is None:
        target, made_for = "cpu", artifact.library("cpu")
        native = native or load_native(made_for, artifact.target(target).library_sha256)
        threads = threads or default_threads()
    else:
        target, native = _cuda_library(artifact, index, native)
        found = read_device(native, index, artifact.target(target).driver_min)
        threads, isa = 1, "auto"
    weights = TargetWeights(artifact, target)
    try:
        return Net(artifact, target, weights, native, threads, isa, found)
    except BaseException:
        weights.close()
        raise


def _cuda_library(artifact: Artifact, index: int, native: Native | None) -> tuple[str, Native]:
    """The target that the device runs, and its library; nothing is uploaded yet.

    Raises TargetError: the artifact holds no code for it.
    """
    where, held = str(artifact.folder), sorted(artifact.manifest.targets)
    for_devices = [name for name in held if is_cuda(name)]
    if not for_devices:
        raise TargetError(
            f"{where}: no code for device 'cuda:{index}', the artifact holds {', '.join(held)}; "
            'compile with --target sm_90a, or load it with device="cpu"'
        )
    first = for_devices[0]  # any of them can be asked what the device is
    facts = artifact.target(first)
    asked = native or load_native(artifact.library(first), facts.library_sha256)
    device = read_device(asked, index, facts.driver_min)
    target = choose_target(where, held, device)
    if native is not None or target == first:
        return target, asked
    facts = artifact.target(target)
    return target, load_native(artifact.library(target), facts.library_sha256)


class Model:
    """One model with one KV cache: one generation at a time. `with` or `close` frees it.

    `target`: what of the artifact runs.
    """

    def __init__(
        self, artifact: Artifact, target: str, weights: TargetWeights, session: Session
    ) -> None:
        self.artifact, self.target = artifact, target
        self._weights, self._session = weights, session

    @property
    def session(self) -> Session:
        """What runs it."""
        return self._session

    @property
    def facts(self) -> TargetFacts:
        """What was compiled for the target."""
        return self.artifact.target(self.target)

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

    def run(self, inputs: Mapping[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
        """For ONNX graphs (net.py). Raises ModelError: a language model has tokens."""
        raise ModelError(
            f"{self.artifact.folder}: a language model, no ONNX graph; call generate or logits"
        )

    def logits(self, ids: Sequence[int]) -> npt.NDArray[np.float32]:
        """Logits after each token: float32 [len(ids), vocab]."""
        return logits_of(self.session, ids)

    def perplexity(self, ids: Sequence[int]) -> float:
        """Perplexity of tokens (of a text: `model.tokenizer.encode(text)`)."""
        return perplexity(self.session, ids)

    @overload
    def generate(
        self, prompt: Prompt, max_tokens: int | None = None, **options: Unpack[Options]
    ) -> Generation: ...
    @overload
    def generate(
        self, prompt: list[str] | list[list[int]], max_tokens: int | None = None,
        **options: Unpack[Options],
    ) -> list[Generation]: ...  # fmt: skip
    def generate(
        self,
        prompt: Prompt | list[str] | list[list[int]],
        max_tokens: int | None = None,
        **options: Unpack[Options],
    ) -> Generation | list[Generation]:
        """Continues text or token ids: an iterator of text pieces, to the context's end by default.

        A list of prompts gives a list of generations, which a CUDA device runs together, however
        they are iterated.
        Raises ModelError for a prompt that does not fit or a sampling value out of range.
        """
        sampling, stop = self._options(options)
        if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int):
            return self._start_all([self._ids(p) for p in prompt], max_tokens, sampling, stop)
        return self.start(self._ids(prompt), max_tokens, sampling, stop, reuse=False)

    def _ids(self, prompt: Any) -> list[int]:
        if isinstance(prompt, str):
            return self.tokenizer.encode(prompt)
        self.session.require_known(prompt)
        return list(prompt)

    def _options(self, options: Options) -> tuple[Sampling, str | Sequence[str]]:
        """The sampling and the stop strings that a call asked for."""
        chosen = {name: value for name, value in options.items() if name != "stop"}
        return self.sampling.override(**cast(Any, chosen)), options.get("stop", ())

    def chat(
        self,
        messages: Sequence[Message],
        max_tokens: int | None = None,
        *,
        tools: Sequence[object] | None = None,
        **options: Unpack[Options],
    ) -> Generation:
        """Answers a conversation, rendered by the chat template; turns before are not run again."""
        sampling, stop = self._options(options)
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
        source: TokenSource
        if isinstance(self.session, CudaSession) and sampling.repetition_penalty == 1:
            batch = Batch(self.session)
            source = batch.add(ids, sampling, self.eos, max_tokens)
            batch.begin_in_place(source, reuse)
        else:
            source = HostTokens(self.session, ids, Sampler(sampling, ids), reuse)
        return self._generation(source, ids, max_tokens, stop)

    def _start_all(
        self,
        prompts: Sequence[Sequence[int]],
        max_tokens: int | None,
        sampling: Sampling,
        stop: str | Sequence[str],
    ) -> list[Generation]:
        """Generations that one device decodes together."""
        if not isinstance(self.session, CudaSession):
            raise ModelError("prompts: this device runs one sequence at a time; call generate for "
                             "each, or load the model on a CUDA device")  # fmt: skip
        if sampling.repetition_penalty != 1:
            raise ModelError("repetition_penalty: not for several prompts at once; leave it at 1")
        if not all(prompts):
            raise ModelError("prompt: no tokens, expected at least one; give some text")
        batch = Batch(self.session)
        sources = [batch.add(ids, sampling, self.eos, max_tokens) for ids in prompts]
        return [
            self._generation(source, ids, max_tokens, stop)
            for source, ids in zip(sources, prompts, strict=True)
        ]

    def _generation(
        self,
        source: TokenSource,
        ids: Sequence[int],
        max_tokens: int | None,
        stop: str | Sequence[str],
    ) -> Generation:
        limits = Limits(self.eos, [stop] if isinstance(stop, str) else stop, max_tokens)
        has_text = TOKENIZER in self.artifact.manifest.parts
        text = self.tokenizer.stream(ids) if has_text else None
        return Generation(source, len(ids), self.session.context, limits, text)

    def close(self) -> None:
        """Frees the KV cache and unmaps the weights. The model cannot be used afterwards."""
        self.session.close()
        self._weights.close()
