"""How many graphs adapters, their names and their scalings make; each against stock PEFT."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
from torch._dynamo.utils import counters

import qlora_compile
from bench.agreement import distance
from tests.hf import test_experts as experts
from tests.test_equality import as_rewritten, build, lora, step
from tests.toy_models import tokens, toy

__all__ = ["as_rewritten"]

pytestmark = pytest.mark.usefixtures("as_rewritten")

BASES = ("plain", "nf4", "bnb-4bit")
by_base = pytest.mark.parametrize("base", BASES)


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


def pair(base: str, adapters: int = 1, **options: Any) -> list[Any]:
    """Return stock and ours with the same adapters "default", "1", "2", …."""
    counters.clear()
    models = build(base, torch.float32, 0.0, False)
    for model in models:
        for number in range(1, adapters):
            torch.manual_seed(number)
            model.add_adapter(str(number), lora(**options))
    return models


def assert_equal_steps(stock: Any, ours: Any) -> None:
    ids = tokens()
    expected, actual = step(stock, ids), step(ours, ids)
    for group, error in distance(actual, expected).items():
        assert error < 1e-4, group


@by_base
def test_any_scaling_runs_one_graph(base: str) -> None:
    stock, ours = pair(base)
    for scaling in (0.5, 2.0, 0.3, 3.0, 1.0):
        for model in (stock, ours):
            for module in model.modules():
                if isinstance(module, LoraLayer) and "default" in module.scaling:
                    module.set_scale("default", scaling)
        assert_equal_steps(stock, ours)
    assert graphs() == 1


@by_base
def test_hotswapped_adapters_run_one_graph(base: str, tmp_path: Path) -> None:
    """PEFT's hotswap writes weights and scalings in place."""
    models = pair(base)
    for model in models:
        prepare_model_for_compiled_hotswap(model)
    for number, alpha in enumerate((8, 2, 32)):
        torch.manual_seed(number)
        get_peft_model(toy(), lora(lora_alpha=alpha)).save_pretrained(str(tmp_path / str(number)))
        for model in models:
            hotswap_adapter(model, str(tmp_path / str(number)), "default")
        assert_equal_steps(*models)
    assert graphs() == 1


@by_base
def test_adapters_of_one_shape_share_a_graph(base: str) -> None:
    names = ["default", *map(str, range(1, 8))]
    stock, ours = pair(base, len(names), lora_alpha=3)
    for _ in range(2):
        for name in names:
            for model in (stock, ours):
                model.set_adapter(name)
            assert_equal_steps(stock, ours)
    assert graphs() == 1


def _switch(name: str) -> Callable[[Any], Any]:
    return lambda model: model.set_adapter(name)


def _disable(model: Any) -> None:
    model.base_model.disable_adapter_layers()


def _enable(model: Any) -> None:
    model.base_model.enable_adapter_layers()


def _replace(model: Any) -> None:
    """Deletes an adapter and adds another of its name and shape."""
    model.set_adapter("default")
    model.delete_adapter("1")
    torch.manual_seed(7)
    model.add_adapter("1", lora())


STATES: dict[str, Callable[[Any], Any]] = {
    "default": _switch("default"),
    "1": _switch("1"),
    "disabled": _disable,
    "enabled": _enable,
    "replaced": _replace,
    "evaluation": lambda model: model.eval(),
    "training": lambda model: model.train(),
}
MOST_GRAPHS = 5
"""Training and evaluation, each with adapters and without; in evaluation with adapters the first
block, whose input requires no gradient, has its own."""


@pytest.mark.parametrize("base", ["nf4"])
@settings(max_examples=2)
@given(states=st.lists(st.sampled_from(sorted(STATES)), min_size=3, max_size=6))
def test_graphs_do_not_grow_with_repetition(base: str, states: list[str]) -> None:
    torch._dynamo.reset()
    stock, ours = pair(base, 2)
    counts = []
    for _ in range(3):
        for state in states:
            for model in (stock, ours):
                STATES[state](model)
            ids = tokens()
            outputs = [model(input_ids=ids, labels=ids, use_cache=False) for model in (stock, ours)]
            torch.testing.assert_close(outputs[1].logits, outputs[0].logits, rtol=1e-4, atol=1e-5)
        counts.append(graphs())
    # The first round starts in another state than it ends in.
    assert counts[1] == counts[2] <= MOST_GRAPHS


def test_adapters_of_experts_share_a_graph() -> None:
    counters.clear()
    config = experts.lora()
    stock, ours = (
        get_peft_model(experts.toy(), config),
        qlora_compile.optimize(get_peft_model(experts.toy(), config)),
    )
    for model in (stock, ours):
        model.add_adapter("other", config)
        torch.manual_seed(0)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.normal_(std=0.1)
        model.train()
    inputs = experts.batch(ours)
    for name in ("default", "other", "default"):
        losses = []
        for model in (stock, ours):
            model.set_adapter(name)
            losses.append(model(**inputs).loss)
            losses[-1].backward()
        torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=1e-5)
    assert graphs() == 1
