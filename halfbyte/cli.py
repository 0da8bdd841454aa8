"""The command `halfbyte`: finds the subcommand, runs it, and says errors in one form.

Each subcommand is a module with `add_parser(subparsers)` and `main(args) -> exit status`. Only the
module of the command asked for is imported, so that `halfbyte run` never loads the compiler.

Exit status: 0 done, 1 refused (the reason stands on stderr), 2 wrong usage, 130 interrupted, 141
nobody reads the output. `HALFBYTE_DEBUG=1` shows where in halfbyte an error was raised.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType

from . import __version__
from .environment import cache_folder, compiler_command
from .ir.errors import HalfbyteError, IRError

REFUSED, INTERRUPTED, UNREAD = 1, 130, 141
DEBUG = "HALFBYTE_DEBUG"
EXTRAS = {"ml_dtypes": "compile", "gguf": "compile"}
"""Packages that only some commands need -> the extra that installs them."""


@dataclass(frozen=True, slots=True)
class Command:
    """A subcommand: its name, the module that holds it, and its line in `halfbyte --help`."""

    name: str
    module: str
    help: str

    def load(self) -> ModuleType:
        return importlib.import_module(f".{self.module}", __package__)


COMMANDS: tuple[Command, ...] = (
    Command("compile", "compile_command", "make an artifact NAME.hb of a model"),
    Command("run", "run_command", "answer a prompt, chat, or score a text with a compiled model"),
    Command("inspect", "inspect_command", "read what the compiler did to every layer, and why"),
    Command("bench", "bench_command", "time prefill (pp) and decode (tg) as llama-bench does"),
    Command("doctor", "doctor", "what this machine offers, and what mends what it lacks"),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line (default: the process's). Returns the exit status, never raises."""
    words = list(sys.argv[1:] if argv is None else argv)
    _be_printable()
    try:
        status = _run(words)
        sys.stdout.flush()  # here, where a reader that went away is no traceback
        return status
    except SystemExit as done:  # argparse has printed help, or what is wrong
        return done.code if isinstance(done.code, int) else 2
    except HalfbyteError as error:
        return _refuse(error)
    except ModuleNotFoundError as error:
        extra = EXTRAS.get(error.name or "")
        if extra is None:
            raise
        what = f"needs the package {error.name}, which is not installed"
        return _refuse(error, f"halfbyte {words[0]}: {what}; pip install 'halfbyte[{extra}]'")
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        _close_stdout()
        return UNREAD


def _run(words: list[str]) -> int:
    chosen = next((c for c in COMMANDS if words[:1] == [c.name]), None)
    args = _parser(chosen).parse_args(words)
    if chosen is None:  # `version` and `--version`: all that is left
        print(f"halfbyte {__version__}")
        return 0
    module = chosen.load()
    if chosen.name == "doctor":  # asks the machine as the driver would
        return int(module.main(args, cache=cache_folder(), cxx=compiler_command()))
    return int(module.main(args))


def _parser(chosen: Command | None) -> argparse.ArgumentParser:
    """All commands by name and help; of the chosen one also its options."""
    parser = argparse.ArgumentParser(
        prog="halfbyte",
        description="Compiles 4-bit language models ahead of time into one artifact, runs it, and "
        "shows what every step did to every layer.",
        epilog=f"{DEBUG}=1 shows where an error was raised.",
    )
    if chosen is None:
        parser.add_argument("--version", action="version", version=f"halfbyte {__version__}")
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True)
    for command in COMMANDS:
        if command is chosen:
            command.load().add_parser(subparsers)
        else:
            subparsers.add_parser(command.name, help=command.help)
    subparsers.add_parser("version", help="print the version of halfbyte")
    return parser


def _refuse(error: Exception, message: str | None = None) -> int:
    """The error on stderr, with what was noted on its way: `error: where: what is wrong; do`."""
    if os.environ.get(DEBUG, "0") not in ("", "0"):
        traceback.print_exception(error)
        return REFUSED
    print(f"error: {error if message is None else message}", file=sys.stderr)
    for note in getattr(error, "__notes__", ()):
        print(note, file=sys.stderr)
    if isinstance(error, IRError):
        hint = f"this is a bug of halfbyte; {DEBUG}=1 shows where, please report it with that"
        print(hint, file=sys.stderr)
    return REFUSED


def _be_printable() -> None:
    """A terminal that has no `×` or `µ` shows `?` there instead of failing."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="replace")


def _close_stdout() -> None:
    """Points stdout at nothing, so that the interpreter's last flush is quiet."""
    sink = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(sink, sys.stdout.fileno())
    except (OSError, ValueError):  # a stdout that is no file, as in tests
        pass
    finally:
        os.close(sink)
