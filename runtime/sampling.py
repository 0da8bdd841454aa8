"""From the logits of one position to one token.

Order of steps, as transformers' `_get_logits_processor` builds its list (generation/utils.py):
repetition penalty, temperature, top-k, top-p, min-p; then one draw. Probabilities are float64.

- repetition penalty r (arXiv:1909.05858): each token of the context once: l/r if l > 0 else l*r.
- temperature t: l / t. t = 0 means greedy: the largest logit, the lowest id among equals.
- top-k: keeps logits >= the k-th largest (equals of it stay, as in TopKLogitsWarper). 0 = off.
- top-p: tokens by falling probability, equals by rising id; keeps a token while the mass before it
  is < p (TopPLogitsWarper says the same from the other end). 1 = off. At least one token stays.
- min-p: keeps p_i >= min_p * max p (MinPLogitsWarper; llama.cpp's llama_sampler_min_p states it on
  logits: l_i >= l_max + ln(min_p)). 0 = off.
- draw: the first token, by id, whose cumulative probability exceeds u = Generator.random().
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import cast

import numpy as np
import numpy.typing as npt

from ..ir.errors import ModelError
from .strict import Json

Logits = npt.NDArray[np.float32]
_GENERATION = "generation_config.json"


@dataclasses.dataclass(frozen=True, slots=True)
class Sampling:
    """How to choose a token; the default is greedy. ModelError for a value out of range."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        _require("temperature", self.temperature, 0 <= self.temperature < math.inf, ">= 0")
        _require("top_k", self.top_k, self.top_k >= 0, ">= 0 (0 = off)")
        _require("top_p", self.top_p, 0 < self.top_p <= 1, "in (0, 1]")
        _require("min_p", self.min_p, 0 <= self.min_p <= 1, "in [0, 1]")
        penalty = self.repetition_penalty
        _require("repetition_penalty", penalty, 0 < penalty < math.inf, "> 0")
        _require("seed", self.seed, self.seed is None or self.seed >= 0, ">= 0")

    def override(
        self,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
        seed: int | None = None,
    ) -> "Sampling":
        """This with some values replaced; None keeps."""
        return Sampling(
            self.temperature if temperature is None else temperature,
            self.top_k if top_k is None else top_k,
            self.top_p if top_p is None else top_p,
            self.min_p if min_p is None else min_p,
            self.repetition_penalty if repetition_penalty is None else repetition_penalty,
            self.seed if seed is None else seed,
        )


def defaults_from(generation: Mapping[str, object]) -> Sampling:
    """The model's own defaults, from the contents of generation_config.json.

    `do_sample` false, or neither it nor a temperature given: greedy (transformers' default).
    A value that is not given is off; transformers' hidden top_k = 50 is not applied (as in vLLM).
    """
    temperature = _number(generation, "temperature", 1.0)
    asked = generation.get("do_sample", "temperature" in generation)
    return Sampling(
        temperature=temperature if asked is True else 0.0,
        top_k=int(_number(generation, "top_k", 0)),
        top_p=_number(generation, "top_p", 1.0),
        min_p=_number(generation, "min_p", 0.0),
        repetition_penalty=_number(generation, "repetition_penalty", 1.0),
    )


def eos_from(generation: Mapping[str, object]) -> tuple[int, ...]:
    """`eos_token_id` of generation_config.json: one id or a list."""
    value = generation.get("eos_token_id")
    ids = cast(list[object], value) if isinstance(value, list) else [value]
    return tuple(v for v in ids if isinstance(v, int) and not isinstance(v, bool))


class Sampler:
    """A `Sampling` with its random generator and the tokens seen so far (for the penalty)."""

    def __init__(self, sampling: Sampling, context: Sequence[int]) -> None:
        self._sampling = sampling
        self._random = np.random.default_rng(sampling.seed)
        self._penalised = sampling.repetition_penalty != 1
        self._seen = set(context) if self._penalised else set[int]()

    def choose(self, logits: Logits) -> int:
        """One token for `logits` [vocab]. Raises ModelError when the largest is not finite."""
        if self._penalised:
            logits = penalise(logits, self._seen, self._sampling.repetition_penalty)
        best = int(logits.argmax())  # numpy's argmax finds a NaN first, if there is one
        if not math.isfinite(logits[best]):
            raise ModelError(
                f"logits: token {best} has {logits[best]}, expected finite numbers; the checkpoint "
                "or a kernel is broken: run `halfbyte inspect --scales` and `--check`"
            )
        token = best if self._sampling.temperature == 0 else self._draw(logits)
        if self._penalised:
            self._seen.add(token)
        return token

    def _draw(self, logits: Logits) -> int:
        tokens, mass = distribution(logits, self._sampling)
        total: npt.NDArray[np.float64] = np.cumsum(mass)
        index = int(total.searchsorted(self._random.random() * float(total[-1]), side="right"))
        return int(tokens[min(index, len(tokens) - 1)])


def penalise(logits: Logits, seen: set[int], penalty: float) -> Logits:
    """A copy with the repetition penalty on the tokens `seen`."""
    changed = logits.copy()
    at = np.fromiter(seen, np.int64, len(seen))
    at = at[at < len(logits)]
    changed[at] = np.where(changed[at] > 0, changed[at] / penalty, changed[at] * penalty)
    return changed


def distribution(
    logits: Logits, sampling: Sampling
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """The tokens that may be drawn, by rising id, and their probabilities (temperature > 0)."""
    tokens, kept = np.arange(len(logits)), logits
    if 0 < sampling.top_k < len(logits):
        smallest = np.partition(logits, -sampling.top_k)[-sampling.top_k]
        tokens = np.flatnonzero(logits >= smallest)
        kept = logits[tokens]
    mass = kept.astype(np.float64)
    mass -= mass.max()
    mass /= sampling.temperature
    np.exp(mass, out=mass)  # in place, all of it: a vocabulary of 150,000 is several caches large
    mass /= mass.sum()
    if sampling.top_p < 1:
        tokens, mass = _nucleus(tokens, mass, sampling.top_p)
    if sampling.min_p > 0:
        wanted = mass >= sampling.min_p * mass.max()
        tokens, mass = tokens[wanted], mass[wanted]
    mass /= mass.sum()
    return tokens, mass


def _nucleus(
    tokens: npt.NDArray[np.int64], mass: npt.NDArray[np.float64], top_p: float
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """Top-p. Tokens below (1 - p)/n sum to less than 1 - p: none can stay, so none is sorted."""
    likely = np.flatnonzero(mass >= (1 - top_p) / len(mass))
    order = likely[np.argsort(-mass[likely], kind="stable")]
    after = np.cumsum(mass[order])
    count = 1 + int(np.searchsorted(after[:-1], top_p, side="left"))
    chosen = np.sort(order[:count])
    return tokens[chosen], mass[chosen]


def _number(generation: Mapping[str, object], key: str, default: float) -> float:
    value = generation.get(key)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ModelError(f"{_GENERATION}: {key}: expected a number, found {value!r}; correct it")
    return value


def _require(name: str, value: Json, holds: bool, expected: str) -> None:
    if not holds:  # a NaN fails every comparison
        raise ModelError(f"sampling: {name}: out of range, expected {expected}, found {value}")
