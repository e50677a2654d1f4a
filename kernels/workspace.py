"""Scratch memory for decoded weights: one buffer per device and stream.

All layers share it, nothing in it outlives the op that asked for it, and it is never saved for the
backward.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

_CPU = torch.device("cpu")
_MOST_VIEWS = 256


class _Buffers(threading.local):
    """The buffers of one thread: two threads that launch on one stream would overwrite each other's
    weight. views: the tensors handed out so far, since making one takes as long as a small
    product. parts: what owners have made of a view. fresh: whether nothing is shared."""

    fresh = False

    def __init__(self) -> None:
        self.by_stream: dict[tuple[torch.device, int], Tensor] = {}
        self.views: dict[tuple[torch.device, int, tuple[int, ...], torch.dtype], Tensor] = {}
        self.parts: WeakKeyDictionary[Any, tuple[Tensor, list[Tensor]]] = WeakKeyDictionary()


_buffers = _Buffers()


def workspace(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return uninitialised memory of `shape`, contiguous, valid until this thread asks again.

    Every call returns the same memory, which grows to the largest request and stays.
    """
    if _buffers.fresh or device.type not in ("cpu", "cuda"):
        return torch.empty(shape, dtype=dtype, device=device)
    stream = 0
    if device.type == "cuda":
        # A graph replays into the memory it was captured with, long after a larger request has
        # replaced this one.
        if torch.cuda.is_current_stream_capturing():
            return torch.empty(shape, dtype=dtype, device=device)
        stream = torch.cuda.current_stream(device).cuda_stream
    size = math.prod(shape) * dtype.itemsize
    buffer = _buffers.by_stream.get((device, stream))
    if buffer is None or buffer.numel() < size:
        # The old one is freed before the new one is made.
        _buffers.by_stream.pop((device, stream), None)
        _buffers.views.clear()
        _buffers.parts.clear()
        del buffer
        with torch.inference_mode(False):
            buffer = torch.empty(size, dtype=torch.uint8, device=device)
        _buffers.by_stream[device, stream] = buffer
    key = (device, stream, shape, dtype)
    view = _buffers.views.get(key)
    if view is None:
        if len(_buffers.views) >= _MOST_VIEWS:
            _buffers.views.clear()
        with torch.inference_mode(False):
            view = _buffers.views[key] = buffer[:size].view(dtype).view(shape)
    poisoned = torch.utils.deterministic.fill_uninitialized_memory  # pyright: ignore[reportAttributeAccessIssue]
    if poisoned and torch.are_deterministic_algorithms_enabled():
        # In this mode torch.empty fills memory with NaN.
        view.fill_(math.nan if dtype.is_floating_point else torch.iinfo(dtype).max)
    return view


@contextmanager
def fresh_workspaces() -> Iterator[None]:
    """Give every call of this thread memory of its own inside the context, as plans need it."""
    before, _buffers.fresh = _buffers.fresh, True
    try:
        yield
    finally:
        _buffers.fresh = before


def divided(
    owner: object, size: int, divide: Callable[[Tensor], list[Tensor]]
) -> tuple[Tensor, list[Tensor]]:
    """Return `size` bytes of the CPU's workspace, and what `divide` makes of them, which is made
    once for an owner as long as the memory stays the same."""
    slab = workspace(size, dtype=torch.uint8, device=_CPU)
    parts = _buffers.parts.get(owner)
    if parts is None or parts[0] is not slab:
        with torch.inference_mode(False):
            parts = _buffers.parts[owner] = slab, divide(slab)
    return parts


def release() -> None:
    """Free this thread's workspaces, until it asks for one again."""
    _buffers.by_stream.clear()
    _buffers.views.clear()
    _buffers.parts.clear()


def poison() -> None:
    """Overwrite this thread's workspaces with NaN, so that stale contents show."""
    for buffer in _buffers.by_stream.values():
        buffer.fill_(0xFF)
