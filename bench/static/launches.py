"""Every launch the configs give, for compiling them ahead of time: real arguments, no memory.

Launches are recorded over meta tensors of a typical layer, through the same code that runs them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qlora_compile.kernels.formats.formats import FORMATS, UNQUANTIZED, format_named, meta_tensors
from qlora_compile.kernels.gpu.configs import GemmConfig
from qlora_compile.kernels.gpu.gemm_launch import gemm
from qlora_compile.kernels.gpu.launch import Launch, recording
from qlora_compile.kernels.gpu.products import (
    adapter_gradient,
    adapter_operands,
    dequantize,
    keep_bits,
    low_rank,
)
from qlora_compile.kernels.layout import Layout
from qlora_compile.kernels.problem import Direction, Problem
from qlora_compile.kernels.variants.base import LinearSpec
from qlora_compile.kernels.variants.decoding import dequantize_decoder
from qlora_compile.kernels.variants.fused import Fused, Skinny
from qlora_compile.kernels.variants.tail import Tail
from qlora_compile.kernels.variants.triton_variant import GemmVariant

ROWS, WIDTH = 4096, 4096
_FEW_ROWS = 16


@dataclass(frozen=True)
class ShippedLaunch:
    """kernel: such as "fused_forward". config: its label and what is unusual about the launch.
    macs_per_iteration: of the main loop, None without one."""

    kernel: str
    format: str
    dtype: torch.dtype
    decoder: str
    rank: int
    double_quantized: bool
    config: str
    launch: Launch
    macs_per_iteration: int | None


@dataclass(frozen=True)
class _Case:
    """One specialisation of the GEMM kernels."""

    format: str = "nf4"
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
        return format_named(self.format).layout(shape, double_quantize=self.double_quantized)

    @property
    def format_name(self) -> str:
        return "dense" if self.format == UNQUANTIZED else self.format

    @property
    def spec(self) -> LinearSpec:
        return LinearSpec.of(self.problem("forward", ROWS), dropout=0.1, stream=0)

    @property
    def planes(self) -> list[Tensor]:
        return meta_tensors(self.layout, self.dtype)


_CASES = (
    _Case(),
    _Case(rank=0),
    _Case(rank=64),
    _Case(double_quantized=True),
    _Case(dtype=torch.float16),
    _Case(format="fp4"),
    _Case(format="int8"),
    _Case(lora_dtype=torch.bfloat16, note="16-bit adapter"),
    _Case(bias=True, note="bias"),
    _Case(rank=100, double_quantized=True, dropout=True, note="dropout"),
    _Case(dropout=True, note="dropout"),
)
_SKINNY_CASES = (_CASES[0], _CASES[1], _CASES[3], _CASES[6])
_THIN_CASES = (
    (torch.bfloat16, torch.float32, 16, False),
    (torch.bfloat16, torch.float32, 64, True),
    (torch.bfloat16, torch.bfloat16, 16, False),
    (torch.float16, torch.float32, 100, True),
)


def shipped_launches(target: str) -> Iterator[ShippedLaunch]:
    """For one of Triton's targets, "sm_90" or "gfx942". Needs Triton to compile, not interpret."""
    for variant in (Fused(), Skinny(), Tail()):
        for case in _SKINNY_CASES if variant.name == "skinny" else _CASES:
            for direction in ("forward", "backward"):
                yield from _products(variant, target, direction, case)
    yield from _dequantisations(target)
    yield from _thin_products()


def _meta(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _products(
    variant: GemmVariant, target: str, direction: Direction, case: _Case
) -> Iterator[ShippedLaunch]:
    rows = _FEW_ROWS if variant.name == "skinny" else ROWS
    backward = direction == "backward"
    if variant.name == "tail":
        # What it multiplies with is dense, however it was stored.
        if case.double_quantized or case.format != "nf4":
            return
        case = replace(case, format=UNQUANTIZED)
    dtype, spec = case.dtype, case.spec
    planes = case.planes
    adapter = None
    if case.rank:
        low = _meta(1, rows, case.rank, dtype=torch.float32)
        up = _meta(WIDTH, case.rank, dtype=case.lora_dtype)
        masked = backward and case.dropout
        bits = _meta(rows * WIDTH // 8, dtype=torch.uint8) if masked else None
        with recording():
            adapter, _ = adapter_operands(
                *(low, up, case.lora_dtype, dtype),
                scaling=_meta(1, dtype=torch.float32),
                bits=bits,
            )
    x, out = (_meta(rows, WIDTH, dtype=dtype) for _ in range(2))
    bias = _meta(WIDTH, dtype=dtype) if case.bias and not backward else None
    for config in variant.configs_on(target, case.problem(direction, rows)):
        assert isinstance(config, GemmConfig)
        with recording() as launches:
            gemm(x, planes, spec, config, out, backward=backward, bias=bias, adapter=adapter)
        name = f"{variant.name}_{direction}" if variant.name != "skinny" else "skinny"
        note = f"{direction} {case.note}" if variant.name == "skinny" else case.note
        yield ShippedLaunch(
            kernel=name,
            format=case.format_name,
            dtype=dtype,
            decoder=config.decoder or "-",
            rank=case.rank,
            double_quantized=case.double_quantized,
            config=", ".join(filter(None, (config.label, note.strip()))),
            launch=launches[-1],
            macs_per_iteration=config.block_m * config.block_c * config.block_r,
        )


def _streaming(
    kernel: str, case: _Case, decoder: str, config: str, launch: Launch
) -> ShippedLaunch:
    return ShippedLaunch(
        kernel=kernel,
        format=case.format_name,
        dtype=case.dtype,
        decoder=decoder,
        rank=case.rank,
        double_quantized=case.double_quantized,
        config=config,
        launch=launch,
        macs_per_iteration=None,
    )


def _dequantisations(target: str) -> Iterator[ShippedLaunch]:
    for quant_format in FORMATS:
        for dtype in (torch.bfloat16, torch.float16):
            for double in {False, quant_format.has_double_quantize}:
                for rank in (0, 16) if dtype == torch.bfloat16 else (0,):
                    case = _Case(quant_format.name, dtype, rank, double)
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
                    yield _streaming(kernel, case, decoder, "-", launches[-1])
    double = _Case(double_quantized=True, rank=0, dtype=torch.float32)
    with recording() as launches:
        format_named(double.format).prepared(double.layout, double.planes)
    yield _streaming("absmax", double, "-", "-", launches[-1])


def _thin_products() -> Iterator[ShippedLaunch]:
    for dtype, lora_dtype, rank, dropout in _THIN_CASES:
        case = _Case(UNQUANTIZED, dtype, rank, lora_dtype=lora_dtype, dropout=dropout)
        x = _meta(ROWS, WIDTH, dtype=dtype)
        bits = _meta(ROWS * WIDTH // 8, dtype=torch.uint8) if dropout else None
        factor = _meta(rank, WIDTH, dtype=torch.float32)
        low = _meta(ROWS, rank, dtype=torch.float32)
        scaling = _meta(1, dtype=torch.float32)
        gradient = _meta(WIDTH, rank, dtype=torch.float32)
        with recording() as launches:
            planes = low_rank(x, factor, lora_dtype, bits)
            adapter_operands(planes, gradient, lora_dtype, dtype, scaling=scaling, total=True)
            adapter_gradient(x, low, lora_dtype, gradient, bits)
        note = f"adapter {lora_dtype}".replace("torch.", "")
        note += ", dropout" if dropout else ""
        names = ("low_rank", "adapter_operand", "adapter_gradient")
        for name, launch in zip(names, launches, strict=True):
            yield _streaming(name, case, "-", note, launch)
    case = _Case(UNQUANTIZED, rank=0, dropout=True)
    with recording() as launches:
        keep_bits(_meta(1, dtype=torch.int64), case.spec, ROWS)
    yield _streaming("keep_bits", case, "-", "-", launches[0])
