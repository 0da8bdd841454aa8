"""Real checkpoints by the real producers, end to end, against logits the producers computed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import halfbyte
from halfbyte.runtime import Model
from tests.test_oracle import TINY, cosines

ISAS = ("scalar", "avx2", "avx512", "amx")
Compiled = Callable[[str, str], Path]


@pytest.fixture(scope="module")
def compiled(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    """Artifacts of the shared models, by folder and recipe; each is compiled once."""
    folder = tmp_path_factory.mktemp("models")
    made: dict[tuple[str, str], Path] = {}

    def artifact(name: str, recipe: str) -> Path:
        if (name, recipe) not in made:
            out = folder / f"{name.replace('/', '-')}-{recipe}.hb"
            halfbyte.compile(shared / "models" / name, out, recipe=recipe)
            made[name, recipe] = out
        return made[name, recipe]

    return artifact


def opened(path: Path, isa: str) -> Model:
    """The model on one instruction set; skips where this processor lacks it."""
    try:
        return halfbyte.load(path, isa=isa)
    except halfbyte.TargetError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", TINY)
def test_w4a16_logits(shared: Path, compiled: Compiled, name: str, isa: str) -> None:
    reference = np.load(shared / "models" / "tiny" / name / "reference.npz")
    with opened(compiled(f"tiny/{name}", "w4a16"), isa) as model:
        logits = model.logits(reference["input_ids"].tolist())
    assert cosines(logits, reference["w4a16_f32_logits"]).min() >= 0.9999


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", TINY)
def test_w4a4_logits(shared: Path, compiled: Compiled, name: str, isa: str) -> None:
    """A rounding flip cascades, so the worst row is held to less than the median."""
    reference = np.load(shared / "models" / "tiny" / name / "reference.npz")
    with opened(compiled(f"tiny/{name}", "w4a4"), isa) as model:
        logits = model.logits(reference["input_ids"].tolist())
    found = cosines(logits, reference["w4a4_emul_f32_logits"])
    assert np.median(found) >= 0.9999 and found.min() >= 0.95


@pytest.mark.parametrize("name", TINY)
def test_greedy_tokens(shared: Path, compiled: Compiled, name: str) -> None:
    """24 greedy tokens equal the reference's, up to the first whose margin is a coin toss."""
    reference = np.load(shared / "models" / "tiny" / name / "reference.npz")
    wanted, margins = reference["w4a16_f32_greedy"], reference["w4a16_f32_greedy_margin"]
    with halfbyte.load(compiled(f"tiny/{name}", "w4a16")) as model:
        ids = reference["input_ids"].tolist()
        for token, margin in zip(wanted.tolist(), margins.tolist(), strict=True):
            found = int(model.logits(ids)[-1].argmax())
            if margin < 1e-3:
                break
            assert found == token
            ids.append(token)


SMOLLM2 = "smollm2-135m-llmcompressor"


@pytest.fixture(scope="module")
def smollm2(shared: Path) -> dict[str, np.ndarray]:
    return dict(np.load(shared / "models" / SMOLLM2 / "reference.npz"))


@pytest.mark.parametrize("prompt", [0, 1, 2])
def test_smollm2_prompts(smollm2: dict[str, np.ndarray], compiled: Compiled, prompt: int) -> None:
    ids = smollm2[f"prompt{prompt}_ids"].tolist()
    tag = f"w4a16_f32_p{prompt}"
    with halfbyte.load(compiled(SMOLLM2, "auto")) as model:
        last = model.logits(ids)[-1:]
        assert cosines(last, smollm2[f"{tag}_last_logits"][None]).min() >= 0.99999
        margins = smollm2[f"{tag}_greedy_margin"].tolist()
        for token, margin in zip(smollm2[f"{tag}_greedy"].tolist(), margins, strict=True):
            if margin < 1e-2:
                break
            assert int(last[0].argmax()) == token
            ids.append(token)
            last = model.logits(ids)[-1:]


@pytest.mark.parametrize(
    ("recipe", "wanted", "within"), [("w4a16", 37.37, 0.002), ("w4a4", 44.56, 0.02)]
)
def test_smollm2_perplexity(
    smollm2: dict[str, np.ndarray], compiled: Compiled, recipe: str, wanted: float, within: float
) -> None:
    with halfbyte.load(compiled(SMOLLM2, recipe)) as model:
        found = model.perplexity(smollm2["passage_ids"].tolist())
    assert abs(found / wanted - 1) <= within


def test_an_artifact_compiled_anew_at_the_same_path_is_the_new_one(
    shared: Path, tmp_path: Path
) -> None:
    """The dynamic linker would take the second library for the first, by its path."""
    out = tmp_path / "model.hb"
    for name in ("llama_tied-modelopt", "qwen2-modelopt"):
        folder = shared / "models" / "tiny" / name
        reference = np.load(folder / "reference.npz")
        halfbyte.compile(folder, out)
        with halfbyte.load(out) as model:
            logits = model.logits(reference["input_ids"].tolist())
        assert cosines(logits, reference["w4a16_f32_logits"]).min() >= 0.9999
