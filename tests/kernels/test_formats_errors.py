"""The error each bad input to a format raises, and what its message names."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from qlora_compile.errors import (
    BlockSizeError,
    DoubleQuantizeError,
    PackedWeightError,
    RowRangeError,
    UnknownFormatError,
    WeightShapeError,
    WeightValueError,
)
from qlora_compile.kernels.formats.base import QuantFormat
from qlora_compile.kernels.formats.errors import AbsmaxOverflowError
from qlora_compile.kernels.registry import FORMATS, format_named

each_format = pytest.mark.parametrize("quant_format", FORMATS, ids=lambda f: f.name)


def normal(rows: int, columns: int) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)) * 0.02


def test_unknown_format_names_the_known_ones() -> None:
    with pytest.raises(
        UnknownFormatError, match="'nf5'.*" + ", ".join(repr(f.name) for f in FORMATS)
    ):
        format_named("nf5")


@each_format
@pytest.mark.parametrize(("start", "stop"), [(1, 2), (-2, 2), (0, 5), (4, 2)])
def test_bad_row_range(quant_format: QuantFormat, start: int, stop: int) -> None:
    packed = quant_format.quantize(normal(4, 96))
    alignment = quant_format.row_alignment(packed.layout)
    if (start, stop) == (1, 2) and alignment == 1:
        return
    message = f"rows {start} to {stop} .*multiple of {alignment}"
    with pytest.raises(RowRangeError, match=message):
        quant_format.dequantize_rows(packed, start, stop, torch.float32)


@each_format
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("block_size", [64, "row"])
def test_non_finite_weight(quant_format: QuantFormat, value: float, block_size) -> None:
    weight = normal(3, 65)
    weight[0, 3] = weight[2, 64] = value
    with pytest.raises(WeightValueError, match=r"layers\.0\.q_proj: the weight holds 2 NaN"):
        quant_format.quantize(weight, block_size=block_size, site="layers.0.q_proj")


@each_format
@pytest.mark.parametrize(
    "weight",
    [torch.zeros(64), torch.zeros(1, 2, 3), torch.zeros(0, 4), torch.zeros(2, 2).int()],
    ids=["1-D", "3-D", "empty", "integer"],
)
def test_bad_weight_shape(quant_format: QuantFormat, weight: Tensor) -> None:
    with pytest.raises(WeightShapeError, match=r"layers\.1\.up_proj"):
        quant_format.quantize(weight, site="layers.1.up_proj")


@each_format
@pytest.mark.parametrize("block_size", [0, 16, 8192, 96, -64, 64.0, True, "column", None])
def test_bad_block_size(quant_format: QuantFormat, block_size) -> None:
    with pytest.raises(BlockSizeError, match="from 32 to 4096, or 'row'"):
        quant_format.quantize(normal(2, 64), block_size=block_size)


def test_formats_without_double_quantisation_refuse_it() -> None:
    refusing = [f for f in FORMATS if not f.has_double_quantize]
    assert refusing
    for quant_format in refusing:
        with pytest.raises(DoubleQuantizeError, match=repr(quant_format.name)):
            quant_format.quantize(normal(2, 64), double_quantize=True)


def test_double_quantisation_of_maxima_beyond_float32() -> None:
    weight = torch.full((2, 64), 3e38)
    with pytest.raises(AbsmaxOverflowError, match=r"layers\.2: .*3\.\d+e\+38"):
        format_named("nf4").quantize(weight, double_quantize=True, site="layers.2")
    packed = format_named("nf4").quantize(weight)
    assert torch.equal(format_named("nf4").dequantize(packed, torch.float32), weight)


@each_format
def test_another_formats_weight_is_refused(quant_format: QuantFormat) -> None:
    other = next(f for f in FORMATS if f is not quant_format)
    packed = other.quantize(normal(2, 64))
    with pytest.raises(PackedWeightError, match=f"cannot be read as {quant_format.name!r}"):
        quant_format.dequantize(packed, torch.float32)
    with pytest.raises(PackedWeightError, match=f"cannot be read as {quant_format.name!r}"):
        quant_format.dequantize_rows(packed, 0, 2, torch.float32)
