"""Llama 1 to 3 and what shares its shape (SmolLM2): biases as the config says."""

from __future__ import annotations

from ..ir.graph import Value
from .blocks import Family, pre_norm_block
from .net import Net


def block(net: Net, x: Value, layer: int) -> Value:
    c = net.config
    return pre_norm_block(
        net, x, layer, qkv_bias=c.attention_bias, out_bias=c.attention_bias, mlp_bias=c.mlp_bias
    )


LLAMA = Family(block)
