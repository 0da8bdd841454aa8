"""The KV cache in FP8: what a checkpoint declares, what is made of it, and what its ops mean."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from halfbyte.codegen import declarations
from halfbyte.codegen.plan import Plan, make_plan
from halfbyte.codegen.tolerance import tolerance
from halfbyte.driver import Options, compile_model
from halfbyte.frontend import Imported, import_model, open_checkpoint
from halfbyte.inspect_source import Scale
from halfbyte.ir import numerics
from halfbyte.ir.errors import IRError, ModelError, TargetError
from halfbyte.ir.graph import Graph, Op, Value
from halfbyte.ir.interp import evaluate, run
from halfbyte.ir.numerics import Array
from halfbyte.ir.opdef import Data, array
from halfbyte.ir.target import target
from halfbyte.ir.text import from_text, to_text
from halfbyte.ir.types import PAGED, Plain, tensor
from halfbyte.ir.verify import verify
from halfbyte.passes import pipeline
from halfbyte.passes.context import Context
from halfbyte.passes.pipeline import Report
from tests.checkpoint_files import (
    E4M3,
    Config,
    Tensors,
    dense_weights,
    llama_config,
    write_checkpoint,
)
from tests.graphs import Shape, decoder
from tests.kv_checkpoints import DIALECTS, calibrated, logits_of
from tests.test_oracle import cosines

AT = "model.layers.0.self_attn"
K, V = 0.03125, 0.017
MODELOPT = {f"{AT}.k_proj.k_scale": K, f"{AT}.v_proj.v_scale": V}
COMPRESSED = {f"{AT}.k_scale": K, f"{AT}.v_scale": V}
FUSED = {f"{AT}.qkv_proj.k_scale": K, f"{AT}.qkv_proj.v_scale": V}
SCHEME = {"type": "float", "num_bits": 8, "dynamic": False}


def legacy(algorithm: str | None) -> Config:
    """hf_quant_config.json."""
    quantization = {"quant_algo": "NVFP4", "kv_cache_quant_algo": algorithm, "group_size": 16}
    return {"producer": {"name": "modelopt"}, "quantization": quantization}


def with_scheme(**scheme: Any) -> Config:
    """config.json with the cache of compressed-tensors, or of ModelOpt's newer form."""
    quant = {"quant_method": "compressed-tensors", "kv_cache_scheme": {**SCHEME, **scheme}}
    return llama_config(quantization_config=quant)


def with_scales(scales: Mapping[str, float], shape: tuple[int, ...] = ()) -> Tensors:
    extra = {name: np.full(shape, value, np.float32) for name, value in scales.items()}
    return {**dense_weights(), **extra}


def imported(
    folder: Path, tensors: Tensors, config: Config, kv_cache: str = "auto", **files: Config
) -> Imported:
    checkpoint = open_checkpoint(write_checkpoint(folder, tensors, config, **files))
    model = import_model(checkpoint, context=16, kv_cache=kv_cache)
    verify(model.graph)
    assert to_text(from_text(to_text(model.graph))) == to_text(model.graph)
    return model


def ops(graph: Graph, name: str) -> list[Op]:
    return [op for op in graph.ops if op.name == name]


def cache_types(graph: Graph) -> set[str]:
    return {str(op.out.type.enc) for op in ops(graph, "state")}


# ---- what a checkpoint declares ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scales", "config", "files"),
    [
        (MODELOPT, llama_config(), {"hf_quant_config": legacy("FP8")}),
        (MODELOPT, with_scheme(), {}),
        (MODELOPT, with_scheme(), {"hf_quant_config": legacy(None)}),
        (COMPRESSED, with_scheme(strategy="tensor", symmetric=True), {}),
        (FUSED, with_scheme(), {}),
    ],
)
@pytest.mark.parametrize("shape", [(), (1,)])
def test_a_declared_cache_comes_with_its_scales(
    tmp_path: Path, scales: dict[str, float], config: Config, files: Any, shape: tuple[int, ...]
) -> None:
    model = imported(tmp_path, with_scales(scales, shape), config, **files)
    k, v = float(np.float32(K)), float(np.float32(V))
    assert cache_types(model.graph) == {"f8e4m3"} and not model.excused
    (attention,) = ops(model.graph, "attention")
    assert (attention.attrs["k_scale"], attention.attrs["v_scale"]) == (k, v)
    assert [op.attrs["cache_scale"] for op in ops(model.graph, "kv_append")] == [k, v]
    assert "declares FP8" in str(model.graph.attrs["kv_cache"])


def test_one_scale_for_both(tmp_path: Path) -> None:
    model = imported(tmp_path, with_scales({f"{AT}.kv_scale": K}), with_scheme())
    assert [op.attrs["cache_scale"] for op in ops(model.graph, "kv_append")] == [K, K]


def test_nobody_says_anything(tmp_path: Path) -> None:
    """Scales alone are no declaration: they are excused, with a reason."""
    model = imported(tmp_path, with_scales(MODELOPT), llama_config())
    assert cache_types(model.graph) == {"f32"} and "kv_cache" not in model.graph.attrs
    assert set(model.excused) == set(MODELOPT)
    assert not {"k_scale", "v_scale"} & set(ops(model.graph, "attention")[0].attrs)


@pytest.mark.parametrize("algorithm", ["FP8", "NVFP4", "INT8"])
def test_the_user_may_leave_it_unquantised(tmp_path: Path, algorithm: str) -> None:
    files = {"hf_quant_config": legacy(algorithm)}
    model = imported(tmp_path, dense_weights(), llama_config(), "bf16", **files)
    assert cache_types(model.graph) == {"f32"}
    assert f"declares {algorithm}" in str(model.graph.attrs["kv_cache"])


def test_the_user_may_ask_for_scales_that_no_file_declares(tmp_path: Path) -> None:
    model = imported(tmp_path, with_scales(MODELOPT), llama_config(), "fp8")
    assert cache_types(model.graph) == {"f8e4m3"}
    assert model.graph.attrs["kv_cache"] == "asked for"


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (dense_weights(), r"self_attn\.k_proj\.k_scale .*no such tensor"),
        (with_scales({f"{AT}.k_scale": K}), r"v_proj\.v_scale .*no such tensor"),
        (with_scales({**MODELOPT, f"{AT}.v_proj.v_scale": 0.0}), "v_scale.*above 0, found 0.0"),
        (with_scales({**MODELOPT, f"{AT}.k_proj.k_scale": -K}), "k_scale.*above 0, found -0.03"),
        (with_scales({**MODELOPT, f"{AT}.k_proj.k_scale": np.nan}), "k_scale.*found nan"),
        (with_scales({**MODELOPT, f"{AT}.v_proj.v_scale": np.inf}), "v_scale.*found inf"),
        (with_scales(COMPRESSED, (2,)), r"k_scale.*one scale for all heads, found f32 \[2\]"),
        (with_scales({**MODELOPT, f"{AT}.k_proj.k_bias": 0.5}), "k_bias.*expected no offset"),
    ],
)
@pytest.mark.parametrize("kv_cache", ["auto", "fp8"])
def test_a_scale_is_never_guessed(
    tmp_path: Path, tensors: Tensors, message: str, kv_cache: str
) -> None:
    with pytest.raises(ModelError, match=f"{message}.*--kv-cache bf16") as error:
        imported(tmp_path, tensors, with_scheme(), kv_cache)
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize(
    ("config", "files", "message"),
    [
        (llama_config(), {"hf_quant_config": legacy("NVFP4")}, "NVFP4"),
        (with_scheme(num_bits=4), {}, "4-bit float"),
        (with_scheme(type="int"), {}, "8-bit int"),
        (with_scheme(dynamic=True), {}, "8-bit float with dynamic scales"),
    ],
)
def test_other_formats_are_refused_by_name(
    tmp_path: Path, config: Config, files: Any, message: str
) -> None:
    wanted = f"KV cache in {message}, expected FP8 or none; compile with --kv-cache bf16"
    with pytest.raises(ModelError, match=wanted):
        imported(tmp_path, with_scales(MODELOPT), config, **files)


def test_a_scheme_of_the_wrong_type(tmp_path: Path) -> None:
    config = llama_config(quantization_config={"kv_cache_scheme": [8]})
    with pytest.raises(ModelError, match="kv_cache_scheme"):
        imported(tmp_path, dense_weights(), config)


# ---- what the ops mean ---------------------------------------------------------------------------

CODES = np.arange(256, dtype=np.uint8).view(E4M3)


def nearest(x: float) -> int:
    """The code of x by search over all: nearest, ties to the even code, saturating."""
    values = CODES.astype(np.float64)
    sign = 128 if np.signbit(x) else 0
    finite = range(sign, sign + 127)
    return min(finite, key=lambda c: (abs(values[c] - x), c & 1))


def test_codes_are_the_nearest() -> None:
    edges = (CODES[:126].astype(np.float64) + CODES[1:127].astype(np.float64)) / 2
    rng = np.random.default_rng(0)
    several = [edges, -edges, edges * (1 + 2e-7), edges * (1 - 2e-7), rng.standard_normal(200) * 99,
               np.array([0.0, -0.0, 448, 464, 465, 1e6, -1e6, 2.0**-10, 2.0**-11])]  # fmt: skip
    x = np.concatenate(several).astype(np.float32)
    found = numerics.kv_codes(x, 1.0).view(np.uint8)
    assert found.tolist() == [nearest(float(v)) for v in x]
    assert np.array_equal(numerics.kv_codes(x * np.float32(0.125), 0.125).view(np.uint8), found)
    assert np.isnan(numerics.kv_codes(np.array([np.nan]), 1.0).astype(np.float32)[0])


def appended(rows: Array, scale: float, position: int) -> tuple[Op, Data]:
    heads, dim = 2, rows.shape[1] // 2
    cache = Value("c", tensor("f8e4m3", heads, 12, dim))
    x, pos = Value("x", tensor("f32", "T", heads * dim)), Value("pos", tensor("i32"))
    op = Op("kv_append", (cache, x, pos), (Value("y", cache.type),), {"cache_scale": scale})
    data = np.zeros((heads, 12, dim), E4M3)
    return op, evaluate(op, [data, rows, np.array(position, np.int32)])[0]


def test_append_divides_rounds_and_saturates() -> None:
    rows = (np.random.default_rng(1).standard_normal((3, 8)) * 20).astype(np.float32)
    _, after = appended(rows, 0.0371, 4)
    found = array(after)
    assert found.dtype == E4M3 and not found[:, :4].astype(np.float32).any()
    for t in range(3):
        for head in range(2):
            quotients = rows[t, 4 * head : 4 * head + 4] / np.float32(0.0371)
            codes = found[head, 4 + t].view(np.uint8).tolist()
            assert codes == [nearest(float(v)) for v in quotients]


def attention(scales: dict[str, float], enc: str, **attrs: float) -> Op:
    cache = tensor(enc, 1, 9, 16)
    operands = (Value("q", tensor("f32", "T", 32)), Value("k", cache), Value("v", cache),
                Value("pos", tensor("i32")))  # fmt: skip
    heads = {"heads": 2, "kv_heads": 1, "head_dim": 16, "scale": 0.25}
    return Op("attention", operands, (Value("o", tensor("f32", "T", 32)),),
              {**heads, **scales, **attrs})  # fmt: skip


def caches(rng: np.random.Generator) -> tuple[Array, Array]:
    keys, values = (numerics.kv_codes(rng.standard_normal((1, 9, 16)) * 99, 1.0) for _ in "kv")
    return keys, values


def test_attention_reads_codes_times_scales() -> None:
    rng = np.random.default_rng(2)
    q, position = rng.standard_normal((2, 32)).astype(np.float32), np.array(5, np.int32)
    keys, values = caches(rng)
    scales = {"k_scale": 0.01, "v_scale": 0.3}
    (found,) = evaluate(attention(scales, "f8e4m3"), [q, keys, values, position])
    plain = [(keys.astype(np.float64) * 0.01), (values.astype(np.float64) * 0.3)]
    (wanted,) = evaluate(attention({}, "f32"), [q, *plain, position])
    np.testing.assert_allclose(array(found), array(wanted), rtol=1e-6)


def test_softcap_is_the_tanh_of_scores() -> None:
    rng = np.random.default_rng(3)
    q, position = (9 * rng.standard_normal((1, 32))).astype(np.float32), np.array(8, np.int32)
    keys, values = rng.standard_normal((2, 1, 9, 16)).astype(np.float32)
    (found,) = evaluate(attention({}, "f32", softcap=2.5), [q, keys, values, position])
    for head in range(2):
        scores = keys[0].astype(np.float64) @ q[0, 16 * head : 16 * head + 16] * 0.25
        weights = np.exp(2.5 * np.tanh(scores / 2.5))
        wanted = weights @ values[0] / weights.sum()
        np.testing.assert_allclose(array(found)[0, 16 * head : 16 * head + 16], wanted, rtol=1e-5)
    (off,) = evaluate(attention({}, "f32", softcap=0.0), [q, keys, values, position])
    (none,) = evaluate(attention({}, "f32"), [q, keys, values, position])
    assert np.array_equal(array(off), array(none)) and not np.allclose(array(off), array(found))


def test_scales_go_with_an_fp8_cache_and_only_with_it() -> None:
    from halfbyte.ir.ops import infer

    with pytest.raises(IRError, match="k_scale goes with a quantised cache"):
        infer(attention({"k_scale": 1.0}, "f32"))
    with pytest.raises(IRError, match=r"v_scale is 0\.0, expected a finite number above 0"):
        infer(attention({"k_scale": 1.0}, "f8e4m3"))
    with pytest.raises(IRError, match="softcap is -1"):
        infer(attention({}, "f32", softcap=-1.0))


# ---- what the phases make of it ------------------------------------------------------------------

FP8 = Shape(kv_scales=(K, V))


def compiled(graph: Graph, weights: Any, name: str, **wishes: Any) -> tuple[Graph, list[Report]]:
    reports: list[Report] = []
    context = Context(target(name), declarations(name), weights, recipe="w4a16", **wishes)
    return pipeline.run(graph, context, hook=reports.append), reports


def plan_of(shape: Shape, name: str) -> Plan:
    made = decoder(shape)
    return make_plan(compiled(made.graph, made.data.__getitem__, name)[0], target(name))


@pytest.mark.parametrize("name", ["sm_90a", "sm_120a"])
def test_cuda_keeps_it_at_half_the_bytes(name: str) -> None:
    plain, quantised = (plan_of(shape, name) for shape in (Shape(), FP8))
    assert quantised.state_bytes * 2 == plain.state_bytes
    assert quantised.state_bytes_per_page * 2 == plain.state_bytes_per_page
    names = {kernel.name for kernel in quantised.kernels}
    assert {"attention_decode_fp8", "attention_prefill_fp8", "rope_append"} <= names
    assert not {"attention_decode", "attention_prefill"} & names
    by_struct = {a.struct: a.initialiser for a in quantised.arguments}
    assert f".cache_type = 2, .k_scale = {K}f, .v_scale = {V}f" in by_struct["RopeAppendArgs"]
    assert f".scale = {0.25 * K}f" in by_struct["AttentionArgs"]
    assert f".v_scale = {V}f" in by_struct["AttentionArgs"]
    assert (
        ".cache_type = 1}" in {a.struct: a for a in plain.arguments}["RopeAppendArgs"].initialiser
    )


def test_the_reason_is_in_the_log() -> None:
    made = decoder(FP8)
    said = made.graph.with_attrs(kv_cache="config.json declares FP8")
    graph, reports = compiled(said, made.data.__getitem__, "sm_90a")
    assert cache_types(graph) == {str(Plain("f8e4m3", PAGED))}
    (phase,) = (r for r in reports if r.id.startswith("32"))
    entries = [e for e in phase.log if e.rule == "fp8 cache"]
    assert len(entries) == 4 and all(e.fired and "config.json" in e.detail for e in entries)
    refusals = [e.detail for r in reports if r.id.startswith("35") for e in r.log if not e.fired]
    assert any("KV cache is f8e4m3<layout=paged16>, kernel reads bf16" in why for why in refusals)


def test_the_cpu_keeps_its_own_and_says_so() -> None:
    made, plain = decoder(FP8), decoder()
    said = made.graph.with_attrs(kv_cache="config.json declares FP8")
    graph, reports = compiled(said, made.data.__getitem__, "cpu")
    assert cache_types(graph) == {"f32"}
    assert graph.attrs["kv_cache"] == ("config.json declares FP8; cpu has no kernels that read it")
    (phase,) = (r for r in reports if r.id.startswith("32"))
    assert [e.fired for e in phase.log] == [False] * 4
    other, _ = compiled(plain.graph, plain.data.__getitem__, "cpu")
    inputs = made.inputs(5)
    found, wanted = (run(g, inputs, made.data.__getitem__)[0] for g in (graph, other))
    assert np.array_equal(array(found), array(wanted))


def test_the_cpu_cannot_be_made_to_have_it() -> None:
    made = decoder(FP8)
    with pytest.raises(TargetError, match="--kv-cache fp8: cpu has no kernels.*--kv-cache auto"):
        compiled(made.graph, made.data.__getitem__, "cpu", needs_fp8_cache=True)


def test_fusion_keeps_what_it_means() -> None:
    """All phases but the one that makes bf16 of activations."""
    made = decoder(replace(FP8, window=7, softcap=3.0))
    context = Context(target("sm_90a"), (), made.data.__getitem__, recipe="w4a16")
    fused = pipeline.run(made.graph, context, pipeline.after("00", "30_fuse"))
    assert {"rope_append", "fused_linear"} <= {op.name for op in fused.ops}
    results: list[Array] = []
    for graph in (made.graph, fused):
        state: dict[str, Data] = {}
        results.append(array(run(graph, made.inputs(9), made.data.__getitem__, state)[0]))
        assert len(state) == 4 and all(array(data).dtype == E4M3 for data in state.values())
    np.testing.assert_allclose(results[1], results[0], rtol=2e-4, atol=2e-5)


def test_an_fp8_cache_is_close_and_not_equal() -> None:
    made, plain = decoder(FP8), decoder()
    found, wanted = (
        array(run(d.graph, d.inputs(20), d.data.__getitem__)[0]) for d in (made, plain)
    )
    cosine = (found * wanted).sum() / np.linalg.norm(found) / np.linalg.norm(wanted)
    assert 0.99 < cosine < 0.9999999


@pytest.mark.parametrize("dialect", DIALECTS)
def test_calibrated_scales_keep_the_logits(root: Path, tmp_path: Path, dialect: str) -> None:
    source = root / "tests" / "data" / "llama_tied-modelopt"
    ids = [(7 * i + 3) % 500 for i in range(40)]
    folder = calibrated(source, tmp_path / "fp8", ids, dialect)
    wanted, found = (logits_of(f, ids) for f in (source, folder))
    assert not np.array_equal(found, wanted)
    alike = cosines(found, wanted)
    assert np.median(alike) > 0.997 and alike.min() > 0.99


def test_a_code_may_only_differ_at_an_edge() -> None:
    """The self-test's bound of FP8 codes is zero but where rounding may fall either way."""
    made = decoder(replace(FP8, layers=1))
    graph, _ = compiled(made.graph, made.data.__getitem__, "sm_90a")
    (op,) = ops(graph, "rope_append")
    rng = np.random.default_rng(4)
    inv_freq = made.data["rope.inv_freq"]
    empty = [np.zeros(v.type.static, E4M3) for v in op.args[1:3]]
    qkv = rng.standard_normal((6, op.args[0].type.last)).astype(ml_dtypes.bfloat16)
    args: list[Data] = [qkv, *empty, np.array(3, np.int32), inv_freq]
    results = evaluate(op, args)
    _, keys, values = tolerance(op, args, results, 2.0**-9)
    assert np.mean(keys > 1e-20) < 0.01 and not np.any(values > 1e-20)


# ---- what a user sees ----------------------------------------------------------------------------


def compile_to_plan(model: Path, name: str, kv_cache: str = "auto") -> str:
    options = Options(model, None, target=name, compile_to="50_capture", kv_cache=kv_cache)
    return compile_model(options).kv_cache


def test_its_scales_are_audited(tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "m", with_scales(COMPRESSED), with_scheme())
    compile_model(
        Options(model, None, target="sm_90a", compile_to="50_capture", dump=tmp_path / "d")
    )
    (found,) = tmp_path.glob("d/**/scales.json")
    scales = [Scale(**fields) for fields in json.loads(found.read_text())]
    assert [(s.module, s.value, s.role) for s in scales] == [
        (f"{AT}.k_cache", K, "kv_cache"), (f"{AT}.v_cache", float(np.float32(V)), "kv_cache")
    ]  # fmt: skip


def test_the_report_says_which_and_why(tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path, with_scales(COMPRESSED), with_scheme())
    assert compile_to_plan(model, "sm_90a") == "f8e4m3 (config.json declares FP8)"
    assert compile_to_plan(model, "cpu").startswith("f32 (")
    assert "no kernels" in compile_to_plan(model, "cpu")
    assert compile_to_plan(model, "sm_90a", "bf16").startswith("bf16 (asked for, though ")
    with pytest.raises(TargetError, match="cpu has no kernels"):
        compile_to_plan(model, "sm_90a,cpu", "fp8")
    with pytest.raises(ModelError, match="kv_cache 'int8': unknown, expected auto, bf16, fp8"):
        compile_to_plan(model, "sm_90a", "int8")
    (tmp_path / "net.onnx").touch()
    with pytest.raises(ModelError, match="kv_cache: for a language model"):
        compile_to_plan(tmp_path / "net.onnx", "cpu", "fp8")
