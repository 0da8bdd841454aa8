"""halfbyte: 4-bit language models, compiled ahead of time into one artifact that runs anywhere.

    import halfbyte
    report = halfbyte.compile("path/to/model", "model.hb")
    model = halfbyte.load("model.hb")
    text = "".join(model.generate("Hello", max_tokens=48, temperature=0.0))

Importing this package loads neither the compiler nor the runtime; the first call does.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from .ir.errors import HalfbyteError, IRError, ModelError, TargetError

if TYPE_CHECKING:
    from .driver import CompileReport
    from .runtime import Model

__version__ = "0.1.0"
__all__ = ["HalfbyteError", "IRError", "ModelError", "TargetError", "compile", "load"]


def compile(
    model: str | Path,
    out: str | Path,
    target: str = "cpu",
    quantize: str | None = None,
    recipe: str = "auto",
    context: int | None = None,
    kv_cache: str = "auto",
    allow_fallback: Collection[str] = (),
    dims: Mapping[str, int] | None = None,
) -> CompileReport:
    """Compile a model (folder of SafeTensors, a GGUF file, an ONNX file) into the artifact `out`.

    target: "cpu", "sm_120a", "sm_120f" or "sm_90a", or several: "sm_120a,sm_90a,cpu". quantize:
    "nvfp4" turns unquantised linears into NVFP4. recipe: "w4a4", "w4a16", or "auto", the
    checkpoint's as the target serves it. context: positions of the KV cache (4096, or what the
    model was made for if that is less). kv_cache: "auto" (FP8 where the checkpoint declares it and
    the target has kernels), "bf16" (not quantised) or "fp8". allow_fallback: slow kernels permitted
    by name. dims: extents of an ONNX graph to bind, a symbol or INPUT.AXIS to a number.
    Raises ModelError, TargetError.
    """
    from .driver import Options, compile_model

    return compile_model(
        Options(
            model=Path(model),
            out=Path(out),
            target=target,
            quantize=quantize,
            recipe=recipe,
            context=context,
            kv_cache=kv_cache,
            allow_fallback=frozenset(allow_fallback),
            dims=tuple((dims or {}).items()),
        )
    )


def load(
    path: str | Path, device: str = "cpu", threads: int | None = None, isa: str = "auto"
) -> Model:
    """An artifact, ready to run. threads: default the physical cores this process may use.

    Raises ModelError for a damaged artifact, TargetError where it does not fit this machine.
    """
    from .runtime import load as load_model

    return load_model(path, device=device, threads=threads, isa=isa)
