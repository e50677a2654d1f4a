"""NF4, FP4 and INT8 against bitsandbytes' CPU code, bit for bit in both directions."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qlora_compile.kernels.formats.codebook import CodebookFormat
from qlora_compile.kernels.formats.cpu import encode
from qlora_compile.kernels.formats.int8 import INT8
from qlora_compile.kernels.formats.nested import dynamic_map
from qlora_compile.kernels.packed import PackedWeight
from qlora_compile.kernels.registry import FORMATS

functional = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is not installed")

CODEBOOK_FORMATS = [f for f in FORMATS if isinstance(f, CodebookFormat)]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

each_codebook_format = pytest.mark.parametrize(
    "quant_format", CODEBOOK_FORMATS, ids=lambda f: f.name
)


@pytest.fixture(autouse=True, params=[1, 1 << 40], ids=["encoded in one pass", "by torch"])
def _each_encoder(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(encode, "SMALLEST", request.param)
    # bitsandbytes compiles its fallback for odd K anew for every shape; eager is the same.
    with torch.compiler.set_stance("force_eager"):
        yield


def same_bits(ours: Tensor, theirs: Tensor) -> bool:
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[ours.element_size()]
    return ours.dtype == theirs.dtype and torch.equal(
        ours.reshape(-1).view(integer), theirs.reshape(-1).view(integer)
    )


def reference_dequantize(packed: PackedWeight, absmax: Tensor, dtype: torch.dtype) -> Tensor:
    codes = packed.codes.view(-1, 1)
    rows, columns = packed.shape
    # As one row, where that may be: on AVX-512 CPUs bitsandbytes 0.50.2 gives blocks that straddle
    # rows a wrong absmax, off by up to a quarter of the weight's norm.
    shape = packed.shape if columns % 2 else (1, rows * columns)
    return torch.ops.bitsandbytes.dequantize_4bit(
        codes, absmax, packed.layout.named["block_size"], packed.format, shape, dtype
    ).view(packed.shape)


def assert_equal_both_ways(
    quant_format: CodebookFormat, weight: Tensor, block_size: int, double_quantize: bool
) -> None:
    ours = quant_format.quantize(weight, block_size=block_size, double_quantize=double_quantize)
    codes, state = functional.quantize_4bit(
        weight,
        blocksize=block_size,
        compress_statistics=double_quantize,
        quant_type=quant_format.name,
    )
    assert same_bits(ours.codes, codes)
    assert same_bits(ours.planes["absmax"], state.absmax)
    planes = [codes, state.absmax]
    absmax = state.absmax
    if double_quantize:
        nested = [state.state2.code, state.state2.absmax, state.offset]
        planes += nested
        assert state.state2.blocksize == 256
        assert all(same_bits(a, b) for a, b in zip(ours.tensors[2:], nested, strict=True))
        absmax = functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
    shape = (weight.shape[0], weight.shape[1])
    adopted = quant_format.packed(ours.layout, planes)
    for dtype in DTYPES:
        expected = reference_dequantize(ours, absmax, dtype)
        for values in (
            quant_format.dequantize(adopted, dtype),
            quant_format.dequantize_rows(adopted, 0, shape[0], dtype),
        ):
            if quant_format.name == "fp4":
                # Its scalar code reads code 8 as -0.0, as we do; AVX-512 and torch code as 0.0.
                assert torch.equal(values, expected)
            else:
                assert same_bits(values, expected)


@each_codebook_format
def test_codebook(quant_format: CodebookFormat) -> None:
    theirs = functional.get_4bit_type(quant_format.name, device="cpu")
    assert torch.equal(quant_format.codebook_on(torch.device("cpu")), theirs)


def test_dynamic_map() -> None:
    assert same_bits(dynamic_map(), functional.create_dynamic_map())


@settings(deadline=None, max_examples=50)
@given(data=st.data())
def test_random_weights(data: st.DataObject) -> None:
    quant_format = data.draw(st.sampled_from(CODEBOOK_FORMATS))
    rows = data.draw(st.sampled_from([1, 2, 3, 7, 64, 129]))
    columns = data.draw(st.sampled_from([1, 2, 31, 64, 65, 100, 576, 1000]))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 999)))
    weight = torch.randn(rows, columns, generator=generator)
    weight *= data.draw(st.sampled_from([1e-7, 0.02, 1.0, 300.0]))
    zeros = data.draw(st.sampled_from(["none", "some", "one block", "all"]))
    if zeros == "some":
        weight[torch.rand(rows, columns, generator=generator) < 0.5] = 0
    elif zeros == "one block":
        weight.view(-1)[-64:] = 0
    elif zeros == "all":
        weight.zero_()
    assert_equal_both_ways(
        quant_format,
        weight.to(data.draw(st.sampled_from(DTYPES))),
        data.draw(st.sampled_from([32, 64, 128, 256, 512, 1024, 2048, 4096])),
        data.draw(st.booleans()),
    )


@settings(deadline=None, max_examples=50)
@given(
    quant_format=st.sampled_from(CODEBOOK_FORMATS),
    values=st.lists(
        st.floats(width=32, allow_nan=False, min_value=-(2.0**100), max_value=2.0**100),
        min_size=1,
        max_size=130,
    ),
    double_quantize=st.booleans(),
)
def test_any_float(quant_format: CodebookFormat, values, double_quantize: bool) -> None:
    weight = torch.tensor([values], dtype=torch.float32)
    assert_equal_both_ways(quant_format, weight, 64, double_quantize)


@each_codebook_format
@pytest.mark.parametrize("partial", [False, True])
def test_ties(quant_format: CodebookFormat, partial: bool) -> None:
    """Values on every decision boundary and one step to either side of it."""
    table = torch.tensor(quant_format.codebook).sort().values
    boundaries = (table[:-1] + table[1:]) / 2
    around = [torch.nextafter(boundaries, torch.full_like(boundaries, e)) for e in (-2.0, 2.0)]
    values = torch.cat([torch.ones(1), boundaries, *around])
    block = torch.nn.functional.pad(values, (0, (49 if partial else 64) - values.numel()))
    for scale in (1.0, 0.25, 3.0):
        assert_equal_both_ways(quant_format, (block * scale).unsqueeze(0), 64, False)


def test_double_quantisation_next_to_every_decision_boundary() -> None:
    """Enough blocks that many fall where the reference's 65535-step grid decides the code."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.rand(30000, 32, generator=generator)
    ours = CODEBOOK_FORMATS[0].quantize(weight, block_size=32, double_quantize=True)
    single = CODEBOOK_FORMATS[0].quantize(weight, block_size=32)
    centred = single.planes["absmax"] - single.planes["absmax"].mean()
    codes, state = functional.quantize_blockwise(centred, blocksize=256)
    assert same_bits(ours.planes["absmax"], codes)
    assert same_bits(ours.planes["nested_absmax"], state.absmax)
    nearest = torch.bucketize(
        centred / state.absmax.repeat_interleave(256)[: centred.numel()],
        (state.code[:-1] + state.code[1:]) / 2,
    )
    assert bool((nearest != codes).any()), "no value was near enough to a boundary to tell"


@pytest.mark.parametrize("dtype", DTYPES)
def test_int8_rows_are_llm_int8_weights(dtype: torch.dtype) -> None:
    weight = torch.randn(65, 577, generator=torch.Generator().manual_seed(0)).to(dtype)
    codes, absmax, _ = torch.ops.bitsandbytes.int8_vectorwise_quant(weight.clone())
    packed = INT8.quantize(weight, block_size="row")
    assert same_bits(packed.codes, codes)
    assert same_bits(packed.planes["absmax"], absmax)
    adopted = INT8.packed(packed.layout, [codes, absmax])
    expected = codes.float() * (absmax / 127).unsqueeze(1)
    assert same_bits(INT8.dequantize(adopted, torch.float32), expected)
    assert adopted.codes.data_ptr() == codes.data_ptr()
