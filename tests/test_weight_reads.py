"""Linears whose weight the model reads itself are not packed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import qlora_compile
from bench.coverage.kinds import KINDS, batch, built
from qlora_compile.modules.linear import QuantizedLinear
from qlora_compile.weight_reads import read_by_parent
from tests.test_equality import without_inductor
from tests.toy_models import toy

__all__ = ["without_inductor"]


class Reading(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.other, self.third = (nn.Linear(64, 64) for _ in range(3))
        nn.init.zeros_(self.third.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.product(self.third(self.other(x.to(self.other.weight.dtype))))

    def product(self, x: Tensor) -> Tensor:
        return x @ self.layer.weight.t()


def read(module: nn.Module) -> set[str]:
    return read_by_parent(dict(module.named_modules()))


def test_only_weights_that_are_computed_with_are_read() -> None:
    assert read(nn.Sequential(Reading())) == {"0.layer"}
    assert not read(toy("Llama"))
    torchs = nn.TransformerEncoderLayer(8, 2, 8)  # its fast path for inference
    assert read(torchs) >= {"linear1", "linear2", "self_attn.out_proj"}


@pytest.mark.parametrize(
    ("name", "kept"),
    # Mamba's CUDA kernels take all three weights.
    [("mamba", {"x_proj", "dt_proj", "out_proj"}), ("jamba", {"dt_proj"})],
)
@pytest.mark.usefixtures("without_inductor")
def test_a_model_that_multiplies_a_weight_itself_trains_packed(name: str, kept: set[str]) -> None:
    model = built(KINDS[name])
    inputs = batch(model)
    model = qlora_compile.optimize(model, quantize="nf4")
    assert torch.isfinite(model(**inputs).loss)
    plain = [name for name, m in model.named_modules() if type(m) is nn.Linear]
    assert {name.rpartition(".")[2] for name in plain} == kept | {"lm_head"}
    assert any(isinstance(module, QuantizedLinear) for module in model.modules())
    sites = qlora_compile.explain(model).sites
    reasons = {site.reason for site in sites if "dt_proj" in site.name}
    assert reasons == {"the model computes with its weight without calling the layer"}
