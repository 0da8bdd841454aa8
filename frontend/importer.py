"""Phase 00: a checkpoint becomes a graph, as read. Nothing is fused, quantised or laid out here."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..ir.errors import ModelError
from ..ir.graph import Graph
from .blocks import Family, decoder
from .bounded_json import Object
from .config import ModelConfig, architecture_of, read_config, read_generation, text_config
from .container import Checkpoint
from .dialects import check_finite
from .families import family_of
from .kv_cache import AUTO, kv_cache_of
from .net import INV_FREQ, LinearFacts, Net
from .quant_config import read_quant_config
from .rope import F32, inverse_frequencies
from .tensor_info import Array, fault

DEFAULT_CONTEXT = 4096
ROPE_FACTORS = "rope_freqs.weight"
"""GGUF's form of llama3 scaling: divisors of the plain inverse frequencies."""

EXCUSES: tuple[tuple[str, str], ...] = (
    (r"(?:.*\.)?rotary_emb\.inv_freq", "rotary frequencies are computed from the config"),
    (r".*\.(?:[kv]_scale|kv_scale)", "scale of a quantised KV cache; this one is not"),
    (r".*\.q_scale", "scale of quantised queries; they stay as they are"),
    (r".*\.[kv]_proj\.[kv]_bias", "offset of a quantised KV cache; there is none here"),
)
"""(pattern of a tensor's name, why the graph may leave it), for every family."""

PREFIXES = (
    {"model": "model", "lm_head": "lm_head"},
    {"model": "language_model.model", "lm_head": "language_model.lm_head"},
    {"model": "model.language_model", "lm_head": "lm_head"},
)
"""Our module names -> a checkpoint's, as wrappers of different transformers versions have them."""


class Weights:
    """Source name of a `weight` op -> its data, read lazily and checked for infinities once."""

    def __init__(self, checkpoint: Checkpoint, generated: Mapping[str, Array]) -> None:
        self._checkpoint, self._generated = checkpoint, generated
        self._checked: set[str] = set()

    def __call__(self, name: str) -> Array:
        """Raises ModelError for an unknown name and for floats that are not finite."""
        if name in self._generated:
            return self._generated[name]
        data = self._checkpoint.read(name)
        if name not in self._checked:
            check_finite(self._checkpoint.info(name), data)
            self._checked.add(name)
        return data


@dataclass(frozen=True, slots=True)
class Imported:
    """A model as read. `excused`: checkpoint tensors the graph leaves, with the rule; `tokenizer`:
    file name -> contents; `notes`: what a user may want to know about the checkpoint.
    """

    graph: Graph
    weights: Weights
    config: ModelConfig
    generation: Object
    tokenizer: Mapping[str, bytes]
    linears: tuple[LinearFacts, ...]
    excused: Mapping[str, str]
    notes: tuple[str, ...]
    files: tuple[Path, ...]


def import_model(checkpoint: Checkpoint, *, context: int | None, kv_cache: str = AUTO) -> Imported:
    """The graph of one step: ids i32 [T], pos i32, rows i32 [R] -> logits f32 [R, vocab].

    `context`: positions of KV cache; None: 4096, or what the model was made for if less.
    `kv_cache`: one of kv_cache.CHOICES; a cache is typed as the checkpoint means it, phase 32 makes
    of it what the target has. Raises
    ModelError for an unknown architecture, for a tensor that is missing, damaged or misshapen, and
    for one that nothing reads and no rule excuses.
    """
    where = str(checkpoint.path)
    if context is not None and context < 1:
        raise ModelError(
            f"{where}: context {context}, expected at least 1 position; raise --context"
        )
    family = family_of(architecture_of(checkpoint.config, where), where)
    _check_wrapped(family, checkpoint.config, where)
    config = read_config(checkpoint.config, checkpoint.path)
    if context is None:
        context = min(DEFAULT_CONTEXT, config.max_positions or DEFAULT_CONTEXT)
    if config.hidden_act not in ("silu", "swish"):
        raise ModelError(
            f"{where}: hidden_act is {config.hidden_act[:40]!r}, expected silu; no family "
            "here has another activation yet, compile another model"
        )
    table, rope_scale = inverse_frequencies(config.rope, config.head_dim, where)
    net = Net(
        checkpoint,
        config,
        read_quant_config(checkpoint.quantization),
        context,
        _prefixes(checkpoint),
        rope_scale,
        kv_cache_of(checkpoint.quantization, kv_cache),
    )
    logits = decoder(net, family.block)
    generated = {INV_FREQ: _with_factors(net, table)}
    _account(net, family)
    said = {"kv_cache": net.kv_cache.why} if net.kv_cache.why else {}
    graph = net.b.build(
        logits, family=config.model_type, context=context, vocab=config.vocab_size, **said
    )
    return Imported(
        graph=graph,
        weights=Weights(checkpoint, generated),
        config=config,
        generation=read_generation(checkpoint.generation, checkpoint.config, where),
        tokenizer=checkpoint.tokenizer_files(),
        linears=tuple(net.ledger.linears),
        excused=dict(sorted(net.ledger.excused.items())),
        notes=_notes(net),
        files=checkpoint.files,
    )


def _check_wrapped(family: Family, config: Object, where: str) -> None:
    inner = text_config(config, where)
    if family.wraps and inner is not config and inner.get("model_type") not in family.wraps:
        raise ModelError(
            f"{where}: unknown architecture {str(inner.get('model_type'))[:80]!r} in text_config, "
            f"expected {', '.join(family.wraps)}; compile a model of one of these families"
        )


def _prefixes(checkpoint: Checkpoint) -> Mapping[str, str]:
    """The naming whose embedding is in the checkpoint; plain names where none is."""
    names = frozenset(checkpoint.names())
    for prefixes in PREFIXES:
        if f"{prefixes['model']}.embed_tokens.weight" in names:
            return prefixes
    return PREFIXES[0]


def _with_factors(net: Net, table: F32) -> F32:
    """The table, divided by the factors a GGUF carries instead of llama3 parameters."""
    if ROPE_FACTORS not in net.names:
        return table
    net.ledger.excused[ROPE_FACTORS] = f"folded into {INV_FREQ}"
    info, factors = net.checkpoint.info(ROPE_FACTORS), net.checkpoint.read(ROPE_FACTORS)
    check_finite(info, factors)
    if info.dtype != "f32" or factors.shape != table.shape or not (factors > 0).all():
        raise fault(
            info.file,
            info.name,
            f"expected f32 [{table.size}] above 0, found {info.dtype} {list(info.shape)}",
            "convert the model again",
        )
    return (table / factors).astype(np.float32)


def _account(net: Net, family: Family) -> None:
    """Every checkpoint tensor is used or excused. Raises ModelError that names what is left."""
    left: list[str] = []
    for name in net.checkpoint.names():
        if name in net.ledger.used or name in net.ledger.excused:
            continue
        why = _excuse(net, family, name)
        if why is None:
            left.append(name)
        else:
            net.ledger.excused[name] = why
    if left:
        info = net.checkpoint.info(left[0])
        raise fault(
            info.file,
            left[0],
            f"{len(left)} tensor(s) that {net.config.architecture} does not read: "
            f"{_some([repr(name[:80]) for name in left])}",
            "the config is of another model, or this one has parts that halfbyte does not know",
        )


def _some(names: list[str]) -> str:
    """The first few of a list that may be long."""
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _notes(net: Net) -> tuple[str, ...]:
    """What a user may want to know, one line per kind of disagreement."""
    notes = [
        f"{where}: says {claim}, the tensors are {scheme} and decide: {_some(locs)}"
        for (where, claim, scheme), locs in net.ledger.disputes.items()
    ]
    made_for = net.config.max_positions
    if made_for and net.context > made_for:
        notes.append(f"context {net.context} exceeds the {made_for} positions it was made for")
    return tuple(notes)


def _excuse(net: Net, family: Family, name: str) -> str | None:
    for pattern, why in EXCUSES:
        if re.fullmatch(pattern, name):
            return why
    for prefix, why in family.excuses:
        if name.startswith(prefix):
            return why
    if net.config.tied and name == net.stored("lm_head") + ".weight":
        return "the head is tied to the embedding"
    return None
