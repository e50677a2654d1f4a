"""Packages that a machine with a GPU may lack and cannot download: what they are, and where.

This module imports only the standard library, as it runs before anything else can be imported.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

CARRIED = Path(__file__).parents[2] / ".device"
"""One folder for each group of packages; git ignores it."""

SHARED = "shared"
PACKAGES = {
    SHARED: ("platformdirs==4.14.8",),
    "bitsandbytes": ("bitsandbytes==0.50.2",),
    "unsloth": (
        "unsloth==2026.10.9",
        "unsloth_zoo==2026.10.9",
        "trl==1.15.0",
        "datasets==4.8.5",
        "dill==0.4.1",
        "multiprocess==0.70.19",
        "cut_cross_entropy==25.1.1",
        "msgspec==0.22.0",
    ),
}
"""By group. Unsloth's other requirements are either on machines that have torch and transformers
(torchvision, sentencepiece, protobuf, psutil, pillow, pyarrow, pandas), or not imported to train
(hf_transfer, diffusers, torchao, tyro, pydantic, json5, structlog), or of no use: xformers 0.0.35
does not load with torch 2.11, and Unsloth then takes torch's attention."""


def add_shared() -> None:
    """Put the shared packages on the path of this process and of those it starts, unless they are
    installed."""
    names = (package.partition("==")[0] for package in PACKAGES[SHARED])
    if all(importlib.util.find_spec(name) for name in names):
        return
    folder = str(CARRIED / SHARED)
    sys.path.append(folder)
    path = filter(None, [os.environ.get("PYTHONPATH"), folder])
    os.environ["PYTHONPATH"] = os.pathsep.join(path)
