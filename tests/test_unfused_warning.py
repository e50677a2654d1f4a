"""Training warns once of sites that could be fused and are not, whatever the reason."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import get_peft_model

import qlora_compile
from qlora_compile.capture.first_step import UnfusedWarning
from tests.test_equality import as_rewritten, lora
from tests.toy_models import tokens, toy

__all__ = ["as_rewritten"]

pytestmark = pytest.mark.usefixtures("as_rewritten")


def warned(model: Any, steps: int = 3, **inputs: Any) -> list[str]:
    """Return the messages of each UnfusedWarning of some training steps."""
    ids = tokens()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(steps):
            model(input_ids=ids, labels=ids, **inputs).loss.backward()
    return [str(each.message) for each in caught if each.category is UnfusedWarning]


def adapted() -> Any:
    model = get_peft_model(toy(), lora(target_modules=["q_proj"])).train()
    return qlora_compile.optimize(model, quantize="nf4", tune="off")


def hooked(model: Any) -> dict[str, Any]:
    for block in model.get_base_model().model.layers:
        block.mlp.register_full_backward_hook(lambda *_: None)
    return {}


def untraceable(model: Any) -> dict[str, Any]:
    for block in model.get_base_model().model.layers:
        block.mlp.register_forward_hook(lambda *_: torch._dynamo.graph_break())
    return {}


LEFT: dict[str, tuple[Callable[[Any], dict[str, Any]], str]] = {
    "a backward hook": (hooked, "backward hook"),
    "a cache": (lambda _: {"use_cache": True}, "key-value cache"),
    "an untraceable hook": (untraceable, "Dynamo cannot trace"),
}


@pytest.mark.parametrize("case", LEFT)
def test_training_warns_once(case: str) -> None:
    model = adapted()
    leave, reason = LEFT[case]
    inputs = leave(model)
    with torch.no_grad():
        assert warned(model.eval(), steps=0) == []
    (message,) = warned(model.train(), **inputs)
    assert message.startswith("14 of 14 linears")
    assert reason in message
    assert warned(model, **inputs) == []


def test_a_fused_model_gives_no_warning_and_evaluation_none() -> None:
    model = pickle.loads(pickle.dumps(copy.deepcopy(adapted())))
    assert warned(model) == []
    model = adapted().eval()
    hooked(model)
    assert warned(model) == []


def test_one_block_of_two() -> None:
    model = adapted()
    model.get_base_model().model.layers[1].mlp.register_full_backward_hook(lambda *_: None)
    (message,) = warned(model)
    assert message.startswith("7 of 14 linears")
