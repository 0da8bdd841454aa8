"""The floor of the house: types, graph, op table, text, verifier, rewriting, interpreter, targets.

Nothing is imported here, so that `ir.errors` stays a leaf that the runtime can use on a serving
box. Import from the file that owns the name: `from ..ir.types import TensorType`.
"""
