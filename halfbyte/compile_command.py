"""`halfbyte compile`: a model on disk to an artifact, with a line per phase and a summary."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from .driver import CompileReport, Options, compile_model
from .ir.errors import ModelError
from .roofline import Floor
from .runtime.devices import is_cuda

_HELP = "compile a model (SafeTensors folder, GGUF file) or an ONNX graph into an artifact"


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Registers `compile` with argparse's subparsers."""
    parser: argparse.ArgumentParser
    parser = subparsers.add_parser("compile", help=_HELP, description=_HELP)
    parser.add_argument("model", type=Path, help="folder with config.json, a .gguf or an .onnx "
                        "file")  # fmt: skip
    parser.add_argument("-o", "--out", type=Path, metavar="OUT.hb", help="the artifact to write")
    parser.add_argument("--target", default="cpu", metavar="NAME[,NAME]", help="cpu (the default), "
                        "sm_120a, sm_120f, sm_90a; several with commas between")  # fmt: skip
    parser.add_argument("--quantize", choices=["nvfp4"], help="turn unquantised linears into NVFP4")
    parser.add_argument("--recipe", default="auto", choices=["auto", "w4a4", "w4a16"],
                        help="activations of NVFP4 linears; auto: the checkpoint's, as the target "
                        "serves it")  # fmt: skip
    parser.add_argument("--context", type=int, metavar="N", help="positions of the KV cache "
                        "(default 4096, or what the model was made for if less)")  # fmt: skip
    parser.add_argument("--kv-cache", default="auto", choices=["auto", "bf16", "fp8"],
                        help="auto: FP8 where the checkpoint declares it and the target has "
                        "kernels; bf16: never quantised; fp8: by the checkpoint's scales or not "
                        "at all")  # fmt: skip
    parser.add_argument("--allow-fallback", action="append", default=[], metavar="NAME",
                        help="permit a slow kernel by name")  # fmt: skip
    parser.add_argument(
        "--dim",
        action="append",
        default=[],
        metavar="NAME=N",
        help="bind an extent of an ONNX graph, a symbol or INPUT.AXIS",
    )
    _add_phase_options(parser)
    parser.add_argument("--json", action="store_true", help="the summary as JSON on stdout")
    parser.add_argument("--quiet", action="store_true", help="no progress lines")
    return parser


def _add_phase_options(parser: argparse.ArgumentParser) -> None:
    phases = parser.add_argument_group("phases")
    phases.add_argument("--dump", type=Path, metavar="DIR", help="text, diff and log of each phase")
    phases.add_argument("--compile-to", metavar="ID", help="stop behind this phase (its IR goes to "
                        "stdout where no --dump is given)")  # fmt: skip
    phases.add_argument("--start-from", nargs=2, metavar=("ID", "FILE"), help="go on from a dumped "
                        "IR: FILE is the text behind phase ID")  # fmt: skip
    phases.add_argument("--print-ir-after-all", action="store_true", help="IR of each phase to "
                        "stderr")  # fmt: skip


def options_of(args: argparse.Namespace) -> Options:
    """The driver's options. Exits with 2 where -o is missing and needed."""
    if args.out is None and args.compile_to is None:
        print("error: compile: -o OUT.hb is missing (or --compile-to ID)", file=sys.stderr)
        raise SystemExit(2)
    start = None if args.start_from is None else (args.start_from[0], Path(args.start_from[1]))
    return Options(
        model=args.model,
        out=args.out,
        target=args.target,
        quantize=args.quantize,
        recipe=args.recipe,
        context=args.context,
        kv_cache=args.kv_cache,
        allow_fallback=frozenset(args.allow_fallback),
        dims=tuple(map(_dim, args.dim)),
        dump=args.dump,
        compile_to=args.compile_to,
        start_from=start,
        progress=_silent if args.quiet else _to_stderr,
        print_ir=_to_stderr if args.print_ir_after_all else None,
    )


def _dim(word: str) -> tuple[str, int]:
    name, _, number = word.rpartition("=")
    if not name or not number.isdigit():
        raise ModelError(f"--dim {word}: expected NAME=N, a symbol and a number")
    return name, int(number)


def main(args: argparse.Namespace) -> int:
    """Compile; the summary goes to stdout."""
    report = compile_model(options_of(args))
    if args.json:
        print(json.dumps(report.to_json(), indent=1))
    elif report.artifact is None:
        if args.dump is None:
            print("".join(r.text for r in (report, *report.others)), end="")
    else:
        print("\n".join(summary(report)))
    return 0


def _silent(line: str) -> None:
    pass


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _mib(nbytes: float) -> str:
    return f"{nbytes / 2**20:,.1f} MiB"


def _roofline(floor: Floor) -> str:
    """What a decode step must read and, where this machine's memory is the one, the speed."""
    reads = f"a decode step reads {_mib(floor.bytes_per_token)}"
    if not floor.gigabytes:
        return reads
    speed = f"{floor.gigabytes:.1f} GB/s read here just now, about"
    return f"{reads}: at the {speed} {floor.tokens_per_second:.0f} tok/s"


def summary(report: CompileReport) -> list[str]:
    """The closing summary, aligned: of each target, and then of the artifact."""
    lines = [line for r in (report, *report.others) for line in _target(r, bool(report.others))]
    size = f"{report.artifact}, {_mib(report.artifact_bytes)}, in {report.seconds:.1f} s"
    return [*lines, f"{'artifact':10} {size}"]


def _target(report: CompileReport, named: bool) -> list[str]:
    kinds = ", ".join(f"{count} x {name}" for name, count in report.kernels.items())
    formats = ", ".join(f"{name} {_mib(n)}" for name, n in report.bytes_by_format.items())
    if report.is_net:
        rows = _net(report, kinds, formats)
        return [f"{name:10} {text}" for name, text in (*_named(report, named), *rows)]
    rows = [
        *_named(report, named),
        ("launches", f"{report.launches} per step, buckets {list(report.buckets)}"),
        ("kernels", kinds),
        ("fallbacks", str(report.fallbacks)),
        ("weights", formats),
        ("memory", f"arena {_mib(report.arena)}, workspace {_mib(report.workspace)}, "
                   f"KV cache {_mib(report.state)} in {report.kv_cache} for {report.context} "
                   "positions"),
        ("self-test", _selftest(report, "the interpreter")),
        ("roofline", _roofline(report.floor)),
    ]  # fmt: skip
    return [f"{name:10} {text}" for name, text in rows]


def _named(report: CompileReport, named: bool) -> list[tuple[str, str]]:
    return [("target", report.target)] if named else []


def _selftest(report: CompileReport, oracle: str) -> str:
    """What was tested: nothing where that takes a device, or a graph launches nothing."""
    if not report.selftests and is_cuda(report.target):
        return "none: it takes the device"
    worst = f"worst {report.worst_selftest:.0%} of the tolerance"
    left = f"; not tested: {', '.join(report.untested)}" if report.untested else ""
    return f"{report.selftests} kernels against {oracle}, {worst}{left}"


def _net(report: CompileReport, kinds: str, formats: str) -> list[tuple[str, str]]:
    """The summary of an ONNX graph."""
    return [
        ("launches", str(report.launches)),
        ("kernels", kinds),
        ("weights", formats or "none"),
        ("self-test", _selftest(report, "onnx's reference evaluator")),
    ]
