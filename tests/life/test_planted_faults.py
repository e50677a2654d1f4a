"""The sequences find what used to be wrong: each fault is put back, and they have to fail."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
from torch._dynamo.backends.debugging import aot_eager
from torch._functorch import config as functorch_config

from qlora_compile.capture import backend, regions
from qlora_compile.hf import full_training
from tests.life.operations import OPERATIONS, Backward, Batch, Hook, OptimizerStep, Unhook
from tests.life.sequences import AT_LENGTH, explore
from tests.life.test_sequences import without_inductor

__all__ = ["without_inductor"]


@dataclass(frozen=True)
class Fault:
    """plant: puts it back. operations: those that are drawn in the suite, to find it soon."""

    name: str
    plant: Callable[[pytest.MonkeyPatch], None]
    operations: tuple[Any, ...]
    symptom: str


def _ignore_hooks(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(regions, "has_hooks", lambda block: False)


def _donate_buffers(patch: pytest.MonkeyPatch) -> None:
    def donating(graph: Any, inputs: Any, *_: Any) -> Any:
        with functorch_config.patch(donated_buffer=True):
            return aot_eager(graph, inputs)

    patch.setattr(backend, "compile_inner", donating)


def _pack_trained(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(full_training, "trained_in_full", lambda model: set())


FAULTS = (
    Fault("hooks are ignored", _ignore_hooks, (Hook, Unhook, Batch), "differs by|only stock has"),
    Fault("buffers are donated", _donate_buffers, (Backward, OptimizerStep), "donated buffers"),
    Fault("trained Linears are packed", _pack_trained, (Batch,), "only stock has"),
)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_planted_fault_is_found(
    fault: Fault, without_inductor: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fault.plant(monkeypatch)
    operations = OPERATIONS if AT_LENGTH else fault.operations
    with pytest.raises((AssertionError, RuntimeError), match=fault.symptom):
        explore("nf4", 100, without_inductor, operations, shrink=False)
