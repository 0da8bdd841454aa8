"""Artifacts: written whole or not at all; hostile ones are refused with a reason."""

import json
import multiprocessing
import os
import resource
import signal
import tracemalloc
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from halfbyte.ir.errors import IRError, ModelError, TargetError
from halfbyte.runtime.artifact import Artifact, ArtifactWriter, TensorSpec, WeightsFile, place
from tests.fake_model import write_artifact

FUZZ = settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],  # each example writes its file
)


@pytest.fixture
def artifact(tmp_path: Path) -> Artifact:
    return write_artifact(tmp_path / "m.hb")


def edit(artifact: Artifact, *keys: str | int, value: Any) -> None:
    """Sets one value in manifest.json (`value` is ... to delete it)."""
    path = artifact.folder / "manifest.json"
    data = json.loads(path.read_bytes())
    inner: Any = data
    for key in keys[:-1]:
        inner = inner[key]
    if value is ...:
        del inner[keys[-1]]
    else:
        inner[keys[-1]] = value
    path.write_text(json.dumps(data))


def keys_of(value: Any) -> list[Any]:
    """What a JSON object or list is indexed by; nothing for other values."""
    if isinstance(value, dict):
        return list(cast(dict[str, Any], value))
    return list(range(len(cast(list[Any], value)))) if isinstance(value, list) else []


def test_opening_takes_little_memory(artifact: Artifact) -> None:
    tracemalloc.start()
    try:
        Artifact.open(artifact.folder)
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


def test_reads_back_equal(artifact: Artifact) -> None:
    opened = Artifact.open(artifact.folder, check=True)
    assert opened.manifest == artifact.manifest
    assert opened.read_optional("passes/cpu/00_import.ir") == b"graph\n"
    assert opened.read_optional("none") is None
    assert [p.name for p in artifact.folder.parent.iterdir()] == ["m.hb"]


def test_weights_are_what_safetensors_reads(artifact: Artifact) -> None:
    path = artifact.folder / "weights.safetensors"
    tensors = safetensors.numpy.load_file(path)  # pyright: ignore[reportUnknownMemberType]  # PathLike
    assert tensors["a"].tolist() == [0, 1, 2] and tensors["b"].shape == (2, 576)
    weights = WeightsFile(path)
    assert weights.names() == ["a", "b"]
    assert weights.tensor("a").view(np.float32).tolist() == [0, 1, 2]
    assert weights.image.ctypes.data % 64 == 0
    for facts in artifact.target("cpu").weights:
        view = weights.image[facts.offset : facts.offset + facts.bytes]
        assert bytes(view) == tensors[facts.name].tobytes()
    weights.close()


def test_streams_in_pieces_and_counts_bytes(tmp_path: Path) -> None:
    with ArtifactWriter(tmp_path / "x.hb") as out, pytest.raises(IRError, match="never written"):
        with out.weights(place([TensorSpec("w", "U8", (130,))])) as file:
            file.begin("w")
            file.write(b"1" * 100)
            file.write(b"2" * 29)
    with ArtifactWriter(tmp_path / "x.hb") as out, pytest.raises(IRError, match="1 bytes too many"):
        with out.weights(place([TensorSpec("w", "BF16", (2,))])) as file:
            file.begin("w")
            file.write(b"12345")
    with ArtifactWriter(tmp_path / "x.hb") as out, pytest.raises(IRError, match="out of order"):
        with out.weights(place([TensorSpec("w", "U8", (2,))])) as file:
            file.begin("v")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("keys", "value", "expected"),
    [
        (("format",), 1, "format: version"),
        (("format",), True, "format: version"),
        (("format",), ..., "format: version"),
        (("model",), ..., "'model' is missing"),
        (("model", "vocab"), "1", r"model\.vocab: wrong value"),
        (("model", "vocab"), -1, r"model\.vocab: wrong value"),
        (("model", "vocab"), 10**30, r"model\.vocab: wrong value"),
        (("model", "vocab"), 10**12, r"model\.vocab: out of range"),
        (("model", "eos"), [258], r"model\.eos: out of range"),
        (("model", "extra"), 1, "unknown key 'extra'"),
        (("targets", "cpu", "buckets"), [], "buckets: wrong order"),
        (("targets", "cpu", "buckets"), [1, 4, 4], "buckets: wrong order"),
        (("parts",), [], "parts: wrong type"),
        (("parts", "../x"), {"bytes": 0, "sha256": "0" * 64}, "unsafe file name"),
        (("parts", "/etc/passwd"), {"bytes": 0, "sha256": "0" * 64}, "unsafe file name"),
        (("parts", "a/./b"), {"bytes": 0, "sha256": "0" * 64}, "unsafe file name"),
        (("parts", "gone"), {"bytes": 0, "sha256": "0" * 64}, "file is missing"),
        (("parts", "x" * 5000), {"bytes": 0, "sha256": "0" * 64}, "file is missing"),
        (("parts", "tokenizer.json", "bytes"), 1, "wrong size"),
        (("parts", "tokenizer.json", "sha256"), "0", "not a SHA-256"),
        (("targets", "cpu", "library"), "../lib.so", "no such part"),
        (("targets", "cpu", "weights", 0, "offset"), 1, "not aligned"),
        (("targets", "cpu", "weights", 0, "offset"), 2**40, "beyond the weight image"),
        (("targets",), {}, "at least one target"),
        (("targets", "cpu", "image", 0, "file"), "gone.safetensors", "no such part"),
        (("targets", "cpu", "image", 0, "offset"), 64, "out of place"),
        (("targets", "cpu", "image", 0, "begin"), -64, "wrong value"),
        (("targets", "cpu", "image", 0, "bytes"), 2**40, "out of place"),
        (("targets", "cpu", "image", 0, "bytes"), 65, "not aligned"),
        (("targets", "cpu", "kernels", 0, "bucket"), 2, "no such bucket"),
    ],
)
def test_hostile_manifest(
    artifact: Artifact, keys: tuple[str | int, ...], value: Any, expected: str
) -> None:
    edit(artifact, *keys, value=value)
    with pytest.raises(ModelError, match=expected) as caught:
        Artifact.open(artifact.folder)
    assert "manifest.json" in str(caught.value) and len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    "text",
    ["", "[]", "null", '{"format": NaN}', "[" * 100_000, '{"a":1,"a":2}', "\xff", "1" * 5000],
)
def test_manifest_that_is_no_manifest(artifact: Artifact, text: str) -> None:
    (artifact.folder / "manifest.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ModelError, match=r"manifest\.json"):
        Artifact.open(artifact.folder)


def test_links(artifact: Artifact, tmp_path: Path) -> None:
    part = artifact.folder / "tokenizer.json"
    outside = tmp_path / "outside.json"
    part.rename(outside)
    part.symlink_to(outside)
    with pytest.raises(ModelError, match="link leaves the folder"):
        Artifact.open(artifact.folder)
    part.unlink()
    part.symlink_to(part)
    with pytest.raises(ModelError, match="file is missing"):
        Artifact.open(artifact.folder)
    part.unlink()
    outside.rename(artifact.folder / "inside.json")
    part.symlink_to("inside.json")
    Artifact.open(artifact.folder)


def test_changed_contents_are_found_only_when_asked(artifact: Artifact) -> None:
    path = artifact.folder / "tokenizer.json"
    path.write_bytes(b"x" * path.stat().st_size)
    Artifact.open(artifact.folder)
    with pytest.raises(ModelError, match="contents changed"):
        Artifact.open(artifact.folder, check=True)


@FUZZ
@given(data=st.data())
def test_mutated_manifest(tmp_path: Path, data: st.DataObject) -> None:
    """Any value replaced by any JSON, or any bytes cut: ModelError or a good manifest."""
    folder = tmp_path / "m.hb"
    original = tmp_path / "original.json"
    if not original.exists():
        write_artifact(folder)
        original.write_bytes((folder / "manifest.json").read_bytes())
    text = original.read_bytes()
    if data.draw(st.booleans()):
        at = data.draw(st.integers(0, len(text) - 1))
        cut = data.draw(st.integers(0, 9))
        text = text[:at] + data.draw(st.binary(max_size=3)) + text[at + cut :]
    else:
        manifest: dict[str, Any] = json.loads(text)
        inner, key = manifest, data.draw(st.sampled_from(sorted(manifest)))
        while keys_of(inner[key]) and data.draw(st.booleans()):
            inner = inner[key]
            key = data.draw(st.sampled_from(keys_of(inner)))
        values = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
        nested = st.recursive(values, lambda v: st.lists(v) | st.dictionaries(st.text(), v))
        inner[key] = data.draw(nested)
        text = json.dumps(manifest).encode()
    (folder / "manifest.json").write_bytes(text)
    try:
        Artifact.open(folder)
    except ModelError as error:
        assert "manifest.json" in str(error)


@FUZZ
@given(at=st.integers(0, 400), new=st.binary(max_size=12), cut=st.integers(0, 12))
def test_mutated_weights(tmp_path: Path, at: int, new: bytes, cut: int) -> None:
    image = place([TensorSpec("a", "F32", (3,)), TensorSpec("b", "U8", (70,))])
    path = tmp_path / "x.hb" / "weights.safetensors"
    if not path.exists():
        write_artifact(tmp_path / "x.hb")
        (tmp_path / "good").write_bytes(path.read_bytes())
    good = (tmp_path / "good").read_bytes()
    path.write_bytes(good[:at] + new + good[at + cut :])
    try:
        WeightsFile(path).close()
    except ModelError as error:
        assert "weights.safetensors" in str(error)
    assert image.nbytes == 192


@pytest.mark.parametrize("contents", [b"", b"1234567", b"\xff" * 8, b"\xff" * 7 + b"\x7f" + b"{}"])
def test_weights_without_header(tmp_path: Path, contents: bytes) -> None:
    path = tmp_path / "weights.safetensors"
    path.write_bytes(contents)
    with pytest.raises(ModelError, match=r"weights\.safetensors"):
        WeightsFile(path)


def test_failure_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), ArtifactWriter(tmp_path / "m.hb") as out:
        out.add_bytes("tokenizer.json", b"{}")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_failure_keeps_the_old_one(artifact: Artifact) -> None:
    with pytest.raises(ValueError), ArtifactWriter(artifact.folder) as out:
        out.add_bytes("tokenizer.json", b"{}")
        raise ValueError
    assert Artifact.open(artifact.folder, check=True).manifest == artifact.manifest


def test_replaces_an_artifact_while_it_is_mapped(artifact: Artifact) -> None:
    weights = WeightsFile(artifact.path("weights.safetensors"))
    write_artifact(artifact.folder, created="later")
    assert Artifact.open(artifact.folder, check=True).manifest.created == "later"
    assert weights.tensor("a").view(np.float32).tolist() == [0, 1, 2]
    assert len(list(artifact.folder.parent.iterdir())) == 1


def test_never_overwrites_what_is_not_ours(tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    ArtifactWriter(folder)  # empty: nothing to lose
    (folder / "manifest.json").write_text('{"name": "a web app"}')
    with pytest.raises(ModelError, match="not overwritten"):
        ArtifactWriter(folder)
    (tmp_path / "file").write_text("x")
    with pytest.raises(ModelError, match="not overwritten"):
        ArtifactWriter(tmp_path / "file")


def _write_with_little_space(folder: Path) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
    try:
        with ArtifactWriter(folder) as out:
            with out.weights(place([TensorSpec("w", "U8", (4 << 20,))])) as file:
                file.begin("w")
                for _ in range(16):
                    file.write(bytes(1 << 18))
    except TargetError as error:
        os._exit(7 if "full" in str(error) and "weights.safetensors" in str(error) else 8)
    os._exit(9)


def test_full_disk(tmp_path: Path) -> None:
    child = multiprocessing.get_context("fork").Process(
        target=_write_with_little_space, args=(tmp_path / "m.hb",)
    )
    child.start()
    child.join(30)
    assert child.exitcode == 7
    assert list(tmp_path.iterdir()) == []
    with ArtifactWriter(tmp_path / "m.hb") as out, pytest.raises(TargetError, match="disk space"):
        with out.weights(place([TensorSpec("w", "U8", (1 << 60,))])):
            pass


def _write_and_die(folder: Path) -> None:
    with ArtifactWriter(folder) as out:
        out.add_bytes("tokenizer.json", b"{}")
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_compile_is_cleaned_up_by_the_next(tmp_path: Path) -> None:
    child = multiprocessing.get_context("fork").Process(
        target=_write_and_die, args=(tmp_path / "m.hb",)
    )
    child.start()
    child.join(30)
    (left,) = tmp_path.iterdir()
    write_artifact(tmp_path / "m.hb")
    assert left.exists()  # young: it might be a compile that has only begun
    os.utime(left, (0, 0))
    write_artifact(tmp_path / "m.hb")
    assert [p.name for p in tmp_path.iterdir()] == ["m.hb"]


def test_two_compiles_at_once(tmp_path: Path) -> None:
    with ArtifactWriter(tmp_path / "m.hb") as out:
        os.utime(out.folder, (0, 0))
        write_artifact(tmp_path / "m.hb")
        assert out.folder.exists()  # locked, so it is at work
