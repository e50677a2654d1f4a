"""Options of every format, for tests that range over all of them."""

from __future__ import annotations

import random
from typing import Any

from hypothesis import reject
from hypothesis import strategies as st

from qlora_compile.kernels.formats.base import QuantFormat
from qlora_compile.kernels.formats.errors import FormatOptionValueError
from qlora_compile.kernels.formats.formats import format_named


@st.composite
def drawn_options(draw: st.DrawFn, quant_format: QuantFormat) -> dict[str, Any]:
    """Draw options that the format takes together."""
    options = {each.name: draw(st.sampled_from(each.values)) for each in quant_format.options}
    try:
        quant_format.layout((1, 1), **options)
    except FormatOptionValueError:
        reject()
    return options


def fitting(
    quant_format: QuantFormat | str,
    block_size: int | str = 64,
    double_quantize: bool = False,
) -> dict[str, Any]:
    """Return `block_size` and `double_quantize` for a format in blocks. Another format gets options
    of its own: the defaults for a block size of 64, else others for each size."""
    if isinstance(quant_format, str):
        quant_format = format_named(quant_format)
    known = [option.name for option in quant_format.options]
    if "block_size" in known:
        double = {"double_quantize": double_quantize} if quant_format.has_double_quantize else {}
        return {"block_size": block_size, **double}
    if block_size == 64:
        return {}
    chance = random.Random(str(block_size))
    while True:
        options = {each.name: chance.choice(each.values) for each in quant_format.options}
        try:
            quant_format.layout((1, 1), **options)
        except FormatOptionValueError:
            continue
        return options
