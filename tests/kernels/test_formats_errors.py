"""The error each bad input to a format raises, and what its message names."""

from __future__ import annotations

import itertools
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
from qlora_compile.kernels.formats.blocks import BlockFormat
from qlora_compile.kernels.formats.errors import (
    AbsmaxOverflowError,
    FormatOptionError,
    FormatOptionValueError,
    FormatTextError,
)
from qlora_compile.kernels.formats.formats import format_written
from qlora_compile.kernels.registry import FORMATS, format_named
from tests.format_options import fitting

BLOCK_FORMATS = [f for f in FORMATS if isinstance(f, BlockFormat)]
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
        quant_format.quantize(weight, site="layers.0.q_proj", **fitting(quant_format, block_size))


@each_format
@pytest.mark.parametrize(
    "weight",
    [torch.zeros(64), torch.zeros(1, 2, 3), torch.zeros(0, 4), torch.zeros(2, 2).int()],
    ids=["1-D", "3-D", "empty", "integer"],
)
def test_bad_weight_shape(quant_format: QuantFormat, weight: Tensor) -> None:
    with pytest.raises(WeightShapeError, match=r"layers\.1\.up_proj"):
        quant_format.quantize(weight, site="layers.1.up_proj")


@pytest.mark.parametrize("quant_format", BLOCK_FORMATS, ids=lambda f: f.name)
@pytest.mark.parametrize("block_size", [0, 16, 8192, 96, -64, 64.0, True, "column", None])
def test_bad_block_size(quant_format: QuantFormat, block_size) -> None:
    with pytest.raises(BlockSizeError, match="from 32 to 4096, or 'row'"):
        quant_format.quantize(normal(2, 64), block_size=block_size)


@each_format
def test_options_that_a_format_does_not_have(quant_format: QuantFormat) -> None:
    message = f"columns=3: .*{quant_format.name!r} has such"
    with pytest.raises(FormatOptionError, match=message) as refused:
        quant_format.quantize(normal(2, 64), columns=3)
    for option in quant_format.options:
        assert option.name in str(refused.value)
        if option.name == "block_size":
            continue
        for value in ("no such value", 64.0, None, 1):
            with pytest.raises(FormatOptionValueError) as raised:
                quant_format.layout((2, 64), **{option.name: value})
            for named in (f"{option.name}={value!r}", *map(repr, option.values)):
                assert named in str(raised.value)


@each_format
def test_formats_are_written_with_their_options(quant_format: QuantFormat) -> None:
    choices = [[(each.name, value) for value in each.values] for each in quant_format.options]
    for chosen in itertools.zip_longest(*choices):
        options = dict(pair for pair in chosen if pair is not None)
        written = ",".join(f"{name}={value}".lower() for name, value in options.items())
        text = f"{quant_format.name}:{written}" if written else quant_format.name
        try:
            quant_format.layout((1, 1), **options)
        except FormatOptionValueError:
            with pytest.raises(FormatOptionValueError):
                format_written(text)
        else:
            assert format_written(text) == (quant_format.name, options)
    for listed in ("x", "=1", "x=", "x=1,"):
        with pytest.raises(FormatTextError, match=f"{quant_format.name}:{listed}"):
            format_written(f"{quant_format.name}:{listed}")


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
