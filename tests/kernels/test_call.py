"""A Call and a Layout survive as text."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qlora_compile import errors
from qlora_compile.kernels.call import Call, LinearCall, NeedsGradient
from qlora_compile.kernels.layout import Layout

_DTYPES = st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64])
_NAMES = st.from_regex(r"[a-z]\w{0,9}", fullmatch=True).filter(str.isascii)
_SIZES = st.integers(0, 2**40)

layouts = st.builds(
    lambda format, shape, parameters: Layout.of(format, shape, **parameters),
    _NAMES,
    st.tuples(_SIZES, _SIZES),
    st.dictionaries(
        _NAMES.filter(lambda name: name not in ("format", "shape")), _SIZES, max_size=3
    ),
)
calls = st.builds(
    Call,
    linears=st.lists(
        st.builds(LinearCall, layouts, st.booleans(), _SIZES, _SIZES), min_size=1, max_size=4
    ).map(tuple),
    compute_dtype=_DTYPES,
    lora_dtype=_DTYPES,
    out_dtype=_DTYPES,
    dropout=st.floats(0, 1, exclude_max=True),
    save_low_rank=st.booleans(),
    needs=st.builds(NeedsGradient, st.booleans(), st.booleans(), st.booleans()),
    records=st.text(max_size=9),
)


@given(calls)
def test_a_call_is_read_back_from_its_text(call: Call) -> None:
    assert Call.parse(str(call)) == call
    assert Call.parse(str(call)) is Call.parse(str(call))


@given(calls, calls)
def test_texts_are_equal_where_calls_are(one: Call, other: Call) -> None:
    assert (str(one) == str(other)) == (one == other)


@given(layouts)
def test_a_layout_is_read_back_from_its_text(layout: Layout) -> None:
    assert Layout.parse(str(layout)) == layout


@pytest.mark.parametrize(
    "text", ["", "nf4", "nf4[3]", "nf4[3x4] block_size", "nf4[3x4]  a=1", "x[3x4]\n"]
)
def test_other_texts_are_refused(text: str) -> None:
    with pytest.raises(errors.LayoutTextError, match="is not a layout"):
        Layout.parse(text)
