"""The process of Unsloth: like the others', but Unsloth is imported first.

It changes what transformers, PEFT and torch define, and asks to come before them.
"""

from __future__ import annotations

import unsloth  # noqa: F401  # pyright: ignore[reportMissingImports]

from bench.peers.worker import main

if __name__ == "__main__":
    main()
