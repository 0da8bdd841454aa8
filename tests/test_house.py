"""The rules of the house, read off the files themselves (docs/architecture.md states them)."""

from __future__ import annotations

import ast
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("frontend", "ir", "passes", "codegen", "runtime")
FRONT_DOOR = "halfbyte"
LIBRARY = (FRONT_DOOR, *ROOMS)
CHECKED = (*LIBRARY, "tests", "benchmarks")

FILE_LINES = 450
FUNCTION_LINES = 80
FUNCTION_P95 = 40
TEST_DATA_BYTES = 6_000_000
READS_ENVIRONMENT = ("halfbyte/cli.py", "halfbyte/environment.py")

# Marks of the place where this was written. Split, so that this file does not hold them itself.
PRIVATE_MARKS = ("/wo" + "rk/", "/ho" + "me/", "/ro" + "ot/", "/opt/wh" + "eels", "/opt/py" + "pi")


def _python_files(*folders: str) -> list[Path]:
    """Python files of `folders`; the links halfbyte/<room> are not followed."""
    return sorted(
        path
        for folder in folders
        for path in (ROOT / folder).rglob("*.py")
        if not any(parent.is_symlink() for parent in path.parents)
    )


def _name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def _functions(path: Path) -> Iterator[tuple[str, int]]:
    """(file:line name, number of lines) of every function."""
    for node in ast.walk(_tree(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            end = node.end_lineno or node.lineno
            yield f"{_name(path)}:{node.lineno} {node.name}", end - node.lineno + 1


def _imports(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """(line, top-level package) of every absolute import."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name.partition(".")[0]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.lineno, (node.module or "").partition(".")[0]


def _tracked_files() -> list[Path]:
    """What git tracks or would track; all of the source folders where git does not answer."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if listed.returncode != 0:
        return [path for folder in (*CHECKED, "docs") for path in (ROOT / folder).rglob("*.*")]
    paths = (ROOT / name for name in listed.stdout.split("\0") if name)
    return [path for path in paths if path.is_file() and not path.is_symlink()]


def test_links_lead_to_the_rooms() -> None:
    for room in ROOMS:
        link = ROOT / FRONT_DOOR / room
        assert link.is_symlink(), f"{_name(link)} is no link: clone with core.symlinks=true"
        assert link.readlink() == Path("..") / room


def test_files_fit_the_budget() -> None:
    lengths = {_name(path): len(path.read_text().splitlines()) for path in _python_files(*CHECKED)}
    assert not {name: lines for name, lines in lengths.items() if lines > FILE_LINES}


def test_no_function_is_longer_than_a_screen() -> None:
    found = [item for path in _python_files(*CHECKED) for item in _functions(path)]
    assert not [item for item in found if item[1] > FUNCTION_LINES]


def test_functions_stay_short_on_the_whole() -> None:
    lengths = sorted(n for path in _python_files(*LIBRARY) for _, n in _functions(path))
    p95 = lengths[int(len(lengths) * 0.95)] if lengths else 0
    assert p95 <= FUNCTION_P95


def test_rooms_import_each_other_relatively() -> None:
    """`import ir` works from a checkout and would load a second copy of every class."""
    wrong = [
        f"{_name(path)}:{line} import {package}"
        for path in _python_files(*LIBRARY)
        for line, package in _imports(_tree(path))
        if package in LIBRARY
    ]
    assert not wrong


def test_tests_import_the_package_not_the_rooms() -> None:
    wrong = [
        f"{_name(path)}:{line} import {package}"
        for path in _python_files("tests", "benchmarks")
        for line, package in _imports(_tree(path))
        if package in ROOMS
    ]
    assert not wrong


def _reads_environment(tree: ast.Module) -> Iterator[int]:
    names = {"environ", "environb", "getenv", "getenvb"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in names:
            yield node.lineno
        elif isinstance(node, ast.ImportFrom) and node.module == "os":
            if names & {alias.name for alias in node.names}:
                yield node.lineno


def test_only_the_front_door_reads_the_environment() -> None:
    wrong = [
        f"{_name(path)}:{line}"
        for path in _python_files(*LIBRARY)
        if _name(path) not in READS_ENVIRONMENT
        for line in _reads_environment(_tree(path))
    ]
    assert not wrong


def test_nothing_unpickles() -> None:
    banned = {"pickle", "cPickle", "dill", "shelve", "marshal"}
    wrong = [
        f"{_name(path)}:{line} import {package}"
        for path in _python_files(*LIBRARY)
        for line, package in _imports(_tree(path))
        if package in banned
    ]
    assert not wrong


def _shell_calls(tree: ast.Module) -> Iterator[int]:
    """Calls that hand text to a shell, and NumPy loads that would unpickle."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        for keyword in node.keywords:
            is_false = isinstance(keyword.value, ast.Constant) and not keyword.value.value
            if keyword.arg in {"shell", "allow_pickle"} and not is_false:
                yield node.lineno
        if isinstance(node.func, ast.Attribute) and node.func.attr in {"system", "popen"}:
            if isinstance(node.func.value, ast.Name) and node.func.value.id == "os":
                yield node.lineno


def test_nothing_goes_through_a_shell() -> None:
    wrong = [
        f"{_name(path)}:{line}"
        for path in _python_files(*CHECKED)
        for line in _shell_calls(_tree(path))
    ]
    assert not wrong


def test_no_catch_all_files() -> None:
    banned = {"utils", "util", "helpers", "misc", "common"}
    assert not [_name(path) for path in _python_files(*CHECKED) if path.stem in banned]


def test_every_library_module_says_what_it_is_for() -> None:
    def empty(path: Path) -> bool:
        return not path.read_text().strip()  # an `__init__.py` without public names

    silent = [
        _name(path)
        for path in _python_files(*LIBRARY)
        if not empty(path) and ast.get_docstring(_tree(path)) is None
    ]
    assert not silent


def test_type_checking_is_not_switched_off() -> None:
    """An exception names its rule and its reason: `# pyright: ignore[rule]  # why`."""
    wrong: list[str] = []
    for path in _python_files(*LIBRARY, "benchmarks"):
        for number, line in enumerate(path.read_text().splitlines(), 1):
            bare = "# type: ig" + "nore" in line or "# pyright: ig" + "nore\n" in line + "\n"
            if bare or "pyright: basic" in line:
                wrong.append(f"{_name(path)}:{number}")
    assert not wrong


def test_data_of_the_tests_stays_small() -> None:
    data = ROOT / "tests" / "data"
    assert sum(p.stat().st_size for p in data.rglob("*") if p.is_file()) <= TEST_DATA_BYTES


@pytest.mark.parametrize("mark", PRIVATE_MARKS)
def test_no_path_of_one_machine_is_named(mark: str) -> None:
    found: list[str] = []
    for path in _tracked_files():
        if mark.encode() in path.read_bytes():
            found.append(_name(path))
    assert not found


def test_every_phase_says_why() -> None:
    pipeline = pytest.importorskip("halfbyte.passes.pipeline")
    phases = pipeline.PHASES
    assert phases
    assert not [phase for phase in phases if not phase.why.strip()]
    numbers = [phase.id for phase in phases]
    assert numbers == sorted(set(numbers)), "phase ids are unique and in order"
