"""The model types of the sweep, how each is built, and a toy batch for it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from bench.coverage.shrink import shrunk

BATCH, LENGTH = 2, 12
FIRST_TOKEN, LAST_TOKEN = 3, 100
"""Token ids for text: below are padding and the like, above the tokens that stand for images."""

WITH_IMAGES = ("clip", "gemma3", "git", "got_ocr2", "llava", "qwen2_vl", "siglip", "vit")
"""Model types that get pictures; other multimodal types get text alone, which trains them too."""

WITHOUT_CACHE = ("blt", "hrm_text", "recurrent_gemma", "xlstm")
"""Model types that cannot build their default cache. Batches of other types do not mention the
cache, like a user's."""

_CODEBOOKS = ("musicgen_decoder", "musicgen_melody_decoder")


@dataclass(frozen=True)
class Kind:
    """One model type: `family` groups the table, `make` builds the toy model, seeded."""

    name: str
    family: str
    make: Callable[[], Any]


def _of_class(name: str, family: str, model_class: str) -> Kind:
    def make() -> Any:
        chosen: Any = getattr(transformers, model_class)
        config = shrunk(chosen.config_class)
        if family == "causal" and not config.is_encoder_decoder:
            config.is_decoder = True
        return chosen(config)

    return Kind(name, family, make)


KINDS: dict[str, Kind] = {
    kind.name: kind
    for kind in (
        *(_of_class(n, "causal", c) for n, c in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items()),
        _of_class("bert-mlm", "encoder", "BertForMaskedLM"),
        _of_class("modernbert-mlm", "encoder", "ModernBertForMaskedLM"),
        _of_class("roberta-mlm", "encoder", "RobertaForMaskedLM"),
        _of_class("deberta-mlm", "encoder", "DebertaForMaskedLM"),
        _of_class("deberta-v2-mlm", "encoder", "DebertaV2ForMaskedLM"),
        _of_class("t5-seq2seq", "seq2seq", "T5ForConditionalGeneration"),
        _of_class("bart-seq2seq", "seq2seq", "BartForConditionalGeneration"),
        _of_class("whisper-seq2seq", "seq2seq", "WhisperForConditionalGeneration"),
        _of_class("vit", "vision", "ViTForImageClassification"),
        _of_class("siglip", "vision", "SiglipModel"),
        _of_class("clip", "vision", "CLIPModel"),
        _of_class("llava", "multimodal", "LlavaForConditionalGeneration"),
        _of_class("gemma3-image", "multimodal", "Gemma3ForConditionalGeneration"),
        _of_class("qwen2-vl", "multimodal", "Qwen2VLForConditionalGeneration"),
    )
}


def built(kind: Kind) -> Any:
    """The kind's toy model in float32 with seeded weights, ready to train."""
    torch.manual_seed(0)
    model = kind.make()
    # A bias of zero would hide a bias that is dropped.
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.02)
    return model.float().train()


def batch(model: Any) -> dict[str, Tensor]:
    """Keyword arguments for one training call of `model`, from its forward's signature."""
    config = model.config
    taken = inspect.signature(type(model).forward).parameters
    generator = torch.Generator().manual_seed(0)

    def tokens(*size: int) -> Tensor:
        return torch.randint(FIRST_TOKEN, LAST_TOKEN, size, generator=generator)

    made: dict[str, Any] = {}
    if "input_features" in taken and model.main_input_name == "input_features":
        frames = 2 * config.max_source_positions
        made["input_features"] = torch.randn(
            BATCH, config.num_mel_bins, frames, generator=generator
        )
    elif "input_ids" in taken:
        # One row for every codebook.
        rows = config.num_codebooks if config.model_type in _CODEBOOKS else 1
        made["input_ids"] = tokens(BATCH * rows, LENGTH)
    made |= _image(model, made, generator)
    made |= _audio(config, made, generator)
    if not config.is_encoder_decoder and _has_cross_attention(model):
        width = getattr(config, "cross_attention_hidden_size", None) or config.hidden_size
        encoded = torch.randn(BATCH, LENGTH // 2, width, generator=generator)
        if "encoder_hidden_states" in taken:
            made["encoder_hidden_states"] = encoded
        elif "encoder_outputs" in taken:
            made["encoder_outputs"] = (encoded,)
    if "return_loss" in taken:
        made["return_loss"] = True
    elif "labels" in taken:
        made["labels"] = _labels(model, made, tokens)
    if config.model_type in WITHOUT_CACHE:
        made["use_cache"] = False
    return made


def _has_cross_attention(model: Any) -> bool:
    names = ("encoder_attn", "cross_attn")
    return any(name.endswith(names) for name, _ in model.named_modules())


def _labels(model: Any, made: dict[str, Any], tokens: Callable[..., Tensor]) -> Tensor:
    if model.main_input_name == "pixel_values":
        return torch.arange(BATCH) % 2
    if model.config.model_type in _CODEBOOKS:
        return tokens(BATCH, LENGTH, model.config.num_codebooks)
    return made["input_ids"].clone() if "input_ids" in made else tokens(BATCH, LENGTH)


def _image(model: Any, made: dict[str, Any], generator: torch.Generator) -> dict[str, Any]:
    """Return pictures for a vision model, and replace a part of the text by their tokens."""
    config = model.config
    if config.model_type not in WITH_IMAGES:
        return {}
    vision = getattr(config, "vision_config", config)
    if config.model_type == "qwen2_vl":
        patch = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        made["input_ids"][:, 2] = config.image_token_id
        return {
            "pixel_values": torch.randn(BATCH * 4, patch, generator=generator),
            "image_grid_thw": torch.tensor([[1, 2, 2]] * BATCH),
            "mm_token_type_ids": (made["input_ids"] == config.image_token_id).int(),
        }
    size = vision.image_size
    token = getattr(config, "image_token_id", None) or getattr(config, "image_token_index", None)
    if token is not None:
        count = getattr(config, "mm_tokens_per_image", (size // vision.patch_size) ** 2)
        # Two convolutions halve its sides.
        count = max(count // 16, 1) if config.model_type == "got_ocr2" else count
        made["input_ids"][:, 2 : 2 + count] = token
    return {"pixel_values": torch.randn(BATCH, 3, size, size, generator=generator)}


def _audio(config: Any, made: dict[str, Any], generator: torch.Generator) -> dict[str, Any]:
    """Return sound for models that take it, and replace a part of the text by its tokens."""
    if config.model_type == "phi4_multimodal":
        audio = config.audio_config
        made["input_ids"][:, 2] = audio.audio_token_id
        return {
            "audio_input_features": torch.randn(BATCH, 16, audio.input_size, generator=generator),
            "audio_embed_sizes": torch.ones(BATCH, dtype=torch.int64),
        }
    if config.model_type == "moss_transcribe_diarize":
        audio = config.audio_config
        frames = 2 * audio.max_source_positions
        made["input_ids"][:, 2 : 2 + frames // 2 // config.audio_merge_size] = config.audio_token_id
        return {
            "input_features": torch.randn(BATCH, audio.num_mel_bins, frames, generator=generator),
            "input_features_mask": torch.ones(BATCH, frames, dtype=torch.int64),
        }
    return {}
