"""timm's vision transformer trains as with stock PEFT."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn

from qlora_compile.capture.regions import region_of
from tests.libraries.twins import assert_equal, losses, optimised, twins
from tests.test_equality import as_rewritten, lora

__all__ = ["as_rewritten"]

timm: Any = pytest.importorskip(
    "timm",
    reason="timm is not installed: it needs torchvision, and PyPI has none for the CPU build of "
    "torch that `make test` installs; `make test-libraries` has both",
)

TARGETS = ["qkv", "proj", "fc1", "fc2"]


@pytest.mark.usefixtures("as_rewritten")
def test_a_vision_transformer_trains_as_stock() -> None:
    sizes = {"img_size": 16, "patch_size": 8, "embed_dim": 64, "depth": 3, "num_heads": 4}

    def adapted() -> Any:
        torch.manual_seed(0)
        model = timm.create_model("vit_tiny_patch16_224", num_classes=4, **sizes)
        config = lora(target_modules=TARGETS, modules_to_save=["head"])
        return get_peft_model(model, config).train()

    stock, ours = twins(adapted, optimised)
    images, labels = torch.randn(4, 3, 16, 16), torch.tensor([0, 1, 2, 3])

    def loss(model: nn.Module) -> Tensor:
        return nn.functional.cross_entropy(model(images), labels)

    expected = losses(stock, loss)
    assert_equal(losses(ours, loss), expected, ours)
    compiled = [type(m).__name__ for m in ours.modules() if region_of(m) is not None]
    assert compiled == ["Block"] * 3
