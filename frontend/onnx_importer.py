"""Phase 00 for ONNX: a file becomes graphs of ops in the spelling of the newest opset.

In order: read and check, resolve names and inline functions (onnx_read), bind extents
(onnx_inputs), infer types and fold what is known until nothing changes (onnx_infer, onnx_fold), put
function bodies where there is no entry or no kernel (onnx_bodies), translate (onnx_graph),
recognise the spellings of what halfbyte has its own kernels for (onnx_patterns).
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from onnx import GraphProto, ValueInfoProto

from ..ir.errors import ModelError
from ..ir.graph import Graph
from ..ir.rewrite import LogEntry
from .onnx_bodies import Serves, inline_bodies
from .onnx_fold import Budget, fold
from .onnx_graph import Translator
from .onnx_infer import infer_types
from .onnx_inputs import Port, Symbols, bind, port
from .onnx_model import Model, Names
from .onnx_patterns import recognise
from .onnx_read import Reader, Scope, opsets_of
from .onnx_tensors import Constant, TensorReader
from .onnx_wire import parse
from .tensor_info import Array, map_file

MOST_ROUNDS = 16
"""Of inference and folding; each knows more than the one before, and most graphs need three."""


class OnnxWeights:
    """Source name of a `weight` op -> its data: a view of the file, or a folded constant."""

    def __init__(self, constants: Mapping[str, Constant]) -> None:
        self._constants = constants

    def __call__(self, name: str) -> Array:
        """Raises ModelError for an unknown name."""
        if name not in self._constants:
            raise ModelError(f"constant {name[:80]!r}: the model has none; compile it again")
        return self._constants[name].load()


@dataclass(frozen=True, slots=True)
class OnnxImported:
    """A graph as read. `graphs`: the main one, then the bodies of control flow that it names.

    `symbols`: the extents that vary, IR name -> the file's; `opset`: of the file, 0 where it has
    operators of other domains only; `files`: every file that was read; `log`: what was recognised,
    and what nearly was.
    """

    graphs: tuple[Graph, ...]
    weights: OnnxWeights
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    symbols: Mapping[str, str]
    opset: int
    notes: tuple[str, ...]
    log: tuple[LogEntry, ...]
    files: tuple[Path, ...]


def import_onnx(
    path: str | Path,
    *,
    dims: Mapping[str, int] | None = None,
    serves: Serves = lambda op: True,
) -> OnnxImported:
    """The graphs of an ONNX file. `dims` binds extents: symbol, or `INPUT.AXIS`, -> number.
    Operators that `serves` denies a kernel are written out as ONNX defines them, where it does.

    Raises ModelError naming file and node: for a file that is not ONNX or damaged, a graph that is
    not valid, an operator that is unknown or not compiled, data outside the model's folder.
    """
    path = Path(path)
    mapped = map_file(path)
    proto = parse(path, mapped)
    opsets = opsets_of(proto)
    model = Model(path, proto.graph, {}, Names(), TensorReader(path, mapped))
    reader = Reader(proto, model)
    ports = [v.name for v in (*_inputs(proto.graph), *proto.graph.output)]
    reader.graph(model.graph, Scope(ChainMap(), opsets, {}))
    symbols = bind(model.graph, dims or {}, path)
    _settle(model, reader, serves)
    graphs = recognise(Translator(model).graphs(), model)
    return _imported(model, graphs, ports, symbols, opsets.get("", 0))


def _inputs(graph: GraphProto) -> list[ValueInfoProto]:
    stored = {t.name for t in graph.initializer}
    return [v for v in graph.input if v.name not in stored]


def _settle(model: Model, reader: Reader, serves: Serves) -> None:
    """Infer, fold and inline until no step finds anything more."""
    budget = Budget()
    for _ in range(MOST_ROUNDS):
        infer_types(model)
        if not fold(model, budget) and not inline_bodies(model, reader, serves):
            return
    infer_types(model)


def _imported(
    model: Model, graphs: tuple[Graph, ...], ports: list[str], symbols: Symbols, opset: int
) -> OnnxImported:
    main = graphs[0]
    values = (*main.args, *main.outs)
    facts = [port(name, value, symbols) for name, value in zip(ports, values, strict=True)]
    inputs = len(main.args)
    return OnnxImported(
        graphs=graphs,
        weights=OnnxWeights(model.constants),
        inputs=tuple(facts[:inputs]),
        outputs=tuple(facts[inputs:]),
        symbols={ours: theirs for theirs, ours in symbols.canonical.items()},
        opset=opset,
        notes=tuple(model.notes),
        log=tuple(model.log),
        files=model.tensors.files,
    )
