"""Rows as a trainer makes them, without the model that is to be trained."""

from __future__ import annotations

import copy
import tempfile
from dataclasses import replace
from typing import Any

from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from qlora_compile.hf.rows import IGNORED
from qlora_compile.hf.trainer.class_labels import class_names

_LONGEST = 1 << 20  # positions, more than any row

_NO_EVALUATION = {
    "eval_strategy": "no",
    "eval_on_start": False,
    "save_strategy": "no",
    "load_best_model_at_end": False,
}
"""Options of a trainer that evaluates nothing, and so needs no rows to evaluate."""


def token_rows(run: Any, tokenizer: Any, rows: Any) -> Any:
    """Return the training rows of a run, as its trainer turns them into token ids.

    A trainer wants a model, and asks a small one as well as the real one.
    """
    head = run.objective.head
    made = LlamaForCausalLM if head == "causal" else LlamaForSequenceClassification
    sizes: dict[str, Any] = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 1, "max_position_embeddings": _LONGEST}
    names = class_names(rows) if head == "classes" else ["score"]
    sizes["id2label"] = dict(enumerate(names))
    sizes["label2id"] = {name: number for number, name in enumerate(names)}
    model = made(LlamaConfig(vocab_size=len(tokenizer), **sizes))
    preparing = copy.copy(run)
    # Rows of token ids are taken as they stand.
    options = {} if rows.kind.name == "tokens" else run.settings.options
    preparing.settings = replace(run.settings, options={**options, **_NO_EVALUATION})
    with tempfile.TemporaryDirectory() as folder:
        tuning = preparing.tuning(model, tokenizer, replace(rows, held_out=None), None, folder)
    table = tuning.trainer.train_dataset
    if head == "causal" and rows.kind.name == "tokens" and "labels" not in table.column_names:
        return table.map(_with_labels, load_from_cache_file=False)
    return table


def _with_labels(row: dict[str, Any]) -> dict[str, Any]:
    ids = row["input_ids"]
    mask = row.get("attention_mask") or [1] * len(ids)
    return {"labels": [i if kept else IGNORED for i, kept in zip(ids, mask, strict=True)]}
