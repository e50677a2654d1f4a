"""A toy Llama over each format trains as stock PEFT does over the dense weight that it decodes."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import nn

import qlora_compile
from qlora_compile.kernels.formats.errors import FormatOptionValueError
from qlora_compile.kernels.registry import FORMATS
from qlora_compile.modules.linear import QuantizedLinear
from tests.examples import LONG
from tests.pairwise import pairwise
from tests.test_equality import (
    FLOAT32_TOLERANCE,
    build,
    distance,
    lora,
    step,
    without_inductor,
)
from tests.toy_models import tokens, toy

__all__ = ["without_inductor"]


@pytest.mark.usefixtures("without_inductor")
def test_loss_and_gradients_equal_those_over_the_decoded_weight() -> None:
    stock, ours = build("int4", torch.float32, 0.0, True)
    ids = tokens()
    for group, error in distance(step(ours, ids), step(stock, ids)).items():
        assert error < FLOAT32_TOLERANCE, group
    report = qlora_compile.explain(ours)
    assert report.fused == len(report.sites) - 1, str(report)
    assert {site.format for site in report.sites if site.fused} == {"int4"}


def stored_ways() -> list[tuple[str, dict[str, Any]]]:
    """Return every format with its options, so that every two values that it takes together
    meet."""
    found = []
    for each in FORMATS:
        names = [option.name for option in each.options]
        rows = []
        for values in itertools.product(*(option.values for option in each.options)):
            options = dict(zip(names, values, strict=True))
            try:
                each.layout((1, 1), **options)
            except FormatOptionValueError:
                continue
            rows.append(options)
        found += [(each.name, options) for options in pairwise(rows, lambda options: options)]
    return found


WAYS, LINEARS = stored_ways(), 14


@pytest.mark.parametrize("first", range(0, len(WAYS), LINEARS))
@pytest.mark.usefixtures("without_inductor")
def test_every_way_to_store_a_weight_trains_equally(first: int) -> None:
    """Each Linear of a model is stored in a way of its own."""
    models = []
    for packs in (False, True):
        model = toy("Llama")
        linears = [
            (name, each)
            for name, each in model.named_modules()
            if isinstance(each, nn.Linear) and "lm_head" not in name
        ]
        assert len(linears) == LINEARS
        for (name, linear), (format, options) in zip(linears, WAYS[first:], strict=False):
            packed = QuantizedLinear.from_linear(linear, format, **options)
            linear.weight.data = packed.dequantize()
            if packs:
                model.set_submodule(name, packed)
        torch.manual_seed(1)
        if packs:
            model = qlora_compile.optimize(model, lora(), tune="model")
        else:
            model = get_peft_model(model, lora())
        models.append(model.train())
    stock, ours = models
    ids = tokens()
    for group, error in distance(step(ours, ids), step(stock, ids)).items():
        assert error < FLOAT32_TOLERANCE, group
    report = qlora_compile.explain(ours)
    assert report.fused == len(report.sites) - 1, str(report)
    stored = {format for format, _ in WAYS[first : first + LINEARS]}
    assert stored <= {site.format for site in report.sites if site.fused}


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


@pytest.mark.parametrize("format", [each.name for each in FORMATS][:: 1 if LONG else 4])
@pytest.mark.usefixtures("without_inductor")
def test_every_format_has_a_certificate(format: str) -> None:
    model = toy("Llama", num_hidden_layers=1)
    ours = qlora_compile.optimize(model, lora(), quantize=format, tune="model", verify=True)
    step(ours.train(), tokens())
    report = qlora_compile.explain(ours)
    assert report.certificates
    assert not report.mismatches
