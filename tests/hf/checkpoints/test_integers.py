"""Checkpoints of integers are read without the packages that wrote them, and train."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model

import qlora_compile
from qlora_compile.modules.linear import QuantizedLinear
from tests.examples import LONG
from tests.integer_sources import SOURCES, write
from tests.test_equality import FLOAT32_TOLERANCE, distance, lora, step, without_inductor
from tests.toy_models import tokens, toy

__all__ = ["without_inductor"]

TRAINED = [*SOURCES] if LONG else ["gptq v2 act-order", "awq", "hqq", "compressed-tensors"]


def written(folder: Path, name: str) -> Any:
    """A toy Llama with the values of the checkpoint that is written to `folder`."""
    dense = toy("Llama", num_hidden_layers=1, attention_bias=True)
    write(folder, dense, SOURCES[name])
    return dense


@pytest.mark.parametrize("name", SOURCES)
def test_every_weight_is_read_as_it_is_decoded(tmp_path: Path, name: str) -> None:
    """Bit for bit, in float32."""
    expected = dict(written(tmp_path, name).named_parameters())
    model = qlora_compile.load(tmp_path, dtype=torch.float32)
    packed = {n: m for n, m in model.named_modules() if isinstance(m, QuantizedLinear)}
    assert len(packed) == 7
    for path, module in packed.items():
        assert torch.equal(module.dequantize(torch.float32), expected[f"{path}.weight"]), path
        indexed = "grouping" in module.packed.layout.named
        assert indexed == ("act-order" in name)
    for path, parameter in model.named_parameters():
        if parameter.is_floating_point():
            assert torch.equal(parameter, expected[path]), path


@pytest.mark.parametrize("name", TRAINED)
@pytest.mark.usefixtures("without_inductor")
def test_it_trains_as_stock_does_over_the_dense_weights(tmp_path: Path, name: str) -> None:
    dense = written(tmp_path, name)
    torch.manual_seed(1)
    stock = get_peft_model(dense, lora())
    torch.manual_seed(1)
    ours = qlora_compile.load(tmp_path, dtype=torch.float32)
    ours = qlora_compile.optimize(ours, lora(), tune="model", strict=True)
    ids = tokens()
    found, expected = step(ours.train(), ids), step(stock.train(), ids)
    for group, error in distance(found, expected).items():
        assert error < FLOAT32_TOLERANCE, group
    fused = [site for site in qlora_compile.explain(ours).sites if site.fused]
    assert {site.origin for site in fused} == {f"{name.split()[0]} checkpoint"}
    assert len(fused) == 7
