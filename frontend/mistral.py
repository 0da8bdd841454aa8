"""Mistral, and the text part of mistral3 (Mistral-Small-3.x): head_dim is its own number, attention
may see a sliding window, there are no biases. The vision tower of a wrapper is left out by name.
"""

from __future__ import annotations

from ..ir.graph import Value
from .blocks import Family, pre_norm_block
from .net import Net

_VISION = "vision part: halfbyte compiles the language model"
_VISION_PARTS = (
    "vision_tower",
    "multi_modal_projector",
    "vision_encoder",
    "vision_language_adapter",
)


def block(net: Net, x: Value, layer: int) -> Value:
    return pre_norm_block(net, x, layer)


MISTRAL = Family(block)
MISTRAL3 = Family(
    block,
    wraps=("mistral",),
    excuses=tuple((f"{at}{part}.", _VISION) for at in ("", "model.") for part in _VISION_PARTS),
)
