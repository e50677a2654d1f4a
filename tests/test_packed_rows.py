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
from tests.examples import examples
from tests.test_equality import FLOAT32_TOLERANCE, as_rewritten, lora
from tests.toy_models import VOCABULARY, toy

__all__ = ["as_rewritten"]

pytestmark = pytest.mark.usefixtures("as_rewritten")

KINDS = (
    *(("Llama", "sdpa", "training"), ("Gemma3", "eager", "evaluation")),
    *(("Mistral", "sdpa", "evaluation"), ("GPTNeoX", "eager", "logits-free training")),
)


@pytest.fixture(scope="module", params=KINDS, ids="-".join)
def model(request: pytest.FixtureRequest) -> Any:
    architecture, attention, mode = request.param
    options = {"logits_free_loss": mode.startswith("logits-free"), "tune": "model"}
    model = toy(architecture, attn_implementation=attention)
    model = qlora_compile.optimize(model, lora(), quantize="nf4", **options)
    return model.train(mode != "evaluation")


def step(model: Any, batch: Any) -> dict[str, Tensor]:
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach()[None], **found}


@given(lengths=st.lists(st.integers(2, 20), min_size=3, max_size=3))
@settings(max_examples=examples(6))
def test_packed_rows_train_as_the_same_rows_apart(model: Any, lengths: list[int]) -> None:
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
