"""A stand-in for a compiled library, and a tiny artifact to go with it."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from halfbyte.runtime.artifact import (
    FORMAT,
    ArenaFacts,
    Artifact,
    ArtifactWriter,
    KernelChoice,
    Manifest,
    ModelFacts,
    Run,
    TargetFacts,
    TensorSpec,
    WeightFacts,
    place,
)

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] "
    "+ '<|im_end|>' + '\n' }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\n' }}{% endif %}"
)
BOS, EOS = 256, 257
VOCAB = 258


class FakeNative:
    """The exports of a library whose next token is `script(all tokens so far)`."""

    def __init__(self, script: Callable[[Sequence[int]], int], vocab: int = VOCAB) -> None:
        self.script, self.vocab = script, vocab
        self.cache: list[int] = []
        self.calls: list[tuple[str, int]] = []  # name, tokens
        self.fail_after: int | None = None  # raise KeyboardInterrupt at this call

    def __getitem__(self, name: str, /) -> Callable[..., Any]:
        return getattr(self, name)

    def create(self, weights: Any, threads: int, isa: str) -> int:
        """A handle."""
        assert weights.dtype == np.uint8 and weights.flags.writeable
        if isa == "amx":
            raise RuntimeError("create: isa amx needs AMX, which this machine lacks")
        return 1

    def isa(self, handle: int) -> str:
        """The variant in use."""
        return "scalar"

    def destroy(self, handle: int) -> None:
        """Counts."""
        self.calls.append(("destroy", 0))

    def decode(self, handle: int, token: int, position: int, logits: Any) -> None:
        """One token."""
        self._step("decode", [token], position)
        self._fill(logits, position + 1)

    def prefill(self, handle: int, ids: Any, position: int, rows: Any, logits: Any) -> None:
        """A chunk."""
        assert ids.dtype == np.int32 and rows.dtype == np.int32
        assert logits.shape == (len(rows), self.vocab)
        self._step("prefill", ids.tolist(), position)
        for row, out in zip(rows.tolist(), logits, strict=True):
            self._fill(out, position + row + 1)

    def profile(self, handle: int, bucket: int, tokens: int, position: int, out: Any) -> None:
        """Made-up times."""
        out[:] = np.arange(len(out))

    def _step(self, name: str, ids: list[int], position: int) -> None:
        if self.fail_after is not None and len(self.calls) >= self.fail_after:
            self.fail_after = None
            raise KeyboardInterrupt
        assert position <= len(self.cache), "a gap in the cache"
        self.cache[position:] = ids
        self.calls.append((name, len(ids)))

    def _fill(self, out: Any, end: int) -> None:
        out[:] = 0
        out[self.script(self.cache[:end])] = 5


def byte_tokenizer() -> bytes:
    """tokenizer.json of 256 byte tokens (token i is not byte i) and two special ones."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer: Any = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<|im_start|>"), AddedToken("<|im_end|>")])
    tokenizer.enable_truncation(4)  # a trap that some real files hold; must be taken out
    return tokenizer.to_str().encode()


def write_artifact(path: Path, created: str = "2026-11-23T00:00:00Z") -> Artifact:
    """A tiny artifact with tokenizer and ChatML, context 64 and buckets 1, 4, 16."""
    specs = [TensorSpec("a", "F32", (3,)), TensorSpec("b", "U8", (2, 576))]
    image = place(specs)
    config = {"chat_template": CHATML, "bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
    with ArtifactWriter(path) as out:
        with out.weights(image) as file:
            file.add("a", np.arange(3, dtype=np.float32))
            file.add("b", np.arange(1152).astype(np.uint8).reshape(2, 576))
        out.add_bytes("tokenizer.json", byte_tokenizer())
        out.add_bytes("tokenizer_config.json", json.dumps(config).encode())
        out.add_bytes("passes/cpu/00_import.ir", b"graph\n")
        library = out.add_bytes("kernels-cpu.so", b"not a library")
        manifest = Manifest(
            format=FORMAT,
            producer="test",
            created=created,
            model=ModelFacts("llama", "tiny", VOCAB, 64, BOS, (EOS,), {"m.safetensors": "0"}),
            targets={
                "cpu": TargetFacts(
                    "kernels-cpu.so",
                    library.sha256,
                    ("scalar",),
                    (),
                    buckets=(1, 4, 16),
                    arena=ArenaFacts(1024, 4096, 8192),
                    kernels=(KernelChoice("layer.0", "linear", 1, "nvfp4_gemv", 64, 64),),
                    weights=tuple(
                        WeightFacts(s.name, (s.name,), "t", at, s.nbytes)
                        for s, at in zip(specs, image.offsets, strict=True)
                    ),
                    image=(Run("weights.safetensors", 0, 0, image.nbytes),),
                )
            },
            parts=out.parts,
        )
        return out.commit(manifest)
