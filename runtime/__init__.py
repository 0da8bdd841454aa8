"""Artifact -> tokens. Needs numpy, tvm_ffi and tokenizers; jinja2 only for chat templates."""

from .artifact import Artifact, ArtifactWriter
from .generate import Generation, Statistics
from .manifest import Manifest
from .model import Model, load
from .sampling import Sampling

__all__ = [
    "Artifact",
    "ArtifactWriter",
    "Generation",
    "Manifest",
    "Model",
    "Sampling",
    "Statistics",
    "load",
]
