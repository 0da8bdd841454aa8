"""The families halfbyte knows: a line each, by `architectures[0]` or model_type of the config."""

from __future__ import annotations

from ..ir.errors import ModelError
from .blocks import Family
from .llama import LLAMA
from .mistral import MISTRAL, MISTRAL3
from .qwen2 import QWEN2
from .qwen3 import QWEN3

FAMILIES: dict[str, Family] = {
    "LlamaForCausalLM": LLAMA,
    "MistralForCausalLM": MISTRAL,
    "Mistral3ForConditionalGeneration": MISTRAL3,
    "Qwen2ForCausalLM": QWEN2,
    "Qwen3ForCausalLM": QWEN3,
}
MODEL_TYPES = {
    "llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM",
    "mistral3": "Mistral3ForConditionalGeneration", "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}  # fmt: skip
"""Names for configs without `architectures`."""


def family_of(architecture: str, where: str) -> Family:
    """Raises ModelError, listing the known ones, for an architecture that is not in the table."""
    family = FAMILIES.get(MODEL_TYPES.get(architecture, architecture))
    if family is None:
        raise ModelError(
            f"{where}: unknown architecture {architecture[:80]!r}, expected one of "
            f"{', '.join(FAMILIES)}; compile a model of one of these families"
        )
    return family
