"""`optimize` on a model that has been optimised: as on one that is optimised once, at the end."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
from peft import get_peft_model

import qlora_compile
from bench.agreement import distance, training_step
from qlora_compile.capture.regions import region_of
from qlora_compile.errors import AlreadyOptimizedError
from qlora_compile.kernels.formats.errors import AbsmaxOverflowError, ScaleOverflowError
from tests.test_equality import as_rewritten, lora
from tests.toy_models import tokens, toy

__all__ = ["as_rewritten"]

pytestmark = pytest.mark.usefixtures("as_rewritten")


def unloaded(model: Any) -> Any:
    return get_peft_model(model, lora(target_modules=["v_proj"])).unload()


def with_head(model: Any) -> Any:
    return get_peft_model(model, lora(target_modules=["q_proj", "lm_head"]))


CHANGES: dict[str, tuple[Callable[[Any], Any], dict[str, Any]]] = {
    "an adapter on the head": (with_head, {}),
    "a format": (lambda model: model, {"quantize": "int8"}),
    "an adapter to attach": (lambda model: model, {"lora": lora()}),
    "another adapter after the first": (unloaded, {"lora": lora(), "quantize": "nf4"}),
    "layers that are added": (
        lambda model: get_peft_model(
            model, lora(target_modules=["q_proj"], layer_replication=[(0, 2), (0, 2)])
        ),
        {},
    ),
}


def optimized(model: Any, **options: Any) -> Any:
    return qlora_compile.optimize(model, **copy.deepcopy(options), tune="off")


@pytest.mark.parametrize("case", CHANGES)
def test_a_changed_model_is_optimised_again(case: str) -> None:
    change, options = CHANGES[case]
    ids = tokens()
    once: Any = optimized(change(toy()), **options)
    again: Any = optimized(toy())
    training_step(again.train(), ids)
    again = optimized(change(again), **options)
    state = {n: value for n, value in once.state_dict().items() if "lora_" in n}
    again.load_state_dict(state, strict=False)
    for name, error in distance(*(training_step(m.train(), ids) for m in (again, once))).items():
        assert error < 1e-5, name
    assert qlora_compile.explain(again).sites == qlora_compile.explain(once).sites
    with pytest.raises(AlreadyOptimizedError):
        optimized(again)
    assert sum(region_of(module) is not None for module in again.modules()) >= 2
    assert max(len(module._forward_pre_hooks) for module in again.modules()) == 1


@pytest.mark.parametrize(
    ("options", "value", "error"),
    [
        ({"quantize": "int4", "scales": "float16"}, 1e6, ScaleOverflowError),
        ({"quantize": "nf4"}, 3e38, AbsmaxOverflowError),
    ],
    ids=["scales", "scales of scales"],
)
def test_a_weight_that_cannot_be_packed_leaves_the_model_compiled(
    options: dict[str, Any], value: float, error: type[Exception]
) -> None:
    model: Any = optimized(toy().requires_grad_(False))
    last = model.model.layers[1].mlp.down_proj
    small = last.weight.data.clone()
    last.weight.data.fill_(value)
    with pytest.raises(error, match=r"layers\.1\.mlp\.down_proj"):
        optimized(model, **options)
    last.weight.data = small
    model(input_ids=tokens(), use_cache=False)
    report = qlora_compile.explain(model)
    assert report.fused == 14
    assert {site.format for site in report.sites if site.fused} == {options["quantize"], "float32"}
