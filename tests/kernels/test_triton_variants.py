"""Every Triton variant in the interpreter, against the specification in float64.

The interpreter computes bfloat16, PTX and the tensor cores' accumulation as a GPU does and raises
on every access outside of a launch's tensors (tests/interpreter). Fresh memory holds NaN.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from qlora_compile.kernels.formats.blocks import BlockFormat
from qlora_compile.kernels.formats.formats import FORMATS, format_named
from qlora_compile.kernels.gpu.configs import GemmConfig
from qlora_compile.kernels.gpu.target import assuming
from qlora_compile.kernels.variants.decoding import decoder_names
from qlora_compile.kernels.variants.dense import Dense, DenseConfig
from qlora_compile.kernels.variants.gemm_variant import GemmVariant
from qlora_compile.kernels.variants.tail import Tail
from qlora_compile.kernels.variants.triton_variant import TritonVariant
from tests.examples import examples
from tests.kernels import linear_cases
from tests.kernels.group_cases import groups
from tests.kernels.linear_cases import DTYPES, Case, double_quantizes
from tests.kernels.test_qlora_linear import assert_no_worse_than_plain
from tests.kernels.triton_cases import PAIR_IDS, PAIRS, TRITON_VARIANTS, calls, configs
from tests.pairwise import pairwise

pytestmark = pytest.mark.usefixtures("interpreting")

DENSE, TAIL = Dense(), Tail()


@pytest.mark.parametrize(("variant", "format"), PAIRS, ids=PAIR_IDS)
@settings(max_examples=examples(6))
@given(data=st.data())
def test_error_of_output_and_gradients(
    variant: TritonVariant, format: str, data: st.DataObject
) -> None:
    call = data.draw(calls(variant, format))
    config = data.draw(st.sampled_from(configs(variant, format, call.spec.layout)))
    keeps = data.draw(st.booleans())
    assert_no_worse_than_plain(call, call.fused(variant, config=config, keeps=keeps))


GEMMS = [variant for variant in TRITON_VARIANTS if isinstance(variant, GemmVariant)]


@pytest.mark.parametrize("variant", GEMMS, ids=lambda v: v.name)
@settings(max_examples=examples(10))
@given(data=st.data())
def test_error_of_siblings(variant: GemmVariant, data: st.DataObject) -> None:
    """The gradient of x is added up in the kernel, S is one product."""
    call = data.draw(groups(data.draw(calls(variant, "nf4")).case))
    config = data.draw(st.sampled_from(configs(variant, "nf4")))
    keeps = data.draw(st.booleans()) and call.problem("forward").rank > 0
    assert_no_worse_than_plain(call, call.fused(variant, config, config, keeps))


@pytest.mark.parametrize("decoder", ["plain", "prmt"])
@settings(max_examples=examples(30))
@given(data=st.data())
def test_dense_over_tritons_decoder(decoder: str, data: st.DataObject) -> None:
    """Each decoder by itself is held to the bit in test_triton_kernels."""
    names = [f.name for f in FORMATS if decoder in [d.name for d in f.device_decoders()]]
    call = data.draw(calls(TAIL, data.draw(st.sampled_from(names))))
    assume(decoder in decoder_names(call.spec.layout, "sm_90", torch.bfloat16))
    dtype = call.case.dtypes.compute
    if decoder == "plain" and data.draw(st.booleans()):
        dtype = torch.float32
        call = replace(call.case, dtypes=DTYPES[1]).build()
    config = DenseConfig(dtype, decoder=decoder)
    assert_no_worse_than_plain(call, call.fused(DENSE, config=config))


IN_BLOCKS = {each.name for each in FORMATS if isinstance(each, BlockFormat)}
ONE_HOT = [
    (variant, format, config, size, dtype)
    for variant, format in PAIRS
    if isinstance(variant, GemmVariant)
    for size in (64, 256, 4096, "row")
    for config in configs(variant, format, Case(k=72, format=format, block_size=size).layout)
    for dtype in (torch.bfloat16, torch.float16)
]


def decoding(row: tuple[Any, ...]) -> dict[str, Hashable]:
    variant, format, config, _, dtype = row
    return {"decoder": (format, config.decoder), "dtype": dtype, "variant": variant.name}


def tiling(row: tuple[Any, ...]) -> dict[str, Hashable]:
    """Return what decides where a tile of W and its side lie, and how they enter the product."""
    variant, format, config, size, dtype = row
    return {
        "in blocks": format in IN_BLOCKS,
        "size": size,
        "tile": (variant.name, config.block_m, config.block_c, config.block_r, config.splits),
        "operands": (config.weight_left, config.descriptor, config.prefetch, config.inline),
        "dtype": dtype,
    }


THINNED = pairwise(ONE_HOT, decoding, tiling)


@pytest.mark.parametrize(
    ("variant", "format", "config", "size", "dtype"),
    THINNED,
    ids=[f"{v.name}-{f}-{c.label}-{s}-{d}".replace(" ", "-") for v, f, c, s, d in THINNED],
)
def test_one_hot_rows_give_the_decoded_weight(
    variant: TritonVariant, format: str, config: GemmConfig, size: Any, dtype: torch.dtype
) -> None:
    """Every config and every decoder, to the last bit: one product with 1 and otherwise zeros."""
    dtypes = next(d for d in DTYPES if d.x == d.compute == d.lora == dtype)
    rows = 16 if variant.name == "skinny" else 72
    double = double_quantizes(format)
    call = Case((rows,), 80, 72, 0, format, size, double, dtypes, contiguous=True).build()
    x = torch.eye(72, dtype=dtype)[:rows]
    results = replace(call, x=x).fused(variant, config=config)
    assert torch.equal(results["y"], call.weight(dtype)[:, :rows].t())
    grad = torch.eye(80, dtype=dtype)[:rows]
    results = replace(call, x=x * 0, grad=grad).fused(variant, config=config)
    assert torch.equal(results["grad x"], call.weight(dtype)[:rows])


IN_GROUPS = [f.name for f in FORMATS if any(option.name == "grouping" for option in f.options)]


@pytest.mark.parametrize("format", IN_GROUPS)
@pytest.mark.parametrize("zeros", ["minimum", "float", "integer"])
@pytest.mark.parametrize("grouping", ["consecutive", "indexed"])
def test_one_hot_rows_of_integers_in_groups(
    grouping: str, zeros: str, format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"group_size": 32, "zeros": zeros, "grouping": grouping, "scales": "float16"}
    monkeypatch.setattr(linear_cases, "fitting", lambda *_: options)
    dtypes = next(d for d in DTYPES if d.x == d.compute == d.lora == torch.float16)
    call = Case((72,), 80, 72, 0, format, dtypes=dtypes, contiguous=True).build()
    assert call.spec.layout.named["zeros"] == zeros
    results = replace(call, x=torch.eye(72, dtype=torch.float16)).fused(
        TAIL, config=configs(TAIL, format)[0]
    )
    assert torch.equal(results["y"], call.weight(torch.float16).t())


@pytest.mark.parametrize("variant", [v for v in GEMMS if v.name != "tail"], ids=lambda v: v.name)
def test_no_loop_decodes_columns_in_groups_by_an_index(variant: GemmVariant) -> None:
    """Their factors would take as many registers as the weights."""
    case = Case((16,), 80, 72, format="int4", dtypes=DTYPES[4])
    with assuming("sm_90", "cpu"):
        assert not variant.rejects(case.build().problem("forward"))
        (none, *why) = variant.rejects(replace(case, block_size=256).build().problem("forward"))
    assert none == "no config for sm_90"
    assert any("prmt does not take columns in groups by an index" in reason for reason in why)


@pytest.mark.parametrize("variant", TRITON_VARIANTS, ids=lambda v: v.name)
def test_repeated_calls_give_the_same_bits(variant: TritonVariant) -> None:
    """Partial sums of splits are added in a fixed order."""
    rows = 16 if variant.name == "skinny" else 40
    dropout = None if variant.name == "augmented" else 0.3
    call = Case((rows,), 72, 1024, 5, dtypes=DTYPES[4], dropout=dropout, bias=True).build()
    config = configs(variant, "nf4")[-1]
    first, second = (call.fused(variant, config=config) for _ in range(2))
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@pytest.mark.parametrize("format", [f.name for f in FORMATS])
def test_there_is_a_decoder_for_every_target(format: str) -> None:
    decoders = format_named(format).device_decoders()
    assert not decoders[0].rejects("gfx942", torch.float32)
    names = [decoder.name for decoder in decoders]
    assert len(set(names)) == len(names)
    for decoder in decoders[1:]:
        assert decoder.rejects("gfx942", torch.bfloat16)
        assert decoder.rejects("sm_90", torch.float32)
        assert not decoder.rejects("sm_90", torch.bfloat16)
