"""Operands: random operands to measure a problem with, and the results they must give."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from qlora_compile.kernels.dropout import keep_mask
from qlora_compile.kernels.formats.formats import format_named
from qlora_compile.kernels.problem import Problem
from qlora_compile.kernels.variants.base import (
    Config,
    LinearSpec,
    LinearTensors,
    NeedsGradient,
    Variant,
    adapter_scaling,
)

DROPOUT = 0.1
_SCALING = 2.0
_QUANTIZED = 1 << 18
"""How many elements of a weight are quantised. The rest of the planes repeats them, which is
cheaper to make and decodes as fast."""

_CHECKED_ROWS = 64
_CHUNK = 512


@dataclass(frozen=True)
class Operands:
    """The operands of one call of `problem`, all random.

    group: the tensors and the spec of each Linear, in the order of the problem's parts. grads: for
    a backward, the gradient [M, N] of each Linear's result.
    """

    problem: Problem
    group: list[tuple[LinearTensors, LinearSpec]]
    grads: list[Tensor]

    @property
    def x(self) -> Tensor:
        return self.group[0][0].x

    @property
    def nbytes(self) -> int:
        planes = [plane for tensors, _ in self.group for plane in tensors.planes]
        return sum(t.numel() * t.element_size() for t in (self.x, *self.grads, *planes))

    def copied(self) -> Operands:
        """Return a copy: the same numbers in other memory."""
        tensors, grads = copy.deepcopy(([each for each, _ in self.group], self.grads))
        specs = (spec for _, spec in self.group)
        return Operands(self.problem, list(zip(tensors, specs, strict=True)), grads)

    def run(self, variant: Variant, config: Config) -> dict[str, Tensor]:
        """Run `variant` and return the results by name.

        Forward: "y", and "low rank" where that is kept. Backward: "grad x", "grad lora_a",
        "grad lora_b". For siblings all names but "grad x" are numbered: "y 1", "y 2", ….
        """
        results: dict[str, Tensor | None] = {}
        if self.problem.direction == "forward":
            ys = variant.forward_group(self.group, config)
            for i, (y, (tensors, _)) in enumerate(zip(ys, self.group, strict=True)):
                results |= {self._name("y", i): y, self._name("low rank", i): tensors.low_rank}
        else:
            needs = NeedsGradient(x=True, adapter=self.problem.rank > 0, bias=False)
            grad_x, others = variant.backward_group(self.grads, self.group, needs, config)
            results["grad x"] = grad_x
            for i, grads in enumerate(others):
                results[self._name("grad lora_a", i)] = grads.lora_a
                results[self._name("grad lora_b", i)] = grads.lora_b
        return {name: value for name, value in results.items() if value is not None}

    def _name(self, name: str, position: int) -> str:
        return f"{name} {position + 1}" if len(self.group) > 1 else name

    @property
    def checked(self) -> Tensor:
        """Return the indices of the rows of y and grad x to compare, from the first to the last."""
        rows = self.problem.m
        count = min(rows, _CHECKED_ROWS)
        rows = [round(i * (rows - 1) / max(count - 1, 1)) for i in range(count)]
        return torch.tensor(rows, device=self.x.device)

    def expected(self, *, exact: bool) -> dict[str, Tensor]:
        """Return what `run` must return, with only the `checked` rows of y and grad x.

        exact: whether to compute in float64; if not, plainly in the problem's dtypes.
        """
        p = self.problem
        compute = torch.float64 if exact else p.compute_dtype
        out = torch.float64 if exact else p.out_dtype
        x_dtype = torch.float64 if exact else p.x_dtype
        lora = torch.float64 if exact else p.lora_dtype
        forward = p.direction == "forward"
        grad_x = self.x.new_zeros(len(self.checked), p.k, dtype=_wide(compute))
        results: dict[str, Tensor] = {}
        for i, (part, (tensors, spec)) in enumerate(zip(p.parts, self.group, strict=True)):
            if forward:
                results[self._name("y", i)] = self._y(i, compute, lora).to(out)
                if part.keeps_low_rank:
                    results[self._name("low rank", i)] = _low_rank(tensors, spec, lora)
            else:
                # Rounded for each Linear before the sum, as autograd does too.
                grad_x += self._grad_x(i, compute, lora).to(x_dtype)
                if part.rank:
                    grad_a, grad_b = _adapter_gradients(tensors, spec, self.grads[i], lora)
                    results[self._name("grad lora_a", i)] = grad_a
                    results[self._name("grad lora_b", i)] = grad_b
        if not forward:
            results["grad x"] = grad_x.to(x_dtype)
        return results

    def _y(self, position: int, compute: torch.dtype, lora: torch.dtype) -> Tensor:
        """Return the `checked` rows of the result of the Linear at `position`."""
        tensors, spec = self.group[position]
        x = tensors.x[self.checked]
        y = x.new_empty(len(x), spec.n, dtype=compute)
        for n, weight in _weight(tensors, spec, compute):
            y[:, n] = x.to(compute) @ weight.t()
        if tensors.bias is not None:
            y += tensors.bias.to(compute)
        y = y.to(_wide(compute))
        if tensors.lora_a is not None and tensors.lora_b is not None:
            a, b = tensors.lora_a.to(lora), tensors.lora_b.to(lora)
            mask = self._mask(position, lora)
            y += (x.to(lora) * mask @ a.t() @ b.t()).to(y.dtype) * adapter_scaling(tensors, spec)
        return y

    def _grad_x(self, position: int, compute: torch.dtype, lora: torch.dtype) -> Tensor:
        """Return the `checked` rows of x's gradient through the Linear at `position`."""
        tensors, spec = self.group[position]
        grad = self.grads[position][self.checked]
        grad_x = grad.new_zeros(len(grad), spec.k, dtype=_wide(compute))
        for n, weight in _weight(tensors, spec, compute):
            grad_x += grad[:, n].to(compute) @ weight
        if tensors.lora_a is not None and tensors.lora_b is not None:
            a, b = tensors.lora_a.to(lora), tensors.lora_b.to(lora)
            mask = self._mask(position, lora)
            added = (grad.to(lora) @ b @ a * mask).to(grad_x.dtype)
            grad_x += added * adapter_scaling(tensors, spec)
        return grad_x

    def _mask(self, position: int, dtype: torch.dtype) -> Tensor | float:
        """Return the `checked` rows of the dropout mask, 1 if there is no dropout."""
        mask = _dropout_mask(*self.group[position], slice(0, self.problem.m), dtype)
        return 1.0 if mask is None else mask[self.checked]


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(torch.float32, dtype)


def _low_rank(tensors: LinearTensors, spec: LinearSpec, dtype: torch.dtype) -> Tensor:
    """Return S = scaling * drop(x) Aᵀ [M, R], all rows."""
    assert tensors.lora_a is not None
    a = tensors.lora_a.to(dtype)
    lows = [x @ a.t() * adapter_scaling(tensors, spec) for _, x in _dropped(tensors, spec, dtype)]
    return torch.cat(lows)


def _adapter_gradients(
    tensors: LinearTensors, spec: LinearSpec, all_grad: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return the gradients of A and B, from all rows."""
    assert tensors.lora_a is not None
    assert tensors.lora_b is not None
    a, b = tensors.lora_a.to(dtype), tensors.lora_b.to(dtype)
    grad_a, grad_b = (t.new_zeros(t.shape, dtype=_wide(dtype)) for t in (a, b))
    for m, x in _dropped(tensors, spec, dtype):
        grad = all_grad[m].to(dtype)
        grad_a += (grad @ b * adapter_scaling(tensors, spec)).t() @ x
        grad_b += grad.t() @ (x @ a.t() * adapter_scaling(tensors, spec))
    return grad_a, grad_b


def _dropped(
    tensors: LinearTensors, spec: LinearSpec, dtype: torch.dtype
) -> Iterator[tuple[slice, Tensor]]:
    """Yield x with its dropout by blocks of rows, so that no whole copy in float64 is needed."""
    for start in range(0, len(tensors.x), _CHUNK):
        m = slice(start, min(start + _CHUNK, len(tensors.x)))
        mask = _dropout_mask(tensors, spec, m, dtype)
        x = tensors.x[m].to(dtype)
        yield m, x if mask is None else x * mask


def _dropout_mask(
    tensors: LinearTensors, spec: LinearSpec, rows: slice, dtype: torch.dtype
) -> Tensor | None:
    if tensors.seed is None:
        return None
    bounds = (rows.start, rows.stop)
    return keep_mask(tensors.seed, spec.stream, spec.dropout, bounds, spec.k).to(dtype)


def _weight(
    tensors: LinearTensors, spec: LinearSpec, dtype: torch.dtype
) -> Iterator[tuple[slice, Tensor]]:
    """Yield W by blocks of rows, so that no whole copy in float64 is needed."""
    decoded = torch.float32 if spec.layout.quantized else dtype
    for n, block in spec.decoded(tensors.planes, decoded, _CHUNK):
        yield n, block.to(dtype)


def operands(problem: Problem) -> Operands:
    """Return random operands on the problem's device, the same every time."""
    device = torch.device(problem.device)
    generator = torch.Generator(device).manual_seed(0)

    def normal(rows: int, columns: int, scale: float, dtype: torch.dtype) -> Tensor:
        made = torch.randn(rows, columns, generator=generator, device=device) * scale
        return made.to(dtype)

    x = normal(problem.m, problem.k, 1.0, problem.x_dtype)
    seed = torch.tensor([12345], device=device)
    group, grads = [], []
    for stream, p in enumerate(problem.parts):
        if not p.layout.quantized:
            planes = [normal(p.n, p.k, p.k**-0.5, p.compute_dtype)]
        else:
            rows = min(p.n, max(1, _QUANTIZED // p.k))
            planes = _planes(p, normal(rows, p.k, 1.0, torch.float32))
        lora_a = lora_b = scaling = low_rank = None
        if p.rank:
            wide = torch.promote_types(torch.float32, p.lora_dtype)
            scaling = torch.full((1,), _SCALING, dtype=wide, device=device)
            lora_a = normal(p.rank, p.k, p.k**-0.5, p.lora_dtype)
            lora_b = normal(p.n, p.rank, p.rank**-0.5, p.lora_dtype)
            if p.keeps_low_rank:
                low_rank = torch.empty(p.m, p.rank, dtype=p.lora_dtype, device=device)
        bias = normal(1, p.n, 1.0, p.compute_dtype)[0] if p.bias else None
        spec = LinearSpec.of(p, dropout=DROPOUT, stream=stream)
        own_seed = seed if p.dropout else None
        tensors = LinearTensors(x, planes, bias, lora_a, lora_b, scaling, own_seed, low_rank)
        if p.direction == "backward":
            grads.append(normal(p.m, p.n, 1.0, p.out_dtype))
            if low_rank is not None:
                low_rank.copy_(_low_rank(tensors, spec, p.lora_dtype))
        group.append((tensors, spec))
    return Operands(problem, group, grads)


def _planes(problem: Problem, weight: Tensor) -> list[Tensor]:
    """Return planes of a weight [N, K] that repeat the planes of the smaller `weight`."""
    layout = problem.layout
    quant_format = format_named(layout.format)
    scaled = weight * problem.k**-0.5
    packed = quant_format.pack(scaled, layout.with_rows(weight.shape[0]))

    def repeated(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
        count, flat = math.prod(shape), tensor.reshape(-1)
        return flat.repeat(math.ceil(count / flat.numel()))[:count].view(shape)

    declared = quant_format.planes(layout)
    pairs = zip(packed.tensors, declared, strict=True)
    return [repeated(tensor, plane.shape) for tensor, plane in pairs]
