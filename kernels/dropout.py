"""Dropout from counters: a mask that is recomputed from its seed, never stored.

Philox4x32 with 7 rounds, the fewest that pass BigCrush (Salmon et al., "Parallel random numbers:
as easy as 1, 2, 3", SC 2011). Element e of a row-major [M, K] input uses counter e // 8 and the
(e % 8)-th of the 16-bit lanes of the four output words, low half first: eight decisions per
counter. Sixteen bits resolve the keep probability to 2**-16.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROUNDS = 7
LANES = 8
_LOW = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)


def philox4x32(counters: Tensor, stream: int, seed: Tensor) -> list[Tensor]:
    """Four words, int64 tensors with values below 2**32, shaped as `counters`.

    `counters`: int64, the 64-bit low half of the counter; `stream` is its third word; `seed`: int64
    [1], the 64-bit key.
    """
    words = [counters & _LOW, (counters >> 32) & _LOW, None, None]
    words[2] = torch.full_like(counters, stream)
    words[3] = torch.zeros_like(counters)
    keys = [seed & _LOW, (seed >> 32) & _LOW]
    for _ in range(ROUNDS):
        # A product of two 32-bit numbers may wrap int64's sign; the mask after the shift mends it.
        first = words[0] * _MULTIPLIERS[0]
        second = words[2] * _MULTIPLIERS[1]
        words = [
            (second >> 32).bitwise_and_(_LOW).bitwise_xor_(words[1]).bitwise_xor_(keys[0]),
            second.bitwise_and_(_LOW),
            (first >> 32).bitwise_and_(_LOW).bitwise_xor_(words[3]).bitwise_xor_(keys[1]),
            first.bitwise_and_(_LOW),
        ]
        keys = [(key + step) & _LOW for key, step in zip(keys, _KEY_STEPS, strict=True)]
    return words


def dropout_threshold(probability: float) -> int:
    """Lanes below it are dropped."""
    return round(probability * 65536)


def keep_mask(
    seed: Tensor, stream: int, probability: float, rows: tuple[int, int], k: int
) -> Tensor:
    """bool [rows[1] - rows[0], k]: True where rows `rows` of a [M, k] input are kept."""
    first, last = rows[0] * k, rows[1] * k
    start = first // LANES
    counters = torch.arange(start, -(-last // LANES), dtype=torch.int64, device=seed.device)
    words = philox4x32(counters, stream, seed)
    # As int32 bits, little-endian halves fall in lane order.
    bits = torch.stack([word.to(torch.int32) for word in words], dim=-1)
    lanes = bits.view(torch.int16).to(torch.int32).bitwise_and_(0xFFFF)
    keep = lanes.view(-1) >= dropout_threshold(probability)
    return keep[first - start * LANES : last - start * LANES].view(rows[1] - rows[0], k)
