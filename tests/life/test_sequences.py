"""Whatever people do with a model between two steps, its loss and all its gradients stay those of
stock PEFT: drawn sequences of operations, on every kind of base."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, note, settings
from hypothesis import strategies as st

from tests.life.known_failures import KNOWN_FAILURES, KnownFailure, known_to_fail
from tests.life.operations import OPERATIONS, TARGETS
from tests.life.pair import BASES, Pair, Start, play
from tests.test_equality import without_inductor

__all__ = ["without_inductor"]

SEQUENCES = int(os.environ.get("QLORA_COMPILE_LIFE_SEQUENCES", "40"))
"""Without Inductor; a tenth as many run with it."""

STARTS = (
    st.builds(
        Start,
        st.sampled_from(BASES),
        st.sampled_from(TARGETS),
        st.none() | st.just("base_model.model.model.layers.1.self_attn.k_proj"),
        st.sampled_from(("before", "in")),
    )
    .filter(
        # `optimize` attaches adapters over what is not frozen yet; PEFT then freezes it.
        lambda start: (
            start.thawed is None or (start.attached == "before" and "k_proj" not in start.targets)
        )
    )
    .filter(lambda start: start.thawed is None or not start.base.startswith("bnb"))
)


def live(data: st.DataObject, outer_backend: str, operations: Sequence[Any] = OPERATIONS) -> None:
    """Draws a start and 3 to 8 operations, and compares after each."""
    torch._dynamo.reset()
    pair = Pair(data.draw(STARTS, "start"))
    pair.outer_backend = outer_backend
    try:
        pair.compare()
        for _ in range(data.draw(st.integers(3, 8), "operations")):
            possible = [each for op in operations if (each := op.drawn(pair)) is not None]
            drawn = st.one_of(possible).filter(lambda each: not known_to_fail(pair, each))
            pair.do(data.draw(drawn, "operation"))
    except Exception:
        note(f"To repeat it:\n{pair}")
        raise


def drawn(count: int) -> settings:
    return settings(
        max_examples=count,
        suppress_health_check=list(HealthCheck),
        phases=[phase for phase in Phase if phase is not Phase.explain],
    )


@pytest.mark.usefixtures("without_inductor")
@drawn(SEQUENCES)
@given(st.data())
def test_sequences_agree_with_stock(data: st.DataObject) -> None:
    live(data, "aot_eager")


@drawn(max(4, SEQUENCES // 10) if SEQUENCES > 40 else 4)
@given(st.data())
def test_sequences_agree_with_stock_through_inductor(data: st.DataObject) -> None:
    live(data, "inductor")


@pytest.mark.parametrize("failure", KNOWN_FAILURES, ids=lambda failure: failure.reason)
@pytest.mark.usefixtures("without_inductor")
def test_what_is_known_to_fail_fails(failure: KnownFailure) -> None:
    """What passes here is taken off the list, and drawn."""
    with pytest.raises(Exception):  # noqa: B017, PT011  each fails in a way of its own
        play(failure.start, *failure.operations)
