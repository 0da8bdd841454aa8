"""Spellings of what halfbyte has its own kernels for, found in a graph of ONNX ops."""

from __future__ import annotations

from ..ir.graph import Graph
from .onnx_model import Model


def recognise(graphs: tuple[Graph, ...], model: Model) -> tuple[Graph, ...]:
    """The graphs with every spelling replaced; decisions are added to the model's log."""
    return graphs
