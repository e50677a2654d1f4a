"""Under a transform of torch.func an optimised model computes what stock PEFT does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, func

import qlora_compile
from qlora_compile.modules.linear import QuantizedLinear
from tests.test_equality import lora
from tests.toy_models import toy

Loss = Callable[[dict[str, Tensor]], Tensor]


def _vjp(loss: Loss, values: dict[str, Tensor]) -> Any:
    value, pull = func.vjp(loss, values)[:2]
    return value, pull(torch.ones_like(value))


def _vmap(loss: Loss, values: dict[str, Tensor]) -> Any:
    twice = {name: torch.stack([value, 2 * value]) for name, value in values.items()}
    return func.vmap(loss)(twice)


TRANSFORMS: dict[str, Callable[[Loss, dict[str, Tensor]], Any]] = {
    "grad": lambda loss, values: func.grad(loss)(values),
    "grad_and_value": lambda loss, values: func.grad_and_value(loss)(values),
    "vjp": _vjp,
    "jvp": lambda loss, values: func.jvp(loss, (values,), (values,)),
    "vmap": _vmap,
    "vmap of grad": lambda loss, values: _vmap(func.grad(loss), values),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_a_transform_gives_what_it_gives_of_stock(transform: str) -> None:
    ids = torch.arange(3, 11)[None]
    results = []
    stock, ours = (get_peft_model(toy(num_hidden_layers=1), lora()) for _ in range(2))
    ours = qlora_compile.optimize(ours, quantize="nf4", tune="off")
    for name, module in ours.named_modules():
        if isinstance(module, QuantizedLinear):
            stock.get_submodule(name).weight.data = module.dequantize()
    values = {n: p.detach() for n, p in ours.named_parameters() if "lora_" in n}
    for model in (stock, ours):
        base: Any = model.get_base_model()
        base.set_attn_implementation("eager")

        def loss(values: dict[str, Tensor], model: Any = model) -> Tensor:
            inputs = {"input_ids": ids, "labels": ids, "use_cache": False}
            return func.functional_call(model, values, kwargs=inputs).loss

        results.append(TRANSFORMS[transform](loss, values))
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-6)
    adapted = [site for site in qlora_compile.explain(ours).sites if site.rank]
    assert adapted
    assert all("torch.func" in str(site.reason) for site in adapted)
