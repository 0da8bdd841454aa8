"""The command line's frame: exit statuses, the form of errors, and what is not imported."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from halfbyte import cli
from halfbyte.ir.errors import IRError, ModelError, TargetError

COMPILER = ("halfbyte.frontend", "halfbyte.passes", "halfbyte.codegen", "halfbyte.driver",
            "ml_dtypes", "gguf")  # fmt: skip
Capture = pytest.CaptureFixture[str]


def stub(monkeypatch: pytest.MonkeyPatch, error: BaseException | None) -> None:
    """Replaces `halfbyte run` by a command that raises, or prints."""

    def add_parser(subparsers: Any) -> None:
        subparsers.add_parser("run")

    def main(args: argparse.Namespace) -> int:
        if error is not None:
            raise error
        print("content")
        return 0

    module = ModuleType("stub")
    vars(module).update(add_parser=add_parser, main=main)
    monkeypatch.setattr(cli.Command, "load", lambda self: module)  # pyright: ignore[reportUnknownLambdaType, reportUnknownArgumentType]  # the stub of any command


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (None, 0),
        (ModelError("a.gguf: bad"), 1),
        (TargetError("cpu: no"), 1),
        (IRError("%x: no"), 1),
        (KeyboardInterrupt(), 130),
        (BrokenPipeError(), 141),
        (SystemExit(2), 2),
    ],
)
def test_exit_status(
    monkeypatch: pytest.MonkeyPatch, error: BaseException | None, status: int
) -> None:
    stub(monkeypatch, error)
    assert cli.main(["run"]) == status


def test_an_error_is_one_line_with_its_notes(
    monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    error = IRError("m.0.q_proj: wrong")
    error.add_note("  %y = linear(%x)\n  ^^^^-- here")
    error.add_note("after phase 30_fuse")
    stub(monkeypatch, error)
    assert cli.main(["run"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: m.0.q_proj: wrong\n  %y = linear(%x)\n  ^^^^-- here\nafter phase")
    assert "bug of halfbyte" in err and "Traceback" not in err


def test_debug_shows_where(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    stub(monkeypatch, ModelError("a.gguf: bad"))
    monkeypatch.setenv("HALFBYTE_DEBUG", "1")
    assert cli.main(["run"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    stub(monkeypatch, ModuleNotFoundError("no", name="ml_dtypes"))
    assert cli.main(["run"]) == 1
    assert "pip install 'halfbyte[compile]'" in capsys.readouterr().err


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    stub(monkeypatch, ModuleNotFoundError("no", name="halfbyte.lost"))
    with pytest.raises(ModuleNotFoundError):
        cli.main(["run"])


@pytest.mark.parametrize("words", [[], ["nonsense"], ["inspect"], ["inspect", "a", "--nonsense"],
                                   ["inspect", "a", "--phases", "--kernels"]])  # fmt: skip
def test_wrong_usage_is_2(capsys: Capture, words: list[str]) -> None:
    assert cli.main(words) == 2
    out, err = capsys.readouterr()
    assert out == "" and "usage: halfbyte" in err


@pytest.mark.parametrize("words", [["version"], ["--version"]])
def test_version(capsys: Capture, words: list[str]) -> None:
    assert cli.main(words) == 0
    assert capsys.readouterr().out.startswith("halfbyte ")


def test_help_lists_every_command(capsys: Capture) -> None:
    assert cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"  {command.name} " in text and command.help in text for command in cli.COMMANDS)


@pytest.mark.parametrize("command", [c.name for c in cli.COMMANDS])
def test_each_command_has_help(capsys: Capture, command: str) -> None:
    assert cli.main([command, "--help"]) == 0
    assert f"usage: halfbyte {command}" in capsys.readouterr().out


def test_a_folder_that_is_no_artifact_is_refused(capsys: Capture, tmp_path: Path) -> None:
    assert cli.main(["inspect", str(tmp_path)]) == 1
    assert capsys.readouterr().err.startswith(f"error: {tmp_path}")


def python(root: Path, code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("words", "absent"),
    [
        (["--help"], (*COMPILER, "numpy", "halfbyte.runtime")),
        (["version"], (*COMPILER, "numpy", "halfbyte.runtime")),
        (["run", "--help"], COMPILER),
        (["bench", "--help"], COMPILER),
        (["inspect", "--help"], COMPILER),
        (["inspect", "no-such.hb"], COMPILER),
    ],
)
def test_only_what_is_needed_is_imported(
    root: Path, words: list[str], absent: tuple[str, ...]
) -> None:
    code = (
        "import sys\nfrom halfbyte.cli import main\n"
        f"main({words!r})\n"
        f"loaded = [m for m in sys.modules if m.startswith({absent!r})]\n"
        "print('LOADED', loaded)\n"
    )
    done = python(root, code)
    assert done.stdout.endswith("LOADED []\n"), done.stdout + done.stderr


def test_a_reader_that_goes_away_is_quiet(root: Path) -> None:
    """`halfbyte --help | true`, with a pipe that is closed before anything is written."""
    code = (
        "import os, sys\nread, write = os.pipe()\nos.close(read)\nos.dup2(write, 1)\n"
        "from halfbyte.cli import main\nsys.exit(main(['version']))\n"
    )
    done = python(root, code)
    assert (done.returncode, done.stderr) == (cli.UNREAD, "")
