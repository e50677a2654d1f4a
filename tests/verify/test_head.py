"""The check of a loss without logits: what is right has a certificate, and faults are found."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import qlora_compile
from qlora_compile.errors import VerificationError
from qlora_compile.hf import head_operands
from qlora_compile.modules.linear import QuantizedLinear
from tests.hf.test_head_loss import blocks_run_uncompiled, optimized, toy
from tests.test_equality import lora
from tests.toy_models import tokens

__all__ = ["blocks_run_uncompiled"]
HEAD_TOO = ["q_proj", "lm_head"]


def packed_head() -> Any:
    model = toy()
    model.lm_head = QuantizedLinear.from_linear(model.lm_head, "nf4", double_quantize=True)
    return model


def biased_head() -> Any:
    model = toy()
    model.lm_head = torch.nn.Linear(model.config.hidden_size, model.config.vocab_size)
    return model


CASES: dict[str, tuple[Callable[[], Any], Any, set[str]]] = {
    "bfloat16": (lambda: toy(dtype=torch.bfloat16), lora(), set()),
    "softcap": (lambda: toy("Gemma3", final_logit_softcapping=2.0), lora(), set()),
    "trained": (
        biased_head,
        lora(target_modules=["q_proj"], modules_to_save=["lm_head"]),
        {"weight", "bias"},
    ),
    "adapted": (toy, lora(target_modules=HEAD_TOO), {"lora_a", "lora_b"}),
    "packed": (packed_head, lora(target_modules=HEAD_TOO), {"lora_a", "lora_b"}),
}


def steps(model: Any, count: int = 1) -> Any:
    ids = tokens()
    for _ in range(count):
        model(input_ids=ids, labels=ids.masked_fill(ids % 3 == 0, -100)).loss.backward()
    return qlora_compile.explain(model)


@pytest.mark.parametrize("case", CASES)
def test_a_right_loss_has_a_certificate(case: str) -> None:
    make, config, trained = CASES[case]
    format = None if case == "packed" else "nf4"
    report = steps(optimized(make(), config, quantize=format, verify=True), 2)
    assert not report.mismatches
    (certificate,) = report.certificates
    assert certificate.region.startswith("the loss of ")
    assert certificate.inputs == ("real", "random")
    compared = {each.tensor for each in certificate.comparisons}
    gradients = {"the head's input", *(f"the head's {name}" for name in trained)}
    assert compared == {"output 0", *(f"gradient of {name}" for name in gradients)}
    assert report.loss == "computed without logits"


@pytest.mark.parametrize("fault", ["loss", "gradient"])
def test_a_fault_is_found_and_the_logits_are_made(
    fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = head_operands.chunked_cross_entropy

    def wrong(*args: Any, **options: Any) -> Tensor:
        loss = right(*args, **options)
        return loss * 1.01 if fault == "loss" else 1.01 * loss - (0.01 * loss).detach()

    free, plain = (optimized(toy(), lora(), free=each, verify=each) for each in (True, False))
    strict = optimized(toy(), lora(), verify=True)
    monkeypatch.setattr(head_operands, "chunked_cross_entropy", wrong)
    torch.manual_seed(0)
    report = steps(free)
    (mismatch,) = report.mismatches
    tensor = "output 0" if fault == "loss" else "gradient of the head's input"
    assert mismatch.startswith(f"the loss of LlamaForCausalLM: {tensor} (inputs: real) is off by")
    assert report.loss == f"computed from the logits, because without them {mismatch}"
    torch.manual_seed(0)
    steps(plain)
    for one, other in zip(free.parameters(), plain.parameters(), strict=True):
        if one.requires_grad:
            torch.testing.assert_close(one.grad, other.grad)
    strict.get_base_model().loss_function.check.strict = True
    with pytest.raises(VerificationError, match="is off by"):
        steps(strict)


def test_without_labels_that_count_nothing_is_checked_yet() -> None:
    model = optimized(toy(), lora(), verify=True)
    ids = tokens()
    model(input_ids=ids, labels=torch.full_like(ids, -100))
    assert not qlora_compile.explain(model).certificates
    assert steps(model).certificates
