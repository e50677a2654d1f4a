"""Blocks of GGUF files that a format of ours holds.

The layouts are those of llama.cpp's `ggml-common.h`: blocks of 32 neighbouring weights of a row
with a float16 scale each, or of 256 with eight scales of 6 bits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from qlora_compile.hf.packings.integers import packed_integers
from qlora_compile.kernels.packed import PackedWeight

_BLOCK = 32


Tensors = Mapping[str, Tensor]
"""The bytes of a weight's rows, uint8 [N, bytes], under their only role, "codes"."""


def _packed_q4_0(tensors: Tensors) -> PackedWeight:
    """A block is a scale and 16 bytes; a value is (code - 8) * scale."""
    scales, stored = _split(tensors, 1, 16)
    return packed_integers(_nibbles(stored), 4, scales, 8, group_size=_BLOCK)


def _packed_q4_1(tensors: Tensors) -> PackedWeight:
    """A block is a scale, a minimum and 16 bytes; a value is code * scale + minimum."""
    factors, stored = _split(tensors, 2, 16)
    scales, minima = factors[:, ::2], factors[:, 1::2]
    return packed_integers(_nibbles(stored), 4, scales, None, minima=minima, group_size=_BLOCK)


def _packed_q5_0(tensors: Tensors) -> PackedWeight:
    """A block is a scale, 32 upper bits of codes and 16 bytes; a value is (code - 16) * scale."""
    scales, stored = _split(tensors, 1, 20)
    return packed_integers(_five_bits(stored), 5, scales, 16, group_size=_BLOCK)


def _packed_q5_1(tensors: Tensors) -> PackedWeight:
    """A block is a scale, a minimum, upper bits and 16 bytes; a value is code * scale + minimum."""
    factors, stored = _split(tensors, 2, 20)
    scales, minima = factors[:, ::2], factors[:, 1::2]
    return packed_integers(_five_bits(stored), 5, scales, None, minima=minima, group_size=_BLOCK)


def _packed_q8_0(tensors: Tensors) -> PackedWeight:
    """A block is a scale and 32 int8 codes; a value is code * scale."""
    scales, stored = _split(tensors, 1, 32)
    return packed_integers((stored ^ 128).flatten(1), 8, scales, 128, group_size=_BLOCK)


def _packed_q4_k(tensors: Tensors) -> PackedWeight:
    """A block of 256 is a scale, a minimum, 12 bytes and 128 bytes.

    The 12 bytes hold a scale and a minimum of 6 bits for each of eight groups: s = scale * s6 and
    m = minimum * m6 are exact in float32, and a value is code * s - m.
    """
    factors, stored = _split(tensors, 2, 12 + 128)
    low, middle, high = stored[:, :, :4], stored[:, :, 4:8], stored[:, :, 8:12]
    scales = torch.cat((low & 63, (high & 15) | (low >> 6 << 4)), dim=2)
    minima = torch.cat((middle & 63, (high >> 4) | (middle >> 6 << 4)), dim=2)
    wide = factors.to(torch.float32).unflatten(1, (-1, 2))
    # A run of 32 bytes has the codes of two groups, the first in the lower halves.
    codes = stored[:, :, 12:].unflatten(2, (4, _BLOCK))
    codes = torch.stack((codes & 15, codes >> 4), dim=3)
    return packed_integers(
        codes.flatten(1),
        4,
        (wide[:, :, :1] * scales).flatten(1),
        None,
        minima=(-wide[:, :, 1:] * minima).flatten(1),
        group_size=_BLOCK,
    )


def _split(tensors: Tensors, floats: int, size: int) -> tuple[Tensor, Tensor]:
    """Return the float16 numbers that begin each block, [N, blocks * floats], and the `size` bytes
    after them, [N, blocks, size]."""
    stored = tensors["codes"]
    blocks = stored.view(stored.shape[0], -1, 2 * floats + size)
    factors = blocks[:, :, : 2 * floats].contiguous().view(torch.float16)
    return factors.flatten(1), blocks[:, :, 2 * floats :]


def _nibbles(stored: Tensor) -> Tensor:
    """Return the codes [N, K] of 16 bytes per block: first all lower halves, then the upper."""
    return torch.cat((stored & 15, stored >> 4), dim=2).flatten(1)


def _five_bits(stored: Tensor) -> Tensor:
    """Return the codes [N, K] of 4 bytes with each fifth bit, and 16 bytes as for `_nibbles`."""
    places = torch.arange(8, device=stored.device, dtype=torch.uint8)
    upper = (stored[:, :, :4].unsqueeze(3) >> places & 1).flatten(2)
    return _nibbles(stored[:, :, 4:]) | upper.flatten(1) << 4


PACKINGS: dict[str, Callable[[Tensors], PackedWeight]] = {
    "Q4_0": _packed_q4_0,
    "Q4_1": _packed_q4_1,
    "Q5_0": _packed_q5_0,
    "Q5_1": _packed_q5_1,
    "Q8_0": _packed_q8_0,
    "Q4_K": _packed_q4_k,
}
"""The function that packs a tensor without loss, by the tensor's type."""
