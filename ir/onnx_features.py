"""ONNX operators of classic models: n-grams, and some of the domain ai.onnx.ml."""

from __future__ import annotations

from .graph import Op
from .onnx_ops import dtype, like, onnx, shape, typed
from .opdef import OpDef
from .types import UNKNOWN, Dim, TensorType


def _tf_idf(op: Op) -> TensorType:
    x, width = shape(op, 0), max(op.ints("ngram_indexes"), default=-1) + 1
    return typed("f32", None if x is None else (*x[:-1], width))


def _columns(op: Op) -> TensorType:
    x, columns = shape(op, 0), shape(op, 1)
    if x is None or not x:
        return typed(dtype(op, 0), None)
    width: Dim = columns[0] if columns is not None and len(columns) == 1 else UNKNOWN
    return typed(dtype(op, 0), (*(x[:-1] or (1,)), width))


OPS: dict[str, OpDef] = {
    "onnx_tf_idf_vectorizer": onnx(
        "TfIdfVectorizer", "counts of n-grams, or their weights", 1, 1, _tf_idf,
        {
            "max_gram_length": "longest n-gram",
            "max_skip_count": "most elements between two of an n-gram",
            "min_gram_length": "shortest n-gram",
            "mode": "TF, IDF or TFIDF",
            "ngram_counts": "where n-grams of each length begin in the pool",
            "ngram_indexes": "the output column of each n-gram",
            "pool_int64s": "the n-grams",
            "weights": "of the columns",
        },
    ),
    "onnx_binarizer": onnx(
        "Binarizer", "1 above the threshold, else 0", 1, 1, like(), {"threshold": "of x"}
    ),
    "onnx_array_feature_extractor": onnx(
        "ArrayFeatureExtractor", "columns of the last axis", 2, 2, _columns
    ),
}  # fmt: skip
