"""Decoders: the interface by which Triton kernels decode any format's weights.

A kernel reads tiles of W [N, K] as int32 words of the first plane's codes. What else decoding
needs, the *side* (scales, zero points, tables, …), is a tuple of the format's own that kernels pass
on. A Decoder holds the format's device functions, called with the tuple `side` and its constants
SIDE:

- `prepare(side, SIDE, PROGRAM)`, called once before the loop, returns the `state` for the other
  functions. What it loads stays in registers.
- `load(side, n0, k0, N, K, SIDE, ROWS, COLUMNS, EVEN_N, EVEN_K)`, called for each tile of rows
  n0 … and columns k0 …, returns a tuple of tensors of the side as stored. Positions past the edge,
  where a dimension is not EVEN, repeat the last valid one.
- `scale(loaded, side, state, SIDE)` turns the result of `load` into the scales for `decode`.
  Looking loaded values up in a table belongs here: a kernel calls it one iteration after `load`.
- `decode(words, scales, state, PROGRAM, DTYPE, ROWS, COLUMNS)` returns the tile [ROWS, COLUMNS] of
  DTYPE, from words [ROWS, COLUMNS / codes per word], bytes in memory order. It equals
  `QuantFormat.dequantize` to the last bit: one value in float32, rounded once.

PROGRAM: a tuple of inline assembly texts for DTYPE, empty for plain Triton.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from qlora_compile.kernels.layout import Layout

_PTX_DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16"}


@dataclass(frozen=True)
class Side:
    """What decoding needs beside the codes. arguments: the kernel's `side`, a NamedTuple of
    tensors, numbers and None. constants: SIDE, a tuple of numbers. looks_up: whether `scale` loads
    from a table at loaded values."""

    arguments: tuple[Any, ...]
    constants: tuple[float, ...]
    looks_up: bool = False


@dataclass(frozen=True)
class Decoder:
    """One exact way to decode tiles of one format on the device.

    per_word: codes in a word. programs: a function from a PTX dtype to the inline assembly, None
    for plain Triton, which decodes to any dtype on any target. obstacle: a function that returns
    what prevents decoding a Layout, or None; None if the decoder takes every Layout. The other
    fields are device functions, as above.
    """

    name: str
    per_word: int
    prepare: Any
    load: Any
    scale: Any
    decode: Any
    programs: Callable[[str], tuple[str, ...]] | None = None
    obstacle: Callable[[Layout], str | None] | None = None

    @functools.cache  # noqa: B019  decoders are few, and stay
    def program(self, dtype: torch.dtype) -> tuple[str, ...]:
        return () if self.programs is None else self.programs(_PTX_DTYPES[dtype])

    def rejects(self, target: str, dtype: torch.dtype, layout: Layout | None = None) -> list[str]:
        """Return why this decoder cannot decode (a weight of `layout`) to `dtype` on `target`."""
        reasons = []
        if layout is not None and self.obstacle is not None and (why := self.obstacle(layout)):
            reasons.append(f"decoder {self.name} does not take {why}")
        if self.programs is not None and not target.startswith("sm_"):
            reasons.append(f"decoder {self.name} is written in PTX, but {target} is not NVIDIA's")
        if self.programs is not None and dtype not in _PTX_DTYPES:
            reasons.append(f"decoder {self.name} gives only bfloat16 or float16, not {dtype}")
        return reasons
