"""A checkpoint recomputes a block with the adapters of that moment, as stock PEFT's layers do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointError

from bench.agreement import distance
from tests.test_equality import FLOAT32_TOLERANCE, build, lora, without_inductor
from tests.toy_models import tokens

__all__ = ["without_inductor"]

pytestmark = pytest.mark.usefixtures("without_inductor")

by_kind = pytest.mark.parametrize("reentrant", [False, True], ids=["nonreentrant", "reentrant"])


def evaluate(model: Any) -> None:
    with torch.no_grad():
        model(input_ids=tokens(2, 12), use_cache=False)


def reference(model: Any) -> None:
    with model.disable_adapter():
        evaluate(model)


def reference_layers(model: Any) -> None:
    model.base_model.disable_adapter_layers()
    evaluate(model)
    model.base_model.enable_adapter_layers()


def validation(model: Any) -> None:
    model.eval()
    evaluate(model)
    model.train()


def another_adapter(model: Any) -> None:
    model.set_adapter("ref")
    evaluate(model)
    model.set_adapter("default")


def both_adapters(model: Any) -> None:
    model.base_model.set_adapter(["default", "ref"])
    evaluate(model)
    model.set_adapter("default")


def _scale(model: Any, method: str, *args: float) -> None:
    for module in model.modules():
        if hasattr(module, "lora_A"):
            getattr(module, method)(*args)


def another_scaling(model: Any) -> None:
    _scale(model, "scale_layer", 3.0)
    evaluate(model)
    _scale(model, "unscale_layer", 3.0)


def merged(model: Any) -> None:
    model.merge_adapter()
    evaluate(model)
    model.unmerge_adapter()


def added(model: Any) -> None:
    model.add_adapter("late", lora())
    evaluate(model)


def disabled_for_good(model: Any) -> None:
    model.base_model.disable_adapter_layers()


def switched_for_good(model: Any) -> None:
    model.set_adapter("ref")


def replaced_for_good(model: Any) -> None:
    torch.manual_seed(4)
    model.add_adapter("late", lora())
    model.set_adapter("late")
    model.delete_adapter("default")


BETWEEN: tuple[Callable[[Any], None], ...] = (
    *(reference, reference_layers, validation, another_adapter, both_adapters, another_scaling),
    *(merged, added, disabled_for_good, switched_for_good, replaced_for_good),
)
"""What may happen between a forward and its backward."""


def models(dropout: float = 0.0) -> list[Any]:
    found = build("plain", torch.float32, dropout, False, tune="model")
    for model in found:
        torch.manual_seed(3)
        model.add_adapter("ref", lora())
        model.enable_input_require_grads()
    return found


def gradients(
    model: Any, ids: Tensor, between: Callable[[Any], None], *, reentrant: bool
) -> dict[str, Tensor] | None:
    """Return the gradients of a step; None if the checkpoint notices that it recomputes something
    else."""
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.zero_grad()
    torch.manual_seed(0)
    loss = model(input_ids=ids, labels=ids).loss
    between(model)
    try:
        loss.backward()
    except CheckpointError:
        return None
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@by_kind
@pytest.mark.parametrize("between", BETWEEN, ids=lambda each: each.__name__)
def test_gradients_are_stocks(between: Callable[[Any], None], reentrant: bool) -> None:
    ids = tokens()
    expected, actual = (gradients(m, ids, between, reentrant=reentrant) for m in models())
    if expected is None or actual is None:
        assert expected is actual
        return
    assert actual.keys() == expected.keys()
    if expected:
        assert max(distance(actual, expected).values()) < FLOAT32_TOLERANCE


@by_kind
@pytest.mark.parametrize("between", [reference, validation], ids=lambda each: each.__name__)
def test_dropout_is_that_of_the_forward(between: Callable[[Any], None], reentrant: bool) -> None:
    _, ours = models(dropout=0.3)
    ids = tokens()
    expected, actual = (
        gradients(ours, ids, each, reentrant=reentrant) for each in (lambda _: None, between)
    )
    assert expected is not None
    assert actual is not None
    expected = {name: gradient.clone() for name, gradient in expected.items()}
    assert max(distance(actual, expected).values()) < FLOAT32_TOLERANCE
