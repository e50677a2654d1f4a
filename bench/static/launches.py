"""Lists every launch of the shipped configs, to be compiled ahead of time.

Launches are recorded over meta tensors of a typical layer, by the code that runs them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from qlora_compile.kernels.formats.formats import FORMATS, UNQUANTIZED, format_named, meta_tensors
from qlora_compile.kernels.gpu.adapter_operands import AdapterFactors, adapter_operands
from qlora_compile.kernels.gpu.configs import GemmConfig
from qlora_compile.kernels.gpu.gemm_launch import gemm
from qlora_compile.kernels.gpu.launch import Launch, recording
from qlora_compile.kernels.gpu.products import dequantize, keep_bits
from qlora_compile.kernels.gpu.thin_products import (
    AdapterGradient,
    ThinProduct,
    adapter_gradients,
    low_ranks,
)
from qlora_compile.kernels.layout import Layout
from qlora_compile.kernels.problem import Direction, Problem
from qlora_compile.kernels.variants.base import LinearSpec
from qlora_compile.kernels.variants.decoding import dequantize_decoder
from qlora_compile.kernels.variants.fused import Fused, Skinny
from qlora_compile.kernels.variants.gemm_variant import GemmVariant
from qlora_compile.kernels.variants.tail import Tail

ROWS, WIDTH = 4096, 4096
_FEW_ROWS = 16


@dataclass(frozen=True)
class Case:
    """One specialisation of the kernels. options: the format's, by name. note: what is unusual
    about the launch."""

    format: str = "nf4"
    options: tuple[tuple[str, Any], ...] = ()
    dtype: torch.dtype = torch.bfloat16
    rank: int = 16
    double_quantized: bool = False
    lora_dtype: torch.dtype = torch.float32
    bias: bool = False
    dropout: bool = False
    note: str = ""

    def problem(self, direction: Direction, rows: int) -> Problem:
        return Problem(
            direction=direction,
            m=rows,
            layout=self.layout,
            rank=self.rank,
            x_dtype=self.dtype,
            compute_dtype=self.dtype,
            lora_dtype=self.lora_dtype,
            out_dtype=self.dtype,
            bias=self.bias,
            dropout=self.dropout,
            keeps_low_rank=False,
            device="meta",
        )

    @property
    def layout(self) -> Layout:
        shape = (WIDTH, WIDTH)
        if self.format == UNQUANTIZED:
            return Layout(UNQUANTIZED, shape)
        options = {"double_quantize": self.double_quantized} | dict(self.options)
        return format_named(self.format).layout(shape, **options)

    @property
    def format_name(self) -> str:
        if self.format == UNQUANTIZED:
            return "dense"
        return " ".join([self.format, *(f"{name}={value}" for name, value in self.options)])

    @property
    def spec(self) -> LinearSpec:
        return LinearSpec.of(self.problem("forward", ROWS), dropout=0.1, stream=0)

    @property
    def planes(self) -> list[Tensor]:
        return meta_tensors(self.layout, self.dtype)


@dataclass(frozen=True)
class ShippedLaunch:
    """A launch of a shipped config. kernel: such as "fused_forward". config: its label. multiplies:
    whether it has products for tensor cores."""

    kernel: str
    case: Case
    launch: Launch
    config: str = ""
    decoder: str = ""
    multiplies: bool = False

    @property
    def name(self) -> str:
        """A text that distinguishes this launch from the others of its target."""
        case = self.case
        parts = (
            *(self.kernel, case.format_name, str(case.dtype).removeprefix("torch.")),
            "" if self.config.startswith(self.decoder) else self.decoder,
            *(self.config, f"r={case.rank}", "double" if case.double_quantized else "", case.note),
        )
        return " ".join(filter(None, parts))


_FORMATS = (
    Case(format="fp4"),
    Case(format="int8"),
    Case(format="int4"),
    Case(format="int4", options=(("group_size", 32), ("zeros", "float"), ("scales", "float16"))),
    Case(format="int4", options=(("group_size", 32), ("zeros", "minimum"), ("scales", "float16"))),
    Case(format="uint8"),
    Case(format="uint8", options=(("group_size", 32), ("zeros", "float"))),
    Case(format="fp8_e4m3"),
    Case(format="fp8_e4m3", options=(("scale_per", "block"),)),
    Case(format="fp8_e5m2"),
    Case(format="mxfp4"),
    Case(format="nvfp4"),
)
_CASES = (
    Case(),
    Case(rank=0),
    Case(rank=64),
    Case(double_quantized=True),
    Case(dtype=torch.float16),
    *_FORMATS,
    replace(_FORMATS[3], rank=64),
    Case(lora_dtype=torch.bfloat16, note="16-bit adapter"),
    Case(bias=True, note="bias"),
    Case(rank=100, double_quantized=True, dropout=True, note="dropout"),
    Case(dropout=True, note="dropout"),
)
_SKINNY_CASES = (Case(), Case(rank=0), Case(double_quantized=True), *_FORMATS[1:])
_THIN_CASES = (
    (torch.bfloat16, torch.float32, 16, False),
    (torch.bfloat16, torch.float32, 64, True),
    (torch.bfloat16, torch.bfloat16, 16, False),
    (torch.float16, torch.float32, 100, True),
)


def shipped_launches(target: str) -> Iterator[ShippedLaunch]:
    """Record the launches of a target such as "sm_90" or "gfx942".

    Needs Triton to compile, not to interpret."""
    for variant in (Fused(), Skinny(), Tail()):
        for case in _SKINNY_CASES if variant.name == "skinny" else _CASES:
            for direction in ("forward", "backward"):
                yield from _products(variant, target, direction, case)
    yield from _dequantisations(target)
    yield from _thin_products()


def _meta(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _products(
    variant: GemmVariant, target: str, direction: Direction, case: Case
) -> Iterator[ShippedLaunch]:
    rows, kernel, named = ROWS, f"{variant.name}_{direction}", case
    if variant.name == "skinny":
        rows, kernel = _FEW_ROWS, "skinny"
        named = replace(case, note=f"{direction} {case.note}".strip())
    backward = direction == "backward"
    if variant.name == "tail":
        # What it multiplies with is dense, however it was stored.
        if case.double_quantized or case.format != "nf4":
            return
        case = named = replace(case, format=UNQUANTIZED)
    dtype, spec = case.dtype, case.spec
    planes = case.planes
    adapter = None
    if case.rank:
        low = _meta(1, rows, case.rank, dtype=torch.float32)
        up = _meta(WIDTH, case.rank, dtype=case.lora_dtype)
        masked = backward and case.dropout
        bits = _meta(rows * WIDTH // 8, dtype=torch.uint8) if masked else None
        with recording():
            factors = AdapterFactors(low, up, _meta(1, dtype=torch.float32), bits=bits)
            (adapter,) = adapter_operands([factors], case.lora_dtype, dtype)
    x, out = (_meta(rows, WIDTH, dtype=dtype) for _ in range(2))
    bias = _meta(WIDTH, dtype=dtype) if case.bias and not backward else None
    for config in variant.configs_on(target, case.problem(direction, rows)):
        assert isinstance(config, GemmConfig)
        with recording() as launches:
            gemm(x, planes, spec, config, out, backward=backward, bias=bias, adapter=adapter)
        decoder = config.decoder or ""
        yield ShippedLaunch(kernel, named, launches[-1], config.label, decoder, multiplies=True)


def _dequantisations(target: str) -> Iterator[ShippedLaunch]:
    for quant_format in FORMATS:
        for dtype in (torch.bfloat16, torch.float16):
            for double in {False, quant_format.has_double_quantize}:
                for rank in (0, 16) if dtype == torch.bfloat16 else (0,):
                    case = Case(quant_format.name, dtype=dtype, rank=rank, double_quantized=double)
                    decoder = dequantize_decoder(case.layout, target, dtype)
                    up = _meta(WIDTH, rank, dtype=dtype) if rank else None
                    scaling = _meta(1, dtype=torch.float32) if rank else None
                    with recording() as launches:
                        dequantize(
                            case.planes,
                            case.spec,
                            dtype,
                            decoder,
                            up,
                            scaling,
                        )
                    kernel = "dequantize_augmented" if rank else "dequantize"
                    yield ShippedLaunch(kernel, case, launches[-1], decoder=decoder)
    double = Case(double_quantized=True, rank=0, dtype=torch.float32)
    with recording() as launches:
        format_named(double.format).prepared(double.layout, double.planes)
    yield ShippedLaunch("absmax", double, launches[-1])


def _thin_products() -> Iterator[ShippedLaunch]:
    """Yield the thin products of one Linear, and of three that share a launch."""
    for dtype, lora_dtype, rank, dropout in _THIN_CASES:
        for parts in (1, 3):
            yield from _thin_products_of(dtype, lora_dtype, rank, dropout, parts)
    case = Case(UNQUANTIZED, rank=0, dropout=True)
    with recording() as launches:
        keep_bits(_meta(1, dtype=torch.int64), case.spec, ROWS)
    yield ShippedLaunch("keep_bits", case, launches[0])


def _thin_products_of(
    dtype: torch.dtype, lora_dtype: torch.dtype, rank: int, dropout: bool, parts: int
) -> Iterator[ShippedLaunch]:
    notes = [f"adapter {lora_dtype}".replace("torch.", "")]
    notes += ["dropout"] * dropout + ["siblings"] * (parts > 1)
    note = ", ".join(notes)
    case = Case(*(UNQUANTIZED, (), dtype, rank, False, lora_dtype), dropout=dropout, note=note)
    x = _meta(ROWS, WIDTH, dtype=dtype)
    bits = _meta(ROWS * WIDTH // 8, dtype=torch.uint8) if dropout else None
    total = _meta(ROWS, parts * rank, dtype=lora_dtype)
    factor, up = _meta(rank, WIDTH, dtype=torch.float32), _meta(WIDTH, rank, dtype=torch.float32)
    scaling = _meta(1, dtype=torch.float32)
    with recording() as launches:
        planes = low_ranks([ThinProduct(x, factor, bits)] * parts, lora_dtype)
        lows = total.split(rank, dim=1)
        factors = [
            AdapterFactors(each, up, scaling, low) for each, low in zip(planes, lows, strict=True)
        ]
        adapter_operands(factors, lora_dtype, dtype)
        gradients = [AdapterGradient(x, low, factor.t(), bits) for low in lows]
        adapter_gradients(gradients, lora_dtype)
    # A gradient in one part is not added up, and some take a launch each.
    named = {launch.kernel.__name__.removesuffix("_kernel"): launch for launch in launches}
    for name, launch in named.items():
        yield ShippedLaunch(name, case, launch)
