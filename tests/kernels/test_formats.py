"""Every format of the registry: geometry, accuracy and row blocks."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from qlora_compile.kernels.cpu import stores
from qlora_compile.kernels.formats.base import QuantFormat
from qlora_compile.kernels.formats.blocks import BlockFormat
from qlora_compile.kernels.formats.cpu import decode
from qlora_compile.kernels.formats.nested import dynamic_map
from qlora_compile.kernels.layout import Layout
from qlora_compile.kernels.packed import PackedWeight
from qlora_compile.kernels.registry import FORMATS, format_named
from tests.format_options import drawn_options, fitting

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BLOCK_SIZES = (32, 64, 128, 512, 4096, "row")

each_format = pytest.mark.parametrize("quant_format", FORMATS, ids=lambda f: f.name)
BLOCK_FORMATS = [f for f in FORMATS if isinstance(f, BlockFormat)]
each_block_format = pytest.mark.parametrize("quant_format", BLOCK_FORMATS, ids=lambda f: f.name)


def bits(tensor: Tensor) -> Tensor:
    """Return the raw bits: unlike `torch.equal` on floats, tells -0.0 from 0.0."""
    return tensor.view({4: torch.int32, 2: torch.int16}[tensor.element_size()])


def normal(rows: int, columns: int, seed: int = 0, scale: float = 0.02) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * scale


def code_values(quant_format: BlockFormat) -> Tensor:
    """Return what every code stands for at absmax 1, float64, ascending."""
    codes = torch.arange(256).to(quant_format.code_dtype)
    elements = 256 * 8 // quant_format.bits
    layout = quant_format.layout((1, elements), block_size="row")
    packed = quant_format.packed(layout, [codes, torch.ones(1)])
    return quant_format.dequantize(packed, torch.float32).double().view(-1).unique()


@st.composite
def packed_weights(draw: st.DrawFn) -> tuple[QuantFormat, Tensor, PackedWeight]:
    quant_format = draw(st.sampled_from(FORMATS))
    rows = draw(st.sampled_from([1, 2, 3, 8, 65]))
    columns = draw(st.sampled_from([1, 2, 31, 64, 96, 100, 576]))
    weight = normal(rows, columns, draw(st.integers(0, 99)), draw(st.sampled_from([1e-5, 1.0, 50])))
    weight = weight.to(draw(st.sampled_from(DTYPES)))
    packed = quant_format.quantize(weight, **draw(drawn_options(quant_format)))
    return quant_format, weight, packed


def test_registry_names_are_distinct_and_found() -> None:
    assert len({quant_format.name for quant_format in FORMATS}) == len(FORMATS)
    for quant_format in FORMATS:
        assert format_named(quant_format.name) is quant_format


@each_format
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_planes_are_those_that_the_format_declares(quant_format: QuantFormat, block_size) -> None:
    """With storage of their own, which is what safetensors saves."""
    for double_quantize in {False, quant_format.has_double_quantize}:
        options = fitting(quant_format, block_size, double_quantize)
        packed = quant_format.quantize(normal(3, 101), **options)
        assert packed.layout == quant_format.layout((3, 101), **options)
        assert Layout.parse(str(packed.layout)) == packed.layout
        assert Layout.from_tensor(packed.layout.to_tensor()) == packed.layout
        declared = quant_format.planes(packed.layout)
        assert list(packed.planes) == [plane.name for plane in declared]
        assert len({plane.name for plane in declared}) == len(declared)
        for plane, tensor in zip(declared, packed.tensors, strict=True):
            assert (tensor.dtype, tensor.shape) == (plane.dtype, plane.shape)
            assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
            assert not tensor.requires_grad


@each_block_format
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_blocks_have_an_absmax_each(quant_format: BlockFormat, block_size) -> None:
    packed = quant_format.quantize(normal(3, 101), block_size=block_size)
    size = 101 if block_size == "row" else block_size
    assert packed.layout.named == {"block_size": size}
    assert packed.codes.shape == ((303 * quant_format.bits + 7) // 8,)
    assert packed.planes["absmax"].shape == (math.ceil(303 / size),)


@settings(deadline=None, max_examples=40)
@given(
    quant_format=st.sampled_from(BLOCK_FORMATS),
    values=st.lists(
        # At the very largest float32, 127 * (absmax / 127) of INT8 rounds to infinity.
        st.floats(width=32, allow_nan=False, min_value=-(2.0**127), max_value=2.0**127),
        min_size=1,
        max_size=70,
    ),
    block_size=st.sampled_from([32, 64, "row"]),
)
def test_every_code_is_the_nearest(quant_format: BlockFormat, values, block_size) -> None:
    weight = torch.tensor([values], dtype=torch.float32)
    packed = quant_format.quantize(weight, block_size=block_size)
    restored = quant_format.dequantize(packed, torch.float32).double()
    candidates = code_values(quant_format)
    size = packed.layout.named["block_size"]
    for begin in range(0, weight.numel(), size):
        block = weight.double()[0, begin : begin + size]
        absmax = block.abs().max()
        error = (restored[0, begin : begin + size] - block).abs()
        least = (candidates * absmax - block.unsqueeze(1)).abs().min(dim=1).values
        # Slack: roundings of the scaled value in float32, and the floor under the divisor, which
        # makes blocks below 1e-36 coarser than they need be.
        assert torch.all(error <= least + absmax * 1e-6 + 1e-36)


@each_format
def test_zero_weight_stays_zero(quant_format: QuantFormat) -> None:
    for double_quantize in {False, quant_format.has_double_quantize}:
        packed = quant_format.quantize(torch.zeros(3, 65), double_quantize=double_quantize)
        assert torch.equal(quant_format.dequantize(packed, torch.float32), torch.zeros(3, 65))


@each_format
def test_quantising_in_chunks_equals_quantising_row_by_row(quant_format: QuantFormat) -> None:
    weight = normal(20, 16384)  # more elements than one chunk
    weight[:, 0] = 0.2  # The same maximum in every row, for a scale of the whole tensor.
    whole = quant_format.quantize(weight)
    rows = [quant_format.quantize(row.unsqueeze(0)) for row in weight]
    for name, plane in whole.planes.items():
        parts = [row.planes[name] for row in rows]
        assert torch.equal(plane, torch.cat(parts) if plane.dim() else parts[0])


@each_format
@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES])
def test_strides_and_gradients_of_the_weight_do_not_matter(
    quant_format: QuantFormat, dtype: torch.dtype
) -> None:
    weight = normal(65, 96).to(dtype).t()
    expected = quant_format.quantize(weight.contiguous())
    packed = quant_format.quantize(torch.nn.Parameter(weight))
    for name, plane in packed.planes.items():
        assert torch.equal(plane, expected.planes[name])


@each_format
def test_no_temporary_exceeds_one_float32_copy(quant_format: QuantFormat) -> None:
    class Largest(TorchDispatchMode):
        nbytes = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if isinstance(result, Tensor):
                self.nbytes = max(self.nbytes, result.numel() * result.element_size())
            return result

    weight = normal(1024, 1024).bfloat16()
    with Largest() as largest:
        quant_format.quantize(weight, double_quantize=quant_format.has_double_quantize)
    assert largest.nbytes <= weight.numel() * 4


@pytest.fixture(params=["compiled", "operators"])
def smallest(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether whole blocks are decoded by compiled code, however small the weight."""
    monkeypatch.setattr(decode, "SMALLEST", 1 if request.param == "compiled" else 1 << 60)


@pytest.fixture(params=["to the caches", "past them"])
def stored(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where compiled code writes decoded rows, however few."""
    monkeypatch.setattr(stores, "_UNCACHED", -1 if request.param == "past them" else 1 << 60)


@pytest.mark.usefixtures("smallest", "stored", "level")
@settings(deadline=None, max_examples=60)
@given(drawn=packed_weights(), data=st.data())
def test_row_blocks_equal_the_specification(drawn, data: st.DataObject) -> None:
    quant_format, weight, packed = drawn
    rows, columns = weight.shape
    alignment = quant_format.row_alignment(packed.layout)
    start = alignment * data.draw(st.integers(0, rows // alignment))
    stop = data.draw(st.integers(start, rows))
    dtype = data.draw(st.sampled_from(DTYPES))
    expected = quant_format.dequantize(packed, dtype)[start:stop]
    made = quant_format.dequantize_rows(packed, start, stop, dtype)
    assert made.shape == (stop - start, columns)
    assert made.dtype == dtype
    assert torch.equal(bits(made), bits(expected))
    offset = data.draw(st.integers(0, 2))
    storage = torch.full(((stop - start) * columns + offset,), math.nan, dtype=dtype)
    out = storage[offset:].view(stop - start, columns)
    assert quant_format.dequantize_rows(packed, start, stop, dtype, out=out) is out
    assert torch.equal(bits(out), bits(expected))
    assert bool(storage[:offset].isnan().all())


@pytest.mark.usefixtures("level")
@each_format
@pytest.mark.parametrize("block_size", [64, "row"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_row_blocks_longer_than_a_chunk(
    quant_format: QuantFormat, block_size, dtype: torch.dtype
) -> None:
    options = fitting(quant_format, block_size, quant_format.has_double_quantize)
    packed = quant_format.quantize(normal(601, 999), **options)
    expected = quant_format.dequantize(packed, dtype)
    assert torch.equal(bits(quant_format.dequantize_rows(packed, 0, 601, dtype)), bits(expected))


@each_format
def test_weights_larger_than_the_caches(quant_format: QuantFormat) -> None:
    """Past a size they are written another way."""
    packed = quant_format.quantize(normal(2305, 1024))
    expected = quant_format.dequantize(packed, torch.bfloat16)
    made = quant_format.dequantize_rows(packed, 0, 2305, torch.bfloat16)
    assert torch.equal(bits(made), bits(expected))


@pytest.mark.parametrize(
    ("columns", "block_size", "four_bit", "eight_bit"),
    [(128, 64, 1, 1), (96, 64, 2, 2), (65, 64, 64, 64), (32, 4096, 128, 128), (65, "row", 2, 1)],
)
def test_row_alignment(columns: int, block_size, four_bit: int, eight_bit: int) -> None:
    for quant_format in BLOCK_FORMATS:
        packed = quant_format.quantize(normal(2, columns), block_size=block_size)
        expected = four_bit if quant_format.bits == 4 else eight_bit
        assert quant_format.row_alignment(packed.layout) == expected


@each_format
def test_grad_mode_autocast_and_inference_mode_change_nothing(quant_format: QuantFormat) -> None:
    packed = quant_format.quantize(normal(8, 64), double_quantize=quant_format.has_double_quantize)
    expected = quant_format.dequantize(packed, torch.float32)
    with torch.inference_mode():
        inferred = quant_format.dequantize_rows(packed, 0, 8, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = quant_format.dequantize_rows(packed, 0, 8, torch.float32)
        specified = quant_format.dequantize(packed, torch.float32)
    with torch.no_grad():
        without_grad = quant_format.dequantize_rows(packed, 0, 8, torch.float32)
    for values in (inferred, cast, specified, without_grad):
        assert torch.equal(bits(values), bits(expected))


@pytest.mark.gpu
@each_format
@pytest.mark.parametrize("double_quantize", [False, True])
def test_cuda_reads_what_the_cpu_packed(quant_format: QuantFormat, double_quantize: bool) -> None:
    packed = quant_format.quantize(
        normal(65, 128), double_quantize=double_quantize and quant_format.has_double_quantize
    )
    moved = quant_format.packed(packed.layout, [plane.cuda() for plane in packed.tensors])
    for dtype in DTYPES:
        expected = quant_format.dequantize(packed, dtype)
        assert torch.equal(
            bits(quant_format.dequantize_rows(moved, 0, 65, dtype).cpu()), bits(expected)
        )


def test_dynamic_map_has_seven_decades_of_each_sign() -> None:
    values = dynamic_map()
    assert values.shape == (256,)
    assert values.dtype == torch.float32
    assert bool((values.diff() > 0).all())
    magnitudes = values[values < 0].abs().flip(0)
    assert torch.equal(magnitudes, values[(values > 0) & (values < 1)])
    counts = [int(((values > 10.0**e) & (values < 10.0 ** (e + 1))).sum()) for e in range(-7, 0)]
    assert counts == [1, 2, 4, 8, 16, 32, 64]


@settings(deadline=None, max_examples=10)
@given(blocks=st.integers(1, 700), seed=st.integers(0, 99))
def test_double_quantisation_is_close(blocks: int, seed: int) -> None:
    quant_format = format_named("nf4")
    weight = normal(blocks, 64, seed)
    single = quant_format.quantize(weight)
    double = quant_format.quantize(weight, double_quantize=True)
    assert torch.equal(single.codes, double.codes)
    nested_absmax = double.planes["nested_absmax"]
    assert nested_absmax.shape == (math.ceil(blocks / 256),)
    ratio = quant_format.dequantize(double, torch.float32).abs().amax(dim=1)
    # Half the widest gap of the dynamic map, 0.9 / 64, and one step of the 65535-step grid.
    bound = nested_absmax.repeat_interleave(256)[:blocks] * (0.45 / 64 + 2e-5) + 1e-7
    assert bool(((ratio - single.planes["absmax"]).abs() <= bound).all())
