"""Draws sequences of operations and plays them."""

from __future__ import annotations

import os
import secrets
import zlib
from collections.abc import Sequence
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, given, note, seed, settings
from hypothesis import strategies as st

from tests.life.known_failures import known_to_fail
from tests.life.operations import OPERATIONS
from tests.life.pair import BLOCK, OWN_FORMATS, TARGETS, Pair, Start, Strategy

AT_LENGTH = "QLORA_COMPILE_LIFE_SEQUENCES" in os.environ
SEQUENCES = int(os.environ.get("QLORA_COMPILE_LIFE_SEQUENCES", "10"))
SEED = int(os.environ.get("QLORA_COMPILE_LIFE_SEED", "0" if "CI" in os.environ else "-1"))
"""Negative: a fresh one for each run, told by what fails."""

_THAWED = f"{BLOCK}.1.self_attn.k_proj"


def starts(base: str) -> Strategy:
    targets = st.sampled_from(TARGETS)
    started = st.builds(Start, st.just(base), targets, st.none(), st.sampled_from(("before", "in")))
    if base not in (*OWN_FORMATS, "plain"):
        return started
    without = targets.filter(lambda names: "k_proj" not in names)
    return started | st.builds(Start, st.just(base), without, st.just(_THAWED), st.just("before"))


def live(data: st.DataObject, base: str, backend: str, operations: Sequence[Any]) -> None:
    """Draw a start and 3 to 8 operations, and compare after each."""
    torch._dynamo.reset()
    pair = Pair(data.draw(starts(base)), backend)
    try:
        pair.compare()
        for _ in range(data.draw(st.integers(3, 8))):
            possible = [each for op in operations if (each := op.drawn(pair)) is not None]
            drawn = st.one_of(possible).filter(lambda each: not known_to_fail(pair, each))
            pair.do(data.draw(drawn))
    except Exception:
        note(f"To repeat it:\n{pair}")
        raise


def explore(
    base: str,
    count: int,
    backend: str,
    operations: Sequence[Any] = OPERATIONS,
    shrink: bool = True,
) -> None:
    """Play `count` sequences; raise what the shortest failing one raises. backend: for a
    compilation around the model."""
    start = SEED if SEED >= 0 else secrets.randbits(32)

    @seed(zlib.crc32(base.encode()) + start)
    @settings(
        max_examples=count,
        phases=[Phase.generate, Phase.shrink] if shrink else [Phase.generate],
        database=None,
        print_blob=False,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
    )
    @given(st.data())
    def sequences(data: st.DataObject) -> None:
        note(f"QLORA_COMPILE_LIFE_SEED={start}")
        live(data, base, backend, operations)

    sequences()
