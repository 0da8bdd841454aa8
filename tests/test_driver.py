"""The compiler's way as its options bend it: stop behind a phase, go on from a dump, keep dumps."""

from __future__ import annotations

from pathlib import Path

import pytest

from halfbyte.driver import Options, compile_model
from halfbyte.ir.errors import ModelError

LAYOUT, FUSE, LAST = "20_cutlass_layout", "30_fuse", "50_capture"


@pytest.fixture
def tied(root: Path) -> Path:
    return root / "tests/data/llama_tied-modelopt"


def options(model: Path, **changes: object) -> Options:
    return Options(model=model, out=None, **{"compile_to": LAST, **changes})  # pyright: ignore[reportArgumentType]  # by name


def test_goes_on_from_a_dump_to_the_same_graph(tied: Path, tmp_path: Path) -> None:
    whole = compile_model(options(tied, dump=tmp_path / "all"))
    begun = (LAYOUT, tmp_path / f"all/{LAYOUT}.ir")
    resumed = compile_model(options(tied, start_from=begun, dump=tmp_path / "rest"))
    assert resumed.text == whole.text == (tmp_path / f"all/{LAST}.ir").read_text()
    assert (tmp_path / f"rest/{FUSE}.ir").read_text() == (tmp_path / f"all/{FUSE}.ir").read_text()
    assert not (tmp_path / f"rest/{LAYOUT}.ir").exists()
    assert (tmp_path / f"all/{FUSE}.diff").read_text().startswith("--- before\n+++ 30_fuse")


@pytest.mark.parametrize("name", [FUSE, "30", "fuse"])
def test_stops_behind_a_phase(tied: Path, name: str) -> None:
    text = compile_model(options(tied, compile_to=name)).text
    assert "fused_linear" in text and "kernels=" not in text


def test_prints_the_ir_behind_each_phase(tied: Path) -> None:
    said: list[str] = []
    compile_model(options(tied, compile_to="10", print_ir=said.append))
    heads = [text.splitlines()[0].removeprefix("// ---- after ") for text in said]
    assert heads == ["00_import", "05_canonicalize", "10_promote_nvfp4"]


def test_a_dump_of_another_model_is_refused(tied: Path, tmp_path: Path) -> None:
    compile_model(options(tied, dump=tmp_path))
    dump = tmp_path / f"{LAYOUT}.ir"
    text = dump.read_text()
    dump.write_text(text.replace("512x96", "512x64"))
    differs = "expected tensor<512x64, bf16>, found tensor<512x96, bf16> in the checkpoint; start"
    with pytest.raises(ModelError, match=f"{LAYOUT}.ir: model.embed_tokens.weight: {differs}"):
        compile_model(options(tied, start_from=(LAYOUT, dump)))
    dump.write_text(text.replace("model.norm.weight", "norm.weight"))
    with pytest.raises(ModelError, match="found no such tensor"):
        compile_model(options(tied, start_from=(LAYOUT, dump)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"compile_to": "99_x"}, "phase '99_x': unknown"),
        ({"start_from": (LAYOUT, Path("/dev/null"))}, "/dev/null: not the IR of a phase"),
        ({"start_from": (LAYOUT, Path("none.ir"))}, "none.ir: cannot be read: No such file"),
        ({"recipe": "w8"}, "recipe 'w8': unknown"),
        ({"allow_fallback": frozenset(["x"])}, "'x': no fallback kernel, expected nvfp4_rowmajor"),
        ({"context": 0}, "expected at least 1 position"),
        ({"dump": Path("/dev/null/d")}, "/dev/null/d: cannot write: Not a directory"),
    ],
)
def test_wrong_options(tied: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        compile_model(options(tied, **changes))


def test_a_context_beyond_the_model_is_said(tied: Path) -> None:
    said: list[str] = []
    compile_model(options(tied, context=4096, progress=said.append))
    assert any("context 4096 exceeds the 512 positions" in line for line in said)
