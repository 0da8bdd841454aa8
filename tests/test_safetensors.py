"""The SafeTensors reader: right on what real producers write, ModelError on everything else."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from halfbyte.frontend.container import open_checkpoint
from halfbyte.frontend.safetensors import open_shard
from halfbyte.ir.errors import ModelError
from tests.checkpoint_files import (
    BF16,
    E4M3,
    Tensors,
    dense_weights,
    framed,
    llama_config,
    safetensors_bytes,
    write_checkpoint,
)


def shard(tmp_path: Path, data: bytes) -> Path:
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    return path


def with_header(tmp_path: Path, header: object, payload: bytes = b"") -> Path:
    return shard(tmp_path, framed(json.dumps(header).encode(), payload))


def entry(dtype: object = "F32", shape: object = (2,), offsets: object = (0, 8)) -> dict[str, Any]:
    return {"a": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}


def test_every_dtype_reads_back_bit_for_bit(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    dtypes = [np.dtype(t) for t in (np.float32, np.float16, np.int64, np.int8, np.uint8)]
    tensors: Tensors = {
        f"t{i}": rng.integers(0, 100, (3, 5)).astype(dtype)
        for i, dtype in enumerate([*dtypes, BF16, E4M3])
    }
    found = open_shard(shard(tmp_path, safetensors_bytes(tensors)))
    assert list(found.entries) == list(tensors)
    for name, value in tensors.items():
        assert found.read(name).dtype == value.dtype
        assert found.read(name).tobytes() == value.tobytes()


def test_unaligned_tensors_are_read(tmp_path: Path) -> None:
    tensors: Tensors = {
        "bytes": np.arange(3, dtype=np.uint8),
        "floats": np.array([1.5, -2.0], np.float32),
        "scalar": np.array(7.0, np.float32),
    }
    found = open_shard(shard(tmp_path, safetensors_bytes(tensors)))
    floats = found.read("floats")
    assert floats.flags.aligned
    np.testing.assert_array_equal(floats, tensors["floats"])
    assert found.read("scalar").shape == () and found.read("scalar") == 7.0


def test_aligned_tensors_are_views_of_the_file(tmp_path: Path) -> None:
    found = open_shard(shard(tmp_path, safetensors_bytes({"a": np.arange(8, dtype=np.uint8)})))
    value = found.read("a")
    assert not value.flags.owndata and not value.flags.writeable


@pytest.mark.parametrize(
    ("header", "payload", "message"),
    [
        (entry(dtype="F4"), b"\0" * 8, "unknown dtype 'F4'"),
        (entry(dtype=[]), b"\0" * 8, "unknown dtype"),
        (entry(shape=(3,)), b"\0" * 8, "needs 12 bytes, found 8"),
        (entry(shape=(-2,)), b"\0" * 8, "expected natural numbers"),
        (entry(shape=(True, 2)), b"\0" * 8, "expected natural numbers"),
        (entry(shape=(2.0,)), b"\0" * 8, "expected natural numbers"),
        (entry(shape=[1] * 9 + [2]), b"\0" * 8, "at most 8 dimensions"),
        (entry(offsets=(0,)), b"\0" * 8, "two data_offsets, found 1"),
        (entry(offsets=(8, 0)), b"\0" * 8, "needs 8 bytes, found -8"),
        (entry(offsets=None), b"\0" * 8, "expected natural numbers"),
        (entry(offsets=(0, 8)), b"\0" * 4, "ends at byte 8 of the payload, found 4"),
        (entry(offsets=(4, 12)), b"\0" * 12, "leaves a hole"),
        (entry(), b"\0" * 12, "tensors cover 8 bytes, found 12"),
        ({**entry(), "b": entry()["a"]}, b"\0" * 8, "overlaps 'a'"),
        (entry(shape=(2**62, 2**62), offsets=(0, 8)), b"\0" * 8, "needs"),
        ({"a": 3}, b"", "expected an object"),
        ([1], b"", "expected a JSON object"),
        ({"__metadata__": 3}, b"", "expected an object"),
    ],
)
def test_wrong_entries_name_the_file_and_tensor(
    tmp_path: Path, header: object, payload: bytes, message: str
) -> None:
    path = with_header(tmp_path, header, payload)
    with pytest.raises(ModelError, match="model.safetensors") as caught:
        open_shard(path)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0" * 9,
        struct.pack("<Q", 1 << 62) + b"{}",
        struct.pack("<Q", 3) + b"{}",
        framed(b"{", b""),
        framed(b"\xff\xfe{}", b""),
        framed(b'{"a": NaN}', b""),
        framed(b'{"a":{},"a":{}}', b""),
        framed(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", b""),
        framed(b'{"a":' + b"9" * 10_000 + b"}", b""),
    ],
)
def test_broken_headers_are_model_errors(tmp_path: Path, data: bytes) -> None:
    with pytest.raises(ModelError, match="model.safetensors"):
        open_shard(shard(tmp_path, data))


def test_a_header_that_would_swell_in_memory_is_refused(tmp_path: Path) -> None:
    header = b'{"a":[' + b"[]," * 3_000_000 + b"[]]}"
    with pytest.raises(ModelError, match="bytes of memory"):
        open_shard(shard(tmp_path, framed(header, b"")))


def sharded(tmp_path: Path) -> tuple[Path, dict[str, Any]]:
    """A dense checkpoint in two shards, and its index."""
    tensors = dense_weights()
    names = list(tensors)
    parts = {"a.safetensors": names[:4], "b.safetensors": names[4:]}
    for file, held in parts.items():
        (tmp_path / file).write_bytes(safetensors_bytes({n: tensors[n] for n in held}))
    index = {"weight_map": {name: file for file, held in parts.items() for name in held}}
    (tmp_path / "config.json").write_text(json.dumps(llama_config()))
    return tmp_path, index


def write_index(folder: Path, index: dict[str, Any]) -> Path:
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def test_sharded_checkpoint_reads_every_tensor(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_index(*sharded(tmp_path)))
    assert [path.name for path in checkpoint.files] == ["a.safetensors", "b.safetensors"]
    for name, value in dense_weights().items():
        assert checkpoint.read(name).tobytes() == value.tobytes()
        assert checkpoint.info(name).shape == value.shape


def test_shards_without_an_index_are_found(tmp_path: Path) -> None:
    folder, _ = sharded(tmp_path)
    assert set(open_checkpoint(folder).names()) == set(dense_weights())


def test_missing_shard_names_file_and_tensor(tmp_path: Path) -> None:
    folder = write_index(*sharded(tmp_path))
    (folder / "b.safetensors").unlink()
    with pytest.raises(ModelError, match=r"tensor '.*lies in 'b\.safetensors'.*file is missing"):
        open_checkpoint(folder)


def test_lying_index_names_file_and_tensor(tmp_path: Path) -> None:
    folder, index = sharded(tmp_path)
    index["weight_map"]["model.norm.weight"] = "b.safetensors"
    index["weight_map"]["model.extra"] = "a.safetensors"
    with pytest.raises(ModelError, match=r"a\.safetensors: tensor 'model.extra': not in this file"):
        open_checkpoint(write_index(folder, index))


@pytest.mark.parametrize(
    "file",
    ["../a.safetensors", "/etc/passwd", "sub/a.safetensors", "..", "", 3, "x\\a.safetensors"],
)
def test_index_cannot_leave_the_folder(tmp_path: Path, file: object) -> None:
    folder, index = sharded(tmp_path)
    index["weight_map"]["model.norm.weight"] = file
    with pytest.raises(ModelError, match="model.norm.weight"):
        open_checkpoint(write_index(folder, index))


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    folder, _ = sharded(tmp_path)
    (folder / "c.safetensors").write_bytes((folder / "a.safetensors").read_bytes())
    with pytest.raises(ModelError, match="stored in a.safetensors too"):
        open_checkpoint(folder)


def test_paths_that_are_no_checkpoint_say_what_to_give(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "m", dense_weights(), llama_config())
    for path, message in (
        (tmp_path / "nowhere", "no such file"),
        (tmp_path, "found neither"),
        (folder / "model.safetensors", "give the folder"),
    ):
        with pytest.raises(ModelError, match=message):
            open_checkpoint(path)


def test_a_real_file_reads_bit_for_bit(shared: Path) -> None:
    path = shared / "models/tiny/mistral3-modelopt/model.safetensors"
    found = open_shard(path)
    raw = path.read_bytes()
    assert {e.dtype for e in found.entries.values()} == {"f32", "bf16", "f8e4m3", "u8"}
    for name, e in found.entries.items():
        assert found.read(name).tobytes() == raw[found.payload + e.begin : found.payload + e.end]
