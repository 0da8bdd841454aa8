"""The KV cache of a graph in words, for the compiler's summary and `inspect`."""

from __future__ import annotations

from collections import Counter

from .ir.graph import Graph
from .ir.types import Plain


def kv_cache_words(graph: Graph) -> str:
    """Its dtype, and why if the checkpoint or the user had a say: `f8e4m3 (asked for)`."""
    encodings = (op.out.type.enc for op in graph.ops if op.name == "state")
    dtypes = Counter(enc.dtype for enc in encodings if isinstance(enc, Plain))
    why = str(graph.attrs.get("kv_cache", ""))
    return ", ".join(dtypes) + (f" ({why})" if why else "")
