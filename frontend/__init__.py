"""What a model is on disk, turned into a graph: checkpoints, dialects, families."""

from .container import Checkpoint, open_checkpoint
from .importer import Imported, Weights, import_model
from .net import LinearFacts

__all__ = ["Checkpoint", "Imported", "LinearFacts", "Weights", "import_model", "open_checkpoint"]
