"""DoRA: factored, fused and equal to stock PEFT, on plain, bitsandbytes' and our own bases."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.fx import GraphModule

import qlora_compile
from bench.agreement import distance
from qlora_compile.quantized_linear import QuantizedLinear
from tests.passes.rewritten import rewritten_graphs
from tests.test_equality import FLOAT32_TOLERANCE, _round_trip, lora, step, without_inductor
from tests.toy_models import tokens, toy, with_bitsandbytes

__all__ = ["rewritten_graphs", "without_inductor"]

pytestmark = pytest.mark.usefixtures("without_inductor")


class Setting(NamedTuple):
    base: str
    dropout: float
    bias: bool
    rslora: bool


SETTINGS = (
    Setting("plain", 0.0, True, False),
    Setting("plain", 0.2, False, True),
    Setting("bnb-4bit", 0.0, False, True),
    Setting("bnb-4bit", 0.2, True, False),
    Setting("bnb-8bit", 0.0, True, False),
    Setting("nf4", 0.0, True, True),
    Setting("nf4", 0.2, False, False),
    Setting("int8", 0.2, True, False),
)


def dora(dropout: float = 0.0, **options: Any) -> LoraConfig:
    return lora(dropout, use_dora=True, **options)


def build(base: str, dtype: torch.dtype, config: LoraConfig, bias: bool = False) -> list[Any]:
    """A stock PeftModel with DoRA, and the optimised one with the same weights."""
    models: list[Any] = []
    own = base in ("nf4", "fp4", "int8")
    for optimized in (False, True):
        model = toy("Llama", dtype, attention_bias=bias, mlp_bias=bias)
        if base.startswith("bnb"):
            model = with_bitsandbytes(model, int(base[4]))
        if own and not optimized:
            _round_trip(model, base)
        torch.manual_seed(1)
        if optimized and own:
            model = qlora_compile.optimize(model, copy.deepcopy(config), quantize=base)
        else:
            model = get_peft_model(model, copy.deepcopy(config))
            model = qlora_compile.optimize(model) if optimized else model
        models.append(model.train())
    stock = dict(models[0].named_parameters())
    with torch.no_grad():
        for name, parameter in models[1].named_parameters():
            if "magnitude" in name:
                torch.testing.assert_close(parameter.float(), stock[name].float())
                stock[name].mul_(torch.linspace(0.7, 1.4, len(parameter)))
            if "lora_" in name:
                parameter.copy_(stock[name])
    return models


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda s: "-".join(map(str, s)))
def test_a_training_step_equals_stock(setting: Setting) -> None:
    config = dora(setting.dropout, use_rslora=setting.rslora)
    stock, ours = build(setting.base, torch.float32, config, setting.bias)
    ids = tokens()
    counters.clear()
    results = []
    for model in (ours, stock):
        torch.manual_seed(5)  # the same masks: dropout before both products is torch's own
        results.append(step(model, ids))
    assert any("magnitude" in name for name in results[0])
    for group, error in distance(*results).items():
        assert error < FLOAT32_TOLERANCE, group
    assert not counters["graph_break"]
    report = qlora_compile.explain(ours)
    assert report.fused == len(report.sites) - 1, str(report)
    assert all(site.rank == 4 for site in report.sites if site.fused)
