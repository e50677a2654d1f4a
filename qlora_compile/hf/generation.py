"""Generates text with a model: the answer to a prompt or to a chat."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from transformers import TextStreamer

from qlora_compile.errors import TokenizerMissingError
from qlora_compile.hf.trainer.chat_templates import require_template

DEFAULTS = {"max_new_tokens": 128, "do_sample": False}


@torch.no_grad()
def written(model: Any, tokenizer: Any, prompt: str | list[dict[str, str]], **options: Any) -> str:
    """Return what `model` writes after `prompt`, without the prompt and special tokens.

    prompt: text, or turns with role and content. options: for transformers' `generate`. The model's
    training mode is restored.

    Raises:
        TokenizerMissingError: there is no tokenizer.
        ChatTemplateError: the tokenizer has no chat template.
    """
    if tokenizer is None:
        raise TokenizerMissingError(site="the prompt")
    if isinstance(prompt, str):
        inputs = tokenizer(prompt, return_tensors="pt")
    else:
        require_template(tokenizer, "the prompt")
        inputs = tokenizer.apply_chat_template(
            prompt, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
    inputs = {
        name: inputs[name].to(next(model.parameters()).device)
        for name in ("input_ids", "attention_mask")
    }
    ends = {tokenizer.eos_token_id, *_listed(model.generation_config.eos_token_id)} - {None}
    fixed = {
        "pad_token_id": tokenizer.pad_token_id if tokenizer.pad_token_id is not None else min(ends),
        "eos_token_id": sorted(ends),
    }
    was_training = model.training
    model.eval()
    try:
        ids = model.generate(**inputs, **DEFAULTS | fixed | options)
    finally:
        model.train(was_training)
    return tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def streamed(
    model: Any,
    tokenizer: Any,
    turns: list[dict[str, str]],
    *,
    without_adapter: bool,
    **options: Any,
) -> str:
    """Return the answer to a chat, and write it to standard output as it is generated.

    without_adapter: let the base model answer. Otherwise as `written`.
    """
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    with model.disable_adapter() if without_adapter else nullcontext():
        return written(model, tokenizer, turns, streamer=streamer, **options)


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]
