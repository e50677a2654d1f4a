"""FP8, MXFP4 and NVFP4: all codes and scales, on the host and by Triton; the nearest codes."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qlora_compile.kernels.formats.base import QuantFormat
from qlora_compile.kernels.formats.cpu import decode
from qlora_compile.kernels.formats.fp8 import FP8_E4M3, FP8_E5M2, Fp8Format
from qlora_compile.kernels.formats.microscaling import MXFP4, NVFP4
from qlora_compile.kernels.gpu.products import dequantize
from qlora_compile.kernels.packed import PackedWeight
from qlora_compile.kernels.variants.base import LinearSpec

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
each_fp8 = pytest.mark.parametrize("quant_format", [FP8_E4M3, FP8_E5M2], ids=lambda f: f.name)


def value_of(code: int, exponent_bits: int, mantissa_bits: int, bias: int) -> float:
    """Return the value by the definition of such floats, without NaN and infinity."""
    mantissa = code & (2**mantissa_bits - 1)
    exponent = code >> mantissa_bits & (2**exponent_bits - 1)
    sign = -1.0 if code >> (exponent_bits + mantissa_bits) & 1 else 1.0
    whole = Fraction(mantissa, 2**mantissa_bits) + (exponent > 0)
    return sign * float(whole * Fraction(2) ** (max(exponent, 1) - bias))


def value_of_fp8(quant_format: Fp8Format, code: int) -> float:
    if quant_format is FP8_E4M3:
        return math.nan if code & 0x7F == 0x7F else value_of(code, 4, 3, 7)
    if code & 0x7C != 0x7C:
        return value_of(code, 5, 2, 15)
    return math.nan if code & 3 else math.copysign(math.inf, -(code & 0x80) + 1)


def assert_decoded(quant_format: QuantFormat, packed: PackedWeight, expected: Tensor) -> None:
    """Decode by torch's operators, by the CPU's decoder and by each of Triton's, in each dtype."""
    spec = LinearSpec(packed.layout, 0.0, 0, *(torch.bfloat16,) * 3)
    for dtype in DTYPES:
        rounded = expected.to(dtype)
        rows = quant_format.dequantize_rows(packed, 0, packed.shape[0], dtype)
        by_triton = [
            dequantize(packed.tensors, spec, dtype, decoder.name)
            for decoder in quant_format.device_decoders()
            if dtype != torch.float32 or decoder.programs is None
        ]
        for made in (quant_format.dequantize(packed, dtype), rows, *by_triton):
            torch.testing.assert_close(made, rounded, rtol=0, atol=0, equal_nan=True)
            assert torch.equal(made.signbit() & ~made.isnan(), rounded.signbit() & ~rounded.isnan())


@each_fp8
@pytest.mark.parametrize("scale_per", ["row", "tensor", "block", "group"])
@pytest.mark.usefixtures("interpreting")
def test_all_codes_of_fp8(
    quant_format: Fp8Format, scale_per: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decode, "SMALLEST", 1)
    rows = 130 if scale_per == "block" else 3
    layout = quant_format.layout((rows, 256), scale_per=scale_per)
    scales = torch.tensor(0.3)
    expanded = scales.expand(rows, 256)
    if scale_per == "row":
        scales = torch.linspace(0.3, 1.7, rows)
        expanded = scales[:, None].expand(rows, 256)
    elif scale_per == "block":
        scales = torch.tensor([[0.3, 1.0], [1.7, 2.0]])
        expanded = scales.repeat_interleave(128, 0).repeat_interleave(128, 1)[:rows]
    elif scale_per == "group":
        scales = torch.linspace(0.3, 1.7, 2 * rows).view(rows, 2)
        expanded = scales.repeat_interleave(128, 1)
    codes = torch.arange(256, dtype=torch.uint8).repeat(rows, 1)
    packed = quant_format.packed(layout, [codes, scales])
    values = torch.tensor([value_of_fp8(quant_format, code) for code in range(256)])
    assert_decoded(quant_format, packed, values * expanded)


E2M1 = torch.tensor([value_of(code, 2, 1, 1) for code in range(16)])


def nibbles(codes: Tensor) -> Tensor:
    """Pack codes in bytes, the first of two in the low half."""
    return (codes[:, ::2] + 16 * codes[:, 1::2]).to(torch.uint8)


@pytest.mark.usefixtures("interpreting")
def test_all_codes_and_scales_of_mxfp4(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "SMALLEST", 1)
    assert E2M1[:8].tolist() == [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    codes = torch.arange(16).repeat(4, 128)
    scales = torch.arange(256).view(4, 64).to(torch.uint8)
    powers = torch.tensor([2.0 ** (s - 127) for s in range(255)] + [math.nan]).view(4, 64)
    packed = MXFP4.packed(MXFP4.layout((4, 2048)), [nibbles(codes), scales])
    expected = E2M1[codes] * powers.repeat_interleave(32, dim=1)
    assert_decoded(MXFP4, packed, expected)


@pytest.mark.parametrize("whole", [torch.tensor(0.37), torch.tensor([0.37, 1.7])])
@pytest.mark.usefixtures("interpreting")
def test_all_codes_and_scales_of_nvfp4(whole: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "SMALLEST", 1)
    codes = torch.arange(16).repeat(2, 128)
    scales = torch.arange(256).view(2, 128).to(torch.uint8)
    layout = NVFP4.layout((2, 2048), global_scale_per="row" if whole.dim() else "tensor")
    packed = NVFP4.packed(layout, [nibbles(codes), scales, whole])
    each = torch.tensor([value_of_fp8(FP8_E4M3, code) for code in range(256)]).view(2, 128)
    each = each * whole.view(-1, 1)
    assert_decoded(NVFP4, packed, E2M1[codes] * each.repeat_interleave(16, dim=1))


@settings(max_examples=20)
@given(data=st.data())
def test_every_code_is_the_nearest_to_even(data: st.DataObject) -> None:
    quant_format = data.draw(st.sampled_from([FP8_E4M3, FP8_E5M2, MXFP4, NVFP4]))
    small = st.sampled_from([x / 8 for x in range(-64, 65)])
    values = st.one_of(small, st.floats(-50, 50, width=32))
    row = data.draw(st.lists(values, min_size=1, max_size=70))
    options = {}
    if isinstance(quant_format, Fp8Format):
        per = st.sampled_from(["row", "tensor", "block", "group"])
        options["scale_per"] = data.draw(per)
        table = torch.tensor([value_of_fp8(quant_format, code) for code in range(256)])
        table = torch.where(table.isfinite(), table, 1e30)
    else:
        table = E2M1
    weight = torch.tensor([row])
    packed = quant_format.quantize(weight, **options)
    restored = quant_format.dequantize(packed, torch.float32)[0].double()
    scales, _ = quant_format.factors(packed, 0, 1)
    size = min(quant_format.group_size(packed.layout), len(row))
    scales = scales.double().repeat_interleave(size, dim=1)[0, : len(row)]
    distances = (table.double() * scales.unsqueeze(1) - weight.double().t()).abs()
    # A quotient next to a boundary is rounded to float32 before its code is looked for.
    slack = 1e-6 * (weight[0].double().abs() + scales) + 1e-37
    assert torch.all((restored - weight[0]).abs() <= distances.amin(1) + slack)
    if quant_format is MXFP4:  # with exact scales, ties show
        codes = quant_format._codes(packed, 0, 1)[0].int()
        ties = (distances == distances.amin(1, keepdim=True)).sum(1) == 2
        away = (weight[0].abs() / scales).isclose(torch.tensor(0.0, dtype=torch.float64))
        assert not (codes[ties & ~away] & 1).any()
