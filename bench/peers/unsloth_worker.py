"""The process of Unsloth: like the others', but Unsloth is imported first.

Unsloth changes what transformers, PEFT and torch define, and asks to be imported before them. Its
import prints.
"""

from __future__ import annotations

from bench.peers.answers import answers

if __name__ == "__main__":
    results = answers()
    import unsloth  # noqa: F401  # pyright: ignore[reportMissingImports]

    from bench.peers.worker import main

    main(results)
