"""NVFP4 linears on a Hopper card: GEMV and GEMM in CUDA graphs, beside reads and cuBLAS.

    python benchmarks/cuda_linears.py [--json OUT]

Needs torch (for cuBLAS, memory and graphs) beside what compiling needs. Each figure is the median
of graph replays; a graph holds a launch for each of so many copies of the weight that L2 serves
none. GEMV and GEMM are checked against each other on the same bytes before they are timed; against
the interpreter they are tested by `make test-gpu`.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib
import json
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from halfbyte.codegen import ffi_options, find_compiler
from halfbyte.codegen.build import build
from halfbyte.codegen.nvcc import find_cuda_compiler
from halfbyte.codegen.plan_cuda import arch_of, kernel_facts
from halfbyte.codegen.render import Source, render, source
from halfbyte.environment import cache_folder, compiler_command, cuda_home
from halfbyte.ir.target import target

torch: Any = importlib.import_module("torch")

TARGET = "sm_90a"
EXPORTS = ("probe_linear", "probe_read")
WORKSPACE = 256 << 20
ROTATED = 420_000_000  # bytes of copies: several times the L2


@dataclass(frozen=True, slots=True)
class Shape:
    """A weight [n, k], and what its linear does beside the product, as in a decoder layer."""

    n: int
    k: int
    prologue: int = 0  # Prologue of codegen/args.py
    residual: bool = False

    def __str__(self) -> str:
        return f"{self.n}x{self.k}"

    @property
    def nbytes(self) -> int:
        return self.n * self.k * 9 // 16


GEMV_SHAPES = tuple(
    Shape(n, k)
    for n, k in ((4096, 4096), (6144, 4096), (12288, 4096), (4096, 12288), (24576, 4096),
                 (5120, 32768), (32768, 5120))
)  # fmt: skip
GEMM_SHAPES = tuple(
    Shape(n, k)
    for n, k in ((4096, 4096), (6144, 4096), (24576, 4096), (4096, 12288), (12288, 4096),
                 (5120, 4096), (6144, 5120), (65536, 5120), (5120, 32768))
)  # fmt: skip
LAYERS = {
    "8b": (Shape(6144, 4096, 1), Shape(4096, 4096, 0, True), Shape(24576, 4096, 1),
           Shape(4096, 12288, 2, True)),
    "24b": (Shape(6144, 5120, 1), Shape(5120, 4096, 0, True), Shape(65536, 5120, 1),
            Shape(5120, 32768, 2, True)),
}  # fmt: skip
"""The linears of one decoder layer in order, each reading what the one before it wrote."""


# --- the kernels ----------------------------------------------------------------------------------


def build_probe() -> Path:
    """The library of templates and linear_probe.cu, from the object cache where it is there."""
    facts = kernel_facts(target(TARGET))
    units = [source(f"{name}.cu", None, "cuda", **facts) for name in ("nvfp4_gemv", "nvfp4_gemm")]
    text = Path(__file__).with_name("linear_probe.cu").read_text()
    headers = {name: render(name, "cuda", **facts) for name in ("args.h", "hb_cuda.h")}
    cache = cache_folder()
    host = find_compiler(compiler_command(), cache)
    compiler = find_cuda_compiler(host, arch_of(target(TARGET)), cuda_home())
    units.append(Source("linear_probe.cu", text, headers))
    return build(units, EXPORTS, compiler, ffi_options(cache)).path


class Probe:
    """The library, loaded; its workspace; the multiprocessors of the device."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL(str(build_probe()))
        self._workspace = torch.zeros(WORKSPACE, dtype=torch.uint8, device="cuda")
        self._sink = torch.zeros(4, dtype=torch.int32, device="cuda")
        self.sms = torch.cuda.get_device_properties(0).multi_processor_count

    def linear(self, shape: Shape, weight: Weight, x: Any, out: Any, *, gemm: bool, m: int) -> None:
        """Enqueues one linear on torch's current stream."""
        status = self._library.probe_linear(
            int(gemm), _at(weight.codes), _at(weight.scales), _at(x), _at(weight.gamma), _at(out),
            _at(self._workspace), ctypes.c_int64(WORKSPACE), m, shape.n, shape.k, shape.prologue,
            int(shape.residual), self.sms, _stream(),
        )  # fmt: skip
        if status:
            raise RuntimeError(f"linear {shape}, {m} rows: CUDA error {status}")

    def read(self, data: Any, blocks: int) -> None:
        """Enqueues a read of all bytes of a tensor."""
        size = ctypes.c_size_t(data.numel() * data.element_size())
        if status := self._library.probe_read(_at(data), size, _at(self._sink), blocks, _stream()):
            raise RuntimeError(f"read: CUDA error {status}")


def _at(tensor: Any) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def _stream() -> ctypes.c_void_p:
    return ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)


@dataclass(frozen=True, slots=True)
class Weight:
    """Random bytes of a weight in kernel layout: a permutation of random codes is random codes."""

    codes: Any
    scales: Any
    gamma: Any

    @classmethod
    def random(cls, shape: Shape) -> Weight:
        rows, columns = -(-shape.n // 128) * 128, -(-shape.k // 64) * 64
        draw = {"dtype": torch.uint8, "device": "cuda"}
        codes = torch.randint(0, 256, (rows * columns // 2,), **draw)
        scales = torch.randint(0x30, 0x48, (rows * columns // 16,), **draw)
        return cls(codes, scales, torch.ones(shape.k, device="cuda"))


# --- timing ---------------------------------------------------------------------------------------


def graph_us(run: Callable[[int], None], launches: int, replays: int = 11) -> float:
    """Median microseconds of one of `launches` calls run(0) … in one captured graph."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run(0)
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin()
        for i in range(launches):
            run(i)
        graph.capture_end()
        graph.replay()
        times: list[float] = []
        for _ in range(replays):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record(stream)
            graph.replay()
            end.record(stream)
            stream.synchronize()
            times.append(begin.elapsed_time(end) * 1e3 / launches)
    return statistics.median(times)


def copies_of(nbytes: int) -> int:
    """How many copies of a weight are rotated."""
    return max(4, min(48, ROTATED // nbytes + 1))


def read_bandwidth(probe: Probe) -> float:
    """GB/s of reading 4 GiB, the best of a few grids."""
    data = torch.randint(0, 255, (4 << 30,), dtype=torch.uint8, device="cuda")
    grids = [probe.sms * blocks for blocks in (2, 4, 8, 16, 32)]
    best = min(graph_us(lambda _, g=g: probe.read(data, g), 2, 7) for g in grids)
    return (4 << 30) / best / 1e3


def _input(shape: Shape, m: int) -> Any:
    columns = shape.k * (2 if shape.prologue == 2 else 1)
    dtype = torch.float32 if shape.prologue == 1 else torch.bfloat16
    return torch.randn(m, columns, device="cuda").to(dtype)


def _output(shape: Shape, m: int) -> Any:
    dtype = torch.float32 if shape.residual else torch.bfloat16
    return torch.zeros(m, shape.n, device="cuda", dtype=dtype)


def check(probe: Probe, shape: Shape, weight: Weight, m: int) -> float:
    """Relative difference of GEMV and GEMM on the same bytes. Raises where it is too large."""
    x = _input(shape, m)
    found: list[Any] = []
    for gemm in (False, True):
        out = torch.full((m, shape.n), float("nan"), device="cuda", dtype=torch.bfloat16)
        probe.linear(shape, weight, x, out, gemm=gemm, m=m)
        torch.cuda.synchronize()
        found.append(out.double())
    error = float((found[0] - found[1]).norm() / found[1].norm())
    if not error < 8e-3:
        raise RuntimeError(f"GEMV and GEMM of {shape} differ by {error:.1e}")
    return error


def time_linear(probe: Probe, shape: Shape, weights: list[Weight], m: int, gemm: bool) -> float:
    x, out = _input(shape, m), _output(shape, m)
    return graph_us(lambda i: probe.linear(shape, weights[i], x, out, gemm=gemm, m=m), len(weights))


# --- tables ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Row:
    """One figure: `us` of a launch; `reference` the read's or cuBLAS' in the same run."""

    what: str
    shape: str
    m: int
    us: float
    reference: float
    ratio: float


def gemv_rows(probe: Probe, bandwidth: float) -> list[Row]:
    """M = 1 … 8 as a share of read bandwidth."""
    rows: list[Row] = []
    for shape in GEMV_SHAPES:
        weights = [Weight.random(shape) for _ in range(copies_of(shape.nbytes))]
        check(probe, shape, weights[0], 8)
        floor = shape.nbytes / bandwidth / 1e3
        cells: list[str] = []
        for m in (1, 2, 4, 8, 16):
            us = time_linear(probe, shape, weights, m, gemm=False)
            rows.append(Row("gemv", str(shape), m, us, floor, floor / us))
            cells.append(f"M={m} {us:6.2f} us {floor / us:4.0%}")
        print(f"gemv {shape!s:>12} {shape.nbytes / 1e6:6.1f} MB  {'  '.join(cells)}", flush=True)
    return rows


def layer_rows(probe: Probe, bandwidth: float) -> list[Row]:
    """All linears of a decoder layer one behind the other, with their norms and residuals."""
    rows: list[Row] = []
    for name, shapes in LAYERS.items():
        nbytes = sum(shape.nbytes for shape in shapes)
        layers = copies_of(nbytes)
        weights = [[Weight.random(shape) for shape in shapes] for _ in range(layers)]
        floor = nbytes / bandwidth / 1e3
        for m in (1, 8, 32):
            chain = [(s, _input(s, m), _output(s, m)) for s in shapes]

            def run(i: int, weights: Any = weights, chain: Any = chain, m: int = m) -> None:
                for (shape, x, out), weight in zip(chain, weights[i], strict=True):
                    probe.linear(shape, weight, x, out, gemm=m > 16, m=m)

            us = graph_us(run, layers)
            rows.append(Row("layer", name, m, us, floor, floor / us))
            print(f"layer of {name:>4} {nbytes / 1e6:6.1f} MB  M={m:<3} {us:7.2f} us "
                  f"{floor / us:4.0%}", flush=True)  # fmt: skip
    return rows


def gemm_rows(probe: Probe) -> list[Row]:
    """M = 32, 64, 512, 2048 as a ratio to cuBLAS in bf16, timed before and behind.

    Few tokens come first, of all shapes: behind many the card's clock stays low for a while.
    """
    rows: list[Row] = []
    for tokens in ((32, 64), (512,), (2048,)):
        for shape in GEMM_SHAPES:
            dense_bytes = shape.n * shape.k * 2
            dense = [
                torch.randn(shape.n, shape.k, device="cuda", dtype=torch.bfloat16) / shape.k**0.5
                for _ in range(max(2, min(6, ROTATED // dense_bytes)))
            ]
            copies = max(4, min(12, ROTATED // shape.nbytes))
            weights = [Weight.random(shape) for _ in range(copies)]
            rows += [beside_cublas(probe, shape, weights, dense, m) for m in tokens]
            del dense, weights
            torch.cuda.empty_cache()
    return rows


def beside_cublas(
    probe: Probe, shape: Shape, weights: list[Weight], dense: list[Any], m: int
) -> Row:
    x, out = _input(shape, m), _output(shape, m)

    def cublas(i: int) -> None:
        torch.mm(x, dense[i].T, out=out)

    first = graph_us(cublas, len(dense), 9)
    us = time_linear(probe, shape, weights, m, gemm=True)
    theirs = (first + graph_us(cublas, len(dense), 9)) / 2
    flops = 2 * m * shape.n * shape.k
    ours = f"{us:8.1f} us {flops / us / 1e6:4.0f} TFLOP/s"
    other = f"{theirs:8.1f} us {flops / theirs / 1e6:4.0f} TFLOP/s"
    print(f"gemm {shape!s:>12} M={m:<5} {ours}  cuBLAS {other}  {theirs / us:.2f}x", flush=True)
    return Row("gemm", str(shape), m, us, theirs, theirs / us)


def main() -> None:
    parser = argparse.ArgumentParser(description="NVFP4 linears beside reads and cuBLAS.")
    parser.add_argument("--json", type=Path, metavar="OUT", help="also write the figures")
    parser.add_argument("--only", choices=("gemv", "layer", "gemm"), action="append")
    args = parser.parse_args()
    torch.manual_seed(0)
    wanted = args.only or ["gemv", "layer", "gemm"]
    probe = Probe()
    bandwidth = read_bandwidth(probe)
    print(f"{torch.cuda.get_device_name()}: reads {bandwidth:.0f} GB/s", flush=True)
    rows = [Row("read", "", 0, 0.0, bandwidth, 1.0)]
    rows += gemv_rows(probe, bandwidth) if "gemv" in wanted else []
    rows += layer_rows(probe, bandwidth) if "layer" in wanted else []
    rows += gemm_rows(probe) if "gemm" in wanted else []
    if args.json:
        args.json.write_text(json.dumps([asdict(row) for row in rows], indent=1))


if __name__ == "__main__":
    main()
