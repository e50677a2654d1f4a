"""A graph is differentiated as often as in stock: kept graphs, repeated gradients, more losses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bench.agreement import distance
from tests.examples import examples
from tests.test_equality import FLOAT32_TOLERANCE, build
from tests.toy_models import tokens

Gradients = dict[str, Tensor]


def parameters(model: Any) -> dict[str, Any]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def accumulated(model: Any, losses: list[Tensor]) -> Gradients:
    """Return the gradients after a backward of each of the `losses`, all through one graph."""
    for loss in losses[:-1]:
        loss.backward(retain_graph=True)
    losses[-1].backward()
    found = {name: p.grad for name, p in parameters(model).items()}
    return {name: grad.clone() for name, grad in found.items() if grad is not None}


def kept(model: Any, output: Any) -> Gradients:
    return accumulated(model, [output.loss] * 3)


def several_losses(model: Any, output: Any) -> Gradients:
    logits = output.logits.float()
    return accumulated(model, [output.loss, logits.square().mean(), logits.logsumexp(-1).mean()])


def one_after_another(model: Any, output: Any) -> Gradients:
    leaves = parameters(model)
    found = {
        n: torch.autograd.grad(output.loss, p, retain_graph=True)[0] for n, p in leaves.items()
    }
    again = torch.autograd.grad(output.loss, list(leaves.values()))
    for gradient, expected in zip(found.values(), again, strict=True):
        assert torch.equal(gradient, expected)
    return found


def once(model: Any, output: Any) -> Gradients:
    return accumulated(model, [output.loss])


WAYS: list[Callable[[Any, Any], Gradients]] = [once, kept, several_losses, one_after_another]
CHECKPOINTING = ("none", "nonreentrant", "reentrant")


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=str, scope="module")
def models(request: pytest.FixtureRequest) -> tuple[torch.dtype, list[Any]]:
    """Stock, ours and stock in float32: compiled once for all that is drawn."""
    dtype = request.param
    stock, ours = build("nf4", dtype, 0.0, True, tune="model")
    exact = build("nf4", dtype, 0.0, True, tune="model")[0].float()
    return dtype, [ours, stock, exact]


@given(data=st.data())
@settings(max_examples=examples(12))
def test_gradients_are_those_of_stock_every_time(
    models: tuple[torch.dtype, list[Any]], data: st.DataObject
) -> None:
    dtype, (ours, stock, exact) = models
    checkpointing = data.draw(st.sampled_from(CHECKPOINTING))
    # Reentrant checkpointing is made for .backward() alone.
    ways = WAYS if checkpointing != "reentrant" else WAYS[:3]
    drawn = data.draw(st.lists(st.sampled_from(ways), min_size=1, max_size=3))
    for model in (ours, stock, exact):
        model.gradient_checkpointing_disable()
        if checkpointing != "none":
            model.enable_input_require_grads()
            reentrant = checkpointing == "reentrant"
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    for way in drawn:
        ids = tokens()
        results = []
        for model in (ours, stock, exact):
            model.zero_grad()
            gradients = way(model, model(input_ids=ids, labels=ids))
            results.append({name: gradient.float() for name, gradient in gradients.items()})
        actual, expected, reference = results
        if dtype == torch.float32:
            assert max(distance(actual, expected).values()) < FLOAT32_TOLERANCE
            continue
        allowed = distance(expected, reference)
        for group, error in distance(actual, reference).items():
            # A single batch's two errors have a ratio of their own.
            assert error <= 2 * allowed[group] + 1e-3, group
