"""`halfbyte inspect`: reads an artifact, and nothing but the artifact, in one of several views."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from .inspect_source import Source

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

_HELP = "read what the compiler did to every layer, and why"


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Registers `inspect` with argparse's subparsers."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "inspect", help=_HELP, description="Without a flag: one screen about the artifact."
    )
    parser.add_argument("artifact", help="folder NAME.hb that `halfbyte compile` made")
    parser.add_argument("--target", metavar="NAME", help="the target to read of, where the "
                        "artifact holds several (the first)")  # fmt: skip
    view = parser.add_mutually_exclusive_group()
    view.add_argument("--layer", metavar="NAME", help="the journey of one module or checkpoint "
                      "tensor, from the checkpoint to its kernels; an end of the name is enough "
                      "where no other has it")  # fmt: skip
    view.add_argument("--phases", action="store_true", help="what each phase took and changed")
    view.add_argument("--phase", metavar="ID", help="the IR after a phase (35, fuse, 30_fuse) and "
                      "its decisions")  # fmt: skip
    view.add_argument("--diff", nargs=2, metavar=("A", "B"), help="the IR of two phases compared")
    view.add_argument("--kernels", action="store_true", help="the kernel of each launch and "
                      "bucket, and the refused ones")  # fmt: skip
    view.add_argument("--graph", action="store_true", help="what the CUDA graph of each bucket "
                      "holds")  # fmt: skip
    view.add_argument("--memory", action="store_true", help="the memory plan, its arena drawn")
    view.add_argument("--scales", action="store_true", help="audit of the checkpoint's scales")
    view.add_argument("--check", action="store_true", help="every SHA-256, and whether the code "
                      "runs here; exit status 1 where not")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="the same facts as JSON")
    parser.set_defaults(func=main)
    return parser


def main(args: argparse.Namespace) -> int:
    """Prints a view. Raises ModelError for a damaged artifact or an unknown name."""
    facts, lines, status = _view(Source(args.artifact, args.target), args)
    print(json.dumps(facts, indent=1) if args.json else "\n".join(lines))
    return status


def _view(source: Source, args: argparse.Namespace) -> tuple[object, Sequence[str], int]:
    """The facts as plain data, the same as text, and the exit status.

    Each view is imported when it is asked for: the summary and the check must not fail, nor wait,
    for what only another view needs.
    """
    if args.check:
        from .inspect_check import check, check_text

        verdict = check(source)
        return asdict(verdict), check_text(verdict), 0 if verdict.good else 1
    if args.layer is not None:
        from .inspect_layer import journey
        from .inspect_story import story

        way = journey(source, args.layer)
        return asdict(way), story(way), 0
    if args.phases or args.phase is not None or args.diff:
        return *_phases(source, args), 0
    facts, lines = _whole(source, args)
    return asdict(facts), lines, 0


def _phases(source: Source, args: argparse.Namespace) -> tuple[object, Sequence[str]]:
    from . import inspect_phases as view

    if args.diff:
        diff = view.difference(source, *args.diff)
        return asdict(diff), view.difference_text(diff)
    if args.phase is not None:
        record = view.phase_record(source, args.phase)
        return asdict(record), view.record_text(record)
    rows = view.phase_rows(source)
    return [asdict(row) for row in rows], view.phase_table(rows)


def _whole(source: Source, args: argparse.Namespace) -> tuple[DataclassInstance, Sequence[str]]:
    """Views of the whole artifact."""
    if args.kernels:
        from .inspect_kernels import kernels, kernels_text

        table = kernels(source)
        return table, kernels_text(table)
    if args.graph:
        from .inspect_graph import graphs, graphs_text

        held = graphs(source)
        return held, graphs_text(held)
    if args.memory and source.manifest.net is not None:
        from .inspect_net_memory import net_memory, net_memory_text

        lives = net_memory(source)
        return lives, net_memory_text(lives)
    if args.memory:
        from .inspect_memory import memory, memory_text

        plan = memory(source)
        return plan, memory_text(plan)
    if args.scales:
        from .inspect_scales import scales, scales_text

        audit = scales(source)
        return audit, scales_text(audit)
    from .inspect_summary import summary, summary_text

    facts = summary(source)
    return facts, summary_text(facts)
