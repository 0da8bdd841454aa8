"""A graph under construction that reads weights by module name, whatever their format.

Module names are those of Hugging Face (`model.layers.0.self_attn.q_proj`); a wrapper's prefix is
translated here, and every checkpoint tensor that is read or may be left is written into a ledger.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ..ir.builder import Builder
from ..ir.graph import Value
from ..ir.types import FP8_CACHE, GGUF_BLOCKS, tensor
from .config import ModelConfig
from .container import Checkpoint
from .dialects import QuantizedWeight, quantized_weight
from .kv_cache import KvCache, kv_scale
from .quant_config import FP8, W4A4, W4A16, QuantConfig
from .tensor_info import fault

INV_FREQ = "rope.inv_freq"
"""Source name of the generated table of inverse frequencies."""
DENSE_DTYPES = ("f32", "bf16", "f16")
REPAIR = "the config and the weights do not belong together; download both again"


@dataclass(frozen=True, slots=True)
class LinearFacts:
    """What import learned about one linear. `scheme`: w4a4, w4a16, fp8, gguf or dense."""

    loc: str
    scheme: str
    dialect: str
    shape: tuple[int, int]
    tensors: tuple[str, ...]


@dataclass(slots=True)
class Ledger:
    """Which checkpoint tensors the graph reads, which it may leave and why, what linears are.

    `disputes`: (file, what it says, what the tensors are) -> the linears where the two differ.
    """

    used: set[str] = field(default_factory=set[str])
    excused: dict[str, str] = field(default_factory=dict[str, str])
    linears: list[LinearFacts] = field(default_factory=list[LinearFacts])
    disputes: dict[tuple[str, str, str], list[str]] = field(
        default_factory=dict[tuple[str, str, str], list[str]]
    )


class Net:
    """A graph under construction over one checkpoint. All activations are f32 [T, width]."""

    def __init__(
        self, checkpoint: Checkpoint, config: ModelConfig, quant: QuantConfig, context: int,
        prefixes: Mapping[str, str], rope_scale: float, kv_cache: KvCache,
    ) -> None:  # fmt: skip
        self.checkpoint, self.config, self.quant = checkpoint, config, quant
        self.context, self.prefixes, self.rope_scale = context, prefixes, rope_scale
        self.kv_cache = kv_cache
        self.names = frozenset(checkpoint.names())
        self.ledger = Ledger()
        self.b = Builder("step")  # one call: T tokens in, logits of R rows out
        self.ids = self.b.arg("ids", tensor("i32", "T"))
        self.pos = self.b.arg("pos", tensor("i32"))
        self.rows = self.b.arg("rows", tensor("i32", "R"))
        self._matrices: dict[str, tuple[Value, QuantizedWeight | None]] = {}

    def stored(self, module: str) -> str:
        """The module's name in the checkpoint."""
        for ours, theirs in self.prefixes.items():
            if module == ours or module.startswith(ours + "."):
                return theirs + module[len(ours) :]
        return module

    def add(self, a: Value, b: Value, loc: str) -> Value:
        return self.b.op("add", a, b, loc=loc)

    # ---- the KV cache --------------------------------------------------------------------------

    def cache_scale(self, attention: str, kind: str) -> float | None:
        """What keys ("k") or values ("v") of a layer are divided by in an FP8 cache; None: there
        is none.
        """
        if not self.kv_cache.quantised:
            return None
        stored, why = self.stored(attention), self.kv_cache.why
        name, value = kv_scale(self.checkpoint, self.names, stored, kind, why)
        self.ledger.used.add(name)
        return value

    def append(self, rows: Value, source: str, scale: float | None) -> Value:
        """The cache `source` of rows [T, kv_heads * head_dim] behind this step's."""
        c = self.config
        dtype, attrs = ("f32", {}) if scale is None else (FP8_CACHE, {"cache_scale": scale})
        cache = self.b.state(source, tensor(dtype, c.kv_heads, self.context, c.head_dim))
        return self.b.op("kv_append", cache, rows, self.pos, loc=source, hint="v", **attrs)

    # ---- weights -------------------------------------------------------------------------------

    def raw(self, name: str) -> Value:
        """A checkpoint tensor as it is stored."""
        info = self.checkpoint.info(name)  # ModelError where it is missing
        self.ledger.used.add(name)
        return self.b.weight(name, info.type)

    def vector(self, name: str, size: int, loc: str) -> Value:
        """A norm's gamma or a bias as f32 [size]."""
        stored = self.stored(name)
        info = self.checkpoint.info(stored)
        if info.shape != (size,) or info.dtype not in DENSE_DTYPES:
            raise fault(
                info.file,
                stored,
                f"expected [{size}] of {', '.join(DENSE_DTYPES)}, found "
                f"{list(info.shape)} {info.dtype}",
                REPAIR,
            )
        return self._unpermuted(self._f32(self.raw(stored), loc), stored, loc)

    def _f32(self, value: Value, loc: str) -> Value:
        if value.type == tensor("f32", *value.type.shape):
            return value
        return self.b.op("cast", value, loc=loc, to="f32")

    def _unpermuted(self, value: Value, stored: str, loc: str) -> Value:
        heads = self.checkpoint.permuted_heads(stored)
        return self.b.op("unpermute_rows", value, loc=loc, heads=heads) if heads else value

    def matrix(self, module: str, n: int, k: int) -> tuple[Value, QuantizedWeight | None]:
        """The weight [n, k] of a module as a value a linear can read, whatever its format."""
        if module not in self._matrices:
            found = quantized_weight(self.checkpoint, self.stored(module), self.names)
            if found is None:
                value = self._plain_matrix(module, n, k)
            else:
                value = self._quantized_matrix(found, module, n, k)
            self._matrices[module] = value, found
        return self._matrices[module]

    def _quantized_matrix(self, found: QuantizedWeight, module: str, n: int, k: int) -> Value:
        if found.shape != (n, k):
            info = self.checkpoint.info(found.packed)
            raise fault(
                info.file,
                found.packed,
                f"expected a weight of [{n}, {k}], found {list(found.shape)}",
                REPAIR,
            )
        scale = self.raw(found.block_scale)
        packed = self._unpermuted(self.raw(found.packed), found.packed, module)
        if found.kind == "fp8":
            operands = (packed, self._f32(scale, module))
        else:
            scale = self._unpermuted(scale, found.block_scale, module)
            operands = (packed, scale, self._multiplier(found.global_scale, found, module))
        return self.b.op("dequantize", *operands, loc=module, hint="w", format=found.kind)

    def _multiplier(self, name: str, found: QuantizedWeight, loc: str) -> Value:
        value = self._f32(self.raw(name), loc)
        return self.b.op("reciprocal", value, loc=loc) if found.divisors else value

    def _plain_matrix(self, module: str, n: int, k: int) -> Value:
        stored = f"{self.stored(module)}.weight"
        info = self.checkpoint.info(stored)
        if info.shape != (n, k):
            raise fault(
                info.file, stored, f"expected shape [{n}, {k}], found {list(info.shape)}", REPAIR
            )
        if info.dtype not in (*DENSE_DTYPES, *GGUF_BLOCKS):
            raise fault(
                info.file,
                stored,
                f"expected {', '.join(DENSE_DTYPES)} or a quantised weight, found {info.dtype}",
                "take another export of this model",
            )
        value = self.raw(stored)
        if info.dtype in GGUF_BLOCKS:
            value = self.b.op("dequantize", value, loc=module, hint="w", format="gguf")
        return self._unpermuted(value, stored, module)

    # ---- ops with weights ----------------------------------------------------------------------

    def embed(self) -> Value:
        """The rows of the embedding table: f32 [T, hidden]."""
        module = "model.embed_tokens"
        table, found = self.matrix(module, self.config.vocab_size, self.config.hidden_size)
        if found is not None and found.input_scale:
            self.ledger.excused[found.input_scale] = "an embedding has no activations to quantise"
        return self.b.op("embed", self.ids, table, loc=module)

    def linear(self, x: Value, module: str, n: int, *, bias: bool = False) -> Value:
        """x W^T (+ b). Activations are quantised first where the checkpoint is W4A4 here."""
        k = x.type.last
        weight, found = self.matrix(module, n, k)
        scheme = self._record(module, module, found, weight)
        if found is not None and scheme == W4A4:
            scale = self._multiplier(found.input_scale, found, module)
            x = self.b.op("quantize_dequantize", x, scale, loc=module, hint="xq", format="nvfp4")
        operands = [x, weight]
        if bias:
            operands.append(self.vector(f"{module}.bias", n, module))
        return self.b.op("linear", *operands, loc=module)

    def head(self, x: Value) -> Value:
        """Logits [R, vocab]. A tied head reads the embedding, unless the file quantised it."""
        module = "lm_head"
        stored = self.stored(module)
        quantised = quantized_weight(self.checkpoint, stored, self.names)
        if self.config.tied and quantised is None:
            embedding = "model.embed_tokens"
            table, found = self.matrix(embedding, self.config.vocab_size, x.type.last)
            self._record(module, embedding, found, table)
            return self.b.op("linear", x, table, loc=module)
        return self.linear(x, module, self.config.vocab_size)

    def rmsnorm(self, x: Value, module: str) -> Value:
        gamma = self.vector(f"{module}.weight", x.type.last, module)
        return self.b.op("rmsnorm", x, gamma, loc=module, eps=self.config.rms_norm_eps)

    def _record(self, loc: str, module: str, found: QuantizedWeight | None, weight: Value) -> str:
        """Enter linear `loc`, which reads the weight of `module`, into the ledger; its scheme."""
        stored = self.stored(module)
        said = self.quant.schemes(self.stored(loc))
        if found is None:
            info = self.checkpoint.info(f"{stored}.weight")
            scheme, dialect = (
                ("gguf", info.dtype) if info.dtype in GGUF_BLOCKS else ("dense", info.dtype)
            )
            tensors: tuple[str, ...] = (info.name,)
        else:
            scheme, dialect, tensors = self._scheme(found), found.dialect, found.tensors
        for where, claim in said:
            if claim != scheme and {claim, scheme} != {W4A4, W4A16}:
                self.ledger.disputes.setdefault((where, claim, scheme), []).append(loc)
        n, k = weight.type.static
        self.ledger.linears.append(LinearFacts(loc, scheme, dialect, (n, k), tensors))
        return scheme

    def _scheme(self, found: QuantizedWeight) -> str:
        """w4a4, w4a16 or fp8; excuses an input scale that is not read. Raises ModelError for a W4A4
        linear without one.
        """
        if found.kind == "fp8":
            self._excuse_input(found, "activations stay f32 for FP8 weights")
            return FP8
        claimed = self.quant.quantizes_activations(found.module)
        if claimed is False:
            self._excuse_input(found, "the config says weight-only (W4A16)")
            return W4A16
        if claimed and not found.input_scale:
            info = self.checkpoint.info(found.packed)
            raise fault(
                info.file,
                found.packed,
                "the config says W4A4, but no input scale is beside it",
                "export again, or say weight-only in the config",
            )
        return W4A4 if found.input_scale else W4A16

    def _excuse_input(self, found: QuantizedWeight, why: str) -> None:
        if found.input_scale:
            self.ledger.excused[found.input_scale] = why
