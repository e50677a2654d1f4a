"""What some code allocates and launches on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile


class OnGpu(NamedTuple):
    """most: bytes the device holds at a time, all told. held: how many more than before at the end,
    where what the code returned counts. kernels: launched."""

    most: int
    held: int
    kernels: int


def on_gpu(run: Callable[[], Any]) -> OnGpu:
    """Of one `run`, which should have made before what it makes once."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        result = run()
        torch.cuda.synchronize()
    held = torch.cuda.memory_allocated() - before
    del result
    kernels = sum(
        event.device_type == DeviceType.CUDA and not event.name.startswith(("Memcpy", "Memset"))
        for event in profiler.events() or ()
    )
    return OnGpu(torch.cuda.max_memory_allocated(), held, kernels)
