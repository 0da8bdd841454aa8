"""GGUF block types, by the `gguf` package: the well-kept definition of what those bytes mean."""

from __future__ import annotations

import numpy as np

from .numerics import F32, Array
from .types import GGUF_BLOCKS


def dequantize_gguf(kind: str, blocks: Array) -> F32:
    """u8 [N, bytes] rows of blocks to f32 [N, K]."""
    import gguf

    elements, nbytes = GGUF_BLOCKS[kind]
    qtype = gguf.GGMLQuantizationType[kind.upper()]
    values = gguf.dequantize(blocks, qtype)
    n, row_bytes = blocks.shape
    return np.asarray(values, np.float32).reshape(n, row_bytes // nbytes * elements)
