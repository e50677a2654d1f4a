"""Finds every Triton kernel that a Problem can need on a target, without compiling any.

Launches are recorded over meta tensors, through the variants' own forward and backward.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from qlora_compile.kernels import selection
from qlora_compile.kernels.device_model import DEVICE_MODELS, model_of_target
from qlora_compile.kernels.formats.formats import meta_tensors
from qlora_compile.kernels.gpu.ahead_of_time import TARGETS, cache_key
from qlora_compile.kernels.gpu.launch import Launch, recording
from qlora_compile.kernels.gpu.target import assuming
from qlora_compile.kernels.problem import Problem
from qlora_compile.kernels.selection import Choice
from qlora_compile.kernels.variants.base import (
    Config,
    Linear,
    LinearSpec,
    LinearTensors,
    NeedsGradient,
    Variant,
)
from qlora_compile.kernels.variants.dense import DenseConfig
from qlora_compile.kernels.variants.triton_variant import TritonVariant

_ROW_BLOCK = 64
"""Rows of a block. The number of such blocks decides what is launched; of the remaining rows only
the divisors matter."""

# No kernel is specialised for these numbers.
_FREE: dict[str, Any] = {"dropout": 0.1, "stream": 2}

_RESTS = (0, 8, 4, 2, 1)
"""Subtracted from a multiple of 64, these give row counts that are divisible by 64, 8, 4, 2 and 1.
Triton's JIT compiles anew if 16 divides an integer argument, and some arguments are multiples of
the rows."""


@dataclass(frozen=True)
class VariantCall:
    """One call of a variant over meta tensors, for `rows` rows out of the problem's bucket.
    factor_dtype, bias_dtype: the dtypes of the adapter's factors and of the bias, which a Problem
    leaves open."""

    variant: Variant
    config: Config
    problem: Problem
    rows: int
    factor_dtype: torch.dtype
    bias_dtype: torch.dtype

    def launches(self, target: str) -> list[Launch]:
        problem = self.problem
        group = [self._linear(part) for part in problem.parts]
        with assuming(target), recording() as launches:
            if problem.direction == "forward":
                self.variant.forward_group(group, self.config)
            else:
                grads = [_meta(self.rows, part.n, dtype=part.out_dtype) for part in problem.parts]
                needs = NeedsGradient(True, bool(problem.rank), problem.bias)
                self.variant.backward_group(grads, group, needs, self.config)
        return launches

    def _linear(self, problem: Problem) -> Linear:
        rank, factors = problem.rank, self.factor_dtype

        def adapters(*shape: int, dtype: torch.dtype, if_any: bool = True) -> Tensor | None:
            return _meta(*shape, dtype=dtype) if rank and if_any else None

        tensors = LinearTensors(
            x=_meta(self.rows, problem.k, dtype=problem.x_dtype),
            planes=meta_tensors(problem.layout, problem.compute_dtype),
            bias=_meta(problem.n, dtype=self.bias_dtype) if problem.bias else None,
            lora_a=adapters(rank, problem.k, dtype=factors),
            lora_b=adapters(problem.n, rank, dtype=factors),
            scaling=adapters(1, dtype=torch.float32),
            seed=adapters(1, dtype=torch.int64, if_any=problem.dropout),
            low_rank=adapters(
                *(self.rows, rank), dtype=problem.lora_dtype, if_any=problem.keeps_low_rank
            ),
        )
        return tensors, LinearSpec.of(problem, **_FREE)


@dataclass(frozen=True)
class NeededKernel:
    """A kernel, by its key in Triton's cache. It is the launch number `position` of `call`, one of
    the calls that need it; `variants` are all that need it."""

    key: str
    name: str
    call: VariantCall
    position: int
    variants: tuple[str, ...]

    def launch(self, target: str) -> Launch:
        return self.call.launches(target)[self.position]


def needed_kernels(
    problems: Iterable[Problem], target: str, limit: int | None
) -> list[NeededKernel]:
    """Return the kernels that the best candidates for each problem on `target` launch, each once.

    target: a key of `ahead_of_time.TARGETS`. limit: how many candidates of a problem to take, by
    the cost model of every card of the target; None for all. Raises as `ahead_of_time.cache_key`.
    """
    found: dict[str, NeededKernel] = {}
    for problem in dict.fromkeys(replace(problem, device="meta") for problem in problems):
        for variant, config in _candidates(problem, target, limit):
            for call in _calls(variant, config, problem, target):
                for position, (key, name) in enumerate(_keys(call, target)):
                    known = found.get(key)
                    if known is None:
                        found[key] = NeededKernel(key, name, call, position, (variant.name,))
                    elif variant.name not in known.variants:
                        names = (*known.variants, variant.name)
                        found[key] = replace(known, variants=names)
    return list(found.values())


def _candidates(problem: Problem, target: str, limit: int | None) -> list[tuple[Variant, Config]]:
    cards = [model for model in DEVICE_MODELS if model.target == target]
    best: dict[tuple[Variant, Config], None] = {}
    for card in cards or [model_of_target(target)]:
        with assuming(target):
            choices = selection.candidates(problem, card)
            if limit is not None:
                choices = selection.shortlist(choices, problem, limit)
        best |= dict.fromkeys((c.variant, c.config) for c in choices if _launches_triton(c))
    return list(best)


def _launches_triton(choice: Choice) -> bool:
    decodes = isinstance(choice.config, DenseConfig) and choice.config.decoder is not None
    return decodes or isinstance(choice.variant, TritonVariant)


def _calls(
    variant: Variant, config: Config, problem: Problem, target: str
) -> Iterator[VariantCall]:
    """Yield calls that together launch every kernel which any number of rows in the problem's
    bucket launches."""
    # A float32 product of an adapter has float32 factors; a narrower product may have either, as
    # PEFT keeps factors in float32 unless told otherwise. Biases are in the model's dtype.
    factors = dict.fromkeys((problem.lora_dtype, torch.float32)) if problem.rank else ()
    biases = dict.fromkeys((problem.x_dtype, problem.compute_dtype)) if problem.bias else ()
    unused = (problem.compute_dtype,)
    for factor, bias in itertools.product(factors or unused, biases or unused):
        call = VariantCall(variant, config, problem, problem.m, factor, bias)
        lowest = problem.m // 2 + 1
        if problem.m <= _ROW_BLOCK:
            yield from (replace(call, rows=rows) for rows in range(lowest, problem.m + 1))
        else:
            first, last = -(-lowest // _ROW_BLOCK), problem.m // _ROW_BLOCK
            for block in _distinct_blocks(call, target, first, last):
                rows = block * _ROW_BLOCK
                yield from (replace(call, rows=rows - rest) for rest in _RESTS)


def _distinct_blocks(call: VariantCall, target: str, first: int, last: int) -> list[int]:
    """Return numbers of row blocks from `first` to `last` that differ in what they launch.

    The number of parts of a reduction only rises or only falls with the rows, so that between two
    numbers that launch the same kernels no other kernels are launched.
    """

    @functools.cache
    def keys(block: int) -> list[tuple[str, str]]:
        return _keys(replace(call, rows=block * _ROW_BLOCK), target)

    found: dict[int, None] = {}
    spans = [(first, last)]
    while spans:
        low, high = spans.pop()
        found |= dict.fromkeys((low,) if keys(low) == keys(high) else (low, high))
        if keys(low) != keys(high) and high - low > 1:
            middle = (low + high) // 2
            spans += [(low, middle), (middle, high)]
    return list(found)


def _keys(call: VariantCall, target: str) -> list[tuple[str, str]]:
    """Return key and name of every launch of a call, in order."""
    return [
        (cache_key(launch, TARGETS[target]), launch.kernel.__name__)
        for launch in call.launches(target)
    ]


def _meta(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")
