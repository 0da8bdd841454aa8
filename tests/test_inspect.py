"""`halfbyte inspect`: what each view says about a small artifact made by hand."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from halfbyte.cli import main
from halfbyte.inspect_format import collapsed, ranges, short, size, table, token_spans
from halfbyte.inspect_memory import memory
from halfbyte.inspect_source import Source

from .graphs import Decoder, Shape, decoder
from .hand_artifact import write

Q0 = "model.layers.0.q_proj"


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("made") / "tiny.hb")


@pytest.fixture(scope="module")
def unequal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """W4A4, and in layer 0 k has another input scale than q and v."""
    made = decoder(w4a4=True)
    data = {**made.data, "model.layers.0.k_proj.input_scale": np.array(0.004, np.float32)}
    folder = tmp_path_factory.mktemp("made")
    return write(folder / "unequal.hb", Decoder(made.graph, data), "w4a4")


Capture = pytest.CaptureFixture[str]


def says(capsys: Capture, artifact: Path, *flags: str) -> str:
    assert main(["inspect", str(artifact), *flags]) == 0
    return capsys.readouterr().out


def told(capsys: Capture, artifact: Path, *flags: str) -> Any:
    return json.loads(says(capsys, artifact, *flags, "--json"))


def squeezed(text: str) -> str:
    """Without alignment and line breaks."""
    return " ".join(text.split())


# --- the journey of a layer ----------------------------------------------------------------------


def test_a_journey_from_checkpoint_to_kernel(capsys: Capture, artifact: Path) -> None:
    text = squeezed(says(capsys, artifact, "--layer", Q0))
    stations = (
        "linear, 48 inputs, 48 outputs",
        "one joint launch: model.layers.0.{q,k,v}_proj",
        "nvfp4, weight only, as modelopt spells it: model.layers.0.q_proj",
        ".weight_scale f8e4m3 [48, 3] 144 B block scales",
        "dequantize(%w.3, %w.4, %w.5)",
        "05_canonicalize: nothing to do here",
        "did promote nvfp4: tensor<48x48, nvfp4<block=16>>",
        "did relayout: nvfp4<block=16> to nvfp4<block=16, layout=p16>",
        "%w.2 is the weight model.layers.0.norm1",
        "did qkv + rope + append: one linear of 80 rows",
        "did norm + linear: takes in model.layers.0.norm1",
        "chosen: nvfp4_gemv for T=1..8, nvfp4_gemm for T=9..512",
        "lies in the weights at 0x1200..0x1e80",
        "fused_linear is launch 1 of a step",
        "padded with zeros: inputs 48 to 64",
        "rows 0..47 are this module's; the others are k_proj, v_proj's",
        "refused nvfp4_gemv: M = 1..8 only, bucket has 64",
        "its arguments: passes/cpu/60_codegen/plan.cc:",
        "off by 2e-06 allowed 1e-05 20%",
    )
    at = -1
    for station in stations:  # in the order of the way
        found = text.find(station, at + 1)
        assert found > at, station
        at = found


def test_a_journey_keeps_to_its_own_module(capsys: Capture, artifact: Path) -> None:
    way = told(capsys, artifact, "--layer", "model.layers.1.gate_proj")
    assert way["joint"] == ["model.layers.1.gate_proj", "model.layers.1.up_proj"]
    rules = [(d["rule"], d["at"]) for step in way["steps"] for d in step["decisions"]]
    joint = "model.layers.1.gate_proj + model.layers.1.up_proj"
    assert rules == [
        ("promote nvfp4", "model.layers.1.gate_proj"),
        ("relayout", "model.layers.1.gate_proj"),
        ("gate·up + silu·mul", "model.layers.1.down_proj"),
        ("linear + quantiser", joint),
        ("norm + linear", joint),
    ]
    assert way["selftests"][0]["at"].startswith("model.layers.0.gate_proj")  # the same shape


def test_the_last_shard_knows_its_rows(capsys: Capture, artifact: Path) -> None:
    way = told(capsys, artifact, "--layer", "model.layers.0.v_proj")
    assert way["stored"][0]["rows"] == [64, 80]


def test_stored_bytes_are_where_the_file_has_them(capsys: Capture, artifact: Path) -> None:
    from halfbyte.runtime.artifact import WeightsFile

    way = told(capsys, artifact, "--layer", "model.layers.0.o_proj")
    raw = (artifact / "weights.safetensors").read_bytes()
    file = WeightsFile(artifact / "weights.safetensors")
    name = way["stored"][0]["name"]
    for buffer in way["stored"][0]["buffers"]:
        start = buffer["file_offset"]
        part = f"{name}:{buffer['suffix']}" if buffer["suffix"] else name
        assert raw[start : start + buffer["bytes"]] == file.tensor(part).tobytes()
    file.close()


def test_a_missed_fusion_says_why(capsys: Capture, unequal: Path) -> None:
    text = squeezed(says(capsys, unequal, "--layer", "model.layers.0.k_proj"))
    assert "not qkv + rope + append: input scales differ: 0.002, 0.004, 0.002" in text
    assert "W4A4: activations quantised" in text
    assert "input scale 0.004" in text
    assert "joint launch" not in text


def test_a_tied_head_and_a_norm_have_journeys(capsys: Capture, artifact: Path) -> None:
    head = squeezed(says(capsys, artifact, "--layer", "lm_head"))
    assert "one copy for 2 readers" in head and "embed(" not in head
    assert "refused nvfp4_gemv: weight is bf16, kernel reads nvfp4" in head
    norm = squeezed(says(capsys, artifact, "--layer", "1.norm2"))
    assert "runs inside model.layers.1.{gate,up}_proj" in norm


def test_a_tensor_names_its_module(capsys: Capture, artifact: Path) -> None:
    assert told(capsys, artifact, "--layer", f"{Q0}.weight_scale_2")["module"] == Q0
    assert told(capsys, artifact, "--layer", "0.q_proj")["module"] == Q0
    tied = told(capsys, artifact, "--layer", "model.embed_tokens.weight")
    assert tied["module"] == "model.embed_tokens"


def test_an_op_without_weights_has_a_journey(capsys: Capture, artifact: Path) -> None:
    found = told(capsys, artifact, "--layer", "layers.0.attn")
    assert (found["module"], found["tensors"]) == ("model.layers.0.attn", [])
    assert {k["kernel"] for k in found["kernels"]} & {"attention", "rope_append"}
    text = squeezed(says(capsys, artifact, "--layer", "model.layers.0.attn"))
    assert "reads none of its tensors" in text and "30_fuse" in text


def test_an_ambiguous_or_unknown_layer_lists_names(capsys: Capture, artifact: Path) -> None:
    assert main(["inspect", str(artifact), "--layer", "q_proj"]) == 1
    error = capsys.readouterr().err
    assert "2 modules match" in error and "model.layers.{0-1}.q_proj" in error
    assert main(["inspect", str(artifact), "--layer", "model.layers.0.q_prj"]) == 1
    assert Q0 in capsys.readouterr().err


# --- phases --------------------------------------------------------------------------------------


def test_phases_table(capsys: Capture, artifact: Path) -> None:
    rows = told(capsys, artifact, "--phases")
    by_id = {row["id"]: row for row in rows}
    assert list(by_id) == sorted(by_id) and rows[0]["id"] == "00_import"
    assert not by_id["15_quantize_weights"]["changed"]
    assert by_id["10_promote_nvfp4"]["fired"] == 14
    assert by_id["35_select_kernels"]["missed"] > 0
    text = says(capsys, artifact, "--phases")
    assert "a misread scale is a type error" in text
    assert by_id["30_fuse"]["digest"] in text


@pytest.mark.parametrize("wanted", ["30_fuse", "30", "fuse"])
def test_phase_is_ir_with_its_decisions(capsys: Capture, artifact: Path, wanted: str) -> None:
    from halfbyte.ir.text import from_text, to_text

    text = says(capsys, artifact, "--phase", wanted)
    assert "// did  qkv + rope + append  model.layers.0.attn: one linear of 80 rows" in text
    assert to_text(from_text(text)) == (artifact / "passes" / "cpu" / "30_fuse.ir").read_text()


def test_diff_names_what_changed_and_where(capsys: Capture, artifact: Path) -> None:
    text = says(capsys, artifact, "--diff", "10", "20")
    assert text.startswith("--- 10_promote_nvfp4\n+++ 20_cutlass_layout\n")
    assert "relayout 0 -> 15" in text
    hunks = [line for line in text.splitlines() if line.startswith("@@")]
    assert any("model.layers.0.q_proj" in hunk for hunk in hunks)
    assert any(line.startswith("+  %p.1 = relayout(%q)") for line in text.splitlines())
    assert "no difference" in says(capsys, artifact, "--diff", "00", "05")
    assert main(["inspect", str(artifact), "--diff", "10", "99"]) == 1
    assert "expected one of 00_import" in capsys.readouterr().err


# --- whole artifact ------------------------------------------------------------------------------


def test_summary_is_one_screen(capsys: Capture, artifact: Path) -> None:
    text = says(capsys, artifact)
    assert len(text.splitlines()) <= 30 and max(map(len, text.splitlines())) <= 100
    flat = squeezed(text)
    for fact in ("tiny: llama", "W4A16", "8 x nvfp4_gemv", "8 x nvfp4_gemm", "fallbacks 0",
                 "cpu (scalar, avx2)", "15 launches a step", '{"temperature": 0.6}'):  # fmt: skip
        assert fact in flat
    facts = told(capsys, artifact)
    assert facts["kernels"]["prefill"]["nvfp4_gemm"] == 8
    assert facts["worst"]["max_abs"] == 2e-6


def test_kernels_collapse_alike_layers(capsys: Capture, artifact: Path) -> None:
    facts = told(capsys, artifact, "--kernels")
    wheres = [row["where"] for row in facts["linears"]]
    assert wheres == [
        "model.layers.{0-1}.{q,k,v}_proj", "model.layers.{0-1}.o_proj",
        "model.layers.{0-1}.{gate,up}_proj", "model.layers.{0-1}.down_proj", "lm_head",
    ]  # fmt: skip
    text = squeezed(says(capsys, artifact, "--kernels"))
    assert "T=1..8 T=9..512" in text
    assert "nvfp4_gemv: M = 1..8 only, bucket has 64 [#1, #2, #3, #4; bucket 64]" in text
    assert "fallbacks: 0" in text


def test_unlike_layers_stay_apart(capsys: Capture, unequal: Path) -> None:
    wheres = [row["where"] for row in told(capsys, unequal, "--kernels")["linears"]]
    assert "model.layers.0.k_proj" in wheres and "model.layers.1.{q,k,v}_proj" in wheres


def test_memory_draws_the_arena(capsys: Capture, artifact: Path) -> None:
    m = memory(Source(artifact))
    assert (m.repeat.start, m.repeat.period, m.repeat.times) == (1, 6, 2)
    for a in m.slots:  # what the picture rests on: nobody shares bytes with the living
        for b in m.slots:
            together = a.first <= b.last and b.first <= a.last
            apart = a.offset + a.bytes <= b.offset or b.offset + b.bytes <= a.offset
            assert a is b or not together or apart
    text = says(capsys, artifact, "--memory")
    picture = [line for line in text.splitlines() if line.startswith("0x")]
    assert len(picture) == len({e for s in m.slots for e in (s.offset, s.offset + s.bytes)}) - 1
    assert sum(int(line.split()[1]) for line in picture) == m.arena_per_token
    assert "4 x tensor<1x32x16, f32>" in text
    assert m.buckets[-1].arena == 512 * m.arena_per_token


def test_scales_audit_names_outliers(capsys: Capture, artifact: Path) -> None:
    facts = told(capsys, artifact, "--scales")
    audits = {(a["kind"], a["role"]): a for a in facts["audits"]}
    q = audits["weight_global", "q"]
    assert q["count"] == 3 and q["max"] == 1.5
    assert [o["module"] for o in q["outliers"]] == ["model.layers.2.q_proj"]
    assert facts["groups"][0]["unequal"] == 2
    text = squeezed(says(capsys, artifact, "--scales"))
    assert "model.layers.2.q_proj 1.5" in text and "each shard keeps its own" in text


def test_scales_of_activations(capsys: Capture, unequal: Path) -> None:
    facts = told(capsys, unequal, "--scales")
    groups = {(tuple(g["roles"]), g["kind"]): g for g in facts["groups"]}
    group = groups[("q", "k", "v"), "input"]
    assert (group["unequal"], group["layers"]) == (1, 2)
    assert abs(group["most"] - 2.0) < 1e-6


# --- integrity -----------------------------------------------------------------------------------


def test_check_passes_and_then_finds_a_changed_byte(capsys: Capture, tmp_path: Path) -> None:
    artifact = write(tmp_path / "a.hb", decoder(Shape(layers=1)))
    assert "artifact: whole" in says(capsys, artifact, "--check")
    library = artifact / "kernels-cpu.so"
    library.write_bytes(library.read_bytes()[::-1])
    assert main(["inspect", str(artifact), "--check"]) == 1
    text = capsys.readouterr().out
    assert "CHANGED" in text and "DAMAGED" in text
    library.write_bytes(b"short")
    assert main(["inspect", str(artifact), "--check"]) == 1
    assert "wrong size" in capsys.readouterr().err


def test_check_refuses_a_library_for_another_machine(capsys: Capture, tmp_path: Path) -> None:
    artifact = write(tmp_path / "a.hb", decoder(Shape(layers=1)))
    path = artifact / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["targets"]["cpu"]["features"] = ["x86-64", "glibc>=99.1"]
    path.write_text(json.dumps(manifest))
    assert main(["inspect", str(artifact), "--check"]) == 1
    assert "glibc>=99.1" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("part", "flag"),
    [("50_capture.ir", "--memory"), ("log.json", "--phases"), ("scales.json", "--scales")],
)
def test_a_damaged_record_is_a_plain_error(
    capsys: Capture, tmp_path: Path, part: str, flag: str
) -> None:
    artifact = write(tmp_path / "a.hb", decoder(Shape(layers=1)))
    file = artifact / "passes" / "cpu" / part
    file.write_bytes(b"\xff" * file.stat().st_size)
    assert main(["inspect", str(artifact), flag]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and part in error


def test_an_artifact_without_record_still_has_a_summary(capsys: Capture, tmp_path: Path) -> None:
    artifact = write(tmp_path / "a.hb", decoder(Shape(layers=1)))
    path = artifact / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["parts"] = {n: p for n, p in manifest["parts"].items() if "passes/" not in n}
    path.write_text(json.dumps(manifest))
    assert "tiny: llama" in says(capsys, artifact)
    assert "artifact: whole" in says(capsys, artifact, "--check")
    assert "no scales" in says(capsys, artifact, "--scales")
    for flags in (["--memory"], ["--layer", "lm_head"], ["--phase", "30"]):
        assert main(["inspect", str(artifact), *flags]) == 1
        assert "no record" in capsys.readouterr().err or flags[0] == "--phase"


def test_every_view_needs_numpy_alone(artifact: Path, root: Path) -> None:
    views = [[], ["--layer", Q0], ["--phases"], ["--phase", "30"], ["--diff", "10", "30"],
             ["--kernels"], ["--memory"], ["--scales"], ["--check"]]  # fmt: skip
    code = (
        "import sys\n"
        "for name in ('ml_dtypes', 'gguf', 'tvm_ffi', 'tokenizers', 'jinja2'):\n"
        "    sys.modules[name] = None\n"
        "from halfbyte.cli import main\n"
        f"for view in {views!r}:\n"
        f"    assert main(['inspect', {str(artifact)!r}, *view]) == 0, view\n"
        "assert not [m for m in sys.modules if m.startswith(('halfbyte.passes', "
        "'halfbyte.frontend'))]\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# --- words ---------------------------------------------------------------------------------------


def test_names_are_made_short() -> None:
    assert short("a.0.q_proj + a.0.k_proj") == "a.0.{q,k}_proj"
    assert short("a.x + b.y") == "{a.x,b.y}"
    assert short("lm_head") == "lm_head"
    assert ranges([3, 0, 1, 2, 7]) == "0-3,7"
    assert collapsed(["m.0.q", "m.1.q", "m.0.k", "n"]) == ["m.{0-1}.q", "m.0.k", "n"]


def test_numbers_are_made_readable() -> None:
    assert [size(n) for n in (640, 3200, 101 << 20, 5 << 30)] == [
        "640 B", "3.1 KiB", "101.0 MiB", "5.00 GiB",
    ]  # fmt: skip
    assert token_spans((1, 8), (1, 8, 64, 512)) == "1..8"
    assert token_spans((64, 512), (1, 8, 64, 512)) == "9..512"
    assert token_spans((1, 512), (1, 8, 64, 512)) == "1, 65..512"
    assert table([("a", 1), ("bbb", 22)], right=(1,)) == ["a     1", "bbb  22"]
