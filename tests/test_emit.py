"""Phases 60 and 70 on small decoders: artifacts whose kernels and logits are the interpreter's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from halfbyte.codegen import (
    Library,
    Request,
    compile_library,
    declarations,
    elf,
    ffi_options,
    find_compiler,
    kernel_choice,
    write_artifact,
)
from halfbyte.codegen.emit import Build
from halfbyte.codegen.kernels import BY_NAME
from halfbyte.codegen.plan import EXPORTS
from halfbyte.codegen.selftest import Session, cases, selftest, summary
from halfbyte.ir.builder import Builder
from halfbyte.ir.errors import IRError, TargetError
from halfbyte.ir.graph import Graph, Value
from halfbyte.ir.interp import run
from halfbyte.ir.numerics import Array
from halfbyte.ir.target import target
from halfbyte.ir.types import tensor
from halfbyte.passes import pipeline
from halfbyte.passes.context import Context, Phase, nothing
from halfbyte.passes.p35_select_kernels import select
from halfbyte.runtime.artifact import WEIGHTS, Artifact, ModelFacts, WeightsFile
from halfbyte.runtime.model import load
from tests.graphs import Decoder, Shape, decoder

ODD = Shape(hidden=80, inner=112, heads=5, kv_heads=1, head_dim=16, vocab=1100, context=600)


def normed_decoder(softcap: float = 0.0) -> Decoder:
    """One layer with biases, qk-norm and a sliding window, all weights dense (f32, f16)."""
    b, rng, data = Builder("normed"), np.random.default_rng(5), dict[str, Array]()

    def weight(name: str, dtype: str, *shape: int) -> Value:
        values = rng.standard_normal(shape) / np.sqrt(shape[-1])
        data[name] = values.astype(np.float16 if dtype == "f16" else np.float32)
        return b.weight(name, tensor(dtype, *shape))

    ids, pos = b.arg("ids", tensor("i32", "T")), b.arg("pos", tensor("i32"))
    rows, table = b.arg("rows", tensor("i32", "R")), weight("table", "f16", 90, 72)
    frequencies = weight("inv_freq", "f32", 8)
    x = b.op("embed", ids, table, scale=8.0, loc="embed")
    heads = {"q": 6, "k": 2, "v": 2}
    q, k, v = (
        b.op("linear", x, weight(n, "f32", h * 16, 72), weight(f"{n}.b", "f32", h * 16), loc=n)
        for n, h in heads.items()
    )
    q, k = (
        b.op("head_rmsnorm", y, weight(f"{n}.g", "f32", 16), heads=heads[n], head_dim=16, eps=1e-5)
        for n, y in (("q", q), ("k", k))
    )
    q, k = (
        b.op("rope", y, pos, frequencies, heads=heads[n], head_dim=16)
        for n, y in (("q", q), ("k", k))
    )
    cache = tensor("f32", 2, 500, 16)
    keys, values = (b.op("kv_append", b.state(n, cache), y, pos) for n, y in (("k", k), ("v", v)))
    a = b.op("attention", q, keys, values, pos, heads=6, kv_heads=2, head_dim=16, scale=0.25,
             window=21, softcap=softcap, loc="attention")  # fmt: skip
    x = b.op("add", x, b.op("linear", a, weight("o", "f16", 72, 96), loc="o"))
    x = b.op("take_rows", x, rows)
    return Decoder(b.build(b.op("linear", x, table, loc="head")), data)


@dataclass(frozen=True, slots=True)
class Made:
    """A decoder compiled: its graph behind phase 50, its library, its artifact."""

    decoder: Decoder
    graph: Graph
    library: Library
    artifact: Artifact
    weights: WeightsFile  # its image lives as long as it does

    @property
    def image(self) -> npt.NDArray[np.uint8]:
        return self.weights.image


Make = Callable[[Decoder, Context, Sequence[Phase]], Made]


@pytest.fixture(scope="session")
def make(pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Compile a decoder. Objects are kept between test runs, in pytest's own cache folder."""
    assert pytestconfig.cache is not None
    objects = Path(pytestconfig.cache.mkdir("objects"))

    def compile_decoder(made: Decoder, context: Context, phases: Sequence[Phase]) -> Made:
        graph = pipeline.run(made.graph, context, phases)
        compiler, options = find_compiler(None, objects), ffi_options(objects)
        library = compile_library(graph, context.target, compiler, options)
        chosen = (
            kernel_choice(c.op, c.bucket, c.kernel, c.refused) for c in select(graph, context)
        )
        vocab, capacity = library.plan.vocab, library.plan.context
        facts = ModelFacts("tiny", "tiny", vocab, capacity, None, (), {})
        request = Request(facts, "test", "2026-01-01T00:00:00Z")
        out = tmp_path_factory.mktemp("made") / "tiny.hb"
        built = Build(graph, library, tuple(chosen))
        artifact = write_artifact(out, [built], context.weights, request)
        return Made(made, graph, library, artifact, WeightsFile(artifact.path(WEIGHTS)))

    return compile_decoder


def context_of(made: Decoder, recipe: str = "auto") -> Context:
    return Context(target("cpu"), declarations(), made.data.__getitem__, recipe)


@pytest.fixture(scope="session", params=["w4a16", "w4a4"])
def made(request: pytest.FixtureRequest, make: Make) -> Made:
    tiny = decoder(ODD, w4a4=request.param == "w4a4", seed=3)
    return make(tiny, context_of(tiny, request.param), pipeline.PHASES)


@pytest.fixture(scope="session")
def unfused(make: Make) -> Made:
    """Nothing fused, NVFP4 weights as in the checkpoint: only allowed by name."""
    tiny = decoder(replace(ODD, layers=1, heads=4, kv_heads=2, vocab=200), seed=4)
    base = context_of(tiny)
    context = replace(
        base,
        target=replace(base.target, nvfp4_layout="linear"),
        allow_fallback=frozenset({"nvfp4_rowmajor_linear"}),
    )
    kept = [phase for phase in pipeline.PHASES if phase.id != "30_fuse"]
    return make(tiny, context, [replace(phase, ensures=nothing) for phase in kept])


def cosines(made: Made, tokens: int) -> npt.NDArray[np.float64]:
    """Of the library's logits and the interpreter's, by position: one prefill, and a few short."""
    inputs = made.decoder.inputs(tokens)
    (want,) = run(made.graph, dict(inputs), made.decoder.data.__getitem__)
    assert isinstance(want, np.ndarray)
    ids = inputs["ids"].tolist()
    with load(made.artifact.folder) as model:
        rows = [model.logits(ids), *(model.logits(ids[:n])[-1:] for n in (1, 2, 9))]
    found, reference = np.concatenate(rows), np.concatenate([want, want[[0, 1, 8]]])
    norms = np.linalg.norm(found, axis=1) * np.linalg.norm(reference, axis=1)
    return np.sum(found * reference, axis=1) / norms


def test_logits_are_the_interpreters(made: Made) -> None:
    assert np.median(cosines(made, 70)) > 0.99999


def test_ops_left_alone_have_kernels(unfused: Made) -> None:
    names = {kernel.name for kernel in unfused.library.plan.kernels}
    alone = {"rmsnorm", "rope", "kv_append", "attention", "silu_mul", "add", "take_rows"}
    assert alone | {"nvfp4_rowmajor_linear"} <= names
    assert cosines(unfused, 70).min() > 0.999999
    tested = {test.kernel for test in unfused.artifact.target("cpu").selftest}
    assert tested == names


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("softcap", [0.0, 1.5])
def test_qk_norm_window_softcap_and_biases(make: Make, fused: bool, softcap: float) -> None:
    tiny = normed_decoder(softcap)
    phases = [phase for phase in pipeline.PHASES if fused or phase.id != "30_fuse"]
    made = make(tiny, context_of(tiny), phases)
    ops = {op.name for op in made.library.plan.ops}
    assert ("rope_append" in ops) == fused and ("head_rmsnorm" in ops) != fused
    assert cosines(made, 80).min() > 0.999999
    made.weights.close()


@pytest.mark.parametrize("isa", ["scalar", "avx2", "avx512", "amx"])
@pytest.mark.parametrize("threads", [1, 3])
def test_every_kernel_on_every_isa(made: Made, isa: str, threads: int) -> None:
    image = made.image
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
    facts = Artifact.open(made.artifact.folder, check=True).target("cpu")
    by_loc = {(c.loc, c.bucket): c for c in facts.kernels}
    head = by_loc["lm_head", 1]
    assert (head.kernel, head.n, head.k) == ("dense_gemv_bf16", ODD.vocab, ODD.hidden)
    assert any("weight is bf16" in refused.reason for refused in head.refused)
    qkv = next(w for w in facts.weights if "model.layers.0.q_proj.weight" in w.source)
    assert {"model.layers.0.k_proj.weight", "model.layers.0.v_proj.weight_scale"} <= {*qkv.source}
    assert "p16" in qkv.type
    assert {test.kernel for test in facts.selftest} <= set(BY_NAME)
    assert [phase.id for phase in facts.phases] == ["60_codegen", "70_artifact"]
    assert "glibc>=" in " ".join(facts.features)


def test_a_kernel_that_strays_is_caught(made: Made) -> None:
    """The reference sees another weight than the kernel: the error names the op and the kernel."""
    other = np.array(made.image)
    with Session(made.library.built.path, made.image) as session:
        gamma = made.library.plan.ops[1].args[2].place
        assert gamma is not None
        other[gamma.offset + 2] ^= 0x40
        session.image = other
        with pytest.raises(TargetError, match=r"model\.layers\.0\.q_proj.*nvfp4_.*off by"):
            selftest(made.library.plan, session)


def test_the_library_shows_its_exports_and_nothing_else(made: Made) -> None:
    assert elf.read(made.library.built.path).exports == set(EXPORTS)
    assert set(made.library.built.needed) <= {"libtvm_ffi.so", "libc.so.6", "libm.so.6"}


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
            [Build(made.graph, library)],
            made.decoder.data.__getitem__,
            Request(facts, "test", ""),
        )
    assert not list(tmp_path.iterdir())
