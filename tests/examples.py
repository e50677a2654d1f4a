"""The number of examples that a slow test draws: a part of its range in `make test`, all in
`make test-long`."""

import os

LONG = "QLORA_COMPILE_LONG_TESTS" in os.environ
PART = 3


def examples(count: int, part: int = PART) -> int:
    """Return `count`, or a third of it, or a smaller part if many tests draw from one range."""
    return count if LONG else max(1, count // part)
