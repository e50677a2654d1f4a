"""A toy Llama over each format trains as stock PEFT does over the dense weight that it decodes."""

from __future__ import annotations

import pytest
import torch

import qlora_compile
from qlora_compile.kernels.registry import FORMATS
from tests.test_equality import (
    FLOAT32_TOLERANCE,
    SETTINGS,
    build,
    distance,
    lora,
    step,
    without_inductor,
)
from tests.toy_models import tokens, toy

__all__ = ["without_inductor"]

NAMES = [each.name for each in FORMATS if each.name not in {setting.base for setting in SETTINGS}]


@pytest.mark.parametrize("format", NAMES)
@pytest.mark.usefixtures("without_inductor")
def test_loss_and_gradients_equal_those_over_the_decoded_weight(format: str) -> None:
    stock, ours = build(format, torch.float32, 0.0, True)
    ids = tokens()
    for group, error in distance(step(ours, ids), step(stock, ids)).items():
        assert error < FLOAT32_TOLERANCE, group
    report = qlora_compile.explain(ours)
    assert report.fused == len(report.sites) - 1, str(report)
    assert {site.format for site in report.sites if site.fused} == {format}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.usefixtures("without_inductor")
def test_16_bit_planes_are_verified_as_they_are_stored(dtype: torch.dtype) -> None:
    """Neither widened with the other inputs, nor taken for a low precision to compute in."""
    options = {"zeros": "float", "scales": "bfloat16", "group_size": 32}
    model = toy("Llama", dtype, num_hidden_layers=1)
    ours = qlora_compile.optimize(
        model, lora(), quantize="int4", tune="model", verify=True, **options
    ).train()
    step(ours, tokens(2, 5))
    report = qlora_compile.explain(ours)
    assert not report.mismatches
    (certificate,) = report.certificates
    worst = max(each.allowed for each in certificate.comparisons if each.inputs == "random")
    assert worst < 1e-3 if dtype == torch.float32 else worst > 1e-3
