"""Whether decoded weights are written past the caches, straight to memory.

A line that another core has read can be written only once that core has given it up. Decoding then
takes up to ten times as long, probably where cores share no cache, as on processors of several
dies. Writing past the caches does not wait, but the product then reads the weight from memory. With
many rows that takes hardly longer, with few rows up to twice as long.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import TypeVar

import torch
from torch import Tensor

from qlora_compile.kernels.cpu import instructions

Block = TypeVar("Block")

_UNCACHED = 4 << 20
"""Bytes that no core's cache holds."""

_MANY_ROWS = 256
"""From so many rows on, a product takes hardly longer if it reads the weight from memory."""


class _Products(threading.local):
    rows = 0


_products = _Products()


def read_by(rows: int, decoded: Iterator[Block]) -> Iterator[Block]:
    """Yield what `decoded` yields. While it decodes, `past_caches` counts on a product of `rows`
    rows that reads the result."""
    while True:
        before, _products.rows = _products.rows, rows
        try:
            block = next(decoded)
        except StopIteration:
            return
        finally:
            _products.rows = before
        yield block


def past_caches(out: Tensor) -> bool:
    """Whether a weight is decoded to `out` past the caches.

    AMX multiplies so fast that it would wait for memory, weights in float32 are so large that other
    lines have taken their place, and one thread writes only lines of its own.
    """
    if out.dtype == torch.float32:
        return False
    if out.nbytes > _UNCACHED:
        return True
    shared = torch.get_num_threads() > 1 and instructions.level() != "amx"
    return shared and _products.rows >= _MANY_ROWS
