"""Code that another torch.compile or torch.export makes of an optimised model has the adapters of
its call, as stock PEFT's has, whatever our blocks ran with before."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor

import qlora_compile
from qlora_compile.hf.own_graphs import CALLS, in_own_graph
from tests.capture.test_regions import Tower
from tests.hf import test_experts as experts
from tests.test_equality import as_rewritten, build, lora
from tests.toy_models import tokens

__all__ = ["as_rewritten"]

pytestmark = pytest.mark.usefixtures("as_rewritten")


def _scaled(model: Any) -> None:
    for module in model.modules():
        if hasattr(module, "lora_A"):
            module.scale_layer(3.0)


CHANGES: dict[str, Callable[[Any], Any]] = {
    "evaluation": lambda model: model.eval(),
    "disabled": lambda model: model.base_model.disable_adapter_layers(),
    "enabled": lambda model: model.base_model.enable_adapter_layers(),
    "another adapter": lambda model: model.base_model.set_adapter("ref"),
    "both adapters": lambda model: model.base_model.set_adapter(["default", "ref"]),
    "a scaling": _scaled,
}
"""What is done after a training step with dropout, each after the one before."""


@torch.no_grad()
def cached(model: Any, ids: Tensor) -> Tensor:
    """Return the logits of a call that our blocks leave to whoever compiles around them."""
    return model(input_ids=ids, use_cache=True).logits


@pytest.mark.parametrize("base", ["plain", "nf4", "bnb-4bit"])
def test_a_compiled_model_follows_its_adapters(base: str) -> None:
    stock, ours = build(base, torch.float32, 0.3, False, layers=1, tune="model")
    for model in (stock, ours):
        torch.manual_seed(2)
        model.add_adapter("ref", lora(r=2, lora_alpha=8))
    outer = torch.compile(ours, backend="eager")
    for name, change in CHANGES.items():
        ids = tokens()
        ours.train()(input_ids=ids, use_cache=False)
        for model in (stock, ours):
            change(model)
            model.eval()
        torch.testing.assert_close(cached(outer, ids), cached(stock, ids), msg=name)


def test_compiled_experts_follow_their_adapters() -> None:
    stock = experts.adapted()
    ours = qlora_compile.optimize(copy.deepcopy(stock), tune="model")
    inputs = experts.batch(stock)
    outer = torch.compile(ours, backend="eager")
    for change in ("evaluation", "disabled", "enabled", "a scaling"):
        ours.train()(**inputs)
        for model in (stock, ours):
            CHANGES[change](model)
            model.eval()
        actual, expected = cached(outer, inputs["input_ids"]), cached(stock, inputs["input_ids"])
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5, msg=change)


@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_program_has_the_adapters_of_its_moment(strict: bool) -> None:
    stock: Any = get_peft_model(Tower(), lora(0.3, target_modules=["up"])).train()  # pyright: ignore[reportArgumentType]
    ours = qlora_compile.optimize(copy.deepcopy(stock), tune="model")
    x = torch.randn(3, 4)
    for name in ("evaluation", "disabled", "enabled", "a scaling"):
        ours.train()(x)
        for model in (stock, ours):
            CHANGES[name](model)
            model.eval()
        program = torch.export.export(ours.get_base_model(), (x,), strict=strict)
        torch.testing.assert_close(program.module()(x), stock(x), msg=name)


def test_a_block_that_runs_in_another_thread_is_none_of_ours() -> None:
    found = []
    thread = threading.Thread(target=lambda: found.append(in_own_graph()))
    CALLS.stack.append(None)
    try:
        thread.start()
        thread.join()
        assert in_own_graph()
    finally:
        CALLS.stack.pop()
    assert found == [False]
    assert not in_own_graph()
