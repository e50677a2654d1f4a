"""Whatever people do with a model between two steps, its loss and all its gradients stay those of
stock PEFT: drawn sequences of operations, on every kind of base."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from torch._dynamo.backends.debugging import aot_eager
from torch._functorch import config as functorch_config

from qlora_compile.capture import backend
from tests.life.known_failures import KNOWN_FAILURES, KnownFailure
from tests.life.pair import BASES, OWN_FORMATS, play
from tests.life.sequences import AT_LENGTH, SEQUENCES, explore


@pytest.fixture
def without_inductor(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Runs rewritten graphs as they are, which takes half of AOTAutograd's time, or AOTAutograd's
    where there is time; yields the backend for a compilation around the model."""

    def uncompiled(graph: Any, inputs: Any, *_: Any) -> Any:
        return aot_eager(graph, inputs) if AT_LENGTH else graph.forward

    monkeypatch.setattr(backend, "compile_inner", uncompiled)
    # Our own compilation donates no buffer, so that a backward may run again.
    with functorch_config.patch(donated_buffer=False):
        yield "aot_eager" if AT_LENGTH else "eager"


@pytest.mark.parametrize("base", BASES)
def test_sequences_agree_with_stock(base: str, without_inductor: str) -> None:
    explore(base, SEQUENCES // len(BASES), without_inductor)


@pytest.mark.parametrize("base", BASES if AT_LENGTH else OWN_FORMATS[:1])
def test_sequences_agree_with_stock_through_inductor(base: str) -> None:
    explore(base, SEQUENCES // 50 if AT_LENGTH else 1, "inductor")


@pytest.mark.parametrize("failure", KNOWN_FAILURES, ids=lambda failure: failure.reason)
@pytest.mark.usefixtures("without_inductor")
def test_what_is_known_to_fail_fails(failure: KnownFailure) -> None:
    """What passes here is taken off the list, and drawn from then on."""
    pair = play(failure.start, *failure.operations[:-1])
    assert failure.excludes(pair, failure.operations[-1])
    with pytest.raises((AssertionError, RuntimeError)):
        pair.do(failure.operations[-1])
