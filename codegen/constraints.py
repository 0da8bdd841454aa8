"""What a kernel demands of an op, as data: each rule returns None or the reason for its refusal."""

from __future__ import annotations

from dataclasses import dataclass

from ..ir.graph import Op
from ..ir.ops_fused import role
from ..ir.types import Gguf, Nvfp4, Plain, TensorType
from .args import MAX_SHARDS


def weight_encoding(type_: TensorType) -> tuple[str, str]:
    """(encoding, layout) of a weight in the words of the rules: ("nvfp4", "p16"), ("bf16", …)."""
    enc = type_.enc
    if isinstance(enc, Nvfp4):
        return "nvfp4", enc.layout
    if isinstance(enc, Plain):
        return enc.dtype, enc.layout
    assert isinstance(enc, Gguf)
    return f"gguf {enc.kind}", "linear"


def activation_encoding(op: Op) -> str:
    """How the sums of a linear see its activation: "f32", or "nvfp4" for a W4A4 linear."""
    return op.get("act", "f32")


@dataclass(frozen=True, slots=True)
class LinearRule:
    """A linear kernel: the weight and layout it reads, the activation it sums, the rows it serves.

    `rows` is the largest token count of a bucket it takes, None for any. `epilogue_scale`: it can
    multiply by a row_scale operand (a dense kernel can; an NVFP4 one spends it on global scales).
    `x`: the dtype it reads where it does not norm its input itself (what it norms is f32).
    `exact`: it also takes linears of 4-bit activations, and reads them as they are.
    `epilogues`: what it can do to its sums.
    """

    weight: str
    layout: str = "p16"
    act: str = "f32"
    rows: int | None = None
    epilogue_scale: bool = True
    max_shards: int | None = None
    x: str = "f32"
    k_multiple: int = 1
    exact: bool = False
    epilogues: tuple[str, ...] = ("none",)

    def __call__(self, op: Op, tokens: int) -> str | None:
        encoding, layout = weight_encoding(op.args[1].type)
        if encoding != self.weight:
            return f"weight is {encoding}, kernel reads {self.weight}"
        if layout != self.layout:
            return f"weight layout is {layout}, kernel reads {self.layout}"
        return self._refuse_activation(op) or self._refuse_rows(op, tokens)

    def _refuse_activation(self, op: Op) -> str | None:
        x = op.args[0].type
        wanted = "f32" if op.get("prologue", "none") == "rmsnorm" else self.x
        if x.enc != Plain(wanted):
            return f"x is {x.enc} in memory, kernel reads {wanted}"
        if activation_encoding(op) != self.act and not self.exact:
            return f"activation is {activation_encoding(op)}, kernel sums {self.act}"
        if not self.epilogue_scale and role(op, "row_scale") is not None:
            return "the linear has a row_scale of its own, kernel has none besides global scales"
        if (epilogue := op.get("epilogue", "none")) not in self.epilogues:
            return f"its epilogue is {epilogue}, kernel has {', '.join(self.epilogues)}"
        return None

    def _refuse_rows(self, op: Op, tokens: int) -> str | None:
        if self.rows is not None and tokens > self.rows:
            return f"M = 1..{self.rows} only, bucket has {tokens}"
        if op.args[1].type.last % self.k_multiple:
            return f"K is {op.args[1].type.last}, kernel takes multiples of {self.k_multiple}"
        enc = op.args[1].type.enc
        shards = len(enc.shards) if isinstance(enc, Nvfp4) else 0
        if self.max_shards is not None and shards > self.max_shards:
            return f"weight has {shards} global scales, kernel takes {self.max_shards}"
        return None


@dataclass(frozen=True, slots=True)
class EmbedRule:
    """An embedding: the table's dtype, in the dense layout it shares with a tied head."""

    dtype: str
    layout: str = "p16"

    def __call__(self, op: Op, tokens: int) -> str | None:
        encoding, layout = weight_encoding(op.args[1].type)
        if encoding != self.dtype:
            return f"table is {encoding}, kernel reads {self.dtype}"
        if layout != self.layout:
            return f"table layout is {layout}, kernel reads {self.layout}"
        return None


@dataclass(frozen=True, slots=True)
class HeadRule:
    """A kernel over heads: what head_dim may be, and the rows of a bucket it serves.

    head_dim: a multiple of `multiple`, at most `largest`, one of `dims` where they are given.
    `cache`: the dtypes of a KV cache (operand 1) that it takes, any where none are given.
    """

    multiple: int = 1
    largest: int | None = None
    dims: tuple[int, ...] = ()
    least_rows: int = 1
    most_rows: int | None = None
    cache: tuple[str, ...] = ()

    def __call__(self, op: Op, tokens: int) -> str | None:
        return self._refuse_heads(op) or self._refuse_cache(op) or self._refuse_rows(tokens)

    def _refuse_heads(self, op: Op) -> str | None:
        dim = op.get("head_dim", 0)
        if dim % self.multiple:
            return f"head_dim is {dim}, kernel takes multiples of {self.multiple}"
        if self.largest is not None and dim > self.largest:
            return f"head_dim is {dim}, kernel takes at most {self.largest}"
        if self.dims and dim not in self.dims:
            return f"head_dim is {dim}, kernel takes {', '.join(map(str, self.dims))}"
        return None

    def _refuse_cache(self, op: Op) -> str | None:
        if not self.cache:
            return None
        enc = op.args[1].type.enc
        if not (isinstance(enc, Plain) and enc.dtype in self.cache):
            return f"KV cache is {enc}, kernel reads {' or '.join(self.cache)}"
        return None

    def _refuse_rows(self, tokens: int) -> str | None:
        if tokens < self.least_rows:
            return f"M = {self.least_rows} and more only, bucket has {tokens}"
        if self.most_rows is not None and tokens > self.most_rows:
            return f"M = 1..{self.most_rows} only, bucket has {tokens}"
        return None


@dataclass(frozen=True, slots=True)
class PlainRule:
    """An elementwise kernel: the dtypes of the operands that are rows of activations or vectors.

    Their length is a multiple of `multiple`.
    """

    operands: tuple[int, ...] = (0,)
    dtypes: tuple[str, ...] = ("f32",)
    multiple: int = 1

    def __call__(self, op: Op, tokens: int) -> str | None:
        for i in self.operands:
            type_ = op.args[i].type
            if type_.enc not in [Plain(dtype) for dtype in self.dtypes]:
                return f"operand {i} is {type_.enc}, kernel reads {' or '.join(self.dtypes)}"
            if type_.last % self.multiple:
                return f"rows have {type_.last} elements, kernel takes multiples of {self.multiple}"
        return None


ROWMAJOR_RULE = LinearRule("nvfp4", layout="linear", epilogue_scale=False, max_shards=MAX_SHARDS)
