"""Models that optimize(logits_free_loss=True) refuses, before it has changed anything."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from qlora_compile.capture.regions import region_of
from qlora_compile.errors import LogitsFreeLossError
from qlora_compile.hf.lazy_logits import LazyLogits
from tests.hf.test_head_loss import optimized, toy
from tests.test_equality import lora


class Sorted(LlamaForCausalLM):
    """Applies to its logits an operation that no head loss supports."""

    def forward(self, *args: Any, labels: Any = None, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        if labels is not None:
            logits = self.change(output.logits)
            output.loss = self.loss_function(logits, labels, logits.shape[-1])
        return output

    def change(self, logits: Any) -> Any:
        return torch.sort(logits).values


class Shifted(Sorted):
    def change(self, logits: Any) -> Any:
        return logits + 1.0


class Sliced(Sorted):
    def change(self, logits: Any) -> Any:
        return logits[..., :100]


class TimesTensor(Sorted):
    def change(self, logits: Any) -> Any:
        return logits * torch.ones(1)


def of_class(model_class: type) -> Any:
    model = toy()
    model.__class__ = model_class
    return model


@pytest.mark.parametrize(
    ("model_class", "why"),
    [
        (Sorted, "'sort'"),
        (Shifted, "a sum"),
        (Sliced, "indexing"),
        (TimesTensor, "a product with a Tensor"),
    ],
)
def test_logits_that_cannot_be_seen_through_are_refused(model_class: type, why: str) -> None:
    model = of_class(model_class)
    message = f"logits_free_loss: {model_class.__name__} applies to its logits .*({why})"
    assert_refused(model, message)


def assert_refused(model: Any, message: str, **options: Any) -> None:
    before = {name: p.clone() for name, p in model.state_dict().items()}
    with pytest.raises(LogitsFreeLossError, match=message):
        optimized(model, lora(), **options)
    # Nothing has changed.
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not any(region_of(module) for module in model.modules())
    hooks = [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks]
    assert not hooks
    assert not hasattr(model, "_loss_function")


class OtherLoss(LlamaForCausalLM):
    """Its loss, by its own head, is not what it says."""

    def forward(self, *args: Any, labels: Any = None, **kwargs: Any) -> Any:
        output: Any = super().forward(*args, labels=labels, **kwargs)
        if labels is not None and isinstance(output.logits, Tensor):
            output.loss *= 1.01
        return output


def test_a_loss_that_would_differ_is_refused() -> None:
    assert_refused(of_class(OtherLoss), "OtherLoss has a loss of 4.*, which would be 4")


def test_models_of_another_kind_are_refused() -> None:
    assert_refused(toy("Bert"), "BertForMaskedLM computes its loss by other")
    assert_refused(nn.Sequential(nn.Linear(4, 4)), "Sequential is not a transformers model")
    assert_refused(toy(), "would be compiled as a whole", scope="model")
    own = toy()
    own.loss_function = lambda *args, **kwargs: None
    with pytest.raises(LogitsFreeLossError, match="computes its loss by other"):
        optimized(own, lora())


def test_an_adapted_head_with_dropout_is_refused() -> None:
    config = lora(0.1, target_modules=["q_proj", "lm_head"])
    with pytest.raises(LogitsFreeLossError, match="has an adapter of an unknown class on its"):
        optimized(toy(), config)


def test_what_stands_for_logits_knows_their_shape_and_dtype() -> None:
    size = torch.Size((2, 3, 7))
    hidden = torch.ones(2, 3, 4)
    lazy = LazyLogits(hidden, nn.Linear(4, 7), "M", size, torch.bfloat16, hidden.device)
    assert lazy.size(-1) == lazy.shape[-1] == 7
    assert lazy.dim() == 3
    assert lazy.float().dtype == torch.float32
    capped: Any = (
        2 * lazy.__torch_function__(torch.tanh, (), (lazy / 4,), {}).float().contiguous() * 3.0
    )
    assert (capped.logit_scale, capped.softcap) == (6.0 / 4, 6.0)
    with pytest.raises(LogitsFreeLossError, match="a second tanh"):
        capped.tanh()
    assert not hasattr(lazy, "_asdict")
