"""Formats in groups: the codes' places in bytes, the nearest codes, and HQQ's zero points."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_compile.errors import PackedWeightError
from qlora_compile.kernels.formats.cpu import decode
from qlora_compile.kernels.formats.errors import FormatOptionValueError, ScaleOverflowError
from qlora_compile.kernels.formats.groups import padded_groups
from qlora_compile.kernels.formats.integers import INT4, IntegerFormat
from qlora_compile.kernels.gpu.products import dequantize
from qlora_compile.kernels.registry import FORMATS
from qlora_compile.kernels.variants.base import LinearSpec
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
    zeros, scales = zeros.unsqueeze(2), scales.unsqueeze(2)
    adds = options["zeros"] == "minimum"
    candidates = (codes * scales + zeros if adds else (codes - zeros) * scales)[0]
    weight = torch.tensor(row, dtype=torch.float64)
    least = (candidates - weight.unsqueeze(1)).abs().min(1).values
    slack = 1e-6 * candidates.abs().amax(1) + 1e-38
    assert torch.all((restored[0] - weight).abs() <= least + slack)
    # Nothing but what a scale loses in its own dtype lies outside of the range.
    coarsest = torch.finfo(packed.planes["scales"].dtype)
    steps = scales[0, :, 0]
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


def test_refined_zeros_beside_hqqs_own() -> None:
    """From the same scales, by the measure that both minimise."""
    from hqq.core.quantize import Quantizer

    torch.manual_seed(0)
    weight = torch.randn(64, 256) * 0.02
    shared = {"nbits": 4, "group_size": 64, "axis": 1, "device": "cpu"}
    errors = []
    for refine in (False, True):
        codes, meta = Quantizer.quantize(weight, optimize=refine, **shared)
        theirs = Quantizer.dequantize(codes, meta | {"compute_dtype": torch.float32})
        options = {"zeros": "float", "scales": "float32", "refine": refine}
        packed = INT4.quantize(weight, group_size=64, **options)
        torch.testing.assert_close(packed.planes["scales"].flatten(), meta["scale"].flatten())
        ours = INT4.dequantize(packed, torch.float32)
        errors.append([float((each - weight).abs().pow(0.7).sum()) for each in (ours, theirs)])
    (plain, plain_of_hqq), (refined, refined_of_hqq) = errors
    assert plain == pytest.approx(plain_of_hqq, rel=1e-3)
    assert refined <= refined_of_hqq < plain


@each_integer_format
def test_only_float_zeros_are_refined(quant_format: IntegerFormat) -> None:
    for zeros in ("integer", "none", "minimum"):
        with pytest.raises(FormatOptionValueError, match=r"refine=True .*zeros='float'"):
            quant_format.quantize(torch.ones(2, 64), zeros=zeros, refine=True)


@each_integer_format
@pytest.mark.parametrize("zeros", ["integer", "float", "none", "minimum"])
def test_scales_beyond_float16(quant_format: IntegerFormat, zeros: str) -> None:
    weight = torch.full((2, 64), 1e8)
    with pytest.raises(ScaleOverflowError, match=r"layers\.2: .*float16.*'bfloat16'"):
        quant_format.quantize(weight, site="layers.2", zeros=zeros, scales="float16")
    packed = quant_format.quantize(weight, zeros=zeros, scales="bfloat16")
    restored = quant_format.dequantize(packed, torch.float32)
    torch.testing.assert_close(restored, weight, rtol=0.01, atol=0)


@each_integer_format
@pytest.mark.parametrize("scales", ["bfloat16", "float16"])
@pytest.mark.usefixtures("interpreting")
def test_all_whole_zeros_by_triton(quant_format: IntegerFormat, scales: str) -> None:
    """Beside scales of either sign, subnormal ones among them, signs of zero included."""
    dtype = getattr(torch, scales)
    layout = quant_format.layout((16, 512), group_size=32, zeros="integer", scales=scales)
    codes = torch.arange(512).repeat(16, 1) % (quant_format.largest + 1)
    torch.manual_seed(0)
    factors = torch.randn(16, 16).to(dtype)
    factors[:, 0] = torch.finfo(dtype).smallest_normal / 8
    zeros = torch.arange(256, dtype=torch.uint8).view(16, 16)
    planes = [quant_format.stored_codes(codes.to(torch.uint8)), factors, zeros]
    packed = quant_format.packed(layout, planes)
    expected = quant_format.dequantize(packed, dtype)
    spec = LinearSpec(layout, 0.0, 0, *(torch.bfloat16,) * 3)
    for decoder in quant_format.device_decoders():
        made = dequantize(packed.tensors, spec, dtype, decoder.name)
        assert torch.equal(made.view(torch.int16), expected.view(torch.int16)), decoder.name


@each_integer_format
def test_all_float16_scales(quant_format: IntegerFormat, monkeypatch: pytest.MonkeyPatch) -> None:
    """By compiled code as by torch's operators: subnormal numbers, infinity and NaN, too."""
    monkeypatch.setattr(decode, "SMALLEST", 1)
    scales = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.float16).view(32, 2048)
    layout = quant_format.layout((32, 2048 * 32), group_size=32, zeros="float", scales="float16")
    planes = [torch.full((32, 2048 * 4 * quant_format.bits), 0x53, dtype=torch.uint8), scales]
    packed = quant_format.packed(layout, [*planes, torch.ones_like(scales)])
    made = quant_format.dequantize_rows(packed, 0, 32, torch.float32)
    torch.testing.assert_close(
        made, quant_format.dequantize(packed, torch.float32), rtol=0, atol=0, equal_nan=True
    )
