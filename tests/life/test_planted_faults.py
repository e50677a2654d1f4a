"""The sequences find former faults: each is put back, and the sequences have to fail."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import pytest
import torch
from torch._dynamo.backends.debugging import aot_eager
from torch._functorch import config as functorch_config

from qlora_compile.capture import backend, hook_watch
from qlora_compile.hf import full_training
from tests.life.model_operations import Cast
from tests.life.operations import OPERATIONS, Backward, Batch, Hook, Unhook
from tests.life.pair import Start, play
from tests.life.sequences import AT_LENGTH, explore
from tests.life.test_sequences import without_inductor

__all__ = ["without_inductor"]


@dataclass(frozen=True)
class Fault:
    """plant: puts it back, within a `with`. operations: those drawn in the suite, to find it soon.
    symptom: of what is raised."""

    name: str
    plant: Callable[[], AbstractContextManager[Any]]
    operations: tuple[Any, ...]
    symptom: str


@contextmanager
def _donated_buffers() -> Iterator[None]:
    """As Inductor's code would use them, had our backend not emptied their list."""
    compiled = mock.patch.object(
        backend, "compile_inner", lambda graph, inputs, *_: aot_eager(graph, inputs)
    )
    with compiled, functorch_config.patch(donated_buffer=True):
        yield


FAULTS = (
    Fault(
        "hooks are ignored",
        lambda: mock.patch.object(hook_watch, "has_hooks", return_value=False),
        (Hook, Unhook, Batch),
        "differs by|only stock has",
    ),
    Fault("buffers are donated", _donated_buffers, (Backward,), "donated buffers"),
    Fault(
        "trained Linears are packed",
        lambda: mock.patch.object(full_training, "is_partly_frozen", return_value=False),
        (Batch,),
        "only stock has",
    ),
)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_planted_fault_is_found(fault: Fault, without_inductor: str) -> None:
    operations = OPERATIONS if AT_LENGTH else fault.operations
    with fault.plant(), pytest.raises((AssertionError, RuntimeError), match=fault.symptom):
        explore("nf4", 100, without_inductor, operations, shrink=False)


@pytest.mark.parametrize("base", ["plain", "nf4", "bnb-4bit"])
def test_what_rounding_does_not_explain_is_found(base: str, without_inductor: str) -> None:
    pair = play(Start(base), Cast("bfloat16"), backend=without_inductor)
    with torch.no_grad():
        for name, parameter in pair.ours.named_parameters():
            if "lora_B" in name:
                parameter.mul_(1.5)
    with pytest.raises(AssertionError, match="from float32's"):
        pair.compare()
