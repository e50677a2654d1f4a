"""diffusers' models train as with stock PEFT: UNet, DiT, SD3's and Flux's transformers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn

from qlora_compile.capture.regions import region_of
from tests.libraries.twins import assert_equal, losses, optimised, twins
from tests.test_equality import as_rewritten, lora

__all__ = ["as_rewritten"]

diffusers: Any = pytest.importorskip(
    "diffusers", reason="diffusers is not installed; `make test-libraries` has it"
)


def unet() -> Any:
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(64, 64),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=64,
        attention_head_dim=4,
    )


def dit() -> Any:
    return diffusers.DiTTransformer2DModel(
        num_attention_heads=4, attention_head_dim=16, num_layers=2, sample_size=8
    )


def sd3() -> Any:
    return diffusers.SD3Transformer2DModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        num_layers=3,
        attention_head_dim=16,
        num_attention_heads=4,
        joint_attention_dim=64,
        caption_projection_dim=64,
        pooled_projection_dim=64,
        pos_embed_max_size=8,
    )


def flux() -> Any:
    return diffusers.FluxTransformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=4,
        joint_attention_dim=64,
        pooled_projection_dim=64,
        axes_dims_rope=(4, 6, 6),
    )


def image(channels: int = 4) -> Tensor:
    return torch.randn(2, channels, 8, 8)


TIMES = torch.tensor([1, 500])
MODELS: dict[str, tuple[Callable[[], Any], Callable[[], dict[str, Any]], set[str]]] = {
    "unet": (
        unet,
        lambda: {
            "sample": image(),
            "timestep": TIMES,
            "encoder_hidden_states": torch.randn(2, 5, 64),
        },
        {"BasicTransformerBlock"},
    ),
    "dit": (
        dit,
        lambda: {
            "hidden_states": image(),
            "timestep": TIMES,
            "class_labels": torch.tensor([3, 7]),
        },
        {"BasicTransformerBlock"},
    ),
    "sd3": (
        sd3,
        lambda: {
            "hidden_states": image(),
            "timestep": TIMES,
            "encoder_hidden_states": torch.randn(2, 5, 64),
            "pooled_projections": torch.randn(2, 64),
        },
        {"JointTransformerBlock"},
    ),
    "flux": (
        flux,
        lambda: {
            "hidden_states": torch.randn(2, 16, 16),
            "timestep": TIMES / 1000,
            "encoder_hidden_states": torch.randn(2, 5, 64),
            "pooled_projections": torch.randn(2, 64),
            "img_ids": torch.zeros(16, 3),
            "txt_ids": torch.zeros(5, 3),
        },
        {"FluxTransformerBlock", "FluxSingleTransformerBlock"},
    ),
}
"""By model: how it is made, its inputs, and the blocks that are compiled."""

TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj"]


@pytest.mark.usefixtures("as_rewritten")
@pytest.mark.parametrize("name", MODELS)
def test_a_model_trains_as_stock(name: str) -> None:
    make, inputs, blocks = MODELS[name]

    def adapted() -> Any:
        torch.manual_seed(0)
        model = make().requires_grad_(False)
        config = lora(target_modules=TARGETS)
        if not hasattr(model, "add_adapter"):  # diffusers' own way to the adapters of PEFT
            return get_peft_model(model, config).train()
        model.add_adapter(config)
        return model.train()

    stock, ours = twins(adapted, optimised)
    given = inputs()
    shape = stock(**given).sample.shape
    noise = torch.randn(shape)

    def loss(model: nn.Module) -> Tensor:
        return torch.nn.functional.mse_loss(model(**given).sample, noise)

    expected = losses(stock, loss)
    assert_equal(losses(ours, loss), expected, ours)
    compiled = {type(m).__name__ for m in ours.modules() if region_of(m) is not None}
    assert blocks <= compiled
