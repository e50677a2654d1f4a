"""left_as_found: lets a model run without changing its state."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def left_as_found(model: nn.Module) -> Iterator[None]:
    """Restore training modes, buffers and torch's random state after the body."""
    modes = [(module, module.training) for module in model.modules()]
    buffers = [(b, b.clone()) for module, _ in modes for b in module.buffers(recurse=False)]
    device = next(p for module, _ in modes for p in module.parameters(recurse=False)).device
    devices = [device] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        for module, training in modes:
            module.training = training
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)
