"""Rows as a trainer makes them, without the model that is to be trained."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from typing import Any

from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

_LONGEST = 1 << 20  # positions, more than any row


def token_rows(run: Any, tokenizer: Any, rows: Any) -> Any:
    """Return the training rows of a run, as its trainer turns them into token ids.

    A trainer wants a model, and asks a small one as well as the real one.
    """
    made = LlamaForSequenceClassification if run.objective.head == "score" else LlamaForCausalLM
    sizes: dict[str, Any] = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 1, "max_position_embeddings": _LONGEST, "num_labels": 1}
    model = made(LlamaConfig(vocab_size=len(tokenizer), **sizes))
    with tempfile.TemporaryDirectory() as folder:
        tuning = run.tuning(model, tokenizer, replace(rows, held_out=None), None, folder)
    return tuning.trainer.train_dataset
