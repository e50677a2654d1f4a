"""Blocks of GGUF files that a format of ours holds: Q4_0 and Q8_0.

The layouts are those of llama.cpp's `ggml-common.h`: blocks of 32 neighbouring weights of a row,
each with a float16 scale before its codes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from qlora_compile.hf.packings.integers import packed_integers
from qlora_compile.kernels.packed import PackedWeight

_BLOCK = 32


def _packed_q4_0(tensors: Mapping[str, Tensor]) -> PackedWeight:
    """Return the weight [N, K] of "codes", uint8 [N, 18 * K / 32].

    A value is (code - 8) * scale; a block's byte i has the codes of its weights i and i + 16, the
    first in the lower half.
    """
    scales, codes = _blocks(tensors["codes"], 16)
    codes = torch.cat((codes & 15, codes >> 4), dim=2)
    return packed_integers(codes.flatten(1), 4, scales, 8, group_size=_BLOCK)


def _packed_q8_0(tensors: Mapping[str, Tensor]) -> PackedWeight:
    """Return the weight [N, K] of "codes", uint8 [N, 34 * K / 32]: int8 codes times a scale."""
    scales, codes = _blocks(tensors["codes"], 32)
    return packed_integers((codes ^ 128).flatten(1), 8, scales, 128, group_size=_BLOCK)


def _blocks(stored: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Return the scales [N, blocks], and `size` bytes of codes of each block."""
    blocks = stored.view(stored.shape[0], -1, 2 + size)
    return blocks[:, :, :2].contiguous().view(torch.float16).squeeze(2), blocks[:, :, 2:]


PACKINGS: dict[str, Callable[[Mapping[str, Tensor]], PackedWeight]] = {
    "Q4_0": _packed_q4_0,
    "Q8_0": _packed_q8_0,
}
"""By the type of a tensor: packs its "codes", the bytes of its rows, without loss."""
