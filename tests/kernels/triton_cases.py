"""Properties of the Triton variants, to be checked in the interpreter or on a device."""

from __future__ import annotations

import itertools
from dataclasses import replace

import torch
from hypothesis import strategies as st

from qlora_compile.kernels.formats.formats import FORMATS, UNQUANTIZED, format_named
from qlora_compile.kernels.layout import Layout
from qlora_compile.kernels.registry import VARIANTS
from qlora_compile.kernels.variants.base import NO_CONFIG, Config
from qlora_compile.kernels.variants.gemm_variant import GemmVariant
from qlora_compile.kernels.variants.triton_variant import TritonVariant
from tests.kernels.linear_cases import DTYPES, Call, Case, double_quantizes

TARGETS = ("sm_80", "sm_89", "sm_90", "sm_100", "gfx942", "gfx950")
TRITON_VARIANTS = [variant for variant in VARIANTS if isinstance(variant, TritonVariant)]
FORMAT_NAMES = (UNQUANTIZED, *(quant_format.name for quant_format in FORMATS))
SIXTEEN_BIT = [d for d in DTYPES if d.compute in (torch.bfloat16, torch.float16)]


def configs(variant: TritonVariant, format: str, layout: Layout | None = None) -> list[Config]:
    """Return every config of `variant` for any target that can decode `format`, or a weight of
    `layout`."""
    if not isinstance(variant, GemmVariant):
        return [NO_CONFIG]
    shipped = dict.fromkeys(itertools.chain(*(variant.shipped(target) for target in TARGETS)))
    decoders = format_named(format).device_decoders() if format != UNQUANTIZED else ()
    bf16 = torch.bfloat16
    known = {None, *(d.name for d in decoders if not d.rejects("sm_90", bf16, layout))}
    return [config for config in shipped if config.decoder in known]


def takes(variant: TritonVariant, format: str) -> bool:
    """Whether to test `variant` with `format`. For variants that decode a weight once, before the
    product, two packed formats suffice, as each format's decoder is tested by itself."""
    found = configs(variant, format)
    if format == UNQUANTIZED:
        return bool(found) and variant.takes_unquantized
    decodes = any(getattr(config, "decoder", None) is not None for config in found)
    return bool(found) and (decodes or format in FORMAT_NAMES[1:3])


PAIRS = [(v, format) for v in TRITON_VARIANTS for format in FORMAT_NAMES if takes(v, format)]
PAIR_IDS = [f"{variant.name}-{format}" for variant, format in PAIRS]


@st.composite
def calls(draw: st.DrawFn, variant: TritonVariant, format: str, target: str = "sm_90") -> Call:
    """Return a call `variant` does not reject: ragged rows, N and K off the tiles, every option."""
    case = Case(
        batch=draw(st.sampled_from([(0,), (1,), (3, 1), (2, 5), (16,), (131,)])),
        n=draw(st.sampled_from([1, 13, 72, 136])),
        k=draw(st.sampled_from([8, 40, 64, 136, 320])),
        rank=draw(st.sampled_from([0, 1, 3, 16, 64, 100])),
        format=format,
        block_size=draw(st.sampled_from([32, 64, 256, 4096, "row"])),
        double_quantize=double_quantizes(format) and draw(st.booleans()),
        dtypes=draw(st.sampled_from(SIXTEEN_BIT)),
        bias=draw(st.booleans()),
        dropout=draw(st.sampled_from([None, None, 0.1, 0.5])),
        scaling=draw(st.sampled_from([0.25, 1.0, 2.0])),
        contiguous=draw(st.booleans()),
        seed=draw(st.integers(0, 2**20)),
    )
    if variant.name == "skinny":
        case = replace(case, batch=draw(st.sampled_from([(1,), (2, 3), (16,)])))
    if variant.name == "augmented":
        case = replace(case, rank=case.rank or 5, dropout=None, dtypes=DTYPES[4])
    call = case.build()
    reasons = variant.rejects_on(target, call.problem("forward"))
    assert not reasons, reasons
    return call
