"""The kernels one by one, in the interpreter, against torch: to the bit where that is claimed."""

# Loops over `tl.range` and constexprs are not as typed.
# pyright: basic, reportArgumentType=false, reportIndexIssue=false

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from qlora_compile.kernels.dropout import keep_mask
from qlora_compile.kernels.formats.formats import FORMATS
from qlora_compile.kernels.formats.gpu.absmax import block_side, load_absmax
from qlora_compile.kernels.gpu.adapter_operands import AdapterFactors, adapter_operands
from qlora_compile.kernels.gpu.products import dequantize, keep_bits
from qlora_compile.kernels.gpu.thin_products import AdapterGradient, adapter_gradients, low_rank
from qlora_compile.kernels.gpu.weight import load_words
from qlora_compile.kernels.layout import UNQUANTIZED, Layout
from qlora_compile.kernels.variants.base import LinearSpec
from qlora_compile.kernels.variants.decoding import decoder_names
from tests.examples import examples
from tests.format_options import drawn_options

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


pytestmark = pytest.mark.usefixtures("interpreting")


def spec_of(layout: Layout, dropout: float = 0.0, stream: int = 0) -> LinearSpec:
    return LinearSpec(layout, dropout, stream, BF16, F32, BF16)


def plain(n: int, k: int) -> Layout:
    return Layout(UNQUANTIZED, (n, k))


DECODERS = [(f, d.name) for f in FORMATS for d in f.device_decoders()]


@pytest.mark.parametrize(
    ("format", "decoder"), DECODERS, ids=[f"{f.name}-{name}" for f, name in DECODERS]
)
@settings(max_examples=examples(30))
@given(data=st.data())
def test_dequantize_equals_the_host(format, decoder: str, data: st.DataObject) -> None:
    n = data.draw(st.sampled_from([1, 5, 16, 33]))
    k = data.draw(st.sampled_from([8, 40, 256, 264, 520]))
    dtype = data.draw(st.sampled_from([BF16, F16] + [F32] * (decoder == "plain")))
    rank = data.draw(st.sampled_from([0, 3]))
    torch.manual_seed(data.draw(st.integers(0, 99)))
    packed = format.quantize(torch.randn(n, k), **data.draw(drawn_options(format)))
    assume(decoder in decoder_names(packed.layout, "sm_90", BF16))
    up = torch.randn(n, rank) if rank else None
    out = dequantize(
        packed.tensors, spec_of(packed.layout), dtype, decoder, up, torch.tensor([1.5])
    )
    assert out.shape == (n, k + rank)
    assert torch.equal(out[:, :k], format.dequantize(packed, dtype))
    if up is not None:
        assert torch.equal(out[:, k:], (up * 1.5).to(dtype))


def test_absmax_equals_the_host() -> None:
    format = FORMATS[0]
    packed = format.quantize(torch.randn(96, 1000), double_quantize=True)
    single = format.quantize(format.dequantize(packed, F32))
    layout, (codes, absmax) = format.prepared(packed.layout, packed.tensors)
    assert codes is packed.codes
    assert layout == single.layout
    assert absmax.shape == single.planes["absmax"].shape
    _, quantized, codebook, nested_absmax, offset = packed.tensors
    nested = nested_absmax.repeat_interleave(256)[: absmax.numel()]
    assert torch.equal(absmax, codebook[quantized.int()] * nested + offset)
    assert format.prepared(single.layout, single.tensors) == (single.layout, single.tensors)


@settings(max_examples=40)
@given(
    rows=st.integers(1, 70),
    k=st.integers(1, 30).map(lambda i: 8 * i),
    p=st.sampled_from([0.0, 0.1, 0.5, 0.999]),
    seed=st.integers(0, 2**62),
    stream=st.integers(0, 3),
)
def test_dropout_masks_have_the_bits_of_the_reference(rows, k, p, seed, stream) -> None:
    seeds = torch.tensor([seed])
    bits = keep_bits(seeds, spec_of(plain(1, k), p, stream), rows)
    unpacked = (bits[:, None] >> torch.arange(8)) & 1
    expected = keep_mask(seeds, stream, p, (0, rows), k)
    assert torch.equal(unpacked.bool().view(rows, k), expected)


@settings(max_examples=25)
@given(data=st.data())
def test_thin_products_are_as_exact_as_their_dtype(data: st.DataObject) -> None:
    rows = data.draw(st.sampled_from([1, 7, 65, 300]))
    k = data.draw(st.sampled_from([8, 72, 520]))
    rank = data.draw(st.sampled_from([1, 3, 16, 64, 100]))
    x_dtype = data.draw(st.sampled_from([BF16, F16]))
    lora_dtype = data.draw(st.sampled_from([F32, x_dtype]))
    dropped = data.draw(st.booleans())
    torch.manual_seed(data.draw(st.integers(0, 99)))
    x, factor, low = torch.randn(rows, k).to(x_dtype), torch.randn(rank, k), torch.randn(rows, rank)
    seed = torch.tensor([7])
    spec = spec_of(plain(1, k), 0.3)
    bits = keep_bits(seed, spec, rows) if dropped else None
    kept = keep_mask(seed, 0, 0.3, (0, rows), k, F32) if dropped else torch.ones(rows, k)
    masked = x.double() * kept
    exact = masked @ factor.double().t()
    actual = low_rank(x, factor, lora_dtype, bits).sum(0)
    # float32: every bit of the factor counts; 16 bits: the factor is rounded to them.
    eps = torch.finfo(lora_dtype).eps
    scale = masked.abs() @ factor.double().abs().t()
    assert ((actual.double() - exact).abs() <= (eps + 4e-7) * scale + 1e-30).all()
    gradient = torch.full((rank, k), torch.nan)
    adapter_gradients([AdapterGradient(x, low, gradient.t(), bits)], lora_dtype)
    exact = low.double().t() @ masked
    scale = low.double().abs().t() @ masked.abs()
    assert ((gradient.double() - exact).abs() <= (eps + 4e-7) * scale + 1e-30).all()


@settings(max_examples=25)
@given(data=st.data())
def test_adapter_operands_lose_less_than_the_result(data: st.DataObject) -> None:
    rows, rank = data.draw(st.sampled_from([(1, 1), (20, 3), (33, 16), (5, 100)]))
    splits = data.draw(st.sampled_from([1, 3]))
    result = data.draw(st.sampled_from([BF16, F16]))
    torch.manual_seed(data.draw(st.integers(0, 99)))
    # Rows of very different size, and one of zeros: a row's own largest element is the measure.
    low = torch.randn(splits, rows, rank) * torch.logspace(-12, 12, rows)[:, None]
    low[:, 0] = 0
    # Transposed, as A is for the backward.
    up = torch.randn(rank, data.draw(st.sampled_from([1, 40]))).t()
    scaling, kept = torch.tensor([data.draw(st.sampled_from([0.5, 1.0, 3.0]))]), 1.25
    total = low.sum(0) * scaling * kept
    summed = torch.full((rows, rank), torch.nan)
    (start,) = adapter_operands([AdapterFactors(low, up, scaling, summed)], F32, result, kept)
    left, right = start.low, start.up
    torch.testing.assert_close(summed, total, rtol=1e-6, atol=0)
    assert left.scale is not None
    assert right.scale is not None
    product = left.values.double() @ right.values.double().t()
    product = product * left.scale.double()[:, None] * right.scale.double()
    exact = summed.double() @ up.double().t()
    size = summed.abs().amax(1).double()[:, None] * up.abs().amax(1).double() * rank
    allowed = 2**-10 if result == BF16 else 2**-19
    assert ((product - exact).abs() <= allowed * size).all()


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_16_bit_adapters_are_operands_as_they_are(dtype: torch.dtype) -> None:
    low, up = torch.randn(1, 9, 5).to(dtype), torch.randn(20, 5).to(dtype)
    (start,) = adapter_operands([AdapterFactors(low, up)], dtype, dtype)
    for operand, source in ((start.low, low[0]), (start.up, up)):
        assert operand.scale is None
        assert torch.equal(operand.values[:, :5], source)
        assert not operand.values[:, 5:].any()


@triton.jit
def far_tile_kernel(
    codes, side, words_out, scales_out, n0, N, K, row_words,
    SIDE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    start = n0 + tl.program_id(0) * ROWS
    words = load_words(codes, start, 0, N, row_words, ROWS, COLUMNS, 8, False, True)
    values, _ = load_absmax(side, start, 0, N, K, SIDE, ROWS, COLUMNS, False, True)
    rows = tl.arange(0, ROWS)
    places = rows[:, None] * (COLUMNS // 8) + tl.arange(0, COLUMNS // 8)[None, :]
    tl.store(words_out + places, words)
    tl.store(scales_out + rows, values)


def test_tiles_beyond_2_to_the_31_elements(tmp_path) -> None:
    """The last rows of a weight of 2**33 elements, in a file that is nearly all holes."""
    n, k, rows, columns = 2**19 + 3, 2**14, 16, 64
    words = torch.from_file(
        str(tmp_path / "codes"), shared=True, size=n * k // 8, dtype=torch.int32
    )
    blocks = k // 64
    absmax = torch.from_file(str(tmp_path / "absmax"), shared=True, size=n * blocks)
    first = n - 5
    for row in range(first, n):
        words[row * (k // 8) : row * (k // 8) + 8] = row + torch.arange(8)
        absmax[row * blocks] = row
    tile = torch.zeros(rows, columns // 8, dtype=torch.int32)
    scales = torch.zeros(rows)
    side = block_side([absmax], k, 64, columns, None, 1.0)
    sizes = {"SIDE": side.constants, "ROWS": rows, "COLUMNS": columns}
    far_tile_kernel[(1,)](words, side.arguments, tile, scales, first, n, k, k // 8, **sizes)
    expected = torch.arange(first, first + rows).clamp(max=n - 1)
    assert torch.equal(tile, (expected[:, None] + torch.arange(8)).int())
    assert torch.equal(scales, expected.float())
