"""The build: cached by content, safe against rot and interruption, clear when it fails."""

import os
import shutil
import signal
import stat
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from halfbyte.codegen import elf
from halfbyte.codegen.build import Built, Event, Options, build
from halfbyte.codegen.compiler import Compiler, find_compiler, zig_executable
from halfbyte.codegen.render import Source
from halfbyte.ir.errors import IRError, TargetError

CXX = shutil.which("c++")
needs_cxx = pytest.mark.skipif(CXX is None, reason="no C++ compiler")
EXPORT = 'extern "C" __attribute__((visibility("default"))) '


def unit(name: str = "one", body: str = "return 1;", flags: tuple[str, ...] = ()) -> Source:
    text = f'#include "{name}.h"\n{EXPORT}int {name}() {{ {body} }}\n'
    return Source(f"{name}.cc", text, {f"{name}.h": "#pragma once\n"}, flags)


def spy(folder: Path) -> tuple[str, Path]:
    """A compiler that notes every start in a file and then does its work."""
    log, script = folder / "starts", folder / "spy++"
    script.write_text(f'#!/bin/sh\necho "$@" >> {log}\nexec {CXX} "$@"\n')
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    return str(script), log


def starts(log: Path) -> int:
    return len(log.read_text().splitlines()) if log.exists() else 0


@needs_cxx
def test_second_build_starts_no_compiler(tmp_path: Path) -> None:
    cxx, log = spy(tmp_path)
    events: list[Event] = []

    def run(*sources: Source) -> Built:
        options = Options(tmp_path / "cache", progress=events.append)
        compiler = find_compiler(cxx, options.cache)
        return build(sources, [s.name.removesuffix(".cc") for s in sources], compiler, options)

    first = run(unit("one"), unit("two"))
    assert set(first.compiled) == {"one.cc", "two.cc"}
    assert [e.what for e in events] == ["compiled", "compiled", "linked"]
    before = starts(log)
    second = run(unit("one"), unit("two"))
    assert starts(log) == before and second.compiled == () and second.sha256 == first.sha256
    third = run(unit("one"), unit("two", "return 2;"))
    assert third.compiled == ("two.cc",) and starts(log) == before + 2  # one object, one link
    assert elf.read(third.path).exports >= {"one", "two"}


@needs_cxx
@pytest.mark.parametrize("suffix", [".o", ".so"])
def test_a_rotten_cache_entry_is_made_again(tmp_path: Path, suffix: str) -> None:
    options = Options(tmp_path / "cache")
    compiler = find_compiler(None, options.cache)
    first = build([unit()], ["one"], compiler, options)
    for path in options.cache.rglob(f"*{suffix}"):
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    if suffix == ".o":
        first.path.unlink()
    again = build([unit()], ["one"], compiler, options)
    assert again.sha256 == first.sha256
    assert again.compiled == (("one.cc",) if suffix == ".o" else ())


@needs_cxx
def test_flags_and_headers_are_part_of_the_key(tmp_path: Path) -> None:
    options = Options(tmp_path / "cache")
    compiler = find_compiler(None, options.cache)
    build([unit()], ["one"], compiler, options)
    other = Source("one.cc", unit().text, {"one.h": "#pragma once\n// changed\n"})
    for changed in (other, unit(flags=("-mavx2",))):
        assert build([changed], ["one"], compiler, options).compiled == ("one.cc",)


@needs_cxx
def test_compile_errors_show_the_compilers_words(tmp_path: Path) -> None:
    options = Options(tmp_path / "cache")
    compiler = find_compiler(None, options.cache)
    with pytest.raises(TargetError, match="one.cc") as error:
        build([unit(body="return undeclared_thing;")], ["one"], compiler, options)
    assert "undeclared_thing" in str(error.value) and str(compiler) in str(error.value)
    assert "command: " in error.value.__notes__[0]
    assert not list(options.cache.glob(".build-*"))


@needs_cxx
def test_an_unknown_flag_is_named_with_a_remedy(tmp_path: Path) -> None:
    options = Options(tmp_path / "cache")
    compiler = find_compiler(None, options.cache)
    with pytest.raises(TargetError, match="does not know the flag -mavx9000.*pip install ziglang"):
        build([unit(flags=("-mavx9000",))], ["one"], compiler, options)


@needs_cxx
def test_a_compiler_without_an_isa_is_usable_without_it(tmp_path: Path) -> None:
    script = tmp_path / "old++"
    script.write_text(
        f'#!/bin/sh\ncase "$*" in *-mavx512fp16*) echo "error: unknown -mavx512fp16" >&2; exit 1;; '
        f'esac\nexec {CXX} "$@"\n'
    )
    script.chmod(0o755)
    compiler = find_compiler(str(script), tmp_path / "cache")
    assert [isa.name for isa in compiler.isas] == ["scalar", "avx2", "avx512"]
    assert compiler.refused == (("amx", "error: unknown -mavx512fp16"),)
    assert find_compiler(str(script), tmp_path / "cache") == compiler


@needs_cxx
def test_a_missing_export_is_our_bug(tmp_path: Path) -> None:
    options = Options(tmp_path / "cache")
    with pytest.raises(IRError, match="export two is missing"):
        build([unit()], ["two"], find_compiler(None, options.cache), options)


@needs_cxx
def test_undefined_symbols_do_not_link(tmp_path: Path) -> None:
    source = Source("one.cc", f"int gone();\n{EXPORT}int one() {{ return gone(); }}\n", {})
    options = Options(tmp_path / "cache")
    with pytest.raises(TargetError, match="gone"):
        build([source], ["one"], find_compiler(None, options.cache), options)


def _heed_interrupts() -> None:
    """A shell's background jobs ignore them, and so would their children."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@needs_cxx
def test_interrupt_ends_the_children_and_leaves_nothing(tmp_path: Path) -> None:
    slow = tmp_path / "slow++"
    slow.write_text(
        f'#!/bin/sh\ncase "$*" in *one.cc*) echo $$ > {tmp_path}/pid; sleep 60;; esac\n'
        f'exec {CXX} "$@"\n'
    )
    slow.chmod(0o755)
    program = f"""
        from pathlib import Path
        from halfbyte.codegen.build import Options, build
        from halfbyte.codegen.compiler import find_compiler
        from halfbyte.codegen.render import Source
        cache = Path({str(tmp_path / "cache")!r})
        build([Source("one.cc", "", {{}})], [], find_compiler({str(slow)!r}, cache), Options(cache))
    """
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program)],
        env=env,
        stderr=subprocess.PIPE,
        preexec_fn=_heed_interrupts,
    )
    deadline = time.monotonic() + 60
    while not (tmp_path / "pid").exists() and time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.02)
    time.sleep(0.1)
    child = int((tmp_path / "pid").read_text())
    process.send_signal(signal.SIGINT)
    assert b"KeyboardInterrupt" in process.communicate(timeout=10)[1]
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)
    assert not list((tmp_path / "cache").glob(".build-*"))
    assert not list((tmp_path / "cache").rglob("*.o"))


def test_no_compiler_names_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("halfbyte.codegen.compiler.zig_executable", lambda: None)
    with pytest.raises(TargetError, match="no C\\+\\+ compiler found.*pip install ziglang"):
        find_compiler(None, tmp_path / "cache")
    with pytest.raises(TargetError, match=r"\$CXX=nowhere\+\+"):
        find_compiler("nowhere++", tmp_path / "cache")


@pytest.mark.skipif(zig_executable() is None, reason="ziglang is not installed")
def test_zig_builds_every_isa(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("halfbyte.codegen.compiler.CANDIDATES", ())
    options = Options(tmp_path / "cache")
    compiler: Compiler = find_compiler(None, options.cache)
    assert compiler.is_zig and [isa.name for isa in compiler.isas][-1] == "amx"
    body = "__m512 v = _mm512_set1_ps(1); return (int)_mm512_reduce_add_ps(v);"
    text = f"#include <immintrin.h>\n{EXPORT}int one() {{ {body} }}\n"
    sources = [Source("one.cc", text, {}, compiler.isas[-1].flags)]
    built = build(sources, ["one"], compiler, options)
    assert all(name.startswith(("libc.", "libm.", "libpthread.")) for name in built.needed)


def test_elf_refuses_what_is_no_library(tmp_path: Path) -> None:
    (tmp_path / "x.so").write_bytes(b"\x7fELF\x02\x01" + bytes(40))
    (tmp_path / "y.so").write_bytes(b"hello")
    for name in ("x.so", "y.so"):
        with pytest.raises(IRError, match=name):
            elf.read(tmp_path / name)
