"""Random checkpoints of a given shape, for timing: NVFP4 safetensors (ModelOpt's dialect) and GGUF.

    python benchmarks/make_checkpoint.py 0.87b OUT_DIR
    python benchmarks/make_checkpoint.py 0.87b OUT.gguf --gguf q4_0   # for llama-bench

The weights mean nothing, but are finite and of the size that trained ones have (standard deviation
about 1/sqrt(K)), so that no kernel meets NaN or denormals. Random bytes are written as the codes
themselves; nothing is quantised, so a file takes about as long as the disk needs.
"""

from __future__ import annotations

import argparse
import json
import math
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Shape:
    """The sizes of a Llama-family model."""

    family: str
    layers: int
    hidden: int
    ff: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool
    rope_theta: float = 10000.0
    context: int = 4096

    def linears(self) -> tuple[tuple[str, str, int, int], ...]:
        """(Hugging Face name, GGUF name, rows N, columns K) of one layer's linears."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return (
            ("self_attn.q_proj", "attn_q", q, self.hidden),
            ("self_attn.k_proj", "attn_k", kv, self.hidden),
            ("self_attn.v_proj", "attn_v", kv, self.hidden),
            ("self_attn.o_proj", "attn_output", self.hidden, q),
            ("mlp.gate_proj", "ffn_gate", self.ff, self.hidden),
            ("mlp.up_proj", "ffn_up", self.ff, self.hidden),
            ("mlp.down_proj", "ffn_down", self.hidden, self.ff),
        )


SHAPES = {
    "tiny": Shape("llama", 2, 128, 384, 4, 2, 32, 512, tied=True, context=512),
    "135m": Shape("llama", 30, 576, 1536, 9, 3, 64, 49152, tied=True),
    "0.87b": Shape("llama", 16, 2048, 6144, 16, 8, 128, 32000, tied=True),
    "8b": Shape("llama", 36, 4096, 12288, 32, 8, 128, 151936, tied=False, rope_theta=1e6),
    "24b": Shape("mistral", 40, 5120, 32768, 32, 8, 128, 131072, tied=False, rope_theta=1e9),
}


# --- random codes -----------------------------------------------------------------------------


def random_bytes(rng: np.random.Generator, count: int) -> Bytes:
    """`count` uniform bytes."""
    return rng.integers(0, 256, count, dtype=np.uint8)


def bf16_matrix(rng: np.random.Generator, n: int, k: int) -> Bytes:
    """Bytes of a bf16 [n, k] matrix: random sign and mantissa at the exponent of 1/sqrt(k)."""
    exponent = 127 + math.floor(math.log2(1 / math.sqrt(k)))
    bits = rng.integers(0, 1 << 16, n * k, dtype=np.uint16)
    return ((bits & 0x807F) | np.uint16(exponent << 7)).view(np.uint8)


def constant(value: float, dtype: str, count: int = 1) -> Bytes:
    """Bytes of `count` equal numbers; BF16 is the upper half of an F32."""
    if dtype == "BF16":
        half = np.full(count, value, np.float32).view(np.uint16)[1::2]
        return np.ascontiguousarray(half).view(np.uint8)
    return np.full(count, value, np.float32).view(np.uint8)


E2M1_RMS = math.sqrt(sum(v * v for v in (0, 0.5, 1, 1.5, 2, 3, 4, 6)) / 8)
# Block scales uniform over the E4M3 codes of 32 .. 448; their root mean square:
E4M3_LOW, E4M3_HIGH = 0x60, 0x7E
E4M3_RMS = math.sqrt(
    sum(((8 + (c & 7)) * 2.0 ** ((c >> 3) - 10)) ** 2 for c in range(E4M3_LOW, E4M3_HIGH + 1))
    / (E4M3_HIGH - E4M3_LOW + 1)
)


# --- safetensors --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor to be written: its bytes are made only when its turn comes."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        sizes = {"U8": 1, "F8_E4M3": 1, "BF16": 2, "F32": 4}
        return math.prod(self.shape) * sizes[self.dtype]


@dataclass(frozen=True, slots=True)
class Recipe:
    """What the checkpoint quantises besides weights: activations (W4A4), the KV cache (FP8)."""

    w4a4: bool
    fp8_cache: bool = False

    @property
    def algorithm(self) -> str:
        return "NVFP4" if self.w4a4 else "W4A16_NVFP4"


def nvfp4_tensors(shape: Shape, recipe: Recipe) -> Iterator[Tensor]:
    """ModelOpt's tensors of the whole model, in the order of the file."""
    embedding = (shape.vocab, shape.hidden)
    yield Tensor("model.embed_tokens.weight", "BF16", embedding)
    for layer in range(shape.layers):
        prefix = f"model.layers.{layer}"
        for name, _, n, k in shape.linears():
            yield Tensor(f"{prefix}.{name}.weight", "U8", (n, k // 2))
            yield Tensor(f"{prefix}.{name}.weight_scale", "F8_E4M3", (n, k // 16))
            yield Tensor(f"{prefix}.{name}.weight_scale_2", "F32", ())
            if recipe.w4a4:
                yield Tensor(f"{prefix}.{name}.input_scale", "F32", ())
        if recipe.fp8_cache:
            for kind in "kv":
                yield Tensor(f"{prefix}.self_attn.{kind}_proj.{kind}_scale", "F32", ())
        yield Tensor(f"{prefix}.input_layernorm.weight", "BF16", (shape.hidden,))
        yield Tensor(f"{prefix}.post_attention_layernorm.weight", "BF16", (shape.hidden,))
    yield Tensor("model.norm.weight", "BF16", (shape.hidden,))
    if not shape.tied:
        yield Tensor("lm_head.weight", "BF16", embedding)


def tensor_bytes(tensor: Tensor, rng: np.random.Generator, columns: int) -> Bytes:
    """The bytes of one tensor. `columns` is K of the linear that a scalar scale belongs to."""
    if tensor.dtype == "U8":
        return random_bytes(rng, tensor.bytes)
    if tensor.dtype == "F8_E4M3":
        return rng.integers(E4M3_LOW, E4M3_HIGH + 1, tensor.bytes, dtype=np.uint8)
    if tensor.name.endswith("weight_scale_2"):
        return constant(1 / math.sqrt(columns) / (E2M1_RMS * E4M3_RMS), "F32")
    if tensor.name.endswith("input_scale"):
        return constant(8.0 / 2688, "F32")  # activations up to 8 fill the range
    if tensor.name.endswith(("k_scale", "v_scale")):
        return constant(16.0 / 448, "F32")  # keys and values up to 16
    if len(tensor.shape) == 1:
        return constant(1.0, "BF16", tensor.shape[0])
    return bf16_matrix(rng, *tensor.shape)


def shards_of(tensors: list[Tensor], limit: int) -> list[list[Tensor]]:
    """Tensors in file order, a new shard whenever the next one would pass `limit` bytes."""
    shards: list[list[Tensor]] = [[]]
    used = 0
    for tensor in tensors:
        if shards[-1] and used + tensor.bytes > limit:
            shards.append([])
            used = 0
        shards[-1].append(tensor)
        used += tensor.bytes
    return shards


def write_shard(path: Path, tensors: list[Tensor], rng: np.random.Generator) -> None:
    """One safetensors file: u64 header length, JSON header padded with blanks to 8 bytes, data."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        end = offset + tensor.bytes
        fact = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [offset, end]}
        header[tensor.name] = fact
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    columns = 1
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors:
            if tensor.dtype == "U8":
                columns = tensor.shape[1] * 2
            file.write(tensor_bytes(tensor, rng, columns).data)


def write_checkpoint(folder: Path, shape: Shape, recipe: Recipe, limit: int, seed: int) -> None:
    """A ModelOpt checkpoint with its configuration and a byte-level tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    shards = shards_of(list(nvfp4_tensors(shape, recipe)), limit)
    where: dict[str, str] = {}
    for number, tensors in enumerate(shards, 1):
        name = "model.safetensors"
        if len(shards) > 1:
            name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_shard(folder / name, tensors, rng)
        where.update({tensor.name: name for tensor in tensors})
    if len(shards) > 1:
        total = sum(tensor.bytes for tensors in shards for tensor in tensors)
        index = {"metadata": {"total_size": total}, "weight_map": where}
        _write_json(folder / "model.safetensors.index.json", index)
    _write_json(folder / "config.json", config(shape, recipe))
    _write_json(folder / "hf_quant_config.json", legacy_quant_config(recipe))
    _write_json(folder / "generation_config.json", {"bos_token_id": 1, "eos_token_id": 2})
    _write_json(folder / "tokenizer.json", tokenizer(shape.vocab))


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


PRODUCER = {"name": "modelopt", "version": "0.47.0"}
EXCLUDED = ["lm_head", "model.embed_tokens"]


def config(shape: Shape, recipe: Recipe) -> dict[str, Any]:
    """config.json with its quantization_config, as export_hf_checkpoint writes it."""
    fp4 = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": 16}
    group = {
        "weights": fp4,
        "input_activations": fp4 if recipe.w4a4 else None,
        "targets": ["Linear"],
    }
    fp8 = {"dynamic": False, "num_bits": 8, "type": "float"}
    return {
        "architectures": [f"{shape.family.capitalize()}ForCausalLM"],
        "model_type": shape.family,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "dtype": "bfloat16",
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.ff,
        "max_position_embeddings": shape.context,
        "num_attention_heads": shape.heads,
        "num_hidden_layers": shape.layers,
        "num_key_value_heads": shape.kv_heads,
        "rms_norm_eps": 1e-5,
        "rope_theta": shape.rope_theta,
        "tie_word_embeddings": shape.tied,
        "vocab_size": shape.vocab,
        "quantization_config": {
            "quant_method": "modelopt",
            "quant_algo": recipe.algorithm,
            "kv_cache_scheme": fp8 if recipe.fp8_cache else None,
            "config_groups": {"group_0": group},
            "ignore": EXCLUDED,
            "producer": PRODUCER,
        },
    }


def legacy_quant_config(recipe: Recipe) -> dict[str, Any]:
    """hf_quant_config.json."""
    quantization = {
        "quant_algo": recipe.algorithm,
        "kv_cache_quant_algo": "FP8" if recipe.fp8_cache else None,
        "group_size": 16,
        "exclude_modules": EXCLUDED,
    }
    return {"producer": PRODUCER, "quantization": quantization}


def byte_alphabet() -> list[str]:
    """The 256 characters by which byte-level BPE spells bytes (GPT-2's bytes_to_unicode)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = (byte for byte in range(256) if byte not in printable)
    spelled = {byte: chr(byte) for byte in printable}
    spelled.update({byte: chr(256 + n) for n, byte in enumerate(others)})
    return [spelled[byte] for byte in range(256)]


def tokenizer(vocab: int) -> dict[str, Any]:
    """A tokenizer.json that spells any text by its bytes; ids past 259 are fillers."""
    special = ["<unk>", "<s>", "</s>"]
    words = [*special, *byte_alphabet()]
    words += [f"<extra_{n}>" for n in range(len(words), vocab)]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = [{"id": n, "content": w, **flags, "special": True} for n, w in enumerate(special)]
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    level["use_regex"] = False
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": level,
        "post_processor": None,
        "decoder": level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": {word: n for n, word in enumerate(words)},
            "merges": [],
        },
    }


# --- GGUF ---------------------------------------------------------------------------------------

# Kind -> (bytes of a block, values of a block).
BLOCKS = {"q4_0": (18, 32), "q6_k": (210, 256), "q8_0": (34, 32), "nvfp4": (36, 64)}


def gguf_blocks(kind: str, n: int, k: int, rng: np.random.Generator) -> Bytes:
    """Random blocks [n, bytes per row] of a [n, k] matrix, scaled for a deviation of 1/sqrt(k).

    The layouts are ggml-common.h's: q4_0 = f16 d, 16 nibble pairs; q8_0 = f16 d, 32 i8;
    q6_k = 128 + 64 code bytes, 16 i8 scales, f16 d; nvfp4 = 4 UE4M3 scales, 32 nibble pairs.
    """
    size, values = BLOCKS[kind]
    if k % values:
        raise SystemExit(f"{kind}: K must be a multiple of {values}, found {k}")
    blocks = random_bytes(rng, n * (k // values) * size).reshape(-1, size)
    deviation = 1 / math.sqrt(k)
    if kind == "nvfp4":
        ue4m3 = max(1, round(deviation / E2M1_RMS * 512))  # subnormal codes count in 2^-9
        blocks[:, :4] = min(ue4m3, 7)
    elif kind == "q6_k":
        blocks[:, 192:208] = 16
        blocks[:, 208:] = _f16(deviation / (18.5 * 16))
    else:
        blocks[:, :2] = _f16(deviation / {"q4_0": 4.6, "q8_0": 74.0}[kind])
    return blocks.reshape(n, -1)


def _f16(value: float) -> Bytes:
    return np.array([value], np.float16).view(np.uint8)


def write_gguf(path: Path, shape: Shape, kind: str, head: str, seed: int) -> None:
    """A llama-architecture GGUF without a tokenizer (llama-bench feeds random ids)."""
    import gguf

    kinds = gguf.GGMLQuantizationType
    rng = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name(f"random {kind}")
    writer.add_context_length(shape.context)
    writer.add_embedding_length(shape.hidden)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.ff)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_rope_freq_base(shape.rope_theta)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(shape.vocab)
    writer.add_tokenizer_model("none")
    tensors = list(gguf_tensors(shape, kind, head))
    for name, n, k, spelled in tensors:
        if spelled == "f32":
            writer.add_tensor_info(name, (k,), np.dtype(np.float32), 4 * k)
            continue
        size, values = BLOCKS[spelled]
        row = k // values * size
        writer.add_tensor_info(name, (n, row), np.dtype(np.uint8), n * row, kinds[spelled.upper()])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for _, n, k, spelled in tensors:
        ones = np.ones(k, np.float32)
        writer.write_tensor_data(ones if spelled == "f32" else gguf_blocks(spelled, n, k, rng))
    writer.close()


def gguf_tensors(shape: Shape, kind: str, head: str) -> Iterator[tuple[str, int, int, str]]:
    """(name, rows, columns, kind) of every tensor; norms are f32 vectors."""
    # llama-quantize, too, keeps whatever computes the logits in more bits than the linears.
    yield "token_embd.weight", shape.vocab, shape.hidden, head if shape.tied else kind
    for layer in range(shape.layers):
        for _, name, n, k in shape.linears():
            yield f"blk.{layer}.{name}.weight", n, k, kind
        yield f"blk.{layer}.attn_norm.weight", 1, shape.hidden, "f32"
        yield f"blk.{layer}.ffn_norm.weight", 1, shape.hidden, "f32"
    yield "output_norm.weight", 1, shape.hidden, "f32"
    if not shape.tied:
        yield "output.weight", shape.vocab, shape.hidden, head


def main() -> None:
    """Write one checkpoint as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("shape", choices=sorted(SHAPES))
    parser.add_argument("out", type=Path, help="a folder, or with --gguf a file")
    parser.add_argument("--gguf", choices=["q4_0", "nvfp4"], help="write a GGUF of these blocks")
    parser.add_argument("--gguf-head", choices=["q6_k", "q8_0", "q4_0"], default="q6_k")
    parser.add_argument("--recipe", choices=["w4a4", "w4a16"], default="w4a4")
    parser.add_argument("--kv-cache", choices=["bf16", "fp8"], default="bf16")
    parser.add_argument("--shard-gb", type=float, default=2.0, help="largest shard, in GB")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    started = time.perf_counter()
    shape = SHAPES[args.shape]
    if args.gguf:
        write_gguf(args.out, shape, args.gguf, args.gguf_head, args.seed)
    else:
        limit = int(args.shard_gb * 1e9)
        recipe = Recipe(args.recipe == "w4a4", args.kv_cache == "fp8")
        write_checkpoint(args.out, shape, recipe, limit, args.seed)
    print(f"{args.out}: {args.shape} in {time.perf_counter() - started:.1f} s")


if __name__ == "__main__":
    main()
