"""Measuring as an op runs, whatever the caller has switched on around it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def plain_mode(device: str) -> Iterator[None]:
    """Inside, events are of `device`, no gradients are recorded, and neither autocast, inference
    mode nor a default dtype of the caller's is in force."""
    kind = torch.device(device).type
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with contextlib.ExitStack() as modes:
            if kind == "cuda":
                modes.enter_context(torch.cuda.device(device))
            modes.enter_context(torch.inference_mode(False))
            modes.enter_context(torch.no_grad())
            modes.enter_context(torch.autocast(kind, enabled=False))
            yield
    finally:
        torch.set_default_dtype(dtype)
