"""Docs are true: tables equal the code, examples parse, paths exist.

`--update-golden` renews the tables.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from halfbyte.codegen.emit import LATE_PHASES
from halfbyte.driver import IMPORT_WHY
from halfbyte.ir.ops import OPS
from halfbyte.ir.text import from_text, to_text
from halfbyte.ir.verify import verify
from halfbyte.passes.pipeline import PHASES


def ops_table() -> str:
    """The op table as docs/ir.md shows it."""
    rows = ["| op | operands | attributes | meaning |", "|---|---|---|---|"]
    for name, op in OPS.items():
        if op.onnx:
            continue  # docs/onnx.md
        count = str(op.least) if op.least == op.most else f"{op.least}–{op.most}"
        attrs = ", ".join(f"`{a}` ({what})" for a, what in op.attrs.items())
        rows.append(f"| `{name}` | {count} | {attrs} | {op.doc.replace('|', 'or')} |")
    return "\n".join(rows)


def test_op_table(root: Path, update_golden: bool) -> None:
    path = root / "docs" / "ir.md"
    head, _, _ = path.read_text().partition("## Ops\n")
    wanted = f"{head}## Ops\n\n{ops_table()}\n"
    if update_golden:
        path.write_text(wanted)
    assert path.read_text() == wanted


def test_phase_table(root: Path, update_golden: bool) -> None:
    path = root / "docs" / "phases.md"
    rows = "\n".join(f"| {p.id} | {p.why} |" for p in PHASES)
    text = path.read_text()
    pattern = re.compile(r"(\| 00_import [^\n]*\n).*?(\n\| 60_codegen )", re.DOTALL)
    wanted = pattern.sub(lambda m: m[1] + rows + m[2], text)
    if update_golden:
        path.write_text(wanted)
    assert path.read_text() == wanted


def test_phase_table_of_the_readme(root: Path, update_golden: bool) -> None:
    """Those of the pipeline, between import and the two of code generation."""
    path = root / "README.md"
    rows = [("00_import", IMPORT_WHY), *((p.id, p.why) for p in PHASES), *LATE_PHASES]
    table = "| id | why |\n|---|---|\n" + "".join(f"| {id_} | {why} |\n" for id_, why in rows)
    text = path.read_text()
    wanted = re.sub(r"\| id \| why \|\n(?:\|.*\n|@PHASES@\n)+", lambda _: table, text, count=1)
    if update_golden:
        path.write_text(wanted)
    assert path.read_text() == wanted


def test_python_of_the_readme_runs(root: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """The example as it stands, on a tiny checkpoint under the path it names."""
    readme = (root / "README.md").read_text()
    code = readme.partition("```python\n")[2].partition("```")[0]
    model = tmp_path / "path" / "to" / "model"
    model.parent.mkdir(parents=True)
    shutil.copytree(root / "tests" / "data" / "llama_tied-modelopt", model)
    monkeypatch.chdir(tmp_path)
    code = code.replace('model.generate("Hello"', "model.generate([1, 5]")  # it has no tokenizer
    names: dict[str, Any] = {}
    exec(compile(code, "README.md", "exec"), names)
    assert names["logits"].shape == (3, names["model"].artifact.manifest.model.vocab)


def test_example_of_the_ir_is_valid(root: Path) -> None:
    text = (root / "docs" / "ir.md").read_text()
    example = text.partition("```\n")[2].partition("```")[0]
    graph = from_text(example)
    verify(graph)
    assert to_text(graph) == example


@pytest.mark.parametrize("doc", ["architecture", "ir", "phases", "numerics", "adding"])
def test_files_that_docs_name_exist(root: Path, doc: str) -> None:
    text = (root / "docs" / f"{doc}.md").read_text()
    for name in re.findall(
        r"`((?:frontend|passes|codegen|ir|runtime|halfbyte|tests)/[\w./-]+)`", text
    ):
        assert "NN_name" in name or (root / name).exists(), name
