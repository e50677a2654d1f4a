"""Rows of every kind, and TRL's own way from them to token ids and labels."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import datasets
import torch
import trl
from transformers import LlamaConfig, LlamaForCausalLM

from tests.toy_language_model import VOCABULARY, chat_tokenizer

Row = dict[str, Any]
LENGTH = 192
COUNT = 6


def turns(*contents: str) -> list[dict[str, str]]:
    roles = ("user", "assistant")
    return [{"role": roles[n % 2], "content": text} for n, text in enumerate(contents)]


def messages(number: int) -> Row:
    return {"messages": turns(f"q{number}", "a" * number + "b", "why?", "x")}


ROWS: dict[str, list[Row]] = {
    "text": [{"text": f"text {n}"} for n in range(COUNT)],
    "messages": [messages(n) for n in range(COUNT)],
    "system": [
        {"messages": [{"role": "system", "content": "s"}, *messages(n)["messages"]]}
        for n in range(COUNT)
    ],
    "completion": [{"prompt": f"p{n} ", "completion": f"c{n}"} for n in range(COUNT)],
    "turns of a completion": [
        {"prompt": turns(f"p{n}"), "completion": turns("", f"c{n}")[1:]} for n in range(COUNT)
    ],
    "judged": [
        {"prompt": f"p{n} ", "completion": f"c{n}", "label": n % 2 == 0} for n in range(COUNT)
    ],
    "preference": [
        {"prompt": f"p{n} ", "chosen": f"c{n}", "rejected": f"r{n}"} for n in range(COUNT)
    ],
    "turns of a preference": [
        {"prompt": turns("p"), "chosen": turns("", f"c{n}")[1:], "rejected": turns("", "r")[1:]}
        for n in range(COUNT)
    ],
    "prompt": [{"prompt": f"p{n}", "answer": n} for n in range(COUNT)],
    "classes": [{"text": f"t{n}", "label": ["good", "bad"][n % 2]} for n in range(COUNT)],
}


def small_model(vocabulary: int = VOCABULARY) -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
            max_position_embeddings=1024,
        )
    )


def of_trl(rows: list[Row], folder: Path, tokenizer: Any = None, **options: Any) -> list[Any]:
    """Return the token rows that TRL's own trainer makes with a template that marks answers.

    tokenizer: one with SmolLM2's chat template; None for the toy one."""
    from qlora_compile.hf.trainer.chat_templates import SMOLLM2_TRAINING

    tokenizer = chat_tokenizer() if tokenizer is None else copy.deepcopy(tokenizer)
    tokenizer.chat_template = SMOLLM2_TRAINING
    given: dict[str, Any] = {"max_length": LENGTH, "use_cpu": True, "bf16": False, **options}
    trainer = trl.SFTTrainer(
        small_model(),
        args=trl.SFTConfig(str(folder), report_to="none", **given),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    return list(trainer.train_dataset)  # pyright: ignore[reportArgumentType]
