"""Weights are put one below another, in every format, without changing a value."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_compile.errors import PackedWeightError
from qlora_compile.kernels.formats.base import QuantFormat
from qlora_compile.kernels.registry import FORMATS, format_named
from tests.examples import examples
from tests.format_options import drawn_options


@pytest.mark.parametrize("quant_format", FORMATS, ids=lambda each: each.name)
@settings(max_examples=examples(15))
@given(data=st.data())
def test_no_value_changes(quant_format: QuantFormat, data: st.DataObject) -> None:
    options = data.draw(drawn_options(quant_format))
    columns = data.draw(st.sampled_from([16, 64, 130, 256]))
    rows = data.draw(st.lists(st.integers(1, 140), min_size=2, max_size=3))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    parts = [torch.randn(n, columns, generator=generator) * 2.0**i for i, n in enumerate(rows)]
    weights = [quant_format.quantize(part, **options) for part in parts]
    alike = {weight.layout.with_rows(1) for weight in weights}
    alignment = quant_format.row_alignment(weights[0].layout)
    whole = all(n % alignment == 0 for n in rows[:-1])
    ordered = [w.planes["group_index"] for w in weights if "group_index" in w.planes]
    whole &= all(torch.equal(each, ordered[0]) for each in ordered)
    if len(alike) > 1 or not whole:
        with pytest.raises(PackedWeightError):
            quant_format.stacked(weights)
        return
    stacked = quant_format.stacked(weights)
    expected = torch.cat([quant_format.dequantize(w, torch.float32) for w in weights])
    assert torch.equal(quant_format.dequantize(stacked, torch.float32), expected)
    assert stacked.layout.shape == (sum(rows), columns)


def test_weights_of_different_widths_are_refused() -> None:
    nf4 = format_named("nf4")
    weights = [nf4.quantize(torch.ones(4, columns)) for columns in (64, 128)]
    with pytest.raises(PackedWeightError, match="cannot stand above one of"):
        nf4.stacked(weights)
