"""Operands of a problem to measure it with, and what its results must be."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from qlora_compile.kernels.dropout import keep_mask
from qlora_compile.kernels.formats.formats import UNQUANTIZED, format_named
from qlora_compile.kernels.variants.base import (
    Config,
    LinearSpec,
    LinearTensors,
    NeedsGradient,
    Variant,
)
from qlora_compile.packed import NESTED_BLOCK_SIZE
from qlora_compile.problem import Problem

DROPOUT = 0.1
_SCALING = 2.0
_QUANTIZED = 1 << 18
"""Weights that are quantised; the others repeat them, which costs less and decodes as fast."""

_CHECKED_ROWS = 64
_CHUNK = 512


@dataclass(frozen=True)
class Operands:
    """One call of `problem`: random activations, gradients and adapter over a random weight."""

    problem: Problem
    spec: LinearSpec
    tensors: LinearTensors
    grad: Tensor

    @property
    def nbytes(self) -> int:
        tensors = (self.tensors.x, self.grad, *self.tensors.planes)
        return sum(t.numel() * t.element_size() for t in tensors)

    def run(self, variant: Variant, config: Config) -> dict[str, Tensor]:
        """The problem's results by `variant`: y, or the gradients of x and the adapter."""
        tensors = self.tensors
        if self.problem.direction == "forward":
            kept = tensors.low_rank
            results = {"y": variant.forward(tensors, self.spec, config)}
            return results if kept is None else {**results, "low rank": kept}
        needs = NeedsGradient(x=True, adapter=self.problem.rank > 0, bias=False)
        grads = variant.backward(self.grad, tensors, self.spec, needs, config)
        named = {"grad x": grads.x, "grad lora_a": grads.lora_a, "grad lora_b": grads.lora_b}
        return {name: value for name, value in named.items() if value is not None}

    @property
    def checked(self) -> Tensor:
        """The rows of y and grad x that are compared: all over, the first and the last too."""
        rows = self.problem.m
        count = min(rows, _CHECKED_ROWS)
        rows = [round(i * (rows - 1) / max(count - 1, 1)) for i in range(count)]
        return torch.tensor(rows, device=self.tensors.x.device)

    def expected(self, *, exact: bool) -> dict[str, Tensor]:
        """What `run` must return, `checked` rows only of y and grad x: by the specification in
        float64, or plainly in the problem's dtypes."""
        p, spec, tensors = self.problem, self.spec, self.tensors
        compute, lora, out = p.compute_dtype, p.lora_dtype, p.out_dtype
        if exact:
            compute = lora = out = torch.float64
        wide = torch.promote_types(torch.float32, compute)
        rows = self.checked
        x, grad = tensors.x[rows].to(compute), self.grad[rows].to(compute)
        y = x.new_empty(len(rows), p.n)
        grad_x = x.new_zeros(len(rows), p.k, dtype=wide)
        for n, weight in self._weight(compute):
            y[:, n] = x @ weight.t()
            grad_x += grad[:, n] @ weight
        if tensors.bias is not None:
            y += tensors.bias.to(compute)
        y = y.to(wide)
        low = grad_a = grad_b = None
        if tensors.lora_a is not None and tensors.lora_b is not None:
            a, b = tensors.lora_a.to(lora), tensors.lora_b.to(lora)
            scaling = spec.scaling / (1 - spec.dropout)
            keep = self._keep(slice(0, p.m), lora)
            kept = 1.0 if keep is None else keep[rows]
            y += (tensors.x[rows].to(lora) * kept @ a.t() @ b.t()).to(wide) * scaling
            grad_x += (self.grad[rows].to(lora) @ b @ a * kept).to(wide) * scaling
            low, grad_a, grad_b = self._thin(a, b, lora)
        if p.direction == "forward":
            results = {"y": y.to(out), "low rank": low if p.keeps_low_rank else None}
        else:
            x_dtype = torch.float64 if exact else p.x_dtype
            results = {"grad x": grad_x.to(x_dtype), "grad lora_a": grad_a, "grad lora_b": grad_b}
        return {name: value for name, value in results.items() if value is not None}

    def _thin(self, a: Tensor, b: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """S and the adapter's gradients, of all rows."""
        spec, x = self.spec, self.tensors.x
        scaling = spec.scaling / (1 - spec.dropout)
        wide = torch.promote_types(torch.float32, dtype)
        grad_a, grad_b = (t.new_zeros(t.shape, dtype=wide) for t in (a, b))
        lows = []
        for start in range(0, len(x), _CHUNK):
            m = slice(start, min(start + _CHUNK, len(x)))
            keep = self._keep(m, dtype)
            dropped = x[m].to(dtype) if keep is None else x[m].to(dtype) * keep
            grad = self.grad[m].to(dtype)
            lows.append(dropped @ a.t() * scaling)
            grad_a += (grad @ b * scaling).t() @ dropped
            grad_b += grad.t() @ lows[-1]
        return torch.cat(lows), grad_a, grad_b

    def _keep(self, rows: slice, dtype: torch.dtype) -> Tensor | None:
        spec, seed = self.spec, self.tensors.seed
        if seed is None:
            return None
        bounds = (rows.start, rows.stop)
        return keep_mask(seed, spec.stream, spec.dropout, bounds, spec.k).to(dtype)

    def _weight(self, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
        """W by blocks of rows, so that no copy of it in float64 is needed."""
        decoded = dtype if self.spec.format is None else torch.float32
        for n, block in self.spec.decoded(self.tensors.planes, decoded, _CHUNK):
            yield n, block.to(dtype)


def operands(problem: Problem, seed: int = 0) -> Operands:
    """Random operands on the problem's device."""
    p = problem
    device = torch.device(p.device)
    generator = torch.Generator(device).manual_seed(seed)

    def normal(rows: int, columns: int, scale: float, dtype: torch.dtype) -> Tensor:
        made = torch.randn(rows, columns, generator=generator, device=device) * scale
        return made.to(dtype)

    if p.format == UNQUANTIZED:
        planes = [normal(p.n, p.k, p.k**-0.5, p.compute_dtype)]
    else:
        planes = _planes(p, normal(min(p.n, max(1, _QUANTIZED // p.k)), p.k, 1.0, torch.float32))
    lora_a = lora_b = drawn = low_rank = None
    if p.rank:
        lora_a = normal(p.rank, p.k, p.k**-0.5, p.lora_dtype)
        lora_b = normal(p.n, p.rank, p.rank**-0.5, p.lora_dtype)
        if p.dropout:
            drawn = torch.tensor([12345 + seed], device=device)
        if p.keeps_low_rank:
            low_rank = torch.empty(p.m, p.rank, dtype=p.lora_dtype, device=device)
    bias = normal(1, p.n, 1.0, p.compute_dtype)[0] if p.bias else None
    spec = LinearSpec.of(p, scaling=_SCALING, dropout=DROPOUT, stream=0)
    x = normal(p.m, p.k, 1.0, p.x_dtype)
    grad = normal(p.m, p.n, 1.0, p.out_dtype)
    tensors = LinearTensors(x, planes, bias, lora_a, lora_b, drawn, low_rank)
    made = Operands(p, spec, tensors, grad)
    if p.direction == "backward" and low_rank is not None and lora_a is not None:
        assert lora_b is not None
        low_rank.copy_(made._thin(lora_a, lora_b, p.lora_dtype)[0])
    return made


def _planes(problem: Problem, weight: Tensor) -> list[Tensor]:
    """Planes of a weight [N, K] that repeats the rows of `weight`."""
    p = problem
    quant_format = format_named(p.format)
    packed = quant_format.quantize(
        weight * p.k**-0.5,
        block_size="row" if p.block_size == p.k else p.block_size,
        double_quantize=p.double_quantized,
    )
    elements = p.n * p.k
    blocks = math.ceil(elements / p.block_size)

    def repeated(plane: Tensor, count: int) -> Tensor:
        flat = plane.reshape(-1)
        return flat.repeat(math.ceil(count / flat.numel()))[:count]

    codes = repeated(packed.codes, math.ceil(elements * quant_format.bits / 8))
    changes: dict[str, Any] = {"codes": codes, "absmax": repeated(packed.absmax, blocks)}
    if packed.nested_absmax is not None:
        nested_blocks = math.ceil(blocks / NESTED_BLOCK_SIZE)
        changes["nested_absmax"] = repeated(packed.nested_absmax, nested_blocks)
    return replace(packed, shape=(p.n, p.k), **changes).planes
