"""Names: an ONNX operator's op in the op table, and an ONNX value's name in the IR."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from ..ir.ops import OPS

MOST = 60
"""Characters of a stranger's name that the IR keeps."""


OP_OF = {entry.onnx: name for name, entry in reversed(OPS.items()) if entry.onnx}
"""Operator of the newest opset -> its op; the first entry that stands for it."""


@dataclass(slots=True)
class ValueNames:
    """IR names of one graph's values: letters, digits, "_" and "." of the ONNX name, unique."""

    taken: set[str] = field(default_factory=set[str])
    count: dict[str, int] = field(default_factory=dict[str, int])

    def fresh(self, onnx_name: str) -> str:
        base = re.sub(r"[^A-Za-z0-9_.]+", "_", onnx_name)[-MOST:].strip("_.") or "v"
        name = base
        while name in self.taken:
            self.count[base] = self.count.get(base, 0) + 1
            name = f"{base}.{self.count[base]}"
        self.taken.add(name)
        return name
