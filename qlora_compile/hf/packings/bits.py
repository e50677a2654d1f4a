"""Codes of a few bits, packed in a stream from the lowest bit on."""

from __future__ import annotations

import torch
from torch import Tensor

_WORD = 32


def unpacked(words: Tensor, bits: int, count: int) -> Tensor:
    """Return the first `count` codes of each row of `words`: uint8 [rows, count].

    words: int32 [rows, at least ceil(count * bits / 32)], any strides. Code i of a row takes `bits`
    bits, 1 to 8, from bit i * `bits` on, bit 0 being the lowest of the first word; it may reach
    into the next word.
    """
    rows = words.shape[0]
    if _WORD % bits == 0:
        # contiguous() keeps the strides of dimensions of length one, which view() refuses.
        stored = words.clone(memory_format=torch.contiguous_format).view(torch.uint8)
        if bits == 8:
            return stored[:, :count].contiguous()
        parts = [stored >> shift & (2**bits - 1) for shift in range(0, 8, bits)]
        return torch.stack(parts, dim=2).view(rows, -1)[:, :count].contiguous()
    # Every 32 codes take `bits` whole words.
    blocks = torch.nn.functional.pad(words, (0, -words.shape[1] % bits)).view(rows, -1, bits)
    blocks = blocks.to(torch.int64) & 0xFFFFFFFF
    codes = torch.empty(*blocks.shape[:2], _WORD, dtype=torch.uint8, device=words.device)
    for i in range(_WORD):
        word, shift = divmod(i * bits, _WORD)
        value = blocks[:, :, word] >> shift
        if shift + bits > _WORD:
            value |= blocks[:, :, word + 1] << (_WORD - shift)
        codes[:, :, i] = value & (2**bits - 1)
    return codes.view(rows, -1)[:, :count].contiguous()
