"""`halfbyte doctor`: what it reads off a machine, and that each lack names what mends it."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from halfbyte import doctor
from halfbyte.codegen import nvcc
from halfbyte.codegen.isa import ISAS
from halfbyte.doctor import Gpu, Tool

AVX2_FLAGS = "fpu sse2 fma f16c avx avx2 bmi2"
AVX512_FLAGS = f"{AVX2_FLAGS} avx512f avx512bw avx512vl avx512dq avx512vbmi avx512_vnni"
AMX_FLAGS = f"{AVX512_FLAGS} avx512_bf16 avx512_fp16 amx_tile amx_bf16"

ALL_PACKAGES = tuple(Tool(n, "1.0") for n in (*doctor.RUN_PACKAGES, *doctor.COMPILE_PACKAGES))
CXX = Tool("c++", "gcc 12", "c++")
ZIG = Tool("ziglang", None)
NVCC = Tool("nvcc", "13.0", "nvcc")


def _parse(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    doctor.add_parser(parser.add_subparsers(required=True))
    return parser.parse_args(["doctor", *words])


@pytest.mark.parametrize(
    ("flags", "isa", "lacking"),
    [
        ("fpu sse2", "scalar", ["avx2", "avx512", "amx"]),
        (AVX2_FLAGS, "avx2", ["avx512", "amx"]),
        (AVX512_FLAGS, "avx512", ["amx"]),
        (AMX_FLAGS, "amx", []),
    ],
)
def test_variant_follows_from_the_flags(
    tmp_path: Path, flags: str, isa: str, lacking: list[str]
) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    one = f"processor\t: 0\nmodel name\t: Some CPU @ 2:1\nflags\t\t: {flags}\n\n"
    cpuinfo.write_text(one + one.replace(flags, "none"))
    cpu = doctor.read_cpu(cpuinfo)
    assert (cpu.model, cpu.isa, list(cpu.lacks)) == ("Some CPU @ 2:1", isa, lacking)
    assert cpu.cores >= 1


def test_feature_table_is_codegens() -> None:
    assert {isa.name: isa.features for isa in ISAS} == doctor.ISA_FEATURES


def test_a_machine_without_cpuinfo_runs_scalar(tmp_path: Path) -> None:
    assert doctor.read_cpu(tmp_path / "absent").isa == "scalar"


def test_complete_machine_lacks_nothing_for_cpu() -> None:
    assert doctor.cpu_target((CXX, ZIG, NVCC), ALL_PACKAGES).lacks == ()


def test_run_only_machine_runs_but_does_not_compile() -> None:
    packages = tuple(
        Tool(t.name, None) if t.name in doctor.COMPILE_PACKAGES else t for t in ALL_PACKAGES
    )
    state = doctor.cpu_target((Tool("c++", None), ZIG, NVCC), packages)
    assert state.can("run") and not state.can("compile")
    remedies = [lack.remedy for lack in state.lacks]
    assert remedies == ["pip install ml_dtypes gguf", "pip install ziglang"]


def test_broken_cxx_variable_is_blamed() -> None:
    broken = Tool("c++", None, "$CXX=nonsense: does not work")
    (lack,) = doctor.cpu_target((broken, ZIG, NVCC), ALL_PACKAGES).lacks
    assert lack.remedy == "unset CXX"


@pytest.mark.parametrize("version", [None, "12.6"])
def test_old_or_absent_nvcc_is_named(version: str | None) -> None:
    gpu = Gpu("RTX", "12.0", "32607 MiB", "580.1")
    state = doctor.cuda_target("sm_120a", (CXX, ZIG, Tool("nvcc", version)), (gpu,))
    assert any("nvcc >= 13.0" in lack.what for lack in state.lacks)
    assert state.can("run")


def test_cuda_facts_are_those_of_the_compiler() -> None:
    assert doctor.OLDEST_NVCC == nvcc.OLDEST and str(doctor.OLDEST_DRIVER) == nvcc.DRIVER_MIN
    assert doctor.CUDA_EXTRA == nvcc.REMEDY


def test_an_old_driver_and_absent_headers_are_named() -> None:
    gpu = Gpu("RTX", "12.0", "32607 MiB", "570.86")
    state = doctor.cuda_target("sm_120a", (CXX, ZIG, NVCC), (gpu,), (Tool("nvidia-cutlass", None),))
    assert [lack.needed_to for lack in state.lacks] == ["compile", "run"]
    assert "nvidia-cutlass" in state.lacks[0].what and "570.86" in state.lacks[1].what


def test_wrong_gpu_is_named_with_what_was_found() -> None:
    gpu = Gpu("H100", "9.0", "81559 MiB", "580.1")
    state = doctor.cuda_target("sm_120a", (CXX, ZIG, NVCC), (gpu,))
    (lack,) = [lack for lack in state.lacks if lack.needed_to == "run"]
    assert "12.0" in lack.what and "H100 (9.0)" in lack.what


def test_every_lack_says_what_mends_it() -> None:
    nothing = (Tool("c++", None), ZIG, Tool("nvcc", None))
    absent = tuple(Tool(tool.name, None) for tool in ALL_PACKAGES)
    states = [doctor.cpu_target(nothing, absent)]
    states += [doctor.cuda_target(name, nothing, ()) for name in doctor.CUDA_TARGETS]
    for state in states:
        assert not state.can("compile") and not state.can("run")
        assert all(lack.what and lack.remedy for lack in state.lacks)


def test_json_and_text_tell_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "object").write_bytes(b"12345")
    status = doctor.main(_parse("--json"), cache=tmp_path)
    report = json.loads(capsys.readouterr().out)
    assert [target["name"] for target in report["targets"]] == ["cpu", "sm_120a", "sm_90a"]
    assert report["cache"]["folder"] == str(tmp_path) and report["cache"]["bytes"] >= 5
    assert doctor.main(_parse(), cache=tmp_path) == status
    text = capsys.readouterr().out
    assert report["cpu"]["model"] in text
    for tool in report["packages"]:
        assert f"{tool['name']:<16}{tool['version'] or 'absent'}" in text
    for target in report["targets"]:
        for lack in target["lacks"]:
            assert lack["what"] in text and f"mend: {lack['remedy']}" in text
