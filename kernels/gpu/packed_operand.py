"""A weight as a kernel takes it: words of codes, the side, and how to decode them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qlora_compile.kernels.formats.formats import format_named
from qlora_compile.kernels.layout import Layout


@dataclass(frozen=True)
class WeightOperand:
    """A kernel's arguments for a weight. weight: int32 words of codes, or a weight in its own
    dtype. arguments, constexprs: the others. looks_up: as in `Side`."""

    weight: Tensor
    arguments: dict[str, Any]
    constexprs: dict[str, Any]
    looks_up: bool = False


def packed_operand(
    layout: Layout,
    tensors: Sequence[Tensor],
    decoder_name: str,
    dtype: torch.dtype,
    tile_columns: int,
    *,
    prepares: bool = False,
) -> WeightOperand:
    """Return the operand of a packed weight, whose planes `tensors` a kernel decodes to `dtype`.

    K is a multiple of 8. tile_columns: columns of W in a tile, a power of two. prepares: whether
    the format may first bring planes that are read many times into a faster form.
    """
    quant_format = format_named(layout.format)
    decoder = next(d for d in quant_format.device_decoders() if d.name == decoder_name)
    if prepares:
        layout, tensors = quant_format.prepared(layout, tensors)
    side = quant_format.device_side(layout, tensors, tile_columns)
    return WeightOperand(
        tensors[0].reshape(-1).view(torch.int32),
        {"side": side.arguments, "row_words": layout.shape[1] // decoder.per_word},
        {
            "PREPARE": decoder.prepare,
            "LOAD": decoder.load,
            "SCALE": decoder.scale,
            "DECODE": decoder.decode,
            "PROGRAM": decoder.program(dtype),
            "PER_WORD": decoder.per_word,
            "SIDE": side.constants,
        },
        side.looks_up,
    )


def dense_operand(weight: Tensor) -> WeightOperand:
    """Return the operand of a weight that is kept in its own dtype."""
    functions = dict.fromkeys(("PREPARE", "LOAD", "SCALE", "DECODE"))
    return WeightOperand(
        weight,
        {"side": None, "row_words": None},
        {**functions, "PROGRAM": (), "PER_WORD": 1, "SIDE": ()},
    )
