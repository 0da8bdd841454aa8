"""Graph -> sources -> machine code -> artifact: the only room that starts a compiler.

The driver finds a compiler, runs phase 60 (`compile_library`) and phase 70 (`write_artifact`).
"""

from .build import Event, Options, ffi_options
from .compiler import Compiler, find_compiler
from .emit import Library, Request, compile_library, kernel_choice, write_artifact
from .table import declarations

__all__ = [
    "Compiler",
    "Event",
    "Library",
    "Options",
    "Request",
    "compile_library",
    "declarations",
    "ffi_options",
    "find_compiler",
    "kernel_choice",
    "write_artifact",
]
