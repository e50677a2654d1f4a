"""TRL trains an optimised vision-language model on chats with images as a stock one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from PIL import Image
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

import qlora_compile
from tests.libraries.twins import FORMAT, assert_equal, twins
from tests.test_equality import as_rewritten, lora
from tests.toy_language_model import chat_tokenizer

__all__ = ["as_rewritten"]

trl: Any = pytest.importorskip("trl")

SIZE, PATCH = 16, 8
TEMPLATE = (
    "{% for turn in messages %}{{ turn['role'] }}:{% for part in turn['content'] %}"
    "{{ '<image>' if part['type'] == 'image' else part['text'] }}{% endfor %}\n{% endfor %}"
)


def processor() -> Any:
    tokenizer = chat_tokenizer()
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    size = {"height": SIZE, "width": SIZE}
    images = CLIPImageProcessorPil(size=size, crop_size=size)
    return LlavaProcessor(
        images,
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # CLIP's first, which that strategy leaves out
        chat_template=TEMPLATE,
    )


def llava() -> Any:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    sizes["num_attention_heads"] = 4
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(image_size=SIZE, patch_size=PATCH, **sizes),
        text_config=LlamaConfig(vocab_size=128, **sizes),
        image_token_index=processor().tokenizer.convert_tokens_to_ids("<image>"),
    )
    return LlavaForConditionalGeneration(config)


def rows() -> Dataset:
    colours = ("red", "green", "blue", "white")
    chats = [
        [
            {"role": "user", "content": "which colour?"},
            {"role": "assistant", "content": colour},
        ]
        for colour in colours
    ]
    images = [[Image.new("RGB", (20, 24), colour)] for colour in colours]
    return Dataset.from_dict({"messages": chats, "images": images})


def trainer(folder: Path) -> Any:
    options: dict[str, Any] = {"max_steps": 3, "logging_steps": 1, "optim": "sgd", "bf16": False}
    options |= {"use_cpu": True, "save_strategy": "no", "report_to": [], "learning_rate": 0.5}
    return trl.SFTTrainer(
        llava(),
        args=trl.SFTConfig(
            str(folder), per_device_train_batch_size=2, gradient_checkpointing=False, **options
        ),
        train_dataset=rows(),
        processing_class=processor(),
        peft_config=lora(),
    )


def trained(trainer: Any) -> list[float]:
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.usefixtures("as_rewritten")
def test_chats_with_images_train_as_stock(tmp_path: Path) -> None:
    stock, ours = twins(
        lambda: trainer(tmp_path),
        lambda made: qlora_compile.optimize_trainer(made, quantize=FORMAT, tune="off"),
    )
    batch = stock.data_collator([stock.train_dataset[0]])
    assert batch["pixel_values"].shape == (1, 3, SIZE, SIZE)
    expected = trained(stock)
    assert_equal(trained(ours), expected, ours.model)
    names = {site.name for site in qlora_compile.explain(ours.model).sites if site.rank}
    assert any("vision_tower" in name for name in names)
    assert any("language_model" in name for name in names)
