"""Logits and perplexity of given tokens."""

import math
from collections.abc import Sequence

import numpy as np

from ..ir.errors import ModelError
from .session import Logits, Session

_ROWS = 128  # positions scored at a time: bounds the logits held, [128, vocab] float32


def logits_of(session: Session, ids: Sequence[int]) -> Logits:
    """Logits after every one of `ids`: float32 [len(ids), vocab]. Empties the cache first."""
    session.begin()
    session.rewind()
    session.require_fit(len(ids))
    out = np.empty((len(ids), session.vocab), np.float32)
    session.feed_all(ids, out)
    return out


def perplexity(session: Session, ids: Sequence[int]) -> float:
    """exp of the mean of -ln p(token | all before it), over all tokens but the first.

    Text longer than the context is cut into windows of it that are scored on their own, the first
    token of each unscored. Raises ModelError for fewer than two tokens.
    """
    if len(ids) < 2:
        raise ModelError(f"perplexity: text too short, expected 2 tokens or more, found {len(ids)}")
    total, count = 0.0, 0
    for begin in range(0, len(ids), session.context):
        window = ids[begin : begin + session.context]
        total += _negative_log_likelihood(session, window)
        count += len(window) - 1
    return math.exp(total / count)


def _negative_log_likelihood(session: Session, ids: Sequence[int]) -> float:
    session.begin()
    session.rewind()
    rows = np.empty((min(_ROWS, len(ids)), session.vocab), np.float32)
    total = 0.0
    for begin in range(0, len(ids) - 1, _ROWS):
        targets = ids[begin + 1 : begin + 1 + _ROWS]
        logits = rows[: len(targets)]
        session.feed_all(ids[begin : begin + len(targets)], logits)
        exact = logits.astype(np.float64)
        top = exact.max(axis=1)
        norm = top + np.log(np.exp(exact - top[:, None]).sum(axis=1))
        total += float((norm - exact[np.arange(len(targets)), np.asarray(targets)]).sum())
    if not math.isfinite(total):
        raise ModelError("perplexity: logits are not finite; the checkpoint or a kernel is broken")
    return total
