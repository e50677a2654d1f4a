"""A vision-language model with its processor, at toy size."""

from pathlib import Path
from typing import Any

import torch
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from tests.toy_language_model import VOCABULARY, toy_tokenizer

PATCH, SIDE = 8, 16
SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
TEMPLATE = (
    "{% for turn in messages %}{{ turn['role'] }}: {% for part in turn['content'] %}"
    "{{ '<image>' if part['type'] == 'image' else part['text'] }}"
    "{% endfor %}{{ eos_token }}{% endfor %}"
)


def write(folder: Path) -> None:
    """Write a LLaVA and its processor, which needs Pillow but no torchvision."""
    tokenizer = toy_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})  # pyright: ignore[reportArgumentType]
    pictures = LlavaImageProcessorPil(
        size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}
    )
    LlavaProcessor(
        pictures,
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    ).save_pretrained(folder)
    torch.manual_seed(0)
    image = tokenizer.convert_tokens_to_ids("<image>")
    assert isinstance(image, int)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(image_size=SIDE, patch_size=PATCH, **SIZES),
        text_config=LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=256, **SIZES),
        image_token_index=image,
        image_seq_length=(SIDE // PATCH) ** 2,
    )
    LlavaForConditionalGeneration(config).save_pretrained(folder)
