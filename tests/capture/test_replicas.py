"""nn.DataParallel: the copies of an optimised model compute with their own weights, as stock PEFT
does with these. There are no GPUs here: torch's `replicate` gets another way to copy tensors."""

from __future__ import annotations

import copy
import pickle
import sys
import threading
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qlora_compile
from bench.agreement import distance
from qlora_compile.capture.first_step import UnfusedWarning
from qlora_compile.errors import StrictError
from qlora_compile.modules.packed import PackedModule
from tests.hf import test_experts as experts
from tests.test_equality import FLOAT32_TOLERANCE, as_rewritten, build, lora
from tests.toy_models import tokens, toy

__all__ = ["as_rewritten"]

pytestmark = pytest.mark.usefixtures("as_rewritten")

COPIES = 2
REASON = "its block ran uncompiled, in a copy for each GPU (nn.DataParallel)"

Pair = tuple[Any, Any, dict[str, Any]]


def _copied(tensors: list[Tensor], devices: list[int], detach: bool = False) -> list[list[Tensor]]:
    """Copy the tensors for each device; the second has other values of what is trained."""
    return [
        [each * (1 + device) if each.requires_grad else each.clone() for each in tensors]
        for device in devices
    ]


@pytest.fixture
def replicate(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], list[Any]]:
    module = sys.modules["torch.nn.parallel.replicate"]
    monkeypatch.setattr(module, "_broadcast_coalesced_reshape", _copied)
    monkeypatch.setattr(module, "_get_device_index", lambda device, _: device)
    return lambda model: nn.parallel.replicate(model, list(range(COPIES)))


def _of_base(base: str, dropout: float = 0.0) -> Pair:
    stock, ours = build(base, torch.float32, dropout, True, tune="model")
    ids = tokens()
    return stock, ours, {"input_ids": ids, "labels": ids}


def _without_logits() -> Pair:
    stock, _, inputs = _of_base("plain")
    ours = qlora_compile.optimize(copy.deepcopy(stock), logits_free_loss=True, tune="model")
    return stock, ours.train(), inputs


def _checkpointed() -> Pair:
    stock, ours, inputs = _of_base("nf4")
    for model in (stock, ours):
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return stock, ours, inputs


def _packed_experts() -> Pair:
    ours, stock = experts.quantized("nf4")
    return stock, ours, experts.batch(stock)


CASES: dict[str, Callable[[], Pair]] = {
    "plain": lambda: _of_base("plain"),
    "nf4": lambda: _of_base("nf4"),
    "dropout": lambda: _of_base("int8", 0.2),
    "checkpointed": _checkpointed,
    "without logits": _without_logits,
    "packed experts": _packed_experts,
}


def results(model: Any, copies: list[Any], inputs: dict[str, Any]) -> dict[str, Tensor]:
    """Return each copy's loss, each from a thread of its own as in nn.DataParallel, and the sum of
    their gradients."""
    model.zero_grad()
    losses: list[Tensor] = []
    for each in copies:
        torch.manual_seed(7)
        thread = threading.Thread(target=lambda model=each: losses.append(model(**inputs).loss))
        thread.start()
        thread.join()
    torch.stack(losses).sum().backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {f"copy.{i}.loss.": loss.detach() for i, loss in enumerate(losses)} | found


def stock_results(model: Any, inputs: dict[str, Any]) -> dict[str, Tensor]:
    """Return the same of a stock model that is given the values of each copy in turn."""
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    found = {name: torch.zeros_like(p) for name, p in trained.items()}
    for device in range(COPIES):
        model.zero_grad()
        for parameter in trained.values():
            parameter.data *= 1 + device
        torch.manual_seed(7)
        loss = model(**inputs).loss
        loss.backward()
        found[f"copy.{device}.loss."] = loss.detach()
        for name, parameter in trained.items():
            found[name] += (1 + device) * parameter.grad
            parameter.data /= 1 + device
    return found


@pytest.mark.parametrize("case", CASES)
def test_copies_compute_with_their_own_weights(
    case: str, replicate: Callable[[Any], list[Any]]
) -> None:
    stock, ours, inputs = CASES[case]()
    ours(**inputs).loss.backward()  # the slots hold the model's own adapters
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnfusedWarning)
        actual = results(ours, replicate(ours), inputs)
    expected = stock_results(stock, inputs)
    for group, error in distance(actual, expected).items():
        assert error < 2 * FLOAT32_TOLERANCE, group
    assert expected["copy.0.loss."] != expected["copy.1.loss."]
    reasons = {site.reason for site in qlora_compile.explain(ours).sites if not site.fused}
    assert REASON in reasons
    ours(**inputs)
    reasons = {site.reason for site in qlora_compile.explain(ours).sites if not site.fused}
    assert REASON not in reasons


@pytest.mark.parametrize("case", ["nf4", "packed experts"])
def test_copies_of_packed_weights_have_their_own_codes(
    case: str, replicate: Callable[[Any], list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, ours, inputs = CASES[case]()
    ours.eval()
    packed = [module for module in ours.modules() if isinstance(module, PackedModule)]
    codes = {id(module.weight) for module in packed}

    def flipped(tensors: list[Tensor], devices: list[int], detach: bool) -> list[list[Tensor]]:
        second = [each.flip(0) if id(each) in codes else each for each in tensors]
        return [list(tensors), second][: len(devices)]

    module = sys.modules["torch.nn.parallel.replicate"]
    monkeypatch.setattr(module, "_broadcast_coalesced_reshape", flipped)
    actual = [each(**inputs).logits for each in replicate(ours)]
    expected = [ours(**inputs).logits]
    for each in packed:
        each.weight.data = each.weight.data.flip(0)
    expected.append(ours(**inputs).logits)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    assert (expected[0] - expected[1]).norm() > 0.01 * expected[0].norm()


def test_training_warns_once(replicate: Callable[[Any], list[Any]]) -> None:
    ours = _of_base("nf4")[1]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            replicate(ours)
    (message,) = [str(each.message) for each in caught if each.category is UnfusedWarning]
    assert "nn.DataParallel" in message


def test_strict_refuses_copies(replicate: Callable[[Any], list[Any]]) -> None:
    ours = qlora_compile.optimize(toy(), lora(), quantize="nf4", tune="model", strict=True)
    with pytest.raises(StrictError, match="DataParallel"):
        replicate(ours)


@pytest.mark.parametrize("how", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_of_a_copied_model(how: Any, replicate: Callable[[Any], list[Any]]) -> None:
    _, ours, inputs = _of_base("nf4")
    twin = how(ours.eval())
    with torch.no_grad():
        for parameter in ours.parameters():
            if parameter.requires_grad:
                parameter *= 2
        torch.testing.assert_close(replicate(twin)[1](**inputs).loss, ours(**inputs).loss)


def test_a_model_that_is_optimised_again_keeps_nothing_of_it() -> None:
    ours = qlora_compile.optimize(toy(), quantize="nf4", tune="model")
    blocks = [each for each in ours.modules() if "_replicate_for_data_parallel" in vars(each)]
    assert len(blocks) == 2
    qlora_compile.optimize(ours, lora(target_modules=["lm_head"]), tune="model", scope="model")
    blocks = [each for each in blocks if "_replicate_for_data_parallel" in vars(each)]
    assert not blocks
