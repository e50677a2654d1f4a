"""One call of the fused linear with everything it is compared with."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal
from unittest import mock

import torch
from torch import Tensor

from qlora_compile.kernels import op
from qlora_compile.kernels.call import Call as FusedCall
from qlora_compile.kernels.call import LinearCall
from qlora_compile.kernels.dropout import keep_mask
from qlora_compile.kernels.layout import Layout
from qlora_compile.kernels.linear_call import bound, problem_of, specs
from qlora_compile.kernels.packed import PackedWeight
from qlora_compile.kernels.problem import Direction, Problem
from qlora_compile.kernels.registry import UNQUANTIZED, format_named
from qlora_compile.kernels.selection import Choice
from qlora_compile.kernels.specification import linear_reference
from qlora_compile.kernels.variants.base import (
    NO_CONFIG,
    Config,
    LinearSpec,
    LinearTensors,
    Variant,
)
from tests.format_options import fitting

STREAM = 9

_DIFFERENTIABLE = ("x", "bias", "lora_a", "lora_b")

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64


@dataclass(frozen=True)
class Dtypes:
    """The dtypes of x and grad x, the base product, the adapter's product, y, and the factors."""

    x: torch.dtype
    compute: torch.dtype
    lora: torch.dtype
    out: torch.dtype
    parameter: torch.dtype

    @property
    def lowest(self) -> torch.dtype:
        dtypes = (self.x, self.compute, self.lora, self.out, self.parameter)
        return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)


def double_quantizes(format: str) -> bool:
    """Whether a weight of this format can be doubly quantised."""
    return format != UNQUANTIZED and format_named(format).has_double_quantize


DTYPES = (
    Dtypes(F64, F64, F64, F64, F64),
    Dtypes(F32, F32, F32, F32, F32),
    Dtypes(BF16, BF16, F32, BF16, F32),  # PEFT: adapters stay in float32
    Dtypes(F16, F16, F32, F16, F32),
    Dtypes(BF16, BF16, BF16, BF16, BF16),  # PEFT with autocast_adapter_dtype=False
    Dtypes(F16, F16, F16, F16, F16),
    Dtypes(F32, BF16, BF16, BF16, F32),  # a float32 model under autocast
    Dtypes(F32, F32, BF16, F32, BF16),
)


@dataclass(frozen=True)
class Case:
    """A call. rank: 0 for no adapter. dropout: None for no seed. batch, n, k: dimensions of
    shapes."""

    batch: tuple[int, ...] = (5,)
    n: int = 24
    k: int = 40
    rank: int = 3
    format: str = "nf4"
    block_size: int | Literal["row"] = 64
    double_quantize: bool = False
    dtypes: Dtypes = DTYPES[1]
    bias: bool = False
    dropout: float | None = None
    scaling: float = 1.5
    contiguous: bool = True
    seed: int = 0
    stream: int = STREAM

    @property
    def layout(self) -> Layout:
        if self.format == UNQUANTIZED:
            return Layout(UNQUANTIZED, (self.n, self.k))
        options = fitting(self.format, self.block_size, self.double_quantize)
        return format_named(self.format).layout((self.n, self.k), **options)

    def build(self) -> Call:
        generator = torch.Generator().manual_seed(self.seed)
        d = self.dtypes

        def normal(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=F64).mul_(scale).to(dtype)

        def strided(width: int, dtype: torch.dtype) -> Tensor:
            if self.contiguous:
                return normal(*self.batch, width, dtype=dtype)
            return normal(width + 1, *self.batch, 2, dtype=dtype)[1:, ..., 1].movedim(0, -1)

        weight = normal(self.n, self.k, dtype=F32, scale=0.3)
        packed, planes = None, [weight.to(d.compute)]
        if not self.contiguous:  # as Conv1D stores it
            planes = [planes[0].t().contiguous().t()]
        if self.format != UNQUANTIZED:
            packed = format_named(self.format).quantize(
                weight, **fitting(self.format, self.block_size, self.double_quantize)
            )
            planes = packed.tensors
        lora_a = lora_b = seed = keep = None
        if self.rank:
            lora_a = normal(self.rank, self.k, dtype=d.parameter, scale=self.k**-0.5)
            lora_b = normal(self.n, self.rank, dtype=d.parameter, scale=self.rank**-0.5)
            if self.dropout is not None:
                seed = torch.tensor([self.seed * 2**40 + 12345])
                rows = math.prod(self.batch)
                keep = keep_mask(seed, self.stream, self.dropout, (0, rows), self.k)
                keep = keep.view(*self.batch, self.k)
        return Call(
            case=self,
            x=strided(self.k, d.x),
            grad=strided(self.n, d.out),
            planes=planes,
            packed=packed,
            bias=normal(self.n, dtype=d.compute) if self.bias else None,
            lora_a=lora_a,
            lora_b=lora_b,
            seed=seed,
            keep=keep,
        )


@dataclass(frozen=True)
class Call:
    case: Case
    x: Tensor
    grad: Tensor
    planes: list[Tensor]
    packed: PackedWeight | None
    bias: Tensor | None
    lora_a: Tensor | None
    lora_b: Tensor | None
    seed: Tensor | None
    keep: Tensor | None

    def on(self, device: torch.device | str) -> Call:
        """Return the same call with its tensors on `device`; the packed weight and the mask
        stay."""

        def moved(tensor: Tensor | None) -> Any:
            if tensor is None:
                return None
            # Strides are part of the case.
            storage = tensor.untyped_storage().to(device=torch.device(device))
            target = torch.empty(0, dtype=tensor.dtype, device=device)
            return target.set_(storage, tensor.storage_offset(), tensor.shape, tensor.stride())

        names = ("x", "grad", "bias", "lora_a", "lora_b", "seed")
        tensors = {name: moved(getattr(self, name)) for name in names}
        return replace(self, planes=[moved(plane) for plane in self.planes], **tensors)

    def problem(self, direction: Direction) -> Problem:
        """Return the key of the call in one direction."""
        return problem_of(self.fused_call(), direction, math.prod(self.case.batch), self.x)

    @property
    def low_rank(self) -> Tensor:
        """S, as a forward keeps it."""
        assert self.lora_a is not None
        x = self.x.reshape(-1, self.case.k).to(F64)
        if self.keep is not None:
            x = x * self.keep.view(x.shape) / (1.0 - self.spec.dropout)
        return (self.case.scaling * x @ self.lora_a.t().to(F64)).to(self.case.dtypes.lora)

    def weight(self, dtype: torch.dtype) -> Tensor:
        if self.packed is None:
            return self.planes[0].to(dtype)
        return format_named(self.packed.format).dequantize(self.packed, dtype)

    def fused_call(self, save_low_rank: bool = False) -> FusedCall:
        """Return the Call for the op."""
        case, d = self.case, self.case.dtypes
        linear = LinearCall(
            case.layout if self.packed is None else self.packed.layout,
            bias=self.bias is not None,
            rank=case.rank,
            stream=case.stream,
        )
        return FusedCall(
            (linear,),
            compute_dtype=d.compute,
            lora_dtype=d.lora,
            out_dtype=d.out,
            dropout=case.dropout or 0.0,
            save_low_rank=save_low_rank and case.rank > 0,
        )

    @property
    def spec(self) -> LinearSpec:
        (spec,) = specs(self.fused_call())
        return spec

    @property
    def scaling(self) -> Tensor | None:
        if not self.case.rank:
            return None
        dtype = torch.promote_types(F32, self.case.dtypes.lora)
        return torch.tensor([self.case.scaling], dtype=dtype, device=self.x.device)

    @property
    def tensors(self) -> list[Tensor]:
        """The tensors, as the op takes them."""
        own = (*self.planes, self.bias, self.lora_a, self.lora_b, self.scaling)
        return [tensor for tensor in own if tensor is not None]

    @property
    def linear_tensors(self) -> LinearTensors:
        """The tensors, as variants take them."""
        rows = self.x.reshape(-1, self.case.k)
        ((tensors, _),) = bound(self.fused_call(), rows, self.tensors, self.seed)
        return tensors

    def arguments(self, save_low_rank: bool = False) -> tuple[Any, ...]:
        """Return the op's arguments."""
        return self.x, self.tensors, self.seed, str(self.fused_call(save_low_rank))

    def leaves(self, wanted: tuple[str, ...] | None = None) -> tuple[Call, dict[str, Tensor]]:
        """Return the call with gradients required of the `wanted` tensors, and these tensors."""
        names = [name for name in _DIFFERENTIABLE if wanted is None or name in wanted]
        leaves = {
            name: getattr(self, name).detach().requires_grad_()
            for name in names
            if getattr(self, name) is not None
        }
        return replace(self, **leaves), leaves

    def fused(
        self,
        variant: Variant,
        wanted: tuple[str, ...] | None = None,
        config: Config | None = None,
        backward_config: Config | None = None,
        keeps: bool = False,
    ) -> dict[str, Tensor]:
        """Return y and the gradients of `wanted` (every tensor that can have one) through the op.

        config: of both directions, unless backward has its own; the variant's first where None.
        keeps: whether the forward keeps S for the backward.
        """

        def choose(problem: Problem, records: str) -> Choice:
            own = backward_config if problem.direction == "backward" else None
            first = next(iter(variant.configs(problem)), NO_CONFIG)
            return Choice(variant, own or config or first, 0.0)

        with mock.patch.object(op, "select", side_effect=choose):
            call, leaves = self.leaves(wanted)
            y, *_ = op.QLORA_LINEAR(*call.arguments(keeps))
            return _results(y, leaves, self.grad)

    def reference(self, *, plain: bool = False, magnitudes: bool = False) -> dict[str, Tensor]:
        """Return y and all gradients by the specification: in float64, or `plain` in the case's
        dtypes.

        magnitudes: of the absolute values of all operands, the scale of rounding errors.
        """
        d = self.case.dtypes if plain else Dtypes(F64, F64, F64, F64, F64)
        sources = {
            "x": (self.x, d.x, d.compute),
            "bias": (self.bias, d.compute, d.compute),
            "lora_a": (self.lora_a, d.parameter, d.lora),
            "lora_b": (self.lora_b, d.parameter, d.lora),
        }
        weight = self.weight(d.compute if plain else F32).to(d.compute)
        grad = self.grad.to(d.out)
        if magnitudes:
            weight, grad = weight.abs(), grad.abs()
        leaves, operands = {}, {}
        for name, (tensor, leaf_dtype, operand_dtype) in sources.items():
            operands[name] = None
            if tensor is not None:
                leaf = tensor.detach().to(leaf_dtype)
                leaves[name] = (leaf.abs() if magnitudes else leaf).requires_grad_()
                operands[name] = leaves[name].to(operand_dtype)
        y = linear_reference(
            operands["x"],
            weight,
            operands["bias"],
            operands["lora_a"],
            operands["lora_b"],
            scaling=self.case.scaling,
            dropout=self.case.dropout or 0.0,
            keep=self.keep,
        )
        return _results(y.to(d.out), leaves, grad)


def _results(y: Tensor, leaves: dict[str, Tensor], grad: Tensor) -> dict[str, Tensor]:
    results = {"y": y.detach()}
    if leaves:
        grads = torch.autograd.grad(y, list(leaves.values()), grad)
        results |= {f"grad {name}": g for name, g in zip(leaves, grads, strict=True)}
    return results
