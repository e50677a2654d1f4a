"""The versions and the machine of a measurement."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import peft
import torch
import transformers

from qlora_compile.kernels.cpu.instructions import level


def measured_on() -> dict[str, dict[str, str | int]]:
    """Return the versions and the machine of a measurement."""
    device = {"device": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}
    return {
        "versions": {each.__name__: each.__version__ for each in (torch, transformers, peft)},
        "machine": {
            **device,
            "processor": _processor(),
            "instructions": level() or torch.backends.cpu.get_cpu_capability(),
            "machine": platform.machine(),
            "threads": torch.get_num_threads(),
        },
    }


def _processor() -> str:
    """Return the processor's name, or its architecture where the system does not tell it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    told = dict(line.split("\t: ", 1) for line in lines if "\t: " in line)
    told = {name.strip(): value for name, value in told.items()}
    names = ("model name", "cpu family", "model")
    return " ".join(
        told[name] if name == "model name" else f"{name.removeprefix('cpu ')} {told[name]}"
        for name in names
        if name in told
    )


def processor_of(found: Mapping[str, Any]) -> str:
    """Return the level of instructions and the processor in a result of `measured_on`, which may be
    among other entries."""
    return "{instructions}, {processor}".format(**found["machine"])


def in_words(found: Mapping[str, Any]) -> str:
    """Return a result of `measured_on` as a list on one line."""
    parts = [part for each in ("versions", "machine") for part in found[each].items()]
    return ", ".join(f"{name} {value}" for name, value in parts)
