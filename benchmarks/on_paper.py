"""What can be said of a CUDA target without its card: bytes, floors, and machine code.

    python benchmarks/on_paper.py bytes CHECKPOINT --target sm_120a   # of a decode step
    python benchmarks/on_paper.py census ARTIFACT --target sm_120a    # of every kernel

Nothing here is a measurement of speed. `bytes` compares what a decode step reads, as phase 40
placed it, with the least its weights could take; a floor is those bytes over the card's memory
bandwidth as its maker states it. `census` counts instructions in the artifact's library.
"""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path

from halfbyte.codegen.ptxas import readable
from halfbyte.codegen.sass import LOCAL_MEMORY, census, count, find_tools
from halfbyte.driver import Options, compile_model
from halfbyte.ir.graph import Graph, Value
from halfbyte.ir.text import from_text
from halfbyte.ir.types import Nvfp4
from halfbyte.runtime.artifact import Artifact

CARDS = {"RTX 5090": 1792, "RTX PRO 6000 Blackwell": 1792, "RTX 5080": 960}
"""GB/s of the cards of sm_120, by NVIDIA's product pages."""
FAMILIES = ("OMMA", "HMMA", "F2FP", "LDGSTS", "LDSM", *LOCAL_MEMORY)


def least(value: Value) -> int:
    """Bytes of a weight without padding and with one global scale: 4.5 bits a number in NVFP4."""
    if not isinstance(value.type.enc, Nvfp4):
        return value.type.nbytes
    n, k = value.type.static
    return n * k // 2 + n * k // 16 + 4


def read_by_a_step(graph: Graph) -> list[Value]:
    """The weights that a decode step reads whole: all but a table that only embeds one row."""
    uses = graph.uses()
    found = [v for v in graph.values() if v.place is not None and v.place.space == "weights"]
    return [v for v in found if {op.name for op in uses[v]} != {"embed"}]


def cache_bytes(graph: Graph, positions: int) -> int:
    """Of keys and values of so many positions, in all layers."""
    caches = [op.out.type for op in graph.ops if op.name == "state"]
    return sum(t.nbytes // t.enc.parts(t.static)[0].shape[0] // 16 for t in caches) * positions


def tell_bytes(args: argparse.Namespace) -> None:
    options = Options(args.checkpoint, None, args.target, compile_to="50", recipe=args.recipe)
    graph = from_text(compile_model(options).text)
    weights = read_by_a_step(graph)
    placed = sum(v.type.placed_nbytes for v in weights)
    minimum, cache = sum(map(least, weights)), cache_bytes(graph, args.context)
    by_format = Counter[str]()
    for v in weights:
        by_format[str(v.type.enc)] += v.type.placed_nbytes
    print(f"{args.checkpoint.name} for {args.target}: a decode step reads {placed / 1e9:.3f} GB of")
    for name, nbytes in by_format.most_common():
        print(f"  {nbytes / 1e9:7.3f} GB  {name}")
    print(
        f"at least {minimum / 1e9:.3f} GB: {placed / minimum - 1:.2%} more for padding and scales"
    )
    print(f"and {cache / 1e9:.3f} GB of keys and values at context {args.context}")
    for card, bandwidth in CARDS.items():
        seconds = (placed + cache) / (bandwidth * 1e9)
        print(f"{card}, {bandwidth} GB/s: floor {seconds * 1e3:.3f} ms, {1 / seconds:.0f} tok/s")


def tell_census(args: argparse.Namespace) -> None:
    artifact, tools = Artifact.open(args.artifact), find_tools()
    if tools is None:
        raise SystemExit("no cuobjdump: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm")
    print("kernel".ljust(44), *(name.rjust(7) for name in FAMILIES))
    for symbol, instructions in sorted(census(artifact.library(args.target), tools).items()):
        name = "cutlass" if "cutlass" in symbol else readable(symbol)
        counts = (str(count(instructions, family)).rjust(7) for family in FAMILIES)
        print(name[:44].ljust(44), *counts)


def main() -> None:
    parser = argparse.ArgumentParser(description="what can be said without the card")
    commands = parser.add_subparsers(required=True)
    told = commands.add_parser("bytes")
    told.add_argument("checkpoint", type=Path)
    told.add_argument("--recipe", default="auto")
    told.add_argument("--context", type=int, default=512)
    told.set_defaults(run=tell_bytes)
    counted = commands.add_parser("census")
    counted.add_argument("artifact", type=Path)
    counted.set_defaults(run=tell_census)
    for command in (told, counted):
        command.add_argument("--target", default="sm_120a")
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
