"""Dropout from counters: a mask that is recomputed from its seed, never stored.

Philox4x32 with 7 rounds, the fewest that pass BigCrush (Salmon et al., "Parallel random numbers:
as easy as 1, 2, 3", SC 2011). Element e of a row-major [M, K] input uses counter e // 8 and the
(e % 8)-th of the 16-bit lanes of the four output words, low half first: eight decisions per
counter. Sixteen bits resolve the keep probability to 2**-16.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

ROUNDS = 7
LANES = 8
_LOW = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_SIGN_BITS = -0x7FFF8000
"""The top bit of both 16-bit halves of an int32."""

_CHUNK = 1 << 16
"""Counters handled at a time. Five int64 buffers of this length bound the scratch memory, and are
long enough to hide the cost of starting an operator."""


def philox4x32(
    words: Sequence[Tensor | int], key: Tensor | int, rounds: int = ROUNDS
) -> list[Tensor | int]:
    """Return the four output words of the counters `words`, low word first.

    words: four values below 2**32, ints or int64 tensors of one shape, which are overwritten;
    key: 64 bits, an int or an int64 tensor of that shape. Only the low 32 bits of the output words
    are defined.
    """
    word0, word1, word2, word3 = words
    key0, key1 = key & _LOW, (key >> 32) & _LOW
    spare: list[Tensor] = []
    for _ in range(rounds):
        product0 = _product(word0, _MULTIPLIERS[0])
        product1 = _product(word2, _MULTIPLIERS[1])
        word0, word1 = _mixed(product1, word1, key0, spare), product1
        word2, word3 = _mixed(product0, word3, key1, spare), product0
        key0, key1 = (key0 + _KEY_STEPS[0]) & _LOW, (key1 + _KEY_STEPS[1]) & _LOW
    return [word0, word1, word2, word3]


def _signed(value: int) -> int:
    """Return the int64 with the bits of `value` modulo 2**64."""
    return (value + 2**63) % 2**64 - 2**63


def _product(word: Tensor | int, multiplier: int) -> Tensor | int:
    # A product of two 32-bit numbers may wrap int64's sign; `_mixed` masks what the shift drags in.
    return word.mul_(multiplier) if isinstance(word, Tensor) else _signed(word * multiplier)


def _mixed(
    product: Tensor | int, low: Tensor | int, key: Tensor | int, spare: list[Tensor]
) -> Tensor | int:
    """Return the high half of `product` xor the low half of `low` xor `key`, below 2**32.

    Words that are still ints, such as a counter's constant words in the first rounds, cost nothing.
    Buffers that are no longer needed go to `spare`, because fresh memory costs more than the
    arithmetic.
    """
    if not isinstance(product, Tensor):
        if not isinstance(low, Tensor):
            return (product >> 32 ^ low ^ key) & _LOW
        return low.bitwise_xor_(product >> 32 ^ key).bitwise_and_(_LOW)
    mixed = spare.pop() if spare else torch.empty_like(product)
    torch.bitwise_right_shift(product, 32, out=mixed)
    if isinstance(low, Tensor):
        mixed.bitwise_xor_(low)
        spare.append(low)
    else:
        key = key ^ low
    return mixed.bitwise_xor_(key).bitwise_and_(_LOW)


def dropout_threshold(probability: float) -> int:
    """Return the number below which lanes are dropped."""
    return round(probability * 65536)


def keep_mask(
    seed: Tensor,
    stream: int,
    probability: float,
    rows: tuple[int, int],
    k: int,
    dtype: torch.dtype = torch.bool,
) -> Tensor:
    """Return the mask of rows `rows` of a [M, k] input: [rows[1] - rows[0], k] of `dtype`, 1 for
    kept elements, else 0.

    seed: int64 [1]. The mask is the same for every way of cutting the input into rows.
    """
    shape = (rows[1] - rows[0], k)
    threshold = dropout_threshold(probability)
    if threshold == 0:
        return torch.ones(shape, dtype=dtype, device=seed.device)
    first, last = rows[0] * k, rows[1] * k
    start, stop = first // LANES, -(-last // LANES)
    lanes = torch.empty(stop - start, LANES, dtype=torch.int16, device=seed.device)
    # Reading the seed costs less than arithmetic on tensors of keys, but would wait for a device.
    key = seed.item() if seed.device.type == "cpu" else None
    begin = start
    while begin < stop:
        end = min(begin + _CHUNK, stop, (begin | _LOW) + 1)
        counters = torch.arange(begin & _LOW, (end - 1 & _LOW) + 1, device=seed.device)
        if key is None:
            words = philox4x32([counters, begin >> 32, stream, 0], seed.expand(end - begin))
        else:
            words = philox4x32([counters, begin >> 32, stream, 0], int(key))
        # As int32 bits, little-endian halves fall in lane order.
        bits = lanes[begin - start : end - start].view(torch.int32)
        for position, word in enumerate(words):
            bits[:, position] = word
        begin = end
    # Flipping the sign bit turns the comparison of unsigned lanes into one of int16, which torch
    # vectorises if the result is in int16 or `dtype`, but not in bool.
    lanes = lanes.view(torch.int32).bitwise_xor_(_SIGN_BITS).view(torch.int16).view(-1)
    lanes = lanes[first - start * LANES : last - start * LANES].view(shape)
    if dtype == torch.bool:
        return lanes.gt_(threshold - 32769).to(dtype)
    return torch.gt(lanes, threshold - 32769, out=lanes.new_empty(shape, dtype=dtype))
