"""Phases 60 and 70 on small decoders: artifacts whose kernels and logits are the interpreter's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from halfbyte.codegen import (
    Library,
    Request,
    compile_library,
    declarations,
    ffi_options,
    find_compiler,
    kernel_choice,
    write_artifact,
)
from halfbyte.codegen.kernels import BY_NAME
from halfbyte.codegen.selftest import Session, cases, selftest, summary
from halfbyte.ir.errors import IRError, TargetError
from halfbyte.ir.graph import Graph
from halfbyte.ir.interp import run
from halfbyte.ir.numerics import Array
from halfbyte.ir.target import target
from halfbyte.passes import pipeline
from halfbyte.passes.context import Context
from halfbyte.passes.p35_select_kernels import select
from halfbyte.runtime.artifact import WEIGHTS, Artifact, ModelFacts, WeightsFile
from halfbyte.runtime.model import load
from tests.graphs import Decoder, Shape, decoder

ODD = Shape(hidden=80, inner=112, heads=5, kv_heads=1, head_dim=16, vocab=1100, context=600)


@dataclass(frozen=True, slots=True)
class Made:
    """A decoder compiled: its graph behind phase 50, its library, its artifact."""

    decoder: Decoder
    graph: Graph
    library: Library
    artifact: Artifact

    def image(self) -> Array:
        return WeightsFile(self.artifact.path(WEIGHTS)).image


Make = Callable[..., Made]


@pytest.fixture(scope="session")
def make(pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Compile a decoder. Objects are kept between test runs, in pytest's own cache folder."""
    assert pytestconfig.cache is not None
    objects = Path(pytestconfig.cache.mkdir("objects"))

    def compile_decoder(shape: Shape, *, w4a4: bool = False, seed: int = 0) -> Made:
        made = decoder(shape, w4a4=w4a4, seed=seed)
        context = Context(
            target("cpu"), declarations(), made.data.__getitem__, "w4a4" if w4a4 else "auto"
        )
        graph = pipeline.run(made.graph, context)
        library = compile_library(graph, find_compiler(None, objects), ffi_options(objects))
        chosen = (
            kernel_choice(c.op, c.bucket, c.kernel.name, c.refused) for c in select(graph, context)
        )
        facts = ModelFacts("tiny", "tiny", shape.vocab, shape.context, None, (), {})
        request = Request(facts, "test", "2026-01-01T00:00:00Z", tuple(chosen), ())
        out = tmp_path_factory.mktemp("made") / "tiny.hb"
        artifact = write_artifact(out, graph, library, context.weights, request)
        return Made(made, graph, library, artifact)

    return compile_decoder


@pytest.fixture(scope="session", params=["w4a16", "w4a4"])
def made(request: pytest.FixtureRequest, make: Make) -> Made:
    return make(ODD, w4a4=request.param == "w4a4", seed=3)


def test_logits_are_the_interpreters(made: Made) -> None:
    inputs = made.decoder.inputs(tokens=70)
    (want,) = run(made.graph, dict(inputs), made.decoder.data.__getitem__)
    assert isinstance(want, np.ndarray)
    with load(made.artifact.folder) as model:
        found = model.logits(inputs["ids"].tolist())
        again = np.concatenate([model.logits(inputs["ids"].tolist()[:n])[-1:] for n in (1, 2, 9)])
    for rows, reference in ((found, want), (again, want[[0, 1, 8]])):
        cosine = np.sum(rows * reference, 1) / (
            np.linalg.norm(rows, axis=1) * np.linalg.norm(reference, axis=1)
        )
        assert np.median(cosine) > 0.99999


@pytest.mark.parametrize("isa", ["scalar", "avx2", "avx512", "amx"])
@pytest.mark.parametrize("threads", [1, 3])
def test_every_kernel_on_every_isa(made: Made, isa: str, threads: int) -> None:
    image = made.image()
    try:
        session = Session(made.library.built.path, image, threads=threads, isa=isa)
    except Exception as error:
        if isa not in str(error):
            raise
        pytest.skip(str(error))
    with session:
        tests = selftest(made.library.plan, session, seed=threads)
    assert len(tests) == len(cases(made.library.plan)) > 15
    assert all(test.max_abs <= test.tolerance for test in tests), summary(tests)


def test_manifest_tells_kernels_weights_and_tests(made: Made) -> None:
    manifest = Artifact.open(made.artifact.folder, check=True).manifest
    by_loc = {(c.loc, c.bucket): c for c in manifest.kernels}
    head = by_loc["lm_head", 1]
    assert (head.kernel, head.n, head.k) == ("dense_gemv_bf16", ODD.vocab, ODD.hidden)
    assert any("weight is bf16" in refused.reason for refused in head.refused)
    qkv = next(w for w in manifest.weights if "model.layers.0.q_proj.weight" in w.source)
    assert {"model.layers.0.k_proj.weight", "model.layers.0.v_proj.weight_scale"} <= {*qkv.source}
    assert "p16" in qkv.type
    assert {test.kernel for test in manifest.selftest} <= set(BY_NAME)
    assert [phase.id for phase in manifest.phases] == ["60_codegen", "70_artifact"]
    assert "glibc>=" in " ".join(manifest.targets["cpu"].features)


def test_a_kernel_that_strays_is_caught(made: Made) -> None:
    """The reference sees another weight than the kernel: the error names the op and the kernel."""
    other = np.array(made.image())
    with Session(made.library.built.path, made.image()) as session:
        gamma = made.library.plan.ops[1].args[2].place
        assert gamma is not None
        other[gamma.offset + 2] ^= 0x40
        session.image = other
        with pytest.raises(TargetError, match=r"model\.layers\.0\.q_proj.*nvfp4_.*off by"):
            selftest(made.library.plan, session)


def test_plan_comments_hold_the_ir(made: Made) -> None:
    text = made.library.sources["plan.cc"]
    assert "// %h = embed(%ids, %p)" in text
    assert text.count("const LinearArgs ") == 1 + 4 * ODD.layers


def test_the_image_must_be_where_phase_40_put_it(made: Made, tmp_path: Path) -> None:
    short = replace(made.library.plan, weights_bytes=64)
    library = replace(made.library, plan=short)
    facts = made.artifact.manifest.model
    with pytest.raises(IRError, match="planned 64"):
        write_artifact(
            tmp_path / "x.hb",
            made.graph,
            library,
            made.decoder.data.__getitem__,
            Request(facts, "test", "", (), ()),
        )
    assert not list(tmp_path.iterdir())
