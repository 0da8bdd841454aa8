"""The target sm_120a without the card: which kernel serves what, and that nothing misses them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from halfbyte.codegen import declarations, ffi_options, find_compiler
from halfbyte.codegen.args import ARGS
from halfbyte.codegen.emit import compile_library
from halfbyte.codegen.kernels_sm120 import gemm_name, tiles_of, units
from halfbyte.codegen.nvcc import cutlass_folder, find_cuda_compiler
from halfbyte.codegen.plan import Plan, make_plan
from halfbyte.codegen.plan_cuda import Arch, arch_of, cuda_sources
from halfbyte.codegen.render import TEMPLATES
from halfbyte.codegen.sass import LOCAL_MEMORY, census, count, find_tools
from halfbyte.codegen.table import table_of
from halfbyte.frontend import import_model, open_checkpoint
from halfbyte.ir import numerics
from halfbyte.ir.errors import TargetError
from halfbyte.ir.graph import Attr, Graph, Op, Value
from halfbyte.ir.interp import evaluate
from halfbyte.ir.layouts_cuda import nvfp4_from_sfatom, nvfp4_to_sfatom
from halfbyte.ir.ops_fused import unquantized
from halfbyte.ir.ops_model import weight_matrix
from halfbyte.ir.target import TARGETS, target
from halfbyte.ir.types import PAGED, SFATOM, Nvfp4, Plain, TensorType, tensor
from halfbyte.passes import pipeline
from halfbyte.passes.context import Context

NAME = "sm_120a"
HOME = target(NAME)
CHECKPOINTS = (
    "tiny/llama_untied-modelopt",
    "tiny/llama_untied-llmcompressor",
    "tiny/mistral-llmcompressor",
    "tiny/mistral3-modelopt",
    "tiny/qwen2-modelopt",
    "tiny/qwen3-llmcompressor",
)


def compiled(folder: Path, recipe: str = "auto", name: str = NAME) -> Graph:
    imported = import_model(open_checkpoint(folder), context=100)
    context = Context(target(name), declarations(name), imported.weights, recipe=recipe)
    return pipeline.run(imported.graph, context)


@pytest.fixture(scope="module")
def plan(root: Path) -> Plan:
    return make_plan(compiled(root / "tests" / "data" / "llama_tied-modelopt"), HOME)


def linear(n: int, k: int, act: str = "nvfp4", out: str = "bf16", *roles: str) -> Op:
    """A fused linear k -> n over a weight in the layout of sm_120."""
    names = ("x", "w", *roles, *(("input_scale",) if act == "nvfp4" else ()))
    types = {"x": tensor("bf16", "T", k), "w": TensorType((n, k), Nvfp4(layout=SFATOM))}
    types |= {"residual": tensor("f32", "T", n), "input_scale": tensor("f32")}
    values = tuple(Value(name, types.get(name, tensor("f32", n))) for name in names)
    attrs: dict[str, Attr] = {"act": act, "roles": names}
    return Op("fused_linear", values, (Value("y", tensor(out, "T", n)),), attrs, "layer")


@pytest.mark.parametrize(
    ("op", "tokens", "kernel"),
    [
        (linear(4096, 4096), 1, "nvfp4_gemv_rowmajor"),
        (linear(4096, 4096), 8, "nvfp4_gemv_rowmajor"),
        (linear(4096, 4096), 16, "nvfp4_w4a4_smallm"),
        (linear(4096, 4096), 64, "nvfp4_w4a4_smallm"),
        (linear(4096, 4096), 512, "nvfp4_w4a4_gemm_k256"),
        (linear(96, 96), 512, "nvfp4_w4a4_gemm_k128"),
        (linear(96, 4096 + 16), 512, "nvfp4_w4a4_gemm_k128"),
        (linear(100, 96), 512, "nvfp4_gemm_rowmajor"),
        (linear(100, 96, "nvfp4", "f32", "residual"), 512, "nvfp4_w4a4_gemm_k128"),
        (linear(96, 96, "nvfp4", "f32"), 512, "nvfp4_gemm_rowmajor"),
        (linear(96, 96, "f32"), 8, "nvfp4_gemv_rowmajor"),
        (linear(96, 96, "f32"), 9, "nvfp4_gemm_rowmajor"),
        (linear(96, 96, "f32"), 2048, "nvfp4_gemm_rowmajor"),
    ],
)
def test_the_first_kernel_that_takes_it(op: Op, tokens: int, kernel: str) -> None:
    served = [k.decl for k in table_of(NAME).kernels if op.name in k.decl.serves]
    refusals = {k.name: k.refuses(op, tokens) for k in served}
    assert next(name for name, why in refusals.items() if why is None) == kernel
    assert all(why is None or len(why) > 10 for why in refusals.values())
    assert table_of(NAME).by_name[kernel].decl.workspace(op, tokens).shared >= 65536


def test_the_table_is_sound() -> None:
    table = table_of(NAME)
    for kernel in table.kernels:
        assert kernel.decl.promise and kernel.args in ARGS
        assert (TEMPLATES / "cuda" / f"{kernel.family}.cu.jinja").exists(), kernel.name
        assert not kernel.decl.fallback
    assert {k.name for k in table_of("sm_120f").kernels} == set(table.by_name)


def test_what_a_block_cannot_hold_is_refused() -> None:
    heads: dict[str, Attr] = {"heads": 8, "kv_heads": 8, "head_dim": 256}
    q, cache = tensor("bf16", "T", 2048), TensorType((8, 64, 256), Plain("bf16", PAGED))
    operands = (Value("q", q), Value("k", cache), Value("v", cache))
    op = Op("attention", operands, (Value("y", q),), heads)
    for name, refused in ((NAME, True), ("sm_90a", False)):
        why = table_of(name).by_name["attention_decode"].decl.refuses(op, 1)
        assert (why is not None) == refused
    dense = Op("linear", (Value("x", tensor("bf16", 8, 12288)),
                          Value("w", tensor("bf16", 64, 12288))),
               (Value("y", tensor("f32", 8, 64)),))  # fmt: skip
    why = table_of(NAME).by_name["dense_gemv_bf16"].decl.refuses(dense, 8)
    assert why is not None and "bytes of shared memory" in why


@pytest.mark.parametrize("name", CHECKPOINTS)
@pytest.mark.parametrize("recipe", ["auto", "w4a16"])
def test_no_nvfp4_weight_misses_its_kernels(shared: Path, name: str, recipe: str) -> None:
    graph = compiled(shared / "models" / name, recipe)
    linears = [op for op in graph.ops if op.name == "fused_linear"]
    quantised = [op for op in linears if isinstance(op.args[1].type.enc, Nvfp4)]
    assert quantised
    many = "nvfp4_w4a4_smallm" if recipe == "auto" else "nvfp4_gemm_rowmajor"
    for op in quantised:
        assert op.args[1].type.enc == Nvfp4(layout=SFATOM)
        assert op.get("act", "f32") == ("nvfp4" if recipe == "auto" else "f32")
        by_bucket = dict(zip(HOME.buckets, op.strs("kernels"), strict=True))
        assert {by_bucket[b] for b in (1, 2, 4, 8)} == {"nvfp4_gemv_rowmajor"}
        assert {by_bucket[b] for b in (16, 32, 64)} == {many}


def test_an_nvfp4_head_has_its_kernels() -> None:
    """f32 logits of an odd vocabulary, for the rows that decode and the end of a prefill want."""
    head = linear(515, 96, "f32", "f32")
    for tokens, name in ((1, "nvfp4_gemv_rowmajor"), (32, "nvfp4_gemm_rowmajor")):
        assert table_of(NAME).by_name[name].decl.refuses(head, tokens) is None


def test_the_layout_is_a_permutation_with_zeros_behind() -> None:
    rng = np.random.default_rng(0)
    n, k = 130, 272
    packed = rng.integers(0, 256, (n, k // 2), np.uint8)
    scales = rng.integers(0, 126, (n, k // 16), np.uint8)
    codes, atoms = nvfp4_to_sfatom(packed, scales)
    type_ = TensorType((n, k), Nvfp4(layout=SFATOM))
    assert [p.shape for p in type_.enc.parts(type_.static)] == [(n, 144), (2, 5, 512), (256,)]
    assert codes.shape == (n, 144) and not codes[:, k // 2 :].any() and atoms.shape == (2, 5, 512)
    assert np.count_nonzero(atoms) == np.count_nonzero(scales)
    back, scale_back = nvfp4_from_sfatom(codes, atoms, n, k)
    assert np.array_equal(back, packed) and np.array_equal(scale_back, scales)
    rows = rng.random(n).astype(np.float32)
    data = {"": codes, "sf": atoms.view(scales.dtype), "gs": np.pad(rows, (0, 126))}
    view = {**data, "sf": data["sf"].view(numerics.NUMPY_DTYPES["f8e4m3"])}
    expected = numerics.dequantize_nvfp4(packed, scales.view(numerics.NUMPY_DTYPES["f8e4m3"]), rows)
    assert np.array_equal(weight_matrix(type_, view), expected)


def test_an_exact_kernel_leaves_out_the_quantiser_only() -> None:
    op = linear(32, 32, "nvfp4", "f32", "bias")
    plain = unquantized(op)
    assert plain.strs("roles") == ("x", "w", "bias") and plain.get("act", "") == "f32"
    assert unquantized(plain) is plain
    x = np.linspace(-1, 1, 64, dtype=np.float32).reshape(2, 32)
    w = {
        "": np.full((32, 16), 0x22, np.uint8),  # 1.0
        "sf": np.full((1, 1, 512), 0x38, np.uint8).view(numerics.NUMPY_DTYPES["f8e4m3"]),
        "gs": np.ones(128, np.float32),
    }
    (y,) = evaluate(plain, [x, w, np.zeros(32, np.float32)])
    np.testing.assert_allclose(np.asarray(y), x.sum(1, keepdims=True).repeat(32, 1), rtol=1e-6)


# --- sources --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_library_holds_what_it_promises(root: Path, pytestconfig: pytest.Config) -> None:
    """Two instantiations of CUTLASS: some minutes where their objects are not kept."""
    assert pytestconfig.cache is not None
    cache = Path(pytestconfig.cache.mkdir("objects"))
    tools = find_tools()
    try:
        toolchain = find_cuda_compiler(find_compiler(None, cache), arch_of(HOME), None)
        cutlass_folder()
    except TargetError as error:
        pytest.skip(str(error))
    if tools is None:
        pytest.skip("no cuobjdump")
    graph = compiled(root / "tests" / "data" / "llama_tied-modelopt")
    library = compile_library(graph, HOME, toolchain, ffi_options(cache))
    assert not [c for c in library.code if c.spilled or c.stack]
    names = {c.unit for c in library.code}
    assert {"nvfp4_w4a4_cutlass_k128_bf16.cu", "nvfp4_w4a4_cutlass_k128_f32.cu"} <= names
    products = [c for c in library.code if "cutlass" in c.unit or "smallm_kernel" in c.kernel]
    assert len(products) == 2 + 4
    assert {c.instruction for c in products} == {"OMMA.SF.16864.F32.E2M1.E2M1.UE4M3.4X"}
    for instructions in census(library.built.path, tools).values():
        assert not any(count(instructions, name) for name in LOCAL_MEMORY)
    assert library.graphs is not None
    shared = [k.shared + library.code[k.kernel].shared for k in library.graphs.kinds]
    assert max(shared) <= 101_376
    used = {library.code[k.kernel].unit for k in library.graphs.kinds}
    assert {"nvfp4_quantize.cu", "nvfp4_w4a4_smallm.cu", "nvfp4_gemv_rowmajor.cu"} <= used


def test_only_the_tiles_in_use_are_compiled(plan: Plan) -> None:
    names = frozenset(kernel.name for kernel in plan.kernels)
    assert tiles_of(names) == (128,)
    heavy = [s for s in cuda_sources(plan, HOME) if s.heavy]
    assert [s.name for s in heavy] == [
        "nvfp4_w4a4_cutlass_k128_bf16.cu",
        "nvfp4_w4a4_cutlass_k128_f32.cu",
    ]
    both = units(frozenset(map(gemm_name, (128, 256))))
    assert sum(unit.heavy for unit in both) == 4


def test_a_twin_has_no_cutlass(plan: Plan) -> None:
    twin = Arch(NAME, 9, 0, "a", twin=True)
    assert twin.flags == ("-gencode=arch=compute_90a,code=sm_90a", "-DHB_TWIN")
    made = {s.name: s for s in cuda_sources(plan, HOME, twin)}
    assert "cutlass/" not in made["nvfp4_w4a4_cutlass_k128_f32.cu"].text
    assert "facts.major == 9" in made["session.cc"].text
    assert not any(s.heavy for s in made.values())


def test_a_family_target_runs_on_later_members(plan: Plan) -> None:
    text = {name: next(s.text for s in cuda_sources(plan, TARGETS[name], arch_of(TARGETS[name]))
                       if s.name == "session.cc") for name in ("sm_120a", "sm_120f")}  # fmt: skip
    assert "facts.minor == 0" in text["sm_120a"] and "facts.minor >= 0" in text["sm_120f"]


def test_a_vocabulary_the_sampler_cannot_hold_is_refused(plan: Plan) -> None:
    import dataclasses

    big = dataclasses.replace(plan, vocab=262_144)
    with pytest.raises(TargetError, match="the sampler of sm_120a takes at most"):
        cuda_sources(big, HOME)
