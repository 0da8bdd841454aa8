"""The importer: the test list of nvfp4-formats.md section 12 by name, the families, the reference
logits of real producers, and what must not import.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from halfbyte.frontend import Imported, import_model, open_checkpoint
from halfbyte.frontend.families import FAMILIES
from halfbyte.ir.errors import ModelError
from halfbyte.ir.graph import Graph, substitute
from halfbyte.ir.interp import run
from halfbyte.ir.text import from_text, to_text
from halfbyte.ir.verify import verify
from tests.checkpoint_files import (
    BF16,
    E4M3,
    LINEARS,
    Config,
    Q,
    Tensors,
    compressed_weights,
    dense_weights,
    llama_config,
    modelopt_config,
    modelopt_weights,
    write_checkpoint,
)

F32 = NDArray[np.float32]
IDS = np.array([3, 1, 4, 1, 5, 9, 2, 6], np.int32)
SUPPORTED = ("llama_tied", "llama_untied", "mistral", "mistral3", "qwen2", "qwen3")


def imported(folder: Path, tensors: Tensors, config: Config, **files: Config) -> Imported:
    checkpoint = open_checkpoint(write_checkpoint(folder, tensors, config, **files))
    model = import_model(checkpoint, context=16)
    verify(model.graph)
    return model


def logits(model: Imported, ids: NDArray[np.int32] = IDS, graph: Graph | None = None) -> F32:
    """All positions' logits by the interpreter."""
    rows = np.arange(len(ids), dtype=np.int32)
    args = {"ids": ids, "pos": np.array(0, np.int32), "rows": rows}
    found = run(graph or model.graph, args, model.weights)[0]
    assert not isinstance(found, dict)
    return found


def weight_only(graph: Graph) -> Graph:
    """The graph without the quantisation of activations."""
    fake = {op.out: op.args[0] for op in graph.ops if op.name == "quantize_dequantize"}
    kept = [substitute(op, fake) for op in graph.ops if op.name != "quantize_dequantize"]
    return graph.with_ops(kept)


def cosines(a: F32, b: F32) -> NDArray[np.float64]:
    """Cosine of each position's logits."""
    x, y = a.astype(np.float64), b.astype(np.float64)
    return (x * y).sum(-1) / (np.linalg.norm(x, axis=-1) * np.linalg.norm(y, axis=-1))


def schemes(model: Imported) -> Counter[str]:
    return Counter(facts.scheme for facts in model.linears)


def without_inputs(tensors: Tensors) -> Tensors:
    return {name: value for name, value in tensors.items() if not name.endswith("input_scale")}


# ---- section 12 of nvfp4-formats.md ---------------------------------------


def test_01_hf_quant_config_alone_decides_activations(tmp_path: Path) -> None:
    quant = {"quant_algo": "W4A16_NVFP4", "exclude_modules": ["lm_head"], "group_size": 16}
    hf = {"producer": {"name": "modelopt"}, "quantization": quant}
    model = imported(tmp_path, modelopt_weights(), llama_config(), hf_quant_config=hf)
    assert schemes(model) == {"w4a16": 7, "dense": 1}
    assert f"{Q}.input_scale" in model.excused


def test_01_config_json_alone_decides_activations(tmp_path: Path) -> None:
    model = imported(tmp_path, modelopt_weights(), modelopt_config())
    assert schemes(model) == {"w4a4": 7, "dense": 1}
    assert not model.excused


def test_01_no_config_at_all_leaves_it_to_the_tensors(tmp_path: Path) -> None:
    assert schemes(imported(tmp_path / "a", modelopt_weights(), llama_config()))["w4a4"] == 7
    tensors = without_inputs(modelopt_weights())
    assert schemes(imported(tmp_path / "b", tensors, llama_config()))["w4a16"] == 7


def test_01_disagreeing_files_mean_weight_only(tmp_path: Path) -> None:
    hf = {"quantization": {"quant_algo": "W4A16_NVFP4", "exclude_modules": ["lm_head"]}}
    model = imported(tmp_path, modelopt_weights(), modelopt_config(), hf_quant_config=hf)
    assert schemes(model) == {"w4a16": 7, "dense": 1}


@pytest.mark.parametrize("shape", [(), (1,)])
@pytest.mark.parametrize("dtype", [np.dtype(np.float32), BF16])
def test_02_scalars_of_either_shape_and_bf16_globals(
    tmp_path: Path, shape: tuple[int, ...], dtype: np.dtype[np.float32]
) -> None:
    tensors, plain = modelopt_weights(), modelopt_weights()
    for module in LINEARS:
        name = f"model.layers.0.{module}.weight_scale_2"
        value = tensors[name].astype(BF16)
        plain[name] = value.astype(np.float32)
        tensors[name] = value.astype(dtype).reshape(shape)
    model = imported(tmp_path / "a", tensors, modelopt_config())
    expected = imported(tmp_path / "b", plain, modelopt_config())
    np.testing.assert_array_equal(logits(model), logits(expected))


def test_03_unequal_global_scales_of_a_group_stay_exact(tmp_path: Path) -> None:
    """Doubling k's scale and halving its blocks' changes nothing, as a max over shards would."""
    tensors = without_inputs(modelopt_weights())
    expected = logits(imported(tmp_path / "a", tensors, llama_config()))
    k = "model.layers.0.self_attn.k_proj"
    tensors[f"{k}.weight_scale_2"] = tensors[f"{k}.weight_scale_2"] * np.float32(2)
    half = tensors[f"{k}.weight_scale"].astype(np.float32) / 2
    assert (half.astype(E4M3).astype(np.float32) == half).all()
    tensors[f"{k}.weight_scale"] = half.astype(E4M3)
    found = logits(imported(tmp_path / "b", tensors, llama_config()))
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("pattern", ["q_proj", "*q_proj", "re:.*q_proj$", "language_model." + Q])
def test_04_excluded_modules_are_dense_when_their_tensors_are(tmp_path: Path, pattern: str) -> None:
    tensors = modelopt_weights()
    for suffix in ("weight_scale", "weight_scale_2", "input_scale"):
        del tensors[f"{Q}.{suffix}"]
    tensors[f"{Q}.weight"] = dense_weights()[f"{Q}.weight"]
    quant = {"quant_algo": "NVFP4", "ignore": ["lm_head", pattern]}
    model = imported(tmp_path, tensors, llama_config(quantization_config=quant))
    assert schemes(model) == {"w4a4": 6, "dense": 2} and not model.notes


def test_04_tensors_decide_where_the_list_is_wrong(tmp_path: Path) -> None:
    quant = {"quant_algo": "NVFP4", "ignore": ["*q_proj"]}
    model = imported(tmp_path, modelopt_weights(), llama_config(quantization_config=quant))
    assert schemes(model) == {"w4a4": 7, "dense": 1}
    assert any("says dense" in note and "q_proj" in note for note in model.notes)
    assert any("says w4a4" in note and "lm_head" in note for note in model.notes)


@pytest.mark.parametrize("order", ["experts.0.gate_proj", "experts.gate_proj.0"])
def test_05_experts_in_either_order_are_not_dropped_silently(tmp_path: Path, order: str) -> None:
    tensors = {**dense_weights(), f"model.layers.0.mlp.{order}.weight": np.zeros((2, 2), BF16)}
    with pytest.raises(ModelError, match=rf"mlp\.{order}\.weight.*does not read"):
        imported(tmp_path, tensors, llama_config())


def test_06_sizes_that_no_tile_divides(tmp_path: Path, root: Path) -> None:
    """N = 32 and 96, K = 96: six block scales a row, neither a multiple of 128 nor of four."""
    model = import_model(open_checkpoint(root / "tests/data/llama_tied-modelopt"), context=64)
    shapes = {facts.shape for facts in model.linears}
    assert (32, 96) in shapes and all((k // 16) % 4 for n, k in shapes if n == 32)


def test_07_rows_that_no_block_divides_stay_dense(tmp_path: Path) -> None:
    model = imported(tmp_path, dense_weights(hidden=24), llama_config(hidden_size=24))
    assert schemes(model) == {"dense": 8}
    assert np.isfinite(logits(model)).all()


@pytest.mark.parametrize("suffix", ["weight_scale", "weight_scale_2", "input_scale"])
def test_08_a_missing_scale_fails(tmp_path: Path, suffix: str) -> None:
    tensors = modelopt_weights()
    del tensors[f"{Q}.{suffix}"]
    with pytest.raises(ModelError, match=r"model\.safetensors: tensor '.*q_proj"):
        imported(tmp_path, tensors, modelopt_config())


def test_09_zero_blocks_are_zero_whatever_their_scale(tmp_path: Path) -> None:
    tensors = without_inputs(modelopt_weights())
    results: list[F32] = []
    for byte in (0x20, 0x38):  # 0.125 by compressed-tensors, 1.0 by ModelOpt
        packed = tensors[f"{Q}.weight"].copy()
        scales = tensors[f"{Q}.weight_scale"].view(np.uint8).copy()
        packed[5, :8], scales[5, 0] = 0x80, byte  # both zeros: +0 and -0
        changed = {**tensors, f"{Q}.weight": packed, f"{Q}.weight_scale": scales.view(E4M3)}
        results.append(logits(imported(tmp_path / str(byte), changed, llama_config())))
    np.testing.assert_array_equal(results[0], results[1])


def test_10_e4m3_scales_come_through_ml_dtypes(tmp_path: Path) -> None:
    model = imported(tmp_path, modelopt_weights(), modelopt_config())
    scales = model.weights(f"{Q}.weight_scale")
    assert scales.dtype == E4M3
    np.testing.assert_array_equal(scales, modelopt_weights()[f"{Q}.weight_scale"])


# ---- dialects agree, and every tensor is accounted for ---------------------------------------


def test_both_dialects_of_one_model_agree(tmp_path: Path) -> None:
    quant = {"quant_method": "compressed-tensors", "ignore": ["lm_head"]}
    ours = imported(tmp_path / "a", modelopt_weights(), modelopt_config())
    theirs = imported(tmp_path / "b", compressed_weights(), llama_config(quantization_config=quant))
    assert schemes(ours) == schemes(theirs)
    np.testing.assert_allclose(logits(ours), logits(theirs), atol=1e-5)


def test_fp8_linears_are_dequantised_by_row(tmp_path: Path) -> None:
    tensors = dense_weights()
    expected = dense_weights()
    for module, (n, _) in LINEARS.items():
        at = f"model.layers.0.{module}"
        scale = np.geomspace(0.5, 2, n).astype(np.float32).reshape(n, 1)
        codes = (tensors[f"{at}.weight"].astype(np.float32) / scale).astype(E4M3)
        tensors[f"{at}.weight"], tensors[f"{at}.weight_scale"] = codes, scale
        tensors[f"{at}.input_scale"] = np.ones(1, np.float32)
        expected[f"{at}.weight"] = codes.astype(np.float32) * scale
    model = imported(tmp_path / "a", tensors, llama_config())
    assert schemes(model) == {"fp8": 7, "dense": 1} and len(model.excused) == 7
    dense = imported(tmp_path / "b", expected, llama_config())
    np.testing.assert_allclose(logits(model), logits(dense), atol=1e-6)


@pytest.mark.parametrize(
    "name",
    ["model.layers.0.self_attn.rotary_emb.inv_freq", "model.layers.0.self_attn.k_proj.k_scale",
     "model.layers.0.self_attn.v_scale"],
)  # fmt: skip
def test_known_extras_are_excused_with_a_reason(tmp_path: Path, name: str) -> None:
    tensors = {**dense_weights(), name: np.ones(1, np.float32)}
    model = imported(tmp_path, tensors, llama_config())
    assert set(model.excused) == {name} and model.excused[name]


def test_unknown_extras_are_an_error(tmp_path: Path) -> None:
    tensors = {**dense_weights(), "model.layers.1.mlp.up_proj.weight": np.ones(1, np.float32)}
    with pytest.raises(ModelError, match=r"'model\.layers\.1\.mlp\.up_proj\.weight'.*not read"):
        imported(tmp_path, tensors, llama_config())


def test_vision_tensors_are_excused_for_mistral3_only(tmp_path: Path) -> None:
    text = {"model.": "model.language_model."}
    tensors: Tensors = {"model.vision_tower.ln_pre.weight": np.ones(4, BF16)}
    for name, value in dense_weights().items():
        tensors[name.replace("model.", text["model."], 1)] = value
    inner = llama_config(model_type="mistral", sliding_window=None)
    config = {"architectures": ["Mistral3ForConditionalGeneration"], "text_config": inner}
    model = imported(tmp_path / "a", tensors, config)
    assert list(model.excused) == ["model.vision_tower.ln_pre.weight"]
    assert {facts.loc for facts in model.linears} >= {Q, "lm_head"}
    with pytest.raises(ModelError, match="vision_tower"):
        imported(tmp_path / "b", tensors, llama_config())


def test_tied_head_reads_the_embedding(tmp_path: Path) -> None:
    tensors = dense_weights()
    tied = imported(tmp_path / "a", tensors, llama_config(tie_word_embeddings=True))
    assert list(tied.excused) == ["lm_head.weight"]
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    untied = imported(tmp_path / "b", tensors, llama_config())
    np.testing.assert_array_equal(logits(tied), logits(untied))
    head = tied.graph.ops[-1]
    embed = next(op for op in tied.graph.ops if op.name == "embed")
    assert head.loc == "lm_head" and head.args[1] is embed.args[1]


def test_missing_and_misshapen_tensors_are_named(tmp_path: Path) -> None:
    tensors = dense_weights()
    del tensors["model.norm.weight"]
    with pytest.raises(ModelError, match=r"'model\.norm\.weight': is not in the checkpoint"):
        imported(tmp_path / "a", tensors, llama_config())
    with pytest.raises(ModelError, match=rf"'{Q}.weight': expected shape \[64, 32\], found"):
        imported(tmp_path / "b", dense_weights(), llama_config(num_attention_heads=4))


def test_infinite_weights_are_found_when_read(tmp_path: Path) -> None:
    tensors = dense_weights()
    tensors[f"{Q}.weight"] = np.full_like(tensors[f"{Q}.weight"], np.inf)
    model = imported(tmp_path, tensors, llama_config())
    with pytest.raises(ModelError, match=rf"'{Q}.weight': element 0 is not finite"):
        model.weights(f"{Q}.weight")


def test_biases_windows_and_locations(tmp_path: Path) -> None:
    tensors = dense_weights()
    for name in ("q", "k", "v"):
        n = LINEARS[f"self_attn.{name}_proj"][0]
        tensors[f"model.layers.0.self_attn.{name}_proj.bias"] = np.ones(n, BF16)
    config = llama_config(
        architectures=["Qwen2ForCausalLM"], model_type="qwen2", sliding_window=5,
        use_sliding_window=True, max_window_layers=0,
    )  # fmt: skip
    model = imported(tmp_path, tensors, config)
    by_loc = {op.loc: op for op in model.graph.ops if op.name in ("linear", "attention")}
    assert len(by_loc[Q].args) == 3 and len(by_loc["model.layers.0.self_attn.o_proj"].args) == 2
    assert by_loc["model.layers.0.self_attn"].get("window", 0) == 5
    states = [op.get("source", "") for op in model.graph.ops if op.name == "state"]
    assert states == [f"model.layers.0.self_attn.{kv}_cache" for kv in "kv"]


def test_generation_has_stop_tokens_as_a_list(tmp_path: Path) -> None:
    model = imported(tmp_path / "a", dense_weights(), llama_config(eos_token_id=7))
    assert model.generation["eos_token_id"] == [7] and model.generation["bos_token_id"] == 1
    files = {"generation_config": {"eos_token_id": [8, 9], "temperature": 0.6}}
    model = imported(tmp_path / "b", dense_weights(), llama_config(), **files)
    assert model.generation["eos_token_id"] == [8, 9] and model.generation["temperature"] == 0.6
    files = {"generation_config": {"eos_token_id": ["x"]}}
    with pytest.raises(ModelError, match="eos_token_id: expected token ids"):
        imported(tmp_path / "c", dense_weights(), llama_config(), **files)


def test_tokenizer_files_travel_with_their_chat_template(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, dense_weights(), llama_config())
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    files = import_model(open_checkpoint(folder), context=4).tokenizer
    assert json.loads(files["tokenizer_config.json"]) == {"chat_template": "{{ messages }}"}
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match=r"tokenizer\.json: not a tokenizer"):
        import_model(open_checkpoint(folder), context=4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "unknown architecture 'GPT2LMHeadModel'"),
        ({"architectures": [], "model_type": "bloom"}, "unknown architecture 'bloom'"),
        ({"architectures": 3}, "architectures: expected an array"),
        ({"hidden_size": "32"}, "hidden_size: expected a whole number"),
        ({"num_hidden_layers": 0}, "num_hidden_layers: expected a whole number from 1"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers: expected at most"),
        ({"num_key_value_heads": 3}, "num_key_value_heads: expected a divisor of 2"),
        ({"head_dim": 15}, "head_dim: expected an even number"),
        ({"rms_norm_eps": "x"}, "rms_norm_eps: expected a number"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings: expected true or false"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu', expected silu"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "rope type 'longrope'"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope type yarn needs a positive factor"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor: expected 1"),
        ({"rope_parameters": {"full_attention": {}}}, "one set of rope parameters"),
        ({"rope_theta": -1, "rope_parameters": None}, "rope_theta: expected a positive number"),
        ({"sliding_window": 4, "layer_types": ["linear"]}, "layer_types: expected 1 of"),
    ],
)
def test_configs_that_cannot_be_are_named(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ModelError, match="m: |config.json") as caught:
        imported(tmp_path / "m", dense_weights(), llama_config(**changes))
    assert message in str(caught.value)


def test_unknown_architectures_list_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(ModelError) as caught:
        imported(tmp_path, dense_weights(), llama_config(architectures=["Unheard"]))
    assert all(name in str(caught.value) for name in FAMILIES)


def test_context_is_at_least_one(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, dense_weights(), llama_config())
    with pytest.raises(ModelError, match="context 0"):
        import_model(open_checkpoint(folder), context=0)
    assert any(
        "exceeds the 64" in n for n in import_model(open_checkpoint(folder), context=65).notes
    )


# ---- the producers' own logits ---------------------------------------


def check_reference(folder: Path, reference: Path) -> None:
    model = import_model(open_checkpoint(folder), context=64)
    verify(model.graph)
    saved: dict[str, Any] = dict(np.load(reference))
    ids = saved["input_ids"].astype(np.int32)
    w4a16 = cosines(logits(model, ids, weight_only(model.graph)), saved["w4a16_f32_logits"])
    w4a4 = cosines(logits(model, ids), saved["w4a4_emul_f32_logits"])
    assert w4a16.min() >= 0.9999
    assert np.median(w4a4) >= 0.9999 and w4a4.min() >= 0.95


def test_the_checkpoint_in_the_repository_gives_its_producers_logits(root: Path) -> None:
    folder = root / "tests/data/llama_tied-modelopt"
    check_reference(folder, folder / "reference.npz")


def test_every_supported_checkpoint_gives_its_producers_logits(shared: Path) -> None:
    folders = [f for f in sorted((shared / "models/tiny").iterdir())
               if f.name.split("-")[0] in SUPPORTED]  # fmt: skip
    assert len(folders) == 7
    for folder in folders:
        check_reference(folder, folder / "reference.npz")


def test_every_other_checkpoint_is_an_unknown_architecture(shared: Path) -> None:
    for folder in sorted((shared / "models/tiny").iterdir()):
        if folder.name.split("-")[0] in SUPPORTED:
            continue
        with pytest.raises(ModelError, match="unknown architecture"):
            import_model(open_checkpoint(folder), context=16)


def test_smollm2_imports_whole(shared: Path) -> None:
    folder = shared / "models/smollm2-135m-llmcompressor"
    model = import_model(open_checkpoint(folder), context=64)
    assert schemes(model) == {"w4a4": 210, "dense": 1} and not model.excused and not model.notes
    assert set(model.tokenizer) == {"tokenizer.json", "tokenizer_config.json"}
    assert model.generation["eos_token_id"] == [2]


def test_the_graph_survives_its_text(root: Path) -> None:
    model = import_model(open_checkpoint(root / "tests/data/llama_tied-modelopt"), context=32)
    text = to_text(model.graph)
    assert to_text(from_text(text)) == text


def test_old_and_new_rope_spellings_agree(tmp_path: Path) -> None:
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 16}  # fmt: skip
    old = llama_config(rope_theta=5e5, rope_scaling={"type": "llama3", **scaling})
    del old["rope_parameters"]
    new = llama_config(rope_parameters={"rope_type": "llama3", "rope_theta": 5e5, **scaling})
    tables = [
        imported(tmp_path / str(i), dense_weights(), config).weights("rope.inv_freq")
        for i, config in enumerate((old, new))
    ]
    np.testing.assert_array_equal(tables[0], tables[1])
    assert tables[0].dtype == np.float32 and tables[0].shape == (8,)


def test_nothing_is_written_beside_the_checkpoint(tmp_path: Path, root: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(root / "tests/data/llama_tied-modelopt", folder)
    before = sorted(path.name for path in folder.iterdir())
    import_model(open_checkpoint(folder), context=8)
    assert sorted(path.name for path in folder.iterdir()) == before
