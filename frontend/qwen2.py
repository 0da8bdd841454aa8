"""Qwen2 and Qwen2.5: Llama's block with biases on q, k and v only."""

from __future__ import annotations

from ..ir.graph import Value
from .blocks import Family, pre_norm_block
from .net import Net


def block(net: Net, x: Value, layer: int) -> Value:
    return pre_norm_block(net, x, layer, qkv_bias=True)


QWEN2 = Family(block)
