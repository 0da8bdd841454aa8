"""The IR's text, verifier, builder, rewriting and interpreter."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from halfbyte.ir import interp
from halfbyte.ir.builder import Builder
from halfbyte.ir.errors import IRError
from halfbyte.ir.graph import Attr, Op, Place
from halfbyte.ir.ops import OPS
from halfbyte.ir.rewrite import Answer, Rewrite, Rule, View, apply_rules, ordered
from halfbyte.ir.text import from_text, to_text
from halfbyte.ir.types import Gguf, Nvfp4, Plain, TensorType, tensor
from halfbyte.ir.verify import verify
from tests.graphs import decoder

ATTRS = st.one_of(
    st.booleans(),
    st.integers(-(2**40), 2**40),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=12),
    st.lists(st.integers(0, 99), max_size=4).map(tuple),
    st.lists(st.floats(allow_nan=False), min_size=1, max_size=4).map(tuple),
    st.lists(st.text(max_size=5), min_size=1, max_size=3).map(tuple),
)
ENCODINGS = st.sampled_from(
    [
        Plain("f32"), Plain("bf16", "p16"), Nvfp4(), Nvfp4(layout="p16"), Gguf("q4_k"),
        Nvfp4(shards=(3, 5)), Nvfp4(layout="sfatom128x4", shards=(1, 7)),
    ]
)  # fmt: skip


@settings(max_examples=120, deadline=None)
@given(st.dictionaries(st.from_regex(r"[a-z]\w{0,5}", fullmatch=True), ATTRS), ENCODINGS)
def test_text_reads_back_exactly(attrs: dict[str, Attr], enc: Plain | Nvfp4 | Gguf) -> None:
    b = Builder("t")
    b.arg("x", tensor("f32", "T", 8))
    weight = b.weight('odd "name" } : tensor<', TensorType((8, 256), enc))
    weight.place = Place("weights", 64, 128)
    graph = b.build(weight, **attrs)
    text = to_text(graph)
    assert to_text(from_text(text)) == text
    assert from_text(text).attrs == graph.attrs


def test_text_of_a_decoder_is_stable_and_verifies() -> None:
    text = to_text(decoder().graph)
    assert text == to_text(decoder().graph)
    verify(from_text(text))
    assert "0x7f" not in text  # no addresses


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "expected `graph"),
        (
            "graph @g() {\n  %a = add(%b, %b) : tensor<2, f32>\n  return %a\n}",
            "before it is defined",
        ),
        ("graph @g(%a: tensor<2, f32>) {\n  %a = add(%a, %a) : tensor<2, f32>\n}", "twice"),
        ("graph @g(%a: tensor<2, f99>) {\n  return %a\n}", "unknown dtype"),
        ("graph @g(%a: tensor<2, f32>) {\n  return %z\n}", "not defined"),
        ("graph @g(%a: tensor<2, f32>) {\n", "expected `return`"),
        ('graph @g(%a: tensor<2, f32>) {x="} {\n  return %a\n}', "attribute x"),
    ],
)
def test_bad_text_names_the_line(text: str, why: str) -> None:
    with pytest.raises(IRError, match=why) as error:
        from_text(text)
    assert str(error.value).startswith("line ")


def test_verify_underlines_the_wrong_op() -> None:
    good = to_text(decoder().graph)
    wrong = good.replace("%h = embed(%ids, %w) {} : tensor<Tx48, f32>", "")
    wrong = wrong.replace("tensor<Tx80, f32>", "tensor<Tx81, f32>", 1)
    with pytest.raises(IRError, match="typed tensor<Tx81, f32>, expected tensor<Tx80") as error:
        verify(from_text(wrong))
    note = "\n".join(error.value.__notes__)
    assert "^^^^" in note and "gate_proj" in note


def test_every_op_has_documentation_and_operand_counts() -> None:
    for name, entry in OPS.items():
        assert entry.doc and entry.least <= entry.most, name


def test_unknown_ops_and_operand_counts_are_refused() -> None:
    b = Builder("t")
    x = b.arg("x", tensor("f32", "T", 8))
    with pytest.raises(IRError, match="unknown op 'frobnicate'"):
        b.op("frobnicate", x)
    with pytest.raises(IRError, match="add: expected 2 operands, found 1"):
        b.op("add", x)


@pytest.mark.parametrize(
    ("enc", "shape"), [(Nvfp4(), (4, 24)), (Nvfp4(shards=(1, 2)), (4, 32)), (Gguf("q4_0"), (2, 40))]
)
def test_impossible_types_are_refused(enc: Nvfp4 | Gguf, shape: tuple[int, int]) -> None:
    with pytest.raises(IRError):
        enc.parts(shape)


def test_placed_parts_are_aligned_and_do_not_overlap() -> None:
    type_ = TensorType((37, 80), Nvfp4(layout="p16"))
    placed = type_.placed_parts()
    assert [offset % 64 for offset, _ in placed] == [0, 0]
    assert placed[1][0] >= placed[0][1].nbytes
    assert type_.placed_nbytes >= type_.nbytes


# --- rewriting -----------------------------------------------------------------------------------


def _double_is_an_op(op: Op, view: View) -> Answer:
    if op.args[0] is not op.args[1]:
        return "operands differ"
    new, value = view.make("silu_mul", *op.args, loc=op.loc)
    return Rewrite("a + a", (new,), {op.out: value}, (op,))


def test_rules_fire_and_near_misses_keep_their_reason() -> None:
    b = Builder("t")
    x, y = b.arg("x", tensor("f32", "T", 8)), b.arg("y", tensor("f32", "T", 8))
    both = b.op("add", b.op("add", x, x, loc="first"), y, loc="second")
    graph, log = apply_rules(b.build(both), [Rule("double", ("add",), _double_is_an_op)])
    verify(graph)
    assert [op.name for op in graph.ops] == ["silu_mul", "add"]
    assert [(e.at, e.fired, e.detail) for e in log] == [
        ("first", True, "a + a"),
        ("second", False, "operands differ"),
    ]


def test_a_rule_that_never_ends_is_an_error() -> None:
    def again(op: Op, view: View) -> Answer:
        new, value = view.make("add", *op.args)
        return Rewrite("again", (new,), {op.out: value}, (op,))

    b = Builder("t")
    x = b.arg("x", tensor("f32", "T", 8))
    with pytest.raises(IRError, match="still fires"):
        apply_rules(b.build(b.op("add", x, x)), [Rule("again", ("add",), again)])


def test_ordered_puts_definitions_first_and_keeps_order_otherwise() -> None:
    graph = decoder().graph
    assert ordered(graph.ops) == graph.ops
    shuffled = ordered(graph.ops[::-1])
    verify(graph.with_ops(shuffled))


# --- interpreter ---------------------------------------------------------------------------------


def test_steps_with_a_cache_equal_one_long_step() -> None:
    """Prefill in pieces, the caches carried on, gives the logits of the whole prompt."""
    d = decoder()
    whole = d.inputs(9)
    expected = interp.run(d.graph, whole, d.data.__getitem__)[0]
    state: dict[str, interp.Data] = {}
    pieces: list[np.ndarray] = []
    for start, stop in ((0, 4), (4, 5), (5, 9)):
        step = {
            "ids": whole["ids"][start:stop],
            "pos": np.array(start, np.int32),
            "rows": np.arange(stop - start, dtype=np.int32),
        }
        pieces.append(np.asarray(interp.run(d.graph, step, d.data.__getitem__, state)[0]))
    assert np.abs(np.concatenate(pieces) - np.asarray(expected)).max() < 1e-6


def test_a_full_cache_is_an_error() -> None:
    d = decoder()
    with pytest.raises(IRError, match="capacity 32"):
        interp.run(d.graph, d.inputs(2, position=31), d.data.__getitem__)


def test_a_missing_argument_is_named() -> None:
    d = decoder()
    with pytest.raises(IRError, match="%pos is missing"):
        interp.run(d.graph, {"ids": np.zeros(1, np.int32)}, d.data.__getitem__)


def test_folding_reads_only_what_it_needs() -> None:
    d = decoder()
    read: list[str] = []

    def source(name: str) -> interp.Data:
        read.append(name)
        return d.data[name]

    packed = next(op for op in d.graph.ops if op.name == "dequantize")
    interp.fold([packed.out], d.graph, source)
    assert len(read) == 3 and all(name.startswith(packed.loc) for name in read)
