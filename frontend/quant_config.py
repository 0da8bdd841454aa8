"""What a checkpoint's files SAY of quantisation: hf_quant_config.json and quantization_config, by
ModelOpt and compressed-tensors. It is advice: the dtypes of the tensors decide what a weight is;
only whether activations are quantised too is taken from here.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ..ir.errors import ModelError
from .bounded_json import Object, as_object, as_strings

W4A4, W4A16, FP8, DENSE = "w4a4", "w4a16", "fp8", "dense"
ALGORITHMS = {
    "NVFP4": W4A4, "NVFP4_AWQ": W4A4, "NVFP4_SVD": W4A4, "W4A16_NVFP4": W4A16, "FP8": FP8,
    "FP8_PER_CHANNEL_PER_TOKEN": FP8, "FP8_PB_WO": FP8,
}  # fmt: skip
"""ModelOpt's quant_algo -> scheme; anything else is left to the tensors."""

_NESTED = re.compile(r"\)[*+{]")
MAX_REPEATS = 5


@dataclass(frozen=True, slots=True)
class Rule:
    """Modules matched by a pattern get a scheme (None: one we have no word for)."""

    pattern: str
    scheme: str | None


@dataclass(frozen=True, slots=True)
class Claim:
    """What one file says: the first matching rule, unless a pattern of `ignore` matches."""

    where: str
    ignore: tuple[str, ...]
    rules: tuple[Rule, ...]

    def scheme(self, module: str) -> str | None:
        """The scheme of a linear, None where the file has no word about it."""
        if any(matches(module, pattern) for pattern in self.ignore):
            return DENSE
        return next((r.scheme for r in self.rules if matches(module, r.pattern)), None)


@dataclass(frozen=True, slots=True)
class QuantConfig:
    """All files' claims, most trusted first."""

    claims: tuple[Claim, ...] = ()

    def schemes(self, module: str) -> tuple[tuple[str, str], ...]:
        """(file, scheme) of each file that speaks about the module."""
        found = ((claim.where, claim.scheme(module)) for claim in self.claims)
        return tuple((where, scheme) for where, scheme in found if scheme is not None)

    def quantizes_activations(self, module: str) -> bool | None:
        """False where any file says weight-only, True where one says W4A4, None where none speaks.

        Quantised activations lose accuracy, weight-only never does: on disagreement the files that
        say weight-only win (Qwen3.6-35B: hf_quant_config.json W4A16, config.json W4A4).
        """
        said = {scheme for _, scheme in self.schemes(module)}
        if W4A16 in said:
            return False
        return True if W4A4 in said else None


def read_quant_config(sources: Sequence[tuple[str, Object]]) -> QuantConfig:
    """The claims of each (file, contents). Raises ModelError for parts of the wrong JSON type."""
    return QuantConfig(tuple(_claim(where, contents) for where, contents in sources))


def _claim(where: str, contents: Object) -> Claim:
    listed = contents.get("ignore", contents.get("exclude_modules"))
    ignore = tuple(_cut(p) for p in as_strings(listed, f"{where}: ignore"))
    rules = [*_layer_rules(where, contents), *_group_rules(where, contents)]
    algorithm = str(contents.get("quant_algo") or "").upper()
    if not rules and algorithm:
        rules = [Rule("*", ALGORITHMS.get(algorithm))]
    elif ALGORITHMS.get(algorithm) == W4A16:  # the groups may claim 4-bit activations all the same
        rules = [Rule(r.pattern, W4A16 if r.scheme == W4A4 else r.scheme) for r in rules]
    elif not rules and str(contents.get("quant_method") or "").lower() == "fp8":
        rules = [Rule("*", FP8)]
    return Claim(where, ignore, tuple(rules))


def _cut(pattern: str) -> str:
    """ModelOpt 0.47 leaves `name.\\0sentinel` in some lists (nvfp4-formats.md 13.4)."""
    return pattern.split("\0")[0].rstrip(".")


def _layer_rules(where: str, contents: Object) -> Iterator[Rule]:
    layers = as_object(contents.get("quantized_layers"), f"{where}: quantized_layers")
    for name, value in layers.items():
        fields = as_object(value, f"{where}: quantized_layers")
        scheme = ALGORITHMS.get(str(fields.get("quant_algo") or "").upper())
        yield Rule(name, scheme)
        yield Rule(f"{name}.*", scheme)  # an aggregate key covers what lies below it


def _group_rules(where: str, contents: Object) -> Iterator[Rule]:
    groups = as_object(contents.get("config_groups"), f"{where}: config_groups")
    for name, value in groups.items():
        group = as_object(value, f"{where}: config_groups.{name}")
        scheme = _group_scheme(where, group)
        for target in as_strings(group.get("targets"), f"{where}: config_groups.{name}.targets"):
            yield Rule("*" if target == "Linear" else _cut(target), scheme)


def _group_scheme(where: str, group: Object) -> str | None:
    weights = as_object(group.get("weights"), f"{where}: weights")
    if weights.get("type") != "float" or weights.get("num_bits") not in (4, 8):
        return None
    if weights.get("num_bits") == 8:
        return FP8
    return W4A16 if group.get("input_activations") is None else W4A4


def matches(module: str, pattern: str) -> bool:
    """Does an exclusion or target pattern mean this module?

    Exact, part of the name, wildcard, or `re:`; tried under each of the names that wrappers use for
    one module (`language_model.model.x`, `model.language_model.x`, `model.x`).
    """
    if not pattern:
        return False
    if pattern.startswith("re:"):
        regex = _regex(pattern[3:])
        return any(regex.match(name) for name in _names(module))
    if any(c in pattern for c in "*?["):
        return any(fnmatch.fnmatchcase(name, pattern) for name in _names(module))
    return any(pattern in name for name in _names(module))


def _names(module: str) -> tuple[str, ...]:
    bare = module.removeprefix("model.language_model.").removeprefix("language_model.")
    bare = bare.removeprefix("model.")
    if bare == "lm_head":
        return "lm_head", "language_model.lm_head"
    prefixes = ("model.", "language_model.model.", "model.language_model.")
    return (module, *(prefix + bare for prefix in prefixes))


def _regex(text: str) -> re.Pattern[str]:
    """Compiled, after a check that a stranger's pattern cannot take exponential time."""
    if _NESTED.search(text) or len(re.findall(r"[*+{]", text)) > MAX_REPEATS or len(text) > 1000:
        raise ModelError(
            f"quantization config: pattern {text[:80]!r} repeats groups or more than {MAX_REPEATS} "
            "times; write it simpler"
        )
    try:
        return re.compile(text)
    except (re.error, RecursionError, OverflowError) as error:
        raise ModelError(
            f"quantization config: pattern {text[:80]!r} is no regular expression "
            f"({error}); repair it"
        ) from None
