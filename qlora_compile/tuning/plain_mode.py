"""plain_mode: the modes to measure an op in, whatever modes the caller has switched on."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def plain_mode(device: str) -> Iterator[None]:
    """Run the body on `device` without recording gradients, and without the caller's autocast,
    inference mode and default dtype."""
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
