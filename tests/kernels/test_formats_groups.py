"""Formats in groups: the codes' places in bytes, the nearest codes, and HQQ's zero points."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_compile.errors import PackedWeightError
from qlora_compile.kernels.formats.errors import FormatOptionValueError, ScaleOverflowError
from qlora_compile.kernels.formats.groups import padded_groups
from qlora_compile.kernels.formats.integers import IntegerFormat
from qlora_compile.kernels.registry import FORMATS
from tests.format_options import drawn_options

INTEGERS = [f for f in FORMATS if isinstance(f, IntegerFormat)]
each_integer_format = pytest.mark.parametrize("quant_format", INTEGERS, ids=lambda f: f.name)


@each_integer_format
def test_codes_zeros_and_scales_by_hand(quant_format: IntegerFormat) -> None:
    """Two rows of 33 columns: groups of 32 and of one; the first of two 4-bit codes is low."""
    layout = quant_format.layout((2, 33), group_size=32, zeros="integer", scales="float32")
    codes = torch.arange(66).view(2, 33) % 16
    scales = torch.tensor([[0.5, 1.0], [2.0, -1.0]])
    zeros = torch.tensor([[0, 3], [16, 15]], dtype=torch.uint8)
    stored = codes.to(torch.uint8)
    if quant_format.bits == 4:
        even, odd = codes[:, ::2], torch.nn.functional.pad(codes[:, 1::2], (0, 1))
        stored = (even + 16 * odd).to(torch.uint8)
    packed = quant_format.packed(layout, [stored, scales, zeros])
    expected = torch.empty(2, 33)
    expected[:, :32] = (codes[:, :32] - zeros[:, :1].int()) * scales[:, :1]
    expected[:, 32:] = (codes[:, 32:] - zeros[:, 1:].int()) * scales[:, 1:]
    assert torch.equal(quant_format.dequantize(packed, torch.float32), expected)
    without = quant_format.layout((2, 33), group_size=32, zeros="none", scales="float32")
    packed = quant_format.packed(without, [stored, torch.ones(2, 2)])
    middle = 2 ** (quant_format.bits - 1)
    assert torch.equal(quant_format.dequantize(packed, torch.float32), codes.float() - middle)
    with pytest.raises(PackedWeightError, match="needs 2 planes"):
        quant_format.packed(without, [stored, torch.ones(2, 2), zeros])


@each_integer_format
def test_an_index_tells_the_group_of_each_column(quant_format: IntegerFormat) -> None:
    layout = quant_format.layout((2, 33), group_size=32, scales="float32", grouping="indexed")
    codes = torch.arange(66, dtype=torch.uint8).view(2, 33) % 16
    scales = torch.tensor([[0.5, 1.0], [2.0, -1.0]])
    zeros = torch.tensor([[0, 3], [16, 15]], dtype=torch.uint8)
    index = (torch.arange(33, dtype=torch.int32) * 7 // 3) % 2
    packed = quant_format.packed(layout, [quant_format.stored_codes(codes), scales, zeros, index])
    expected = torch.empty(2, 33)
    for n in range(2):
        for k in range(33):
            group = int(index[k])
            expected[n, k] = (float(codes[n, k]) - zeros[n, group]) * scales[n, group]
    assert torch.equal(quant_format.dequantize(packed, torch.float32), expected)
    assert "indexed" in quant_format.label(layout)


@settings(max_examples=30)
@given(data=st.data())
def test_every_code_is_the_nearest(data: st.DataObject) -> None:
    quant_format = data.draw(st.sampled_from(INTEGERS))
    options = data.draw(drawn_options(quant_format))
    values = st.floats(width=32, allow_nan=False, min_value=-1e4, max_value=1e4)
    row = data.draw(st.lists(values, min_size=1, max_size=70))
    packed = quant_format.quantize(torch.tensor([row]), **options)
    restored = quant_format.dequantize(packed, torch.float32).double()
    scales, zeros = quant_format.factors(packed, 0, 1)
    if zeros is None:
        zeros = torch.full_like(scales, quant_format.symmetric_zero)
    scales, zeros = (quant_format.by_column(packed, each).double() for each in (scales, zeros))
    codes = torch.arange(quant_format.largest + 1).double()
    candidates = ((codes - zeros.unsqueeze(2)) * scales.unsqueeze(2))[0]
    weight = torch.tensor(row, dtype=torch.float64)
    least = (candidates - weight.unsqueeze(1)).abs().min(1).values
    slack = 1e-6 * candidates.abs().amax(1) + 1e-38
    assert torch.all((restored[0] - weight).abs() <= least + slack)
    # Nothing but what a scale loses in its own dtype lies outside of the range.
    coarsest = torch.finfo(packed.planes["scales"].dtype)
    steps = scales[0]
    clipped = 1.01 * quant_format.largest * (coarsest.eps * steps + coarsest.tiny)
    if not options["refine"]:
        assert torch.all((restored[0] - weight).abs() <= steps + clipped)


@settings(max_examples=15)
@given(data=st.data())
def test_refined_zeros_are_better(data: st.DataObject) -> None:
    """By the measure that is minimised, for every group; the scales stay."""
    quant_format = data.draw(st.sampled_from(INTEGERS))
    size = data.draw(st.sampled_from([32, 64, "row"]))
    torch.manual_seed(data.draw(st.integers(0, 99)))
    weight = torch.randn(9, 200) * 0.02 + data.draw(st.sampled_from([0.0, 0.01]))
    errors = []
    for refine in (False, True):
        options = {"zeros": "float", "scales": "float32", "group_size": size, "refine": refine}
        packed = quant_format.quantize(weight, **options)
        error = (quant_format.dequantize(packed, torch.float32) - weight).abs()
        powers = padded_groups(error, quant_format.group_size(packed.layout)).pow(0.7)
        errors.append(powers.sum(2))
    plain, refined = errors
    assert torch.all(refined <= plain * 1.001)
    assert refined.sum() < plain.sum()


@each_integer_format
def test_only_float_zeros_are_refined(quant_format: IntegerFormat) -> None:
    for zeros in ("integer", "none"):
        with pytest.raises(FormatOptionValueError, match=r"refine=True .*zeros='float'"):
            quant_format.quantize(torch.ones(2, 64), zeros=zeros, refine=True)


@each_integer_format
@pytest.mark.parametrize("zeros", ["integer", "float", "none"])
def test_scales_beyond_float16(quant_format: IntegerFormat, zeros: str) -> None:
    weight = torch.full((2, 64), 1e8)
    with pytest.raises(ScaleOverflowError, match=r"layers\.2: .*float16.*'bfloat16'"):
        quant_format.quantize(weight, site="layers.2", zeros=zeros, scales="float16")
    packed = quant_format.quantize(weight, zeros=zeros, scales="bfloat16")
    restored = quant_format.dequantize(packed, torch.float32)
    torch.testing.assert_close(restored, weight, rtol=0.01, atol=0)
