"""What measurements were taken with."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from typing import Any

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


def in_words(found: Mapping[str, Any]) -> str:
    """What `measured_on` returned, among other entries or alone, as a list on one line."""
    parts = [part for each in ("versions", "machine") for part in found[each].items()]
    return ", ".join(f"{name} {value}" for name, value in parts)
