"""What checkpoint files say about quantisation: both producers, every way to exclude a module."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from halfbyte.frontend.quant_config import (
    DENSE,
    FP8,
    W4A4,
    W4A16,
    QuantConfig,
    matches,
    read_quant_config,
)
from halfbyte.ir.errors import ModelError

Q = "model.layers.0.self_attn.q_proj"
FOUR_BIT = {"num_bits": 4, "type": "float", "group_size": 16}


def read(*contents: dict[str, Any]) -> QuantConfig:
    return read_quant_config([(f"file{i}", c) for i, c in enumerate(contents)])


def groups(activations: Any, targets: list[str], weights: Any = FOUR_BIT) -> dict[str, Any]:
    group = {"weights": weights, "input_activations": activations, "targets": targets}
    return {"group_0": group}


@pytest.mark.parametrize(
    ("pattern", "module", "expected"),
    [
        ("lm_head", "lm_head", True),  # exact
        ("vision_tower", "model.vision_tower.layers.0.q_proj", True),  # substring
        ("model.layers.1.mlp", "model.layers.0.mlp.up_proj", False),
        ("*embed_tokens*", "model.embed_tokens", True),  # wildcard
        ("model.layers.0.self_attn*", Q, True),
        ("model.layers.?.mlp.*", Q, False),
        ("re:.*self_attn.*", Q, True),
        ("re:self_attn", Q, False),  # re.match: from the beginning
        ("re:model\\.layers\\.\\d+\\.self_attn\\.[qk]_proj$", Q, True),
        ("language_model.model.layers.0.self_attn.q_proj", "model.language_model" + Q[5:], True),
        ("model.language_model.layers.0.self_attn.q_proj", "language_model." + Q, True),
        ("model.layers.0.self_attn.q_proj", "language_model." + Q, True),
        ("language_model.lm_head", "lm_head", True),
        ("", Q, False),
    ],
)
def test_exclusion_by_exact_substring_wildcard_regex_and_prefix_swap(
    pattern: str, module: str, expected: bool
) -> None:
    assert matches(module, pattern) is expected


@pytest.mark.parametrize("pattern", ["re:(a+)+$", "re:.*.*.*.*.*.*x", "re:(", "re:" + "a" * 2000])
def test_patterns_that_could_hang_are_refused(pattern: str) -> None:
    with pytest.raises(ModelError, match="pattern"):
        matches(Q, pattern)


def test_modelopt_config_json_and_the_legacy_file_agree() -> None:
    new = {
        "quant_algo": "NVFP4",
        "config_groups": groups(FOUR_BIT, ["Linear"]),
        "ignore": ["lm_head"],
    }
    legacy = {"quant_algo": "NVFP4", "exclude_modules": ["lm_head"], "kv_cache_quant_algo": None}
    found = read(new, legacy)
    assert found.schemes(Q) == (("file0", W4A4), ("file1", W4A4))
    assert found.schemes("lm_head") == (("file0", DENSE), ("file1", DENSE))
    assert found.quantizes_activations(Q) is True


def test_groups_without_activations_mean_weight_only() -> None:
    found = read({"quant_algo": "NVFP4", "config_groups": groups(None, ["Linear"])})
    assert found.quantizes_activations(Q) is False


def test_weight_only_wins_where_files_disagree() -> None:
    """Qwen3.6-35B: hf_quant_config says W4A16, config.json says 4-bit activations."""
    config = {"quant_algo": "MIXED_PRECISION", "config_groups": groups(FOUR_BIT, ["Linear"])}
    hf = {"quant_algo": "MIXED_PRECISION", "quantized_layers": {Q: {"quant_algo": "W4A16_NVFP4"}}}
    assert read(config, hf).quantizes_activations(Q) is False
    assert read(config).quantizes_activations(Q) is True


def test_algorithm_w4a16_wins_over_its_own_groups() -> None:
    found = read({"quant_algo": "W4A16_NVFP4", "config_groups": groups(FOUR_BIT, ["Linear"])})
    assert found.quantizes_activations(Q) is False


def test_mixed_precision_by_layer_and_by_aggregate_key() -> None:
    layers = {Q: {"quant_algo": "FP8"}, "model.layers.0.mlp": {"quant_algo": "NVFP4"}}
    found = read({"quant_algo": "MIXED_PRECISION", "quantized_layers": layers})
    assert found.schemes(Q) == (("file0", FP8),)
    assert found.schemes("model.layers.0.mlp.up_proj") == (("file0", W4A4),)
    assert found.schemes("model.layers.1.mlp.up_proj") == ()


def test_compressed_tensors_groups_by_target() -> None:
    eight = {"num_bits": 8, "type": "float"}
    config = {
        "quant_method": "compressed-tensors",
        "config_groups": {
            "group_0": {"weights": eight, "input_activations": eight, "targets": ["re:.*attn.*"]},
            "group_1": {"weights": FOUR_BIT, "input_activations": None, "targets": ["Linear"]},
        },
        "ignore": ["re:.*down_proj$"],
    }  # fmt: skip
    found = read(config)
    assert found.schemes(Q) == (("file0", FP8),)
    assert found.schemes("model.layers.0.mlp.up_proj") == (("file0", W4A16),)
    assert found.schemes("model.layers.0.mlp.down_proj") == (("file0", DENSE),)


def test_ignore_wins_over_exclude_modules_and_sentinels_are_cut() -> None:
    config = {
        "quant_algo": "NVFP4",
        "ignore": ["lm_head.\0backbone.sentinel"],
        "exclude_modules": ["*"],
    }
    found = read(config)
    assert found.schemes("lm_head") == (("file0", DENSE),)
    assert found.schemes(Q) == (("file0", W4A4),)


def test_unknown_words_are_left_to_the_tensors() -> None:
    found = read({"quant_algo": "SOMETHING_NEW"}, {"quant_method": "awq"}, {})
    assert found.schemes(Q) == () and found.quantizes_activations(Q) is None


@pytest.mark.parametrize(
    "contents",
    [{"ignore": 3}, {"ignore": [3]}, {"config_groups": []}, {"config_groups": {"g": 1}},
     {"quantized_layers": {"a": "NVFP4"}}, {"config_groups": {"g": {"weights": 4}}}],
)  # fmt: skip
def test_wrong_json_types_name_the_file(contents: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match="file0"):
        read(contents)


def test_real_configs_of_both_producers(shared: Path) -> None:
    for folder in sorted((shared / "models/tiny").iterdir()):
        config = json.loads((folder / "config.json").read_text())
        found = read(config["quantization_config"])
        assert found.schemes("model.layers.0.mlp.experts.0.up_proj.x")[0][1] in (W4A4, DENSE)
        if folder.name.startswith(("llama_untied", "mistral-", "qwen3-")):
            assert found.schemes("lm_head") == (("file0", DENSE),)
