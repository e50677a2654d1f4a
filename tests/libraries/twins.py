"""A stock PEFT model and the optimised one of the same decoded weights, and how both train."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qlora_compile
from qlora_compile.modules.linear import QuantizedLinear

FORMAT = "nf4"
STEPS, LEARNING_RATE = 3, 0.1


def twins(adapted: Callable[[], Any], optimise: Callable[[Any], Any]) -> tuple[Any, Any]:
    """Return two results of `adapted`, with the same weights: one as it is, one after `optimise`.

    adapted: makes a model with adapters, or a trainer of one; all weights but the adapters' are the
    same each time. optimise: packs and compiles the model.
    """
    torch.manual_seed(0)
    stock = adapted()
    ours = optimise(adapted())
    stock_model, model = (
        each if isinstance(each, nn.Module) else each.model for each in (stock, ours)
    )
    packed = {n: m for n, m in model.named_modules() if isinstance(m, QuantizedLinear)}
    assert packed
    with torch.no_grad():
        trained = dict(stock_model.named_parameters())
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(trained[name])
        for name, linear in packed.items():
            weight: Any = stock_model.get_submodule(name).weight
            weight.copy_(linear.dequantize())
    return stock, ours


def optimised(model: Any) -> Any:
    return qlora_compile.optimize(model, quantize=FORMAT, tune="off")


def losses(model: nn.Module, loss: Callable[[nn.Module], Tensor]) -> list[float]:
    """Return the losses of a few steps of gradient descent; models that drop out draw the same."""
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), LEARNING_RATE)
    found = []
    for step in range(STEPS):
        torch.manual_seed(step)
        value = loss(model)
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(value.item())
    return found


def assert_equal(found: list[float], expected: list[float], model: Any) -> None:
    """Assert that the losses of the optimised model are stock's, that it learnt, and that every
    adapted Linear was fused."""
    assert found == pytest.approx(expected, rel=1e-6, abs=1e-6)
    assert len(set(expected)) == len(expected) > 1
    sites = [site for site in qlora_compile.explain(model).sites if site.rank]
    assert sites
    assert {site.name: site.reason for site in sites if not site.fused} == {}
