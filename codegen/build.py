"""Sources -> objects -> one shared library. The only file that runs a compiler on our sources.

Objects and libraries are cached by the SHA-256 of everything that goes into them (text, headers,
flags, the compiler's banner), so a library whose sources are known starts no compiler at all.
Whatever happens, Ctrl-C included, children are ended and nothing half-made is left behind.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from ..ir.errors import IRError, TargetError
from . import elf
from .cache import Store, digest, sha256_file
from .render import Source

NEEDED = ("libc.so", "libm.so", "libpthread.so", "libdl.so", "librt.so", "libstdc++.so",
          "libgcc_s.so", "libtvm_ffi.so", "ld-linux-x86-64.so")  # fmt: skip
_STALE = 86400.0  # seconds after which a scratch directory is nobody's any more
_HEAVY_BYTES = 6 << 30  # memory that the compiler of a heavy unit takes
_POLL = 0.01  # seconds between looks at the running compilers


@dataclass(frozen=True, slots=True)
class Event:
    """One line of progress: `what` is "compiled", "cached", "linked" or "left out"."""

    name: str
    what: str
    seconds: float


Progress = Callable[[Event], None]


class Toolchain(Protocol):
    """What compiles and links the sources of a target (compiler.py, nvcc.py).

    Commands and libraries are paths of this machine; flags and `version` go into the cache keys.
    """

    @property
    def version(self) -> str: ...
    @property
    def linker(self) -> tuple[str, ...]: ...
    @property
    def link_flags(self) -> tuple[str, ...]: ...
    @property
    def link_libraries(self) -> tuple[str, ...]: ...
    @property
    def refused(self) -> tuple[tuple[str, str], ...]: ...
    @property
    def remedy(self) -> str:
        """The command that brings another one."""
        ...

    def command_of(self, unit: str) -> tuple[str, ...]: ...
    def flags_of(self, unit: str) -> tuple[str, ...]: ...


@dataclass(frozen=True, slots=True)
class Options:
    """How to build: where products are cached, how many compilers at once, who is told.

    `includes` and `libraries` are facts of tvm_ffi's installation (see `ffi_options`); `version` of
    what they hold goes into the cache keys in their place.
    """

    cache: Path
    jobs: int = os.cpu_count() or 1
    progress: Progress | None = None
    includes: tuple[Path, ...] = ()
    libraries: tuple[Path, ...] = ()
    version: str = ""

    def tell(self, name: str, what: str, seconds: float = 0.0) -> None:
        if self.progress is not None:
            self.progress(Event(name, what, seconds))


@dataclass(frozen=True, slots=True)
class Built:
    """The linked library in the cache (copy it, never write to it).

    `words`: what the compiler said of each unit, by name; of units whose words are still cached.
    `objects`: the object of each unit, in the cache.
    """

    path: Path
    sha256: str
    needed: tuple[str, ...]
    versions: tuple[str, ...]
    compiled: tuple[str, ...]
    seconds: float
    words: Mapping[str, str] = field(default_factory=dict[str, str])
    objects: Mapping[str, Path] = field(default_factory=dict[str, Path])


@dataclass(frozen=True, slots=True)
class _Job:
    source: Source
    key: str


def ffi_options(cache: Path, progress: Progress | None = None) -> Options:
    """Options with the headers and the library of the installed tvm_ffi."""
    import tvm_ffi
    from tvm_ffi import libinfo

    return Options(
        cache,
        progress=progress,
        includes=tuple(map(Path, libinfo.include_paths())),
        libraries=(Path(libinfo.find_libtvm_ffi()),),
        version=f"tvm_ffi {tvm_ffi.__version__}",
    )


def build(
    sources: Sequence[Source], exports: Iterable[str], compiler: Toolchain, options: Options
) -> Built:
    """Compile and link `sources`; check that every symbol of `exports` is there.

    TargetError: the compiler fails (its words follow in full). IRError: the library lacks an export
    or needs a library it must not.
    """
    start = time.perf_counter()
    store = Store(options.cache / "objects")
    jobs = [_Job(source, _key(source, compiler, options)) for source in sources]
    library_key = digest(
        "library 1", [job.key for job in jobs], compiler.link_flags, options.version
    )
    library, compiled = store.get(library_key, ".so"), ()
    if library is None:
        with _workplace(options.cache) as place:
            compiled = _compile_missing(jobs, store, compiler, options, place)
            library = _link(library_key, jobs, store, compiler, options, place)
    else:
        options.tell("library", "cached")
    facts = _check(library, exports)
    seconds = time.perf_counter() - start
    words = {job.source.name: _words(store, job.key) for job in jobs}
    objects = {job.source.name: store.path(job.key, ".o") for job in jobs}
    digest_ = sha256_file(library)
    return Built(library, digest_, facts.needed, facts.versions, compiled, seconds, words, objects)


def run_program(
    sources: Sequence[Source], flags: Sequence[str], compiler: Toolchain, options: Options
) -> str:
    """Link `sources` into a program that takes no input, and run it: what it says is remembered.

    TargetError: the compiler fails. IRError: the program does.
    """
    store = Store(options.cache / "objects")
    jobs = [_Job(source, _key(source, compiler, options)) for source in sources]
    key = digest("program 1", [job.key for job in jobs], flags)
    if (said := store.get(key, ".txt")) is not None:
        return said.read_text()
    with _workplace(options.cache) as place:
        _compile_missing(jobs, store, compiler, options, place)
        objects = [str(store.path(job.key, ".o")) for job in jobs]
        program = place / "program"
        command = (*compiler.linker, *flags, *objects, "-o", str(program))
        for _ in _run_all([("program", key, command)], 1, compiler):
            pass
        ran = subprocess.run([str(program)], capture_output=True, text=True, timeout=60)
    if ran.returncode != 0:
        raise IRError(f"{sources[-1].name}: {ran.stderr.strip() or ran.returncode}")
    store.put(key, ".txt", ran.stdout.encode())
    return ran.stdout


def _words(store: Store, key: str) -> str:
    path = store.get(key, ".log")
    return "" if path is None else path.read_text(errors="replace")


def _key(source: Source, compiler: Toolchain, options: Options) -> str:
    outside = options.version if _uses_ffi(source) else ""
    flags = compiler.flags_of(source.name)
    facts = (source.text, dict(source.headers), source.flags, flags)
    return digest("object 1", *facts, compiler.version, outside)


def _uses_ffi(source: Source) -> bool:
    return any("<tvm/" in text for text in (source.text, *source.headers.values()))


@contextlib.contextmanager
def _workplace(cache: Path) -> Generator[Path]:
    """A scratch directory inside the cache, gone afterwards; so are those of killed builds."""
    cache.mkdir(parents=True, exist_ok=True)
    for left in cache.glob(".build-*"):
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime > _STALE:
                shutil.rmtree(left)
    with tempfile.TemporaryDirectory(prefix=".build-", dir=cache) as name:
        yield Path(name)


def _compile_missing(
    jobs: Sequence[_Job], store: Store, compiler: Toolchain, options: Options, place: Path
) -> tuple[str, ...]:
    missing: dict[str, Source] = {}
    for job in jobs:
        if store.get(job.key, ".o") is not None:
            options.tell(job.source.name, "cached")
        else:
            missing[job.key] = job.source
    for heavy in (True, False):
        jobs_at_once = min(options.jobs, _heavy_at_once()) if heavy else options.jobs
        commands = (
            (source.name, key, _compile_command(source, place / key, compiler, options))
            for key, source in sorted(missing.items(), key=lambda item: -_cost(item[1]))
            if source.heavy == heavy
        )
        for name, key, seconds in _run_all(commands, jobs_at_once, compiler):
            store.put(key, ".log", (place / key / "out.log").read_bytes())
            store.put(key, ".o", (place / key / "out.o").read_bytes())
            options.tell(name, "compiled", seconds)
    return tuple(source.name for source in missing.values())


def _cost(source: Source) -> int:
    """For an order: longest first, so that no big unit is left alone at the end."""
    return len(source.text) * (1 + len(source.flags))


def _heavy_at_once() -> int:
    """How many compilers of heavy units this machine's memory holds."""
    nbytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return max(1, nbytes // _HEAVY_BYTES)


def _compile_command(
    source: Source, folder: Path, compiler: Toolchain, options: Options
) -> tuple[str, ...]:
    folder.mkdir()
    for name, text in {**source.headers, source.name: source.text}.items():
        (folder / name).write_text(text)
    includes = [f"-I{path}" for path in options.includes] if _uses_ffi(source) else []
    flags = (*compiler.flags_of(source.name), *source.flags, *includes)
    return (
        *compiler.command_of(source.name),
        *flags,
        "-c",
        source.name,
        "-o",
        str(folder / "out.o"),
    )


@dataclass(slots=True)
class _Running:
    name: str
    key: str
    command: tuple[str, ...]
    process: subprocess.Popen[bytes]
    words: Path
    start: float


def _run_all(
    commands: Iterable[tuple[str, str, tuple[str, ...]]], jobs: int, compiler: Toolchain
) -> Iterator[tuple[str, str, float]]:
    """Run commands, at most `jobs` at once; yield (name, key, seconds) as each ends well."""
    running: list[_Running] = []
    waiting = iter(commands)
    try:
        while True:
            while len(running) < jobs and (item := next(waiting, None)) is not None:
                running.append(_start(*item))
            if not running:
                return
            ended = [task for task in running if task.process.poll() is not None]
            for task in ended:
                running.remove(task)
                if task.process.returncode != 0:
                    words = task.words.read_text(errors="replace")
                    raise _failure(task.name, compiler, task.command, words)
                yield task.name, task.key, time.perf_counter() - task.start
            if not ended:
                time.sleep(_POLL)
    finally:
        _end(running)


def _start(name: str, key: str, command: tuple[str, ...]) -> _Running:
    """Start where the output goes, so that messages and objects hold no path of this machine.

    In a session of its own, so that ending it ends the compiler's own children too.
    """
    out = Path(command[-1])
    words = out.with_suffix(".log")
    with words.open("wb") as log:
        process = subprocess.Popen(
            command,
            cwd=out.parent,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    return _Running(name, key, command, process, words, time.perf_counter())


def _end(running: Iterable[_Running]) -> None:
    for task in running:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(task.process.pid, signal.SIGKILL)
        task.process.wait()


def _failure(name: str, compiler: Toolchain, command: Sequence[str], words: str) -> TargetError:
    what, remedy = _diagnose(words, compiler.remedy)
    error = TargetError(f"{name}: {compiler} {what}; {remedy}\n{words.rstrip()}")
    error.add_note(f"command: {shlex.join(command)}")
    return error


_DIAGNOSES: tuple[tuple[str, str, str], ...] = (
    (r"unrecognized command-line option ['‘\"]?([^'’\"\s]+)", "does not know the flag {}", ""),
    (r"unknown argument: ['‘\"]?([^'’\"\s]+)", "does not know the flag {}", ""),
    (r"no such instruction: [`'‘]?(\w+)", "has an assembler without {}", "apt install binutils"),
    (r"fatal error: ['‘]?([\w./+-]+)['’]?(?: file not found|: No such file)",
     "does not find the header {}", "apt install g++"),
    (r"requires target feature ['‘]?([\w.-]+)", "was not given the feature {}", ""),
    (r"cannot find (-l\S+)", "does not find the library {}", "apt install libc6-dev"),
    (r"(No space left on device)", "ran out of room: {}", "df -h"),
)  # fmt: skip


def _diagnose(words: str, another: str) -> tuple[str, str]:
    """What a compiler's words mean, and the one command that mends it."""
    for pattern, what, remedy in _DIAGNOSES:
        if found := re.search(pattern, words):
            return what.format(found.group(1)), f"run `{remedy or another}`"
    return "failed", f"run `{another}` to use another compiler; if that fails too, it is our bug"


def _link(
    key: str, jobs: Sequence[_Job], store: Store, compiler: Toolchain, options: Options, place: Path
) -> Path:
    objects = [str(store.path(job.key, ".o")) for job in jobs]
    out = place / "library.so"
    folders = [f"-L{library.parent}" for library in options.libraries]
    names = [f"-l:{library.name}" for library in options.libraries]
    libraries = (*folders, *names, *compiler.link_libraries)
    command = (*compiler.linker, *compiler.link_flags, *objects, *libraries, "-o", str(out))
    for name, _, seconds in _run_all([("library", key, command)], 1, compiler):
        options.tell(name, "linked", seconds)
    return store.put(key, ".so", out.read_bytes())


def _check(library: Path, exports: Iterable[str]) -> elf.Library:
    facts = elf.read(library)
    if missing := sorted(set(exports) - facts.exports):
        raise IRError(f"{library}: export {missing[0]} is missing, found {sorted(facts.exports)}")
    for name in facts.needed:
        if not name.startswith(NEEDED):
            raise IRError(f"{library}: needs {name}, expected only {', '.join(NEEDED)}")
    return facts
