"""Qwen3 (dense): each q and k head is normalised before its rotary positions."""

from __future__ import annotations

from ..ir.graph import Value
from .blocks import Family, pre_norm_block
from .net import Net


def block(net: Net, x: Value, layer: int) -> Value:
    bias = net.config.attention_bias
    return pre_norm_block(net, x, layer, qkv_bias=bias, out_bias=bias, qk_norm=True)


QWEN3 = Family(block)
