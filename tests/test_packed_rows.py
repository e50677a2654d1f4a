"""Several sequences in one row, told by position_ids that start again, do not see one another."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import DataCollatorWithFlattening

import qlora_compile
from bench.agreement import distance
from tests.test_equality import FLOAT32_TOLERANCE, lora, without_inductor
from tests.toy_models import VOCABULARY, toy

__all__ = ["without_inductor"]

pytestmark = pytest.mark.usefixtures("without_inductor")

ARCHITECTURES = ("Llama", "Qwen3", "Mistral", "Gemma3", "Phi3", "GPTNeoX")


def step(model: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach()[None], **found}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@given(data=st.data())
@settings(max_examples=4)
def test_packed_rows_train_as_the_same_rows_apart(architecture: str, data: st.DataObject) -> None:
    attention = data.draw(st.sampled_from(["sdpa", "eager"]))
    free = data.draw(st.booleans(), label="logits-free loss")
    training = data.draw(st.booleans(), label="training")
    lengths = data.draw(st.lists(st.integers(2, 20), min_size=2, max_size=5))
    torch._dynamo.reset()
    model = toy(architecture, attn_implementation=attention)
    model = qlora_compile.optimize(
        model, lora(), quantize="nf4", logits_free_loss=free, tune="model"
    ).train(training)
    rows = [{"input_ids": torch.randint(3, VOCABULARY, (n,)).tolist()} for n in lengths]
    apart = {
        "input_ids": torch.zeros(len(rows), max(lengths), dtype=torch.int64),
        "attention_mask": torch.zeros(len(rows), max(lengths), dtype=torch.int64),
    }
    for row, ids, mask in zip(rows, apart["input_ids"], apart["attention_mask"], strict=True):
        ids[: len(row["input_ids"])] = torch.tensor(row["input_ids"])
        mask[: len(row["input_ids"])] = 1
    apart["labels"] = apart["input_ids"].masked_fill(apart["attention_mask"] == 0, -100)
    packed: Any = DataCollatorWithFlattening(return_tensors="pt")(rows)
    for group, error in distance(step(model, packed), step(model, apart)).items():
        assert error < FLOAT32_TOLERANCE, group
    # The separation is no accident: with a cache, as in stock by default, the rows are mixed.
    mixed = model(**packed, use_cache=True).loss
    assert not torch.isclose(mixed, step(model, apart)["loss"][0], rtol=1e-6)
