"""What an installation consists of: the wheel, and a machine that only runs artifacts."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

import halfbyte

ROOMS = ("frontend", "ir", "passes", "codegen", "runtime")
INSTALLER = ("pip", "setuptools", "pkg_resources", "_distutils_hack", "wheel")
RUN_INSTALL_MB = 120

# Packages that only compiling, converting or training needs.
FORBIDDEN = ("gguf", "ml_dtypes", "onnx", "safetensors", "torch", "tvm", "ziglang")

# Loads an artifact with everything that compiles out of reach, and tells what it imported.
LOAD_AND_RUN = """
import json, sys
import halfbyte
model = halfbyte.load(sys.argv[1])
logits = model.logits([1, 2, 3])
print(json.dumps({"shape": list(logits.shape), "finite": bool((logits == logits).all()),
                  "top": logits.argmax(axis=1).tolist(), "modules": sorted(sys.modules)}))
"""


@dataclass(frozen=True, slots=True)
class Installed:
    """A venv with the wheel and its base dependencies, without a compiler on its PATH."""

    folder: Path
    outside: Path  # a working directory that is not the checkout

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Python of the venv. Its PATH holds the venv only: no c++, no nvcc, no zig."""
        environment = {"PATH": str(self.folder / "bin"), "HOME": str(self.outside)}
        command = [str(self.folder / "bin" / "python"), *arguments]
        return subprocess.run(
            command, cwd=self.outside, env=environment, capture_output=True, text=True
        )

    @property
    def site_packages(self) -> Path:
        (found,) = self.folder.glob("lib/python*/site-packages")
        return found


def _call(*command: str | Path, cwd: Path) -> None:
    done = subprocess.run([str(part) for part in command], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"


def _source_files(root: Path, room: str, *patterns: str) -> set[str]:
    return {
        f"halfbyte/{room}/{path.relative_to(root / room).as_posix()}"
        for pattern in patterns
        for path in (root / room).rglob(pattern)
    }


@pytest.fixture(scope="module")
def wheel(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, by way of the sdist, as `python -m build` makes it for a release."""
    pytest.importorskip("build")
    out = tmp_path_factory.mktemp("dist")
    _call(sys.executable, "-m", "build", "--outdir", out, root, cwd=out)
    (made,) = out.glob("halfbyte-*.whl")
    return made


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    folder = tmp_path_factory.mktemp("run-only") / "venv"
    _call(sys.executable, "-m", "venv", folder, cwd=folder.parent)
    # Without bytecode, so that what is measured is what the packages bring.
    flags = ("--quiet", "--no-compile", "--disable-pip-version-check")
    _call(folder / "bin" / "python", "-m", "pip", "install", *flags, wheel, cwd=folder.parent)
    return Installed(folder, tmp_path_factory.mktemp("elsewhere"))


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory, root: Path) -> Path:
    """A small random model, compiled here for the other venv to load."""
    folder = tmp_path_factory.mktemp("model")
    script = root / "benchmarks" / "make_checkpoint.py"
    _call(sys.executable, script, "tiny", folder / "tiny", cwd=folder)
    halfbyte.compile(str(folder / "tiny"), str(folder / "tiny.hb"), target="cpu", context=128)
    return folder / "tiny.hb"


@pytest.mark.slow
def test_wheel_holds_the_rooms_and_nothing_else(wheel: Path, root: Path) -> None:
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert {name.partition("/")[0] for name in names} == {"halfbyte"}
    for room in ROOMS:
        wanted = _source_files(root, room, "*.py", "*.jinja")
        assert wanted and not wanted - names
    assert "halfbyte/py.typed" in names
    assert not [name for name in names if "__pycache__" in name or "/tests/" in name]


@pytest.mark.slow
def test_wheel_states_its_licence_and_command(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    facts = {n.rpartition("/")[2]: n for n in archive.namelist() if ".dist-info/" in n}
    metadata = archive.read(facts["METADATA"]).decode()
    assert "License-Expression: Apache-2.0" in metadata
    assert "LICENSE" in facts
    assert "halfbyte = halfbyte.cli:main" in archive.read(facts["entry_points.txt"]).decode()


def _sizes(site_packages: Path) -> dict[str, int]:
    """Bytes per installed package folder; bytecode and what every venv has are not counted."""
    sizes: dict[str, int] = {}
    for path in site_packages.rglob("*"):
        top = path.relative_to(site_packages).parts[0]
        if path.is_file() and "__pycache__" not in path.parts and not top.startswith(INSTALLER):
            sizes[top] = sizes.get(top, 0) + path.stat().st_size
    return sizes


@pytest.mark.slow
def test_run_only_install_stays_small(installed: Installed) -> None:
    sizes = _sizes(installed.site_packages)
    total = sum(sizes.values()) / 1e6
    largest = sorted(sizes.items(), key=lambda item: -item[1])[:6]
    listed = ", ".join(f"{name} {size / 1e6:.1f}" for name, size in largest)
    print(f"run-only install: {total:.1f} MB ({listed})")
    assert total <= RUN_INSTALL_MB, listed


@pytest.mark.slow
def test_run_only_install_has_nothing_that_compiles(installed: Installed) -> None:
    find = "import importlib.util as u, sys; print([n for n in sys.argv[1:] if u.find_spec(n)])"
    assert installed.run("-c", find, *FORBIDDEN).stdout.strip() == "[]"
    which = "import shutil; print([c for c in ('c++', 'g++', 'cc', 'nvcc') if shutil.which(c)])"
    assert installed.run("-c", which).stdout.strip() == "[]"


@pytest.mark.slow
def test_run_only_install_runs_an_artifact(installed: Installed, artifact: Path) -> None:
    done = installed.run("-c", LOAD_AND_RUN, str(artifact))
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["shape"] == [3, 512] and said["finite"]
    assert not _of_packages(said["modules"], FORBIDDEN)
    here = halfbyte.load(str(artifact)).logits([1, 2, 3])
    assert said["top"] == here.argmax(axis=1).tolist()


@pytest.mark.slow
def test_run_only_command_line(installed: Installed, artifact: Path) -> None:
    run = ("-m", "halfbyte", "run", str(artifact), "--ids", "1,2,3", "--max-tokens", "4")
    done = installed.run(*run, "--temperature", "0")
    assert done.returncode == 0, done.stderr
    doctor = installed.run("-m", "halfbyte", "doctor")
    assert doctor.returncode == 0, doctor.stderr
    assert "runs here" in doctor.stdout and "pip install ml_dtypes gguf" in doctor.stdout


def _of_packages(modules: Sequence[str], packages: Sequence[str]) -> list[str]:
    return [name for name in modules if name.partition(".")[0] in packages]
