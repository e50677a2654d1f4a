"""What some code allocates, launches and computes on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile


class OnGpu(NamedTuple):
    """most: bytes the device holds at a time, all told. held: how many more than before at the end,
    where what the code returned counts. kernels: launched. seconds: of all kernels and copies."""

    most: int
    held: int
    kernels: int
    seconds: float


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
    events = [each for each in profiler.events() or () if each.device_type == DeviceType.CUDA]
    kernels = sum(not each.name.startswith(("Memcpy", "Memset")) for each in events)
    seconds = sum(each.time_range.elapsed_us() for each in events) / 1e6
    return OnGpu(torch.cuda.max_memory_allocated(), held, kernels, seconds)
