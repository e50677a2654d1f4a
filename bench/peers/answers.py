"""The stream to which a process writes its answers."""

from __future__ import annotations

import os
import sys
from typing import IO


def answers() -> IO[str]:
    """Return the standard output. From now on libraries print to the standard error, so that
    nothing comes between the answers."""
    results = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    return results
