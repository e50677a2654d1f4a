"""Settings of Inductor under which it cannot compile an op such as ours leave blocks unaffected."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._inductor import config

import qlora_compile
from tests.test_equality import lora
from tests.toy_models import tokens, toy


def step(settings: dict[str, Any]) -> list[Tensor]:
    """Return the loss and the gradients of a step."""
    torch.manual_seed(0)
    model = toy(num_hidden_layers=1)
    with config.patch(settings):
        model = qlora_compile.optimize(model, lora(), quantize="nf4", tune="off", strict=True)
        ids = tokens()
        loss = model.train()(input_ids=ids, labels=ids).loss
        loss.backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return [loss.detach(), *gradients]


def test_a_step_is_as_without_them() -> None:
    settings = {"cpp_wrapper": True, "implicit_fallbacks": False}
    # First, because Inductor remembers what it falls back to, and compiled code is cached.
    found = step({**settings, "force_disable_caches": True})
    torch._dynamo.reset()
    expected = step({})
    assert len(found) == len(expected) > 7
    assert all(map(torch.equal, found, expected))
