"""Whatever a file holds, reading it ends in ModelError or in a model, soon, and in bounded memory.

Two sources of damage: hypothesis, and a seeded corpus of mutations of small valid files (a failure
prints its seed). Memory is what Python and numpy allocate, by tracemalloc.
"""

from __future__ import annotations

import json
import struct
import time
import tracemalloc
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from halfbyte.frontend import import_model, open_checkpoint
from halfbyte.frontend.bounded_json import parse_object
from halfbyte.frontend.quant_config import read_quant_config
from halfbyte.ir.errors import ModelError
from tests.checkpoint_files import (
    Field,
    dense_weights,
    framed,
    gguf_bytes,
    llama_config,
    modelopt_config,
    modelopt_weights,
    safetensors_bytes,
)

SLACK = 64 << 20
SECONDS = 5.0
MUTATIONS = 150
FUZZ = settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
CONFIG = json.dumps(modelopt_config()).encode()
WEIGHTS = safetensors_bytes(modelopt_weights())


def gguf_file(tokens: Sequence[str] = ("a", "b", "c", "ab")) -> bytes:
    """A tiny whole GGUF: metadata, tokenizer, one f32 tensor of each name."""
    fields: dict[str, Field] = {
        "general.architecture": "llama", "llama.block_count": 1, "llama.embedding_length": 32,
        "llama.feed_forward_length": 64, "llama.attention.head_count": 2,
        "llama.attention.head_count_kv": 1, "llama.context_length": 64,
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": [1] * len(tokens),
        "tokenizer.ggml.merges": ["a b"],
    }  # fmt: skip
    names = {"self_attn.": "attn_", "mlp.": "ffn_", "_proj": "", "attn_o.": "attn_output.",
             "model.layers.": "blk.", "post_attention_layernorm": "ffn_norm",
             "input_layernorm": "attn_norm", "model.embed_tokens": "token_embd",
             "model.norm": "output_norm", "lm_head": "output"}  # fmt: skip
    tensors: dict[str, tuple[str, tuple[int, ...], bytes]] = {}
    for name, value in dense_weights().items():
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        tensors[name] = ("f32", value.shape, value.astype(np.float32).tobytes())
    return gguf_bytes(fields, tensors)


@contextmanager
def bounded(size: int) -> Generator[None]:
    """The block allocates at most `size` + 64 MiB at a time and ends soon.

    Soon is processor time, which neighbours on the machine do not stretch (tracemalloc does, 5x).
    """
    tracemalloc.start()
    begin = time.process_time()
    try:
        yield
        peak, seconds = tracemalloc.get_traced_memory()[1], time.process_time() - begin
    finally:
        tracemalloc.stop()
    assert peak <= size + SLACK, f"{peak} bytes for a file of {size}"
    assert seconds < SECONDS, f"{seconds:.1f} s"


def survives(path: Path, size: int) -> bool:
    """Open, import, read every weight and the tokenizer: did it go through?"""
    with bounded(size):
        try:
            checkpoint = open_checkpoint(path)
            model = import_model(checkpoint, context=16)
            for op in model.graph.ops:
                if op.name == "weight":
                    model.weights(op.get("source", ""))
        except ModelError as error:
            assert str(path) in str(error) or path.name in str(error), str(error)
            return False
    return True


def folder_of(tmp_path: Path, config: bytes, weights: bytes, **files: bytes) -> Path:
    for name, data in {"config": config, **files}.items():
        (tmp_path / f"{name}.json").write_bytes(data)
    (tmp_path / "model.safetensors").write_bytes(weights)
    return tmp_path


# ---- a seeded corpus of mutations ----------------------------------------------------------------

Mutation = Callable[[np.random.Generator, bytearray], bytearray]


def flip(rng: np.random.Generator, data: bytearray) -> bytearray:
    """Some bits."""
    for at in rng.integers(0, len(data), int(rng.integers(1, 8))):
        data[int(at)] ^= 1 << int(rng.integers(8))
    return data


def cut(rng: np.random.Generator, data: bytearray) -> bytearray:
    """The end is missing."""
    return data[: int(rng.integers(0, len(data)))]


def big_number(rng: np.random.Generator, data: bytearray) -> bytearray:
    """Eight bytes become a hostile length."""
    at = int(rng.integers(0, max(1, len(data) - 8)))
    value = int(rng.choice([0, 1, 1 << 31, 1 << 32, (1 << 63) - 1])) | int(rng.integers(0, 2)) << 63
    data[at : at + 8] = struct.pack("<Q", value)
    return data


def repeat(rng: np.random.Generator, data: bytearray) -> bytearray:
    """A piece stands twice."""
    begin, length = int(rng.integers(0, len(data))), int(rng.integers(1, 200))
    return data[: begin + length] + data[begin:]


def digit(rng: np.random.Generator, data: bytearray) -> bytearray:
    """A number in a JSON header is another one."""
    digits = [i for i, b in enumerate(data[:20_000]) if 48 <= b <= 57]
    if digits:
        data[int(rng.choice(digits))] = int(rng.integers(48, 58))
    return data


MUTATORS: tuple[Mutation, ...] = (flip, cut, big_number, repeat, digit)


def mutations(original: bytes, head: int, seed: int) -> Iterator[tuple[int, bytes]]:
    """(seed, damaged file). Half of them only damage the first `head` bytes, where structure is."""
    for i in range(MUTATIONS):
        rng = np.random.default_rng([seed, i])
        part = original[:head] if i % 2 else original
        mutate = MUTATORS[int(rng.integers(len(MUTATORS)))]
        yield i, bytes(mutate(rng, bytearray(part))) + original[len(part) :]


def test_the_originals_are_sound(tmp_path: Path) -> None:
    assert survives(folder_of(tmp_path, CONFIG, WEIGHTS), len(WEIGHTS))
    path = tmp_path / "m.gguf"
    path.write_bytes(gguf_file())
    assert survives(path, path.stat().st_size)


def test_mutated_safetensors(tmp_path: Path) -> None:
    head = 8 + int.from_bytes(WEIGHTS[:8], "little")
    for seed, data in mutations(WEIGHTS, head, 1):
        try:
            survives(folder_of(tmp_path, CONFIG, data), len(data))
        except Exception as error:
            raise AssertionError(f"mutation {seed}: {error!r}") from error


def test_mutated_gguf(tmp_path: Path) -> None:
    original = gguf_file()
    path = tmp_path / "m.gguf"
    for seed, data in mutations(original, 2500, 2):
        path.write_bytes(data)
        try:
            survives(path, len(data))
        except Exception as error:
            raise AssertionError(f"mutation {seed}: {error!r}") from error


def test_every_truncation_of_a_gguf_header(tmp_path: Path) -> None:
    original, path = gguf_file(), tmp_path / "m.gguf"
    for length in range(0, 2500, 17):
        path.write_bytes(original[:length])
        assert not survives(path, length)


def test_mutated_config(tmp_path: Path) -> None:
    for seed, data in mutations(CONFIG, len(CONFIG), 3):
        try:
            survives(folder_of(tmp_path, data, WEIGHTS), len(WEIGHTS))
        except Exception as error:
            raise AssertionError(f"mutation {seed}: {error!r}") from error


# ---- hypothesis ----------------------------------------------------------------------------------

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=12,
)  # fmt: skip


@FUZZ
@given(data=st.binary(max_size=200))
def test_any_bytes_as_safetensors_and_gguf(tmp_path: Path, data: bytes) -> None:
    assert not survives(folder_of(tmp_path, CONFIG, data), len(data))
    path = tmp_path / "m.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<I", 3) + data)
    assert not survives(path, len(data))


@FUZZ
@given(header=JSON, payload=st.binary(max_size=32))
def test_any_json_as_a_header(tmp_path: Path, header: Any, payload: bytes) -> None:
    data = framed(json.dumps(header).encode(), payload)
    assert not survives(folder_of(tmp_path, CONFIG, data), len(data))


@FUZZ
@given(key=st.sampled_from(sorted(modelopt_config())), value=JSON)
def test_any_value_in_the_config(tmp_path: Path, key: str, value: Any) -> None:
    config = json.dumps({**modelopt_config(), key: value}).encode()
    survives(folder_of(tmp_path, config, WEIGHTS), len(WEIGHTS))


@FUZZ
@given(value=st.dictionaries(
    st.sampled_from(["ignore", "exclude_modules", "config_groups", "quant_algo", "quantized_layers",
                     "quant_method", "quantization"]), JSON))  # fmt: skip
def test_any_quantisation_config(value: dict[str, Any]) -> None:
    try:
        config = read_quant_config([("here", value)])
        config.quantizes_activations("model.layers.0.self_attn.q_proj")
    except ModelError:
        pass


@FUZZ
@given(
    key=st.sampled_from(["generation_config", "hf_quant_config", "tokenizer_config", "tokenizer"]),
    value=JSON,
)
def test_any_json_beside_the_weights(tmp_path: Path, key: str, value: Any) -> None:
    folder = folder_of(tmp_path, CONFIG, WEIGHTS, **{key: json.dumps(value).encode()})
    survives(folder, len(WEIGHTS))
    (folder / f"{key}.json").unlink()


# ---- files made to hurt --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "header",
    [b'{"a":[' + b"[]," * 2_000_000 + b"[]]}", b'{"a":[' + b'"",' * 2_000_000 + b'""]}',
     b'{"a":[' + b"{}," * 2_000_000 + b"{}]}", b'{"a":"' + b"x" * 8_000_000 + "😀".encode() + b'"}',
     b'{"a":[' + b"99999," * 2_000_000 + b"1]}",
     b"{" + b",".join(b'"%d":0' % i for i in range(700_000)) + b"}"],
    ids=["lists", "strings", "objects", "wide text", "numbers", "keys"],
)  # fmt: skip
def test_json_bombs(tmp_path: Path, header: bytes) -> None:
    """Each kind of JSON value that takes far more memory than text, alone in its file."""
    data = framed(header, b"")
    assert not survives(folder_of(tmp_path, CONFIG, data), len(data))
    with bounded(len(header)):
        try:
            parse_object(header, "here", described=len(header))
        except ModelError as error:
            assert "here" in str(error)


@pytest.mark.parametrize("token", ["", "é"])
def test_gguf_array_bombs(tmp_path: Path, token: str) -> None:
    """100,000 tokens of no or two bytes in an otherwise sound model."""
    path = tmp_path / "m.gguf"
    path.write_bytes(gguf_file([token] * 100_000))
    assert not survives(path, path.stat().st_size)


def test_more_strings_than_a_header_has(tmp_path: Path) -> None:
    """A count that eight bytes a string would allow in a large file is refused before the walk."""
    key = b"tokenizer.ggml.tokens"
    fields = struct.pack("<Q", len(key)) + key + struct.pack("<IIQ", 9, 8, 1 << 23) + bytes(4096)
    path = tmp_path / "m.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + fields)
    with pytest.raises(ModelError, match="brings the strings of the header to 8388608"):
        open_checkpoint(path)


def test_numbers_too_long_to_parse_are_refused(tmp_path: Path) -> None:
    config = json.dumps(llama_config()).replace("64", "9" * 5000, 1).encode()
    assert not survives(folder_of(tmp_path, config, WEIGHTS), len(WEIGHTS))
