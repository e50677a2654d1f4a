"""A part of an optimised model is copied and kept without the model."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import qlora_compile
from qlora_compile.capture.regions import region_of
from qlora_compile.hf import trl_head
from tests.capture.test_slow_products import without_16_bits
from tests.test_equality import as_rewritten, lora
from tests.toy_models import tokens, toy

__all__ = ["as_rewritten", "without_16_bits"]

pytestmark = pytest.mark.usefixtures("as_rewritten")


def optimized(**options: Any) -> Any:
    model = toy(dtype=torch.bfloat16)
    return qlora_compile.optimize(
        model, lora(), quantize="nf4", logits_free_loss=True, tune="off", **options
    ).train()


def compiled_parts(model: Any) -> list[nn.Module]:
    return [module for module in model.modules() if region_of(module) is not None]


@pytest.mark.parametrize("ran", [False, True])
def test_a_part_is_copied_alone(ran: bool) -> None:
    model = optimized()
    if ran:
        model(input_ids=tokens(), labels=tokens())
    everything = {id(module) for module in model.modules()}
    # Two blocks, and the head, which has hooks of the loss without logits.
    parts = compiled_parts(model)
    assert len(parts) == 3
    for part in parts:
        memo: dict[int, Any] = {}
        copy.deepcopy(part, memo)
        assert memo.keys() & everything == {id(module) for module in part.modules()}
        assert len(pickle.dumps(part)) < len(pickle.dumps(model)) / 2


def test_a_part_keeps_no_model() -> None:
    model = optimized()
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    kept = compiled_parts(model)
    base = weakref.ref(model.get_base_model())
    del model
    torch._dynamo.reset()
    gc.collect()
    assert base() is None
    assert len(kept) == 3


served: list[Any] = []


def serve(model: Any) -> None:
    served.append(model)


@pytest.mark.parametrize("how", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copied_model_begins_its_own_first_step(
    how: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trl_head, "serve", serve)
    model = optimized()
    twin = how(how(model))
    for each in (twin, model):
        served.clear()
        each(input_ids=tokens(), labels=tokens())
        (found,) = served
        assert found is each.get_base_model()
