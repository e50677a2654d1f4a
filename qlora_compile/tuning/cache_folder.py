"""The folder of everything that is kept between processes, but for compiled code."""

from __future__ import annotations

import os
from pathlib import Path

import platformdirs


def cache_folder() -> Path:
    """Return $QLORA_COMPILE_CACHE, or else the folder qlora-compile among the user's caches."""
    chosen = os.environ.get("QLORA_COMPILE_CACHE")
    if chosen:
        return Path(chosen)
    return platformdirs.user_cache_path("qlora-compile", appauthor=False)
