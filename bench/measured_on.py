"""What measurements were taken with."""

from __future__ import annotations

import platform

import peft
import torch
import transformers


def measured_on() -> dict[str, dict[str, str | int]]:
    """Versions of what was measured, and the machine."""
    device = {"device": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}
    return {
        "versions": {each.__name__: each.__version__ for each in (torch, transformers, peft)},
        "machine": {
            **device,
            "processor": torch.backends.cpu.get_cpu_capability(),
            "machine": platform.machine(),
            "threads": torch.get_num_threads(),
        },
    }
