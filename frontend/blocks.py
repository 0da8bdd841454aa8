"""The blocks that decoder families are made of. A family file says which, with which flags."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..ir.graph import Value
from ..ir.types import tensor
from .net import INV_FREQ, Net

Block = Callable[[Net, Value, int], Value]
"""(net, residual stream f32 [T, hidden], layer) -> the stream after the layer."""


@dataclass(frozen=True, slots=True)
class Family:
    """How a model type becomes a graph. `wraps`: model types its `text_config` may have."""

    block: Block
    wraps: tuple[str, ...] = ()
    excuses: tuple[tuple[str, str], ...] = ()
    """(prefix of a checkpoint tensor, why the text model does not need it)."""


def decoder(net: Net, block: Block) -> Value:
    """Embedding, layers, final norm, and the head on the rows that are wanted: [R, vocab]."""
    x = net.embed()
    for layer in range(net.config.layers):
        x = block(net, x, layer)
    x = net.b.op("take_rows", x, net.rows, loc="rows")
    return net.head(net.rmsnorm(x, "model.norm"))


def pre_norm_block(
    net: Net, x: Value, layer: int, *, qkv_bias: bool = False, out_bias: bool = False,
    mlp_bias: bool = False, qk_norm: bool = False,
) -> Value:  # fmt: skip
    """x + attention(norm(x)), then x + mlp(norm(x)): the block of every Llama-like family."""
    at = f"model.layers.{layer}"
    h = net.rmsnorm(x, f"{at}.input_layernorm")
    h = attention(net, h, layer, qkv_bias=qkv_bias, out_bias=out_bias, qk_norm=qk_norm)
    x = net.add(x, h, f"{at}.self_attn.residual")
    h = gated_mlp(net, net.rmsnorm(x, f"{at}.post_attention_layernorm"), f"{at}.mlp", bias=mlp_bias)
    return net.add(x, h, f"{at}.mlp.residual")


def attention(
    net: Net, x: Value, layer: int, *, qkv_bias: bool, out_bias: bool, qk_norm: bool
) -> Value:
    """Grouped-query attention over the KV cache: rotary positions, optional norm of each head."""
    c, at = net.config, f"model.layers.{layer}.self_attn"
    q = net.linear(x, f"{at}.q_proj", c.heads * c.head_dim, bias=qkv_bias)
    k = net.linear(x, f"{at}.k_proj", c.kv_heads * c.head_dim, bias=qkv_bias)
    v = net.linear(x, f"{at}.v_proj", c.kv_heads * c.head_dim, bias=qkv_bias)
    if qk_norm:
        q = head_rmsnorm(net, q, f"{at}.q_norm", c.heads)
        k = head_rmsnorm(net, k, f"{at}.k_norm", c.kv_heads)
    q = rope(net, q, f"{at}.q_rope", c.heads)
    k = rope(net, k, f"{at}.k_rope", c.kv_heads)
    by_kind = {kind: net.cache_scale(at, kind) for kind in "kv"}
    keys, values = (
        net.append(rows, f"{at}.{kind}_cache", by_kind[kind]) for kind, rows in (("k", k), ("v", v))
    )
    scales = {f"{kind}_scale": scale for kind, scale in by_kind.items() if scale is not None}
    o = net.b.op(
        "attention", q, keys, values, net.pos, loc=at, heads=c.heads, kv_heads=c.kv_heads,
        head_dim=c.head_dim, scale=c.head_dim**-0.5, window=c.windows[layer], hint="v", **scales,
    )  # fmt: skip
    return net.linear(o, f"{at}.o_proj", c.hidden_size, bias=out_bias)


def head_rmsnorm(net: Net, x: Value, module: str, heads: int) -> Value:
    """RMS norm of each head by one gamma of head_dim (qk-norm)."""
    c = net.config
    gamma = net.vector(f"{module}.weight", c.head_dim, module)
    return net.b.op("head_rmsnorm", x, gamma, loc=module, heads=heads, head_dim=c.head_dim,
                    eps=c.rms_norm_eps)  # fmt: skip


def rope(net: Net, x: Value, loc: str, heads: int) -> Value:
    c = net.config
    table = net.b.weight(INV_FREQ, tensor("f32", c.head_dim // 2))
    return net.b.op("rope", x, net.pos, table, loc=loc, heads=heads, head_dim=c.head_dim,
                    scale=net.rope_scale)  # fmt: skip


def gated_mlp(net: Net, x: Value, module: str, *, bias: bool) -> Value:
    """down(silu(gate(x)) * up(x))."""
    width = net.config.intermediate_size
    gate = net.linear(x, f"{module}.gate_proj", width, bias=bias)
    up = net.linear(x, f"{module}.up_proj", width, bias=bias)
    h = net.b.op("silu_mul", gate, up, loc=f"{module}.act")
    return net.linear(h, f"{module}.down_proj", net.config.hidden_size, bias=bias)
