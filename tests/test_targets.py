"""One artifact for several targets: what they share, what each has, and which one is taken."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from halfbyte.codegen import declarations
from halfbyte.codegen.graphs import Compiled, graphs_of
from halfbyte.codegen.weights import Known, Layout, evaluated, lay_out, stored_parts
from halfbyte.driver import Options, compile_model
from halfbyte.frontend import Imported, import_model, open_checkpoint
from halfbyte.inspect_check import check
from halfbyte.inspect_graph import graphs as graphs_in
from halfbyte.inspect_graph import graphs_text
from halfbyte.inspect_kernels import kernels, kernels_text
from halfbyte.inspect_source import Source
from halfbyte.ir.errors import IRError, ModelError, TargetError
from halfbyte.ir.graph import Graph
from halfbyte.ir.target import target
from halfbyte.passes import pipeline
from halfbyte.passes.context import Context
from halfbyte.runtime import load
from halfbyte.runtime.artifact import Artifact, ArtifactWriter, KernelCode
from halfbyte.runtime.target_weights import TargetWeights

TARGETS = ("sm_120a", "sm_90a", "cpu")


@pytest.fixture(scope="module")
def imported(root: Path) -> Imported:
    return import_model(open_checkpoint(root / "tests/data/llama_tied-modelopt"), context=64)


@pytest.fixture(scope="module")
def graphs(imported: Imported) -> dict[str, Graph]:
    made: dict[str, Graph] = {}
    for name in (*TARGETS, "sm_120f"):
        context = Context(target(name), declarations(name), imported.weights)
        made[name] = pipeline.run(imported.graph, context)
    return made


def laid_out(graphs: dict[str, Graph], *names: str) -> dict[str, Layout]:
    known = Known()
    return {n: lay_out(graphs[n], n, known, on_device=n != "cpu") for n in names}


def image_of(imported: Imported, graph: Graph) -> bytes:
    """The image by itself, part by part."""
    parts = stored_parts(graph)
    data = dict(evaluated(parts, graph, imported.weights))
    pieces = (np.ascontiguousarray(data[p.name]).tobytes() for p in parts)
    return b"".join(x.ljust(p.nbytes, b"\0") for p, x in zip(parts, pieces, strict=True))


def test_equal_parts_are_stored_once(graphs: dict[str, Graph]) -> None:
    found = laid_out(graphs, "sm_120a", "sm_90a", "cpu")
    assert [found[n].file for n in TARGETS] == [
        "weights.safetensors", "weights-sm_90a.safetensors", "weights-cpu.safetensors",
    ]  # fmt: skip
    borrowed = [r for r in found["sm_90a"].runs if r.file == "weights.safetensors"]
    assert sum(r.bytes for r in borrowed) > sum(r.bytes for r in found["sm_90a"].runs) / 4
    assert len(found["cpu"].runs) == len(found["sm_120a"].runs) == 1
    scales = [p for p in found["sm_90a"].own if p.part.suffix == "sf"]
    assert not [p.name for p in scales if p.part.nbytes >= 4096], "both targets read SfAtoms"


def test_targets_of_one_layout_share_everything(graphs: dict[str, Graph]) -> None:
    found = laid_out(graphs, "sm_120a", "sm_120f")
    assert sum(p.nbytes for p in found["sm_120f"].own) < 65536


def test_shared_parts_are_equal(
    imported: Imported, graphs: dict[str, Graph], tmp_path: Path
) -> None:
    """Read back piece by piece, each target's image is what it would have stored alone."""
    found = laid_out(graphs, *TARGETS, "sm_120f")
    with ArtifactWriter(tmp_path / "x.hb") as writer:
        data: dict[str, bytes] = {}
        for name, layout in found.items():
            with writer.weights(layout.image, layout.file) as file:
                for part, array in evaluated(layout.own, graphs[name], imported.weights):
                    file.add(part, array)
            raw = (writer.folder / layout.file).read_bytes()
            data[layout.file] = raw[8 + int.from_bytes(raw[:8], "little") :]
        for name, layout in found.items():
            image = b"".join(data[r.file][r.begin : r.begin + r.bytes] for r in layout.runs)
            assert image == image_of(imported, graphs[name]), name


# --- compiled -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def artifact(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For two devices without CUTLASS, and the cpu."""
    out = tmp_path_factory.mktemp("targets") / "three.hb"
    model = root / "tests/data/llama_tied-modelopt"
    try:
        report = compile_model(
            Options(model, out, target=",".join(TARGETS), recipe="w4a16", context=64)
        )
    except TargetError as error:
        if "nvcc" in str(error):
            pytest.skip(str(error))
        raise
    assert [report.target, *(r.target for r in report.others)] == list(TARGETS)
    return out


@pytest.mark.slow
def test_the_record_tells_of_each_target(artifact: Path) -> None:
    manifest = Artifact.open(artifact, check=True).manifest
    assert list(manifest.targets) == list(TARGETS)
    for name in TARGETS:
        source = Source(artifact, name)
        assert source.phases[-1] == "50_capture" and source.facts.kernels
        assert any("plan.cc" in part for part in manifest.parts if f"/{name}/" in part)
        file, at = source.file_place(source.facts.weights[0].offset)
        assert file in manifest.parts and at > 0
        weights = TargetWeights(source.artifact, name)
        assert sum(map(len, weights.pieces)) == source.facts.image_bytes
        weights.close()
    facts = manifest.targets
    assert {k.kernel for k in facts["sm_120a"].kernels} >= {"nvfp4_gemv_rowmajor"}
    assert {k.kernel for k in facts["sm_90a"].kernels} >= {"nvfp4_gemm"}
    assert facts["cpu"].selftest and not facts["sm_90a"].selftest
    with pytest.raises(TargetError, match="no code for 'sm_80', found cpu, sm_120a, sm_90a"):
        Source(artifact, "sm_80")


@pytest.mark.slow
def test_graphs_hold_what_the_launchers_enqueue(artifact: Path) -> None:
    for name, sms in (("sm_120a", 170), ("sm_90a", 132)):
        source = Source(artifact, name)
        found = graphs_in(source)
        assert found.sms == sms and [g.bucket for g in found.graphs] == list(source.facts.buckets)
        for graph in found.graphs:
            launches = sum(c.bucket == graph.bucket for c in source.facts.kernels)
            assert sum(row.times for row in graph.rows) == launches <= graph.kernels
            assert [n.kernel for n in graph.sampler] == ["sample_kernel"]
            for n in (n for row in graph.rows for n in row.nodes):
                assert 0 < n.threads <= 1024 and 0 < n.registers <= 255 and not n.spilled
                assert n.shared <= target(name).shared_bytes
        table = kernels(source)
        assert {c.row for c in table.compiled} == set(range(1, len(table.linears) + 1))
        for row in range(1, len(table.linears) + 1):
            of_row = [c for c in table.compiled if c.row == row]
            assert [b for c in of_row for b in c.buckets] == list(source.facts.buckets)
            assert all(c.nodes[-1].tile for c in of_row)
        text = "\n".join([*kernels_text(table), *graphs_text(found)])
        assert "no copies, no allocations" in text and " x 8 x K" in text
    with pytest.raises(ModelError, match="cpu runs no CUDA graphs"):
        graphs_in(Source(artifact, "cpu"))


def compiled(shared: int) -> list[Compiled]:
    return [Compiled("_Z1kv", KernelCode("k.cu", "k", 32, 0, 0, shared))]


def test_a_launch_that_a_device_would_refuse_is_our_bug() -> None:
    line = "1 0 {},1,1 128,1,1 {} {} 1 _Z1kv"
    ok = graphs_of(line.format(4, 49152, 49152), compiled(128), target("sm_120a"))
    graph = ok.of(1)
    assert graph is not None
    assert ok.kinds[0].grid == (4, 1, 1) and list(map(list, graph.launches)) == [[0]]
    for shared, allowed in ((49152, 0), (50000, 49152), (101376, 101376)):
        with pytest.raises(IRError, match="bytes of shared memory"):
            graphs_of(line.format(1, shared, allowed), compiled(128), target("sm_120a"))
    with pytest.raises(IRError, match="is launched, but was not compiled"):
        graphs_of(line.format(1, 0, 0), [], target("sm_120a"))


@pytest.mark.slow
def test_the_cpu_runs_its_own(artifact: Path) -> None:
    model = load(artifact)
    assert model.target == "cpu" and model.facts.buckets[0] == 1
    assert np.isfinite(model.logits([1, 2, 3])).all()
    model.close()
    verdict = {t.name: t.lacks for t in check(Source(artifact)).targets}
    assert verdict["cpu"] == ()
    if verdict["sm_120a"]:
        assert "compute capability 12.0" in verdict["sm_120a"][0]


@pytest.mark.gpu
def test_a_device_runs_its_own_pieces(artifact: Path, root: Path, tmp_path: Path) -> None:
    """On a Hopper: the image of two files gives the logits of an artifact for it alone."""
    model = root / "tests/data/llama_tied-modelopt"
    alone = tmp_path / "alone.hb"
    compile_model(Options(model, alone, target="sm_90a", recipe="w4a16", context=64))
    ids = [(7 * i + 3) % 500 for i in range(40)]
    logits: list[bytes] = []
    for path in (artifact, alone):
        with load(path, "cuda:0") as opened:
            assert opened.target == "sm_90a"
            logits.append(opened.logits(ids).tobytes())
    assert logits[0] == logits[1]
    other = tmp_path / "other.hb"
    compile_model(Options(model, other, target="sm_120a,cpu", recipe="w4a16", context=64))
    with pytest.raises(TargetError, match=r"compute capability 9\.0.*holds cpu, sm_120a"):
        load(other, "cuda:0")


def test_what_is_asked_for_must_exist(root: Path, tmp_path: Path) -> None:
    model = root / "tests/data/llama_tied-modelopt"

    def compiling(**options: object) -> Callable[[], object]:
        return lambda: compile_model(Options(model, tmp_path / "x.hb", **options))  # pyright: ignore

    with pytest.raises(TargetError, match="target 'sm_80': unknown, expected one of cpu, sm_120a"):
        compiling(target="cpu,sm_80")()
    with pytest.raises(ModelError, match="start_from: the IR of a phase is of one target"):
        compiling(target="cpu,sm_90a", start_from=("30", tmp_path / "x.ir"))()
