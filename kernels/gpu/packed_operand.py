"""A packed weight as a kernel takes it: the planes, their geometry, and how to decode them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qlora_compile.kernels.gpu.decoders import Decoder
from qlora_compile.kernels.variants.base import LinearSpec

if TYPE_CHECKING:
    from qlora_compile.kernels.experts.base import ExpertsSpec


def decoder_named(spec: LinearSpec | ExpertsSpec, name: str) -> Decoder:
    assert spec.format is not None
    return next(d for d in spec.format.device_decoders() if d.name == name)


def packed_operand(
    planes: list[Tensor],
    spec: LinearSpec | ExpertsSpec,
    decoder: Decoder,
    dtype: torch.dtype,
    tile_columns: int,
) -> tuple[Tensor, dict[str, Any], dict[str, Any]]:
    """(the codes as int32 words, the other arguments, the constexprs) of a packed weight.

    K is a multiple of 8. tile_columns: columns of W in a tile, a power of two. A scale serves the
    longest runs of columns that lie in one block wherever a tile begins.
    """
    assert spec.format is not None
    codes, absmax, *nested = planes
    by_row = spec.block_size == spec.k
    group = tile_columns if by_row else math.gcd(spec.k, spec.block_size, tile_columns)
    nested_codebook, nested_absmax, nested_offset = nested or (None, None, None)
    arguments = {
        "absmax": absmax,
        "nested_codebook": nested_codebook,
        "nested_absmax": nested_absmax,
        "nested_offset": nested_offset,
        "tables": spec.format.device_tables(codes.device),
        "row_words": spec.k // decoder.per_word,
        "row_blocks": None if spec.k % spec.block_size else spec.k // spec.block_size,
    }
    constexprs = {
        "DECODE": decoder.function,
        "PREPARE": decoder.prepare,
        "PROGRAM": decoder.program(dtype),
        "PER_WORD": decoder.per_word,
        "BLOCK_SHIFT": -1 if by_row else spec.block_size.bit_length() - 1,
        "GROUP": group,
        "DIVISOR": spec.format.absmax_divisor,
    }
    return codes.reshape(-1).view(torch.int32), arguments, constexprs


NO_PACKED_ARGUMENTS: dict[str, Any] = dict.fromkeys(
    (
        *("absmax", "nested_codebook", "nested_absmax", "nested_offset", "tables"),
        *("row_words", "row_blocks"),
    )
)
NO_PACKED_CONSTEXPRS: dict[str, Any] = {
    "DECODE": None,
    "PREPARE": None,
    "PROGRAM": (),
    "PER_WORD": 1,
    "BLOCK_SHIFT": -1,
    "GROUP": 1,
    "DIVISOR": 1.0,
}
"""The same of a weight kept in its own dtype."""
