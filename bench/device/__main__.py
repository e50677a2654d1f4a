"""`python -m bench.device`, see `command`; first puts packages that may be missing on the path."""

from __future__ import annotations

import bench.device.begun  # noqa: F401  # the clock starts before the large imports
from bench.device.carried import add_shared

if __name__ == "__main__":
    add_shared()
    from bench.device.command import main

    main()
