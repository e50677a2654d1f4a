"""Records what code allocates, launches and computes on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile


class OnGpu(NamedTuple):
    """What code did on a GPU. most: the most bytes that the device held at a time. held: how many
    more bytes it held at the end, including what the code returned. kernels: how many were
    launched. seconds: of all kernels and copies."""

    most: int
    held: int
    kernels: int
    seconds: float


def on_gpu(run: Callable[[], Any]) -> OnGpu:
    """Record one `run`, which should have run before, so that what it makes once exists."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        result = run()
        torch.cuda.synchronize()
    held = torch.cuda.memory_allocated() - before
    del result
    events = [each for each in profiler.events() or () if each.device_type == DeviceType.CUDA]
    kernels = sum(not each.name.startswith(("Memcpy", "Memset")) for each in events)
    seconds = sum(each.time_range.elapsed_us() for each in events) / 1e6
    return OnGpu(torch.cuda.max_memory_allocated(), held, kernels, seconds)
