"""Which C++ compiler this machine offers, what it can do, and the flags it wants.

Floating point: `-ffp-contract=off`. A kernel fuses a multiply and an add only where it writes an
FMA (intrinsic or `__builtin_fma`), so that gcc, clang and zig agree, and the NVFP4 activation
quantiser rounds exactly as ir/numerics.py defines it. There is no -ffast-math; `-fno-math-errno`
only frees sqrt from setting errno.
"""

from __future__ import annotations

import importlib.util
import json
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..ir.errors import TargetError
from .cache import digest, write_atomic
from .isa import ISAS, Isa

CANDIDATES = ("c++", "g++", "clang++")
REMEDY = "pip install ziglang"
OLDEST_GLIBC = "2.17"  # what zig links against, so that its artifacts load everywhere

_COMPILE = (
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-fvisibility=hidden",
    "-fvisibility-inlines-hidden",
    "-fno-exceptions",
    "-fno-rtti",
    "-fno-math-errno",
    "-ffp-contract=off",
    "-Wall",
)
_LINK = ("-shared", "-Wl,--as-needed", "-Wl,--no-undefined", "-Wl,-z,relro", "-Wl,-z,now")
_BASELINE = ("-march=x86-64", "-mtune=generic")
_ZIG_BASELINE = ("-target", f"x86_64-linux-gnu.{OLDEST_GLIBC}", "-mcpu=x86_64")


@dataclass(frozen=True, slots=True)
class Compiler:
    """A compiler that was started once and answered.

    `command` and `linker` are argument lists; `version` is its own banner, part of every cache key;
    `refused` names the ISAs whose flags it does not know, with its words.
    """

    command: tuple[str, ...]
    linker: tuple[str, ...]
    version: str
    refused: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        return f"{shlex.join(self.command)} ({self.version.splitlines()[0]})"

    @property
    def is_zig(self) -> bool:
        return Path(self.command[0]).name == "zig"

    @property
    def baseline(self) -> tuple[str, ...]:
        return _ZIG_BASELINE if self.is_zig else _BASELINE

    @property
    def compile_flags(self) -> tuple[str, ...]:
        """Flags of every object, without an ISA's own. (zig would add UBSan traps by itself.)"""
        return (*self.baseline, *_COMPILE, *(("-fno-sanitize=all",) if self.is_zig else ()))

    @property
    def link_flags(self) -> tuple[str, ...]:
        return (*self.baseline, *_LINK)

    @property
    def remedy(self) -> str:
        """The command that brings a compiler we know to work."""
        return REMEDY

    @property
    def link_libraries(self) -> tuple[str, ...]:
        """Libraries of the system that the library of a cpu needs."""
        return "-lm", "-lpthread"

    def command_of(self, unit: str) -> tuple[str, ...]:
        """What compiles a unit of this name."""
        return self.command

    def flags_of(self, unit: str) -> tuple[str, ...]:
        """The flags of every unit, without an ISA's own."""
        return self.compile_flags

    @property
    def isas(self) -> tuple[Isa, ...]:
        """The ISAs it can build, in rising order."""
        lacking = {name for name, _ in self.refused}
        return tuple(isa for isa in ISAS if isa.name not in lacking)


def find_compiler(cxx: str | None, cache: Path) -> Compiler:
    """The compiler to use: `cxx` (the user's $CXX) if given, else the first that answers.

    Asked are c++, g++, clang++ and the pip-installable zig, in this order.

    What a compiler answered is remembered in `cache` by its path, size and time, so that asking
    again starts nothing. TargetError: `cxx` does not work, or there is none.
    """
    tried: list[str] = []
    for command in _commands(cxx):
        path = shutil.which(command[0])
        if path is None:
            tried.append(f"{command[0]}: not found")
            continue
        found = _identify((path, *command[1:]), cache)
        if isinstance(found, Compiler):
            return found
        tried.append(f"{shlex.join(command)}: {found}")
    listed = "; ".join(tried)
    if cxx is not None:
        raise TargetError(
            f"$CXX={cxx}: does not work as a C++ compiler: {listed}; unset CXX or mend it"
        )
    raise TargetError(
        f"compiler: no C++ compiler found ({listed}; ziglang: not installed); run `{REMEDY}`"
    )


def _commands(cxx: str | None) -> Iterator[tuple[str, ...]]:
    if cxx is not None:
        yield tuple(shlex.split(cxx)) or ("",)
        return
    yield from ((name,) for name in CANDIDATES)
    zig = zig_executable()
    if zig is not None:
        yield str(zig), "c++"


def zig_executable() -> Path | None:
    """The zig of the Python package `ziglang`, if it is installed."""
    spec = importlib.util.find_spec("ziglang")
    if spec is None or spec.origin is None:
        return None
    path = Path(spec.origin).with_name("zig")
    return path if path.exists() else None


def _identify(command: tuple[str, ...], cache: Path) -> Compiler | str:
    """The compiler behind `command`, or why it is none. Remembered while its file is unchanged."""
    stat = Path(command[0]).resolve().stat()
    key = digest("compiler 1", command, stat.st_size, stat.st_mtime_ns, [isa.flags for isa in ISAS])
    memory = cache / "compilers" / f"{key}.json"
    known = _recall(memory)
    if known is not None:
        return Compiler(command, _linker(command), *known)
    version = _run((*command, "--version"))
    if version.returncode != 0:
        return (version.stderr or version.stdout).strip() or f"exit status {version.returncode}"
    plain = Compiler(command, _linker(command), version.stdout.strip())
    refused = _refused(plain)
    if len(refused) == len(ISAS):
        return refused[0][1]
    fact = {"version": plain.version, "refused": refused}
    write_atomic(memory, json.dumps(fact, indent=1).encode())
    return Compiler(command, plain.linker, plain.version, refused)


def _recall(memory: Path) -> tuple[str, tuple[tuple[str, str], ...]] | None:
    try:
        fact = json.loads(memory.read_text())
        return str(fact["version"]), tuple((str(i), str(why)) for i, why in fact["refused"])
    except (OSError, ValueError, KeyError, TypeError):
        return None  # absent, or half a file of an older crash: ask the compiler again


def _linker(command: tuple[str, ...]) -> tuple[str, ...]:
    """zig as `cc` links without building its own libc++ first (85 s); we use no C++ library."""
    return (command[0], "cc") if Path(command[0]).name == "zig" else command


def _refused(compiler: Compiler) -> tuple[tuple[str, str], ...]:
    """The ISAs it cannot build, with its words. The last ISA has the flags of all before it."""
    if not _probe(compiler, ISAS[-1].flags):
        return ()
    return tuple((isa.name, why) for isa in ISAS if (why := _probe(compiler, isa.flags)))


def _probe(compiler: Compiler, flags: Sequence[str]) -> str:
    """Why it cannot compile an empty program that includes <immintrin.h> with `flags`, or ''."""
    text = "#include <immintrin.h>\n#include <stdint.h>\nint main() { return 0; }\n"
    with tempfile.TemporaryDirectory(prefix="halfbyte-") as folder:
        unit = Path(folder) / "probe.cc"
        unit.write_text(text)
        made = ("-c", str(unit), "-o", str(unit.with_suffix(".o")))
        ran = _run((*compiler.command, *compiler.compile_flags, *flags, *made))
    lines = [line for line in ran.stderr.splitlines() if "error" in line]
    return "" if ran.returncode == 0 else (lines or [ran.stderr.strip()])[0]


def _run(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=120)
    except OSError as error:
        return subprocess.CompletedProcess(command, 127, "", str(error))
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 124, "", "no answer within 120 s")
