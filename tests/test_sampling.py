"""Sampling against oracles written from the definitions, token by token and without tricks."""

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from halfbyte.ir.errors import ModelError
from halfbyte.runtime.sampling import (
    Logits,
    Sampler,
    Sampling,
    defaults_from,
    distribution,
    eos_from,
)


def oracle(logits: list[float], s: Sampling, seen: set[int]) -> dict[int, float]:
    """transformers' processors in their order, as plain Python over a list."""
    scores = dict(enumerate(logits))
    for token in seen:
        penalty = s.repetition_penalty
        scores[token] = scores[token] * penalty if scores[token] < 0 else scores[token] / penalty
    scores = {token: value / s.temperature for token, value in scores.items()}
    if s.top_k:
        kth = sorted(scores.values(), reverse=True)[min(s.top_k, len(scores)) - 1]
        scores = {token: value for token, value in scores.items() if value >= kth}
    if s.top_p < 1:
        # TopPLogitsWarper: ascending; remove while the cumulative mass is <= 1 - p; keep the last
        ascending = sorted(scores, key=lambda token: (scores[token], -token))
        mass, cumulative, kept = softmax(scores), 0.0, set[int]()
        for token in ascending:
            cumulative += mass[token]
            if cumulative > 1 - s.top_p + 1e-12 or token == ascending[-1]:
                kept.add(token)
        scores = {token: value for token, value in scores.items() if token in kept}
    if s.min_p:
        mass = softmax(scores)
        most = max(mass.values())
        scores = {t: v for t, v in scores.items() if mass[t] >= s.min_p * most * (1 - 1e-12)}
    return softmax(scores)


def softmax(scores: dict[int, float]) -> dict[int, float]:
    top = max(scores.values())
    weights = {token: math.exp(value - top) for token, value in scores.items()}
    total = math.fsum(weights.values())
    return {token: weight / total for token, weight in weights.items()}


def f32(values: list[float]) -> Logits:
    return np.array(values, np.float32)


@settings(max_examples=300, deadline=None)
@given(
    logits=st.lists(st.integers(-40, 40).map(lambda v: v / 8), min_size=1, max_size=30),
    temperature=st.sampled_from([0.3, 0.7, 1.0, 1.9]),
    top_k=st.sampled_from([0, 1, 2, 5, 100]),
    top_p=st.sampled_from([1.0, 0.97, 0.83, 0.41, 1e-6]),
    min_p=st.sampled_from([0.0, 0.03, 0.47]),
)
def test_distribution(
    logits: list[float], temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    sampling = Sampling(temperature, top_k, top_p, min_p)
    tokens, mass = distribution(f32(logits), sampling)
    expected = oracle(logits, sampling, set())
    assert tokens.tolist() == sorted(expected)
    assert mass == pytest.approx([expected[t] for t in sorted(expected)], rel=1e-9)


def test_top_p_of_a_large_flat_vocabulary() -> None:
    logits = np.zeros(50_000, np.float32)
    tokens, _ = distribution(logits, Sampling(1.0, top_p=0.5))
    assert tokens.tolist() == list(range(25_000))  # equals go by rising id


def test_min_p_is_also_the_rule_on_logits() -> None:
    logits = np.random.default_rng(1).normal(0, 3, 1000).astype(np.float32)
    tokens, _ = distribution(logits, Sampling(1.0, min_p=0.05))
    expected = np.flatnonzero(logits >= logits.max() + math.log(0.05))
    assert tokens.tolist() == expected.tolist()


def test_greedy_takes_the_first_of_equals() -> None:
    assert Sampler(Sampling(), []).choose(f32([1, 3, 3, 2])) == 1


def test_repetition_penalty() -> None:
    sampler = Sampler(Sampling(repetition_penalty=2.0), [0, 0, 3, 99])
    logits = f32([4, 2.5, 0, -1])
    assert sampler.choose(logits) == 1  # 4/2, 2.5, 0, -1*2
    assert sampler.choose(logits) == 0  # 4/2, 2.5/2: its own choice counts too
    assert logits.tolist() == [4, 2.5, 0, -1]


@pytest.mark.parametrize("seed", [0, 7])
def test_draws_follow_the_distribution_and_the_seed(seed: int) -> None:
    sampling = Sampling(temperature=1.5, top_k=4, seed=seed)
    logits = f32([0, 1, 2, -1, 3, -2])
    sampler, again = Sampler(sampling, []), Sampler(sampling, [])
    drawn = [sampler.choose(logits) for _ in range(4000)]
    assert drawn[:50] == [again.choose(logits) for _ in range(50)]
    tokens, mass = distribution(logits, sampling)
    counts = Counter(drawn)
    assert set(counts) == set(tokens.tolist())
    for token, p in zip(tokens.tolist(), mass.tolist(), strict=True):
        assert abs(counts[token] / 4000 - p) < 5 * math.sqrt(p * (1 - p) / 4000)


def test_no_seed_differs() -> None:
    logits = np.zeros(1000, np.float32)
    first, second = (Sampler(Sampling(1.0), []) for _ in range(2))
    assert [first.choose(logits) for _ in range(8)] != [second.choose(logits) for _ in range(8)]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_no_numbers(bad: float, temperature: float) -> None:
    with pytest.raises(ModelError, match="token 2 has"):
        Sampler(Sampling(temperature), []).choose(f32([1, 2, bad, 0]))
    with pytest.raises(ModelError, match="-inf"):
        Sampler(Sampling(temperature), []).choose(f32([-math.inf, -math.inf]))


def test_masked_tokens_are_never_drawn() -> None:
    sampler = Sampler(Sampling(1.0, seed=0), [])
    assert {sampler.choose(f32([-math.inf, 0, -math.inf])) for _ in range(20)} == {1}


@pytest.mark.parametrize(
    "change",
    [{"temperature": -1.0}, {"temperature": math.nan}, {"temperature": math.inf}, {"top_k": -1},
     {"top_p": 0.0}, {"top_p": 1.1}, {"min_p": -0.1}, {"min_p": 2.0}, {"repetition_penalty": 0.0},
     {"seed": -1}],
)  # fmt: skip
def test_values_out_of_range(change: dict[str, float]) -> None:
    name = next(iter(change))
    with pytest.raises(ModelError, match=f"sampling: {name}"):
        Sampling().override(**change)  # pyright: ignore[reportArgumentType]  # one dict for all


def test_defaults_of_the_model() -> None:
    assert defaults_from({}) == Sampling()
    assert defaults_from({"do_sample": False, "temperature": 0.6}).temperature == 0
    assert defaults_from({"temperature": 0.15}).temperature == 0.15
    assert defaults_from({"do_sample": True, "top_k": 20, "top_p": 0.8}) == Sampling(1.0, 20, 0.8)
    assert defaults_from({"do_sample": True}).override(temperature=0.0, seed=3) == Sampling(seed=3)
    with pytest.raises(ModelError, match=r"generation_config\.json: top_p"):
        defaults_from({"top_p": "0.9"})
    assert eos_from({"eos_token_id": 2}) == (2,)
    assert eos_from({"eos_token_id": [2, 3, "x"]}) == (2, 3)
    assert eos_from({}) == ()
