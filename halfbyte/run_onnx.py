"""`halfbyte run NET.hb --input x=x.npy --output y.npy`: an ONNX graph on arrays in files."""

import argparse
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .ir.errors import ModelError
from .runtime import load

Array = npt.NDArray[Any]


def run_arrays(args: argparse.Namespace) -> int:
    """Runs the graph once. Raises ModelError for files and names that do not fit it."""
    words: list[str] = args.input or []
    given = dict(_pair(word, "--input") for word in words)
    inputs = {name: _read(Path(file)) for name, file in given.items()}
    with load(args.artifact, device=args.device, threads=args.threads, isa=args.isa) as net:
        start = time.perf_counter()
        outputs = net.run(inputs)
        seconds = time.perf_counter() - start
    files = _files(args.output, list(outputs))
    for name, file in files.items():
        _write(file, outputs[name])
    facts = {
        name: {"dtype": str(a.dtype), "shape": list(a.shape), "file": files.get(name)}
        for name, a in outputs.items()
    }
    if args.json:
        print(json.dumps({"outputs": facts, "seconds": seconds}))
    else:
        for name, a in outputs.items():
            print(f"{files.get(name, '-')}  {name} {a.dtype} {list(a.shape)}")
    return 0


def _pair(word: str, flag: str) -> tuple[str, str]:
    name, equals, file = word.partition("=")
    if not equals or not name or not file:
        raise ModelError(f"{flag} {word}: expected NAME=FILE.npy")
    return name, file


def _read(file: Path) -> Array:
    try:
        return np.load(file, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ModelError(f"{file}: not an array of numbers in .npy form: {error}") from error


def _files(words: list[str], names: list[str]) -> Mapping[str, str]:
    """Output name -> file. Raises ModelError for names and counts that do not fit."""
    if len(words) > len(names):
        raise ModelError(f"--output: {len(words)} files for {len(names)} outputs {names}")
    files: dict[str, str] = {}
    for i, word in enumerate(words):
        name, file = _pair(word, "--output") if "=" in word else (names[i], word)
        if name not in names:
            raise ModelError(f"--output {word}: no such output, expected one of {names}")
        files[name] = file
    return files


def _write(file: str, array: Array) -> None:
    try:
        np.save(file, array)
    except OSError as error:
        raise ModelError(f"{file}: cannot write: {error}; choose another file") from error
