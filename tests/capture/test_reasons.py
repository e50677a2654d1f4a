"""The report's reasons are true: a test checks the very thing that each names."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import qlora_compile
from tests.test_equality import as_rewritten

__all__ = ["as_rewritten"]

pytestmark = pytest.mark.usefixtures("as_rewritten")


class OwnProduct(nn.Linear):
    """Multiplies by its weight without torch's linear."""

    def forward(self, input: Tensor) -> Tensor:
        return (input.unsqueeze(-2) * self.weight).sum(-1) + self.bias


class Scaled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.linear(input, self.weight * 2.0, self.bias)


class Past(nn.Module):
    """Reads the weight of a Linear that it does not call."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return (x.unsqueeze(-2) * self.linear.weight).sum(-1)


def reason(model: Any, adapted: bool, hook: Callable[..., Any] | None = None) -> str:
    model = nn.Sequential(model, nn.Tanh()).requires_grad_(False)
    if adapted:
        model = get_peft_model(model, LoraConfig(r=2, target_modules=["0"]))
        if hook is not None:
            layer: Any = model.get_submodule("base_model.model.0")
            layer.register_forward_pre_hook(hook, with_kwargs=True)
    model = qlora_compile.optimize(model, tune="off")
    model.train()(torch.randn(3, 8, requires_grad=True)).sum().backward()
    (site,) = qlora_compile.explain(model).sites
    assert site.fused == (site.reason is None)
    return str(site.reason)


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: OwnProduct(8, 8), "other operators than a linear"),
        (lambda: Scaled(8, 8), "the weight is computed"),
    ],
)
def test_a_layer_with_a_product_of_its_own_is_named(make: Any, words: str, adapted: bool) -> None:
    assert words in reason(make(), adapted)


def test_a_weight_read_past_its_layer_is_named() -> None:
    assert "without calling the layer" in reason(Past(), adapted=False)


def keeps(module: nn.Module, args: Any, kwargs: Any, adapter_names: Any = None) -> None:
    """Changes nothing."""


def prints(module: nn.Module, args: Any, kwargs: Any) -> None:
    print(end="", flush=True)


HOOKS = (prints, partial(prints), partial(keeps, adapter_names=["a"]))


@pytest.mark.parametrize("hook", HOOKS)
def test_a_pre_hook_of_an_adapter_layer_gives_no_row_its_adapter(hook: Any) -> None:
    assert "each row" not in reason(nn.Linear(8, 8), True, hook)
