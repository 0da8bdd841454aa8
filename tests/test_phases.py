"""Phases: meaning kept on random decoders, goldens on small cases, guarantees that can fail."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from halfbyte.codegen import declarations
from halfbyte.ir import interp
from halfbyte.ir.errors import IRError, ModelError, TargetError
from halfbyte.ir.graph import Graph, Op, Place, Value
from halfbyte.ir.numerics import Array
from halfbyte.ir.target import target
from halfbyte.ir.text import from_text, to_text
from halfbyte.ir.types import Nvfp4
from halfbyte.passes import p35_select_kernels, p40_memory_plan, pipeline
from halfbyte.passes.context import Context, Outcome, Phase
from tests.graphs import Decoder, Shape, decoder

CASES = Path(__file__).parent / "cases"


def context(d: Decoder | None = None, **wishes: object) -> Context:
    data: dict[str, Array] = d.data if d else {}
    base = Context(target("cpu"), declarations(), data.__getitem__)
    return replace(base, **wishes)


SHAPES = [
    Shape(),
    Shape(hidden=64, inner=48, heads=4, kv_heads=2, head_dim=8, layers=1, vocab=50),
    Shape(hidden=32, inner=16, heads=1, kv_heads=1, head_dim=32, layers=3),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("recipe", ["w4a16", "w4a4"])
def test_every_phase_keeps_the_meaning(shape: Shape, recipe: str) -> None:
    d = decoder(shape, w4a4=True)
    inputs = d.inputs(7)

    def logits(graph: Graph) -> np.ndarray:
        return np.asarray(interp.run(graph, inputs, d.data.__getitem__)[0])

    seen: list[tuple[str, np.ndarray]] = []
    pipeline.run(
        d.graph, context(d, recipe=recipe), hook=lambda r: seen.append((r.id, logits(r.graph)))
    )
    base = dict(seen)["10_promote_nvfp4"]
    scale = np.abs(base).max()
    for phase, found in seen[1:]:
        assert np.abs(found - base).max() <= 3e-6 * scale, phase
    if recipe == "w4a4":
        assert np.abs(base - logits(d.graph)).max() <= 3e-6 * scale
    else:
        assert np.abs(base - logits(d.graph)).max() > 1e-4 * scale, "activations are exact now"


def test_fusion_leaves_six_launches_a_layer() -> None:
    d = decoder()
    graph = pipeline.run(d.graph, context(d))
    launches = [op.name for op in p35_select_kernels.launched(graph)]
    layer = ["fused_linear", "rope_append", "attention", *["fused_linear"] * 3]
    assert launches == ["embed", *layer, *layer, "take_rows", "fused_linear"]


def test_shards_keep_their_own_global_scales() -> None:
    d = decoder()
    graph = pipeline.run(d.graph, context(d), pipeline.after("00", "30"))
    joined = [op for op in graph.ops if op.name == "concat"]
    assert [op.out.type.enc for op in joined[:2]] == [
        Nvfp4(shards=(48, 16, 16)),
        Nvfp4(shards=(80, 80)),
    ]
    scales = [d.data[f"model.layers.0.{n}_proj.weight_scale_2"] for n in "qkv"]
    [data] = interp.fold([joined[0].out], graph, d.data.__getitem__)
    assert isinstance(data, dict)
    assert data["gs"].tolist() == [float(s) for s in scales]
    assert len(set(data["gs"].tolist())) == 3, "the test needs unequal scales"


def test_unequal_input_scales_are_a_near_miss_with_the_numbers() -> None:
    d = decoder(w4a4=True)
    d.data["model.layers.0.k_proj.input_scale"] = np.array(0.5, np.float32)
    logs: list[str] = []
    graph = pipeline.run(
        d.graph, context(d, recipe="w4a4"), hook=lambda r: logs.extend(map(str, r.log))
    )
    assert any("missed qkv" in line and "0.002, 0.5" in line for line in logs)
    names = [op.name for op in p35_select_kernels.launched(graph)]
    assert names.count("rope_append") == 1 and names.count("rope") == 2


def test_auto_keeps_activations_exact_where_four_bits_gain_nothing() -> None:
    d = decoder(w4a4=True)
    logs: list[str] = []
    graph = pipeline.run(d.graph, context(d), hook=lambda r: logs.extend(map(str, r.log)))
    assert all(op.get("act", "f32") == "f32" for op in graph.ops)
    assert any("W4A16: recipe auto: linears for cpu take exact activations" in s for s in logs)


def test_w4a4_asked_of_a_weight_only_checkpoint_is_an_error() -> None:
    d = decoder()
    with pytest.raises(ModelError, match="no input scale"):
        pipeline.run(d.graph, context(d, recipe="w4a4"))


def test_quantising_says_what_and_why_not() -> None:
    d = decoder()
    logs: list[str] = []
    pipeline.run(d.graph, context(d, quantize="nvfp4"), hook=lambda r: logs.extend(map(str, r.log)))
    assert any("lm_head" in s and "embedding table (tied): stays dense" in s for s in logs)


# --- phase 35 ------------------------------------------------------------------------------------


def test_no_kernel_is_an_error_with_every_refusal() -> None:
    d = decoder()
    unlaid = pipeline.run(d.graph, context(d), pipeline.after("00", "10"))
    with pytest.raises(TargetError, match="table layout is linear, kernel reads p16"):
        p35_select_kernels.run(unlaid, context(d))
    linear = next(op for op in unlaid.ops if op.loc.endswith("down_proj") and op.name == "linear")
    with pytest.raises(TargetError, match="weight layout is linear, kernel reads p16") as error:
        p35_select_kernels.choose(linear, 1, context(d))
    assert "--allow-fallback nvfp4_rowmajor_linear" in str(error.value)


def test_a_fallback_runs_only_when_allowed_by_name() -> None:
    d = decoder()
    dense_only = pipeline.run(d.graph, context(d), pipeline.after("00", "10"))
    linears = [op for op in dense_only.ops if op.loc.endswith("down_proj") and op.name == "linear"]
    allowed = context(d, allow_fallback=frozenset({"nvfp4_rowmajor_linear"}))
    choice = p35_select_kernels.choose(linears[0], 1, allowed)
    assert choice.kernel.name == "nvfp4_rowmajor_linear"
    assert {r.kernel for r in choice.refused} >= {"nvfp4_gemv", "dense_gemv_bf16"}


def test_every_refusal_has_a_reason() -> None:
    d = decoder()
    ready = pipeline.run(d.graph, context(d), pipeline.after("00", "30"))
    choices = p35_select_kernels.select(ready, context(d))
    assert choices and all(r.reason for c in choices for r in c.refused)


# --- phase 40 ------------------------------------------------------------------------------------


def test_the_brute_force_check_sees_an_overlap() -> None:
    d = decoder()
    graph = pipeline.run(d.graph, context(d))
    p40_memory_plan.ensures(graph, context(d))
    lives = p40_memory_plan.lifetimes(graph)
    first = lives[0]
    victim = next(o for o in lives[1:] if o.overlaps(first))
    place = first.value.place
    assert place is not None
    victim.value.place = Place(place.space, place.offset, victim.nbytes)
    with pytest.raises(IRError, match="alive in one place"):
        p40_memory_plan.ensures(graph, context(d))


def test_the_arena_reuses_memory() -> None:
    d = decoder(Shape(layers=8))
    graph = pipeline.run(d.graph, context(d))
    assert p40_memory_plan.arena_bytes(graph) == p40_memory_plan.arena_bytes(
        pipeline.run(decoder(Shape(layers=2)).graph, context(decoder(Shape(layers=2))))
    )


# --- the loop ------------------------------------------------------------------------------------


def test_phase_ids_ascend_and_say_why() -> None:
    ids = [p.id for p in pipeline.PHASES]
    assert ids == sorted(ids) and all(p.why for p in pipeline.PHASES)


def test_resuming_from_any_phases_text_gives_the_same_result() -> None:
    d = decoder(w4a4=True)
    texts: dict[str, str] = {}
    final = to_text(pipeline.run(d.graph, context(d), hook=lambda r: texts.update({r.id: r.after})))
    for id_, text in texts.items():
        resumed = pipeline.run(from_text(text), context(d), pipeline.after(id_))
        assert to_text(resumed) == final, id_


def test_an_unknown_phase_is_named() -> None:
    with pytest.raises(IRError, match="phase '99': unknown, expected one of 05_canonicalize"):
        pipeline.after("99")


def test_a_broken_phase_is_named_in_the_notes() -> None:
    def break_types(graph: Graph, context: Context) -> Outcome:
        op = graph.ops[-1]
        wrong = Op(op.name, op.args, (replace_type(op),), op.attrs, op.loc)
        return Outcome(graph.with_ops([*graph.ops[:-1], wrong], wrong.outs))

    phase = Phase("99_broken", "to see the message", break_types, lambda g, c: None)
    with pytest.raises(IRError, match="do not verify") as error:
        pipeline.run(decoder().graph, context(), [phase])
    assert "after phase 99_broken" in error.value.__notes__


def replace_type(op: Op) -> Value:
    return Value("wrong", op.out.type.with_shape("R", 1))


# --- goldens -------------------------------------------------------------------------------------

MARK = "// ---- after "


def _cases() -> list[Path]:
    return sorted(CASES.glob("*/*.ir"))


def _no_data(name: str) -> interp.Data:
    raise AssertionError(f"a case has no data, and {name} was asked for")


@pytest.mark.parametrize("path", _cases(), ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_case(path: Path, update_golden: bool) -> None:
    """A case holds a graph, the mark, and the graph after the phase its folder names."""
    source, _, expected = path.read_text().partition(MARK)
    phase_id = path.parent.name
    [phase] = [p for p in pipeline.PHASES if p.id == phase_id]
    recipe = "w4a4" if "w4a4" in path.stem else "auto"
    quantize = "nvfp4" if phase_id.startswith("15") else None
    ctx = replace(context(None, recipe=recipe, quantize=quantize), weights=_no_data)
    result = to_text(pipeline.run(from_text(source), ctx, [phase]))
    if update_golden:
        path.write_text(f"{source}{MARK}{phase_id}\n{result}")
        return
    assert expected.partition("\n")[2] == result
