"""Unsloth as published, which loads the model from a folder by its own code."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from bench.peers.settings import ALPHA, EXPERTS, Setting

ENVIRONMENT = {"UNSLOTH_DISABLE_STATISTICS": "1", "TRANSFORMERS_OFFLINE": "1"}

_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def unsloth(model: Any, setting: Setting) -> Any:
    """Pass `model` through a folder to Unsloth, which quantises it, adds adapters and, if the
    setting asks for it, its own checkpointing."""
    from unsloth import FastLanguageModel  # pyright: ignore

    checkpointing = "unsloth" if setting.checkpointing else False
    with tempfile.TemporaryDirectory() as folder:
        save(model, Path(folder))
        loaded, _ = FastLanguageModel.from_pretrained(
            folder,
            max_seq_length=setting.length,
            dtype=torch.bfloat16,
            load_in_4bit=True,
            use_gradient_checkpointing=checkpointing,
        )
    options: dict[str, Any] = {}
    if setting.model == EXPERTS:
        options["target_parameters"] = ["experts.gate_up_proj", "experts.down_proj"]
    return FastLanguageModel.get_peft_model(
        loaded,
        r=setting.rank,
        lora_alpha=ALPHA,
        lora_dropout=0,
        target_modules=list(_LINEARS),
        use_gradient_checkpointing=checkpointing,
        **options,
    )


def save(model: Any, folder: Path) -> None:
    """Save `model` with a tokenizer of three words, which loaders require and nothing here uses."""
    model.save_pretrained(folder)
    words = models.WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2}, unk_token="<unk>")
    tokenizer = Tokenizer(words)
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<unk>",
    ).save_pretrained(folder)
