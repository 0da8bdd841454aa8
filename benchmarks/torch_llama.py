"""The same decoder in torch, bf16: cuBLAS linears, torch's own attention, one CUDA graph per step.

    python benchmarks/torch_llama.py 8b [--json OUT]

What a careful user of torch gets without a compiler, for comparison in the same run: fused q/k/v
and gate/up, `rms_norm` and `scaled_dot_product_attention` of torch, greedy sampling on the device.
"""

from __future__ import annotations

import argparse
import importlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.cuda_linears import graph_us
from benchmarks.make_checkpoint import SHAPES, Shape

torch: Any = importlib.import_module("torch")
functional: Any = importlib.import_module("torch.nn.functional")
EPS = 1e-5


@dataclass(frozen=True, slots=True)
class Layer:
    """The weights of a decoder layer."""

    norm: Any
    qkv: Any
    out: Any
    ff_norm: Any
    gate_up: Any
    down: Any


def _weight(n: int, k: int) -> Any:
    return torch.empty(n, k, device="cuda", dtype=torch.bfloat16).normal_(0, k**-0.5)


class Llama:
    """Random weights of a shape; a cache of `context` positions for each of `batch` sequences."""

    def __init__(self, shape: Shape, layers: list[Layer], head: Any, batch: int, context: int):
        self.shape, self.layers, self.head = shape, layers, head
        size = (shape.layers, 2, batch, shape.kv_heads, context, shape.head_dim)
        self.cache = torch.zeros(size, device="cuda", dtype=torch.bfloat16)
        steps = torch.arange(0, shape.head_dim, 2, device="cuda") / shape.head_dim
        angle = torch.outer(torch.arange(context, device="cuda"), shape.rope_theta**-steps)
        twice = torch.cat((angle, angle), -1)
        self.cos, self.sin = torch.cos(twice).bfloat16(), torch.sin(twice).bfloat16()

    def step(self, ids: Any, position: int) -> Any:
        """The next token of each row of ids [batch, tokens], which stand from `position` on."""

        def norm(x: Any, gamma: Any) -> Any:
            return functional.rms_norm(x, gamma.shape, gamma, EPS)

        x = functional.embedding(ids, self.head)
        for i, layer in enumerate(self.layers):
            x = x + self._attend(i, layer, norm(x, layer.norm), position)
            gate, up = functional.linear(norm(x, layer.ff_norm), layer.gate_up).chunk(2, -1)
            x = x + functional.linear(functional.silu(gate) * up, layer.down)
        last = norm(x[:, -1], self.layers[0].norm)
        return functional.linear(last, self.head).argmax(-1)

    def _attend(self, i: int, layer: Layer, h: Any, position: int) -> Any:
        s, (batch, tokens, _) = self.shape, h.shape
        end = position + tokens
        joint = functional.linear(h, layer.qkv).view(batch, tokens, -1, s.head_dim).transpose(1, 2)
        q, k, v = joint.split((s.heads, s.kv_heads, s.kv_heads), 1)
        keys, values = self.cache[i, 0, :, :, :end], self.cache[i, 1, :, :, :end]
        keys[:, :, position:] = self._rotate(k, position, end)
        values[:, :, position:] = v
        out = functional.scaled_dot_product_attention(
            self._rotate(q, position, end), keys, values, is_causal=tokens > 1, enable_gqa=True
        )
        return functional.linear(out.transpose(1, 2).reshape(batch, tokens, -1), layer.out)

    def _rotate(self, x: Any, begin: int, end: int) -> Any:
        low, high = x.chunk(2, -1)
        return x * self.cos[begin:end] + torch.cat((-high, low), -1) * self.sin[begin:end]


def random_layers(shape: Shape) -> tuple[list[Layer], Any]:
    """The layers and the head, which is the embedding too."""
    q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    ones = torch.ones(shape.hidden, device="cuda", dtype=torch.bfloat16)
    layers = [
        Layer(ones, _weight(q + 2 * kv, shape.hidden), _weight(shape.hidden, q), ones,
              _weight(2 * shape.ff, shape.hidden), _weight(shape.hidden, shape.ff))
        for _ in range(shape.layers)
    ]  # fmt: skip
    return layers, _weight(shape.vocab, shape.hidden)


def measure(name: str, batches: list[int], prompts: list[int], depth: int) -> dict[str, float]:
    """Tokens a second by test: "tg @ d512 x 8" (of all sequences), "pp512"."""
    shape = SHAPES[name]
    layers, head = random_layers(shape)
    found: dict[str, float] = {}

    def note(test: str, tokens: int, run: Callable[[int], None]) -> None:
        found[test] = tokens / graph_us(run, 1, 7) * 1e6
        print(f"torch bf16 {name:>4} {test:>16} {found[test]:10.1f} tok/s", flush=True)

    with torch.inference_mode():
        for batch in batches:
            model = Llama(shape, layers, head, batch, depth + 64)
            ids = torch.zeros(batch, 1, device="cuda", dtype=torch.int64)
            note(f"tg @ d{depth} x {batch}", batch, lambda _, m=model, i=ids: m.step(i, depth))
            del model
        for tokens in prompts:
            model = Llama(shape, layers, head, 1, tokens)
            ids = torch.randint(0, shape.vocab, (1, tokens), device="cuda")
            note(f"pp{tokens}", tokens, lambda _, m=model, i=ids: m.step(i, 0))
            del model
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="A decoder in torch, bf16, CUDA graphs.")
    parser.add_argument("shape", choices=sorted(SHAPES))
    parser.add_argument("-b", type=int, nargs="*", default=[1, 8, 32])
    parser.add_argument("-p", type=int, nargs="*", default=[512, 2048])
    parser.add_argument("-d", type=int, default=512, help="tokens in the cache when decoding")
    parser.add_argument("--json", type=Path, metavar="OUT", help="also write the figures")
    args = parser.parse_args()
    found = measure(args.shape, args.b, args.p, args.d)
    if args.json:
        args.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
