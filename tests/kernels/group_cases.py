"""One call of siblings with everything it is held against."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
from hypothesis import strategies as st
from torch import Tensor

from qlora_compile.kernels import linear_call, op
from qlora_compile.kernels.dropout import keep_mask
from qlora_compile.kernels.problem import Direction, Problem
from qlora_compile.kernels.selection import Choice
from qlora_compile.kernels.variants.base import Config, LinearTensors, Variant
from tests.kernels.linear_cases import Call, Case

_PER_SIBLING = {"bias": 2, "lora_a": 3, "lora_b": 4, "n": 7, "scaling": 10, "stream": 12}


@dataclass(frozen=True)
class GroupCall:
    """`calls` share x and the dropout's seed."""

    calls: tuple[Call, ...]

    @classmethod
    def of(cls, *cases: Case) -> GroupCall:
        """Cases that differ in n, bias, rank, scaling and seed alone."""
        first, *others = (replace(case, stream=i).build() for i, case in enumerate(cases))
        seed = torch.tensor([987654321]) if first.case.dropout is not None else None
        calls = []
        for call in (first, *others):
            keep = None
            if seed is not None and call.lora_a is not None:
                bounds = (0, math.prod(call.case.batch))
                keep = keep_mask(seed, call.case.stream, call.spec.dropout, bounds, call.case.k)
                keep = keep.view(first.x.shape)
            mask = seed if call.lora_a is not None else None
            calls.append(replace(call, x=first.x, seed=mask, keep=keep))
        return cls(tuple(calls))

    @property
    def case(self) -> Case:
        return self.calls[0].case

    def problem(self, direction: Direction, keeps: bool = False) -> Problem:
        kept = torch.empty(0) if keeps else None
        group = [
            (LinearTensors(c.x, c.planes, c.bias, c.lora_a, c.lora_b, c.seed, kept), c.spec)
            for c in self.calls
        ]
        return linear_call.group_problem(direction, math.prod(self.case.batch), group)

    @property
    def arguments(self) -> list[Any]:
        """As the op takes them."""
        rows = [call.arguments for call in self.calls]
        adapted = next((call for call in self.calls if call.lora_a is not None), self.calls[0])
        arguments = list(adapted.arguments)
        arguments[1] = [plane for call in self.calls for plane in call.planes]
        for position in _PER_SIBLING.values():
            arguments[position] = [row[position] for row in rows]
        return arguments

    def fused(
        self, variant: Variant, config: Config, backward_config: Config, keeps: bool
    ) -> dict[str, Tensor]:
        """Every y and all gradients through the op, in the names of `reference`."""

        def choose(problem: Problem, source: str) -> Choice:
            is_backward = problem.direction == "backward"
            return Choice(variant, backward_config if is_backward else config, 0.0)

        arguments = self.arguments
        leaves = {"x": arguments[0].detach().requires_grad_()}
        arguments[0] = leaves["x"]
        for name in ("bias", "lora_a", "lora_b"):
            values = arguments[_PER_SIBLING[name]]
            for i, value in enumerate(values):
                if value is not None:
                    values[i] = leaves[f"{name} {i}"] = value.detach().requires_grad_()
        keeping = mock.patch.object(op, "keeps_low_rank", return_value=keeps)
        with mock.patch.object(linear_call, "select", side_effect=choose), keeping:
            ys = op.QLORA_LINEAR_GROUP(*arguments)
            grads = torch.autograd.grad(ys, list(leaves.values()), [c.grad for c in self.calls])
        results = {f"y {i}": y.detach() for i, y in enumerate(ys)}
        return results | {f"grad {n}": g for n, g in zip(leaves, grads, strict=True)}

    def reference(self, *, plain: bool = False, magnitudes: bool = False) -> dict[str, Tensor]:
        """As `Call.reference`; the gradients of x are added up as autograd does."""
        results: dict[str, Tensor] = {}
        for i, call in enumerate(self.calls):
            for name, value in call.reference(plain=plain, magnitudes=magnitudes).items():
                if name != "grad x":
                    results[f"{name} {i}"] = value
                else:
                    results[name] = results[name] + value if name in results else value
        return results


@st.composite
def groups(draw: st.DrawFn, case: Case) -> GroupCall:
    """Two or three siblings of `case`."""
    count = draw(st.integers(2, 3))
    return GroupCall.of(
        *(
            replace(
                case,
                n=draw(st.sampled_from([1, 13, 64, 97])),
                rank=draw(st.sampled_from([0, 1, 3, 16])) if case.rank else 0,
                bias=draw(st.booleans()),
                scaling=draw(st.sampled_from([1.0, 2.0])),
                seed=case.seed + i,
            )
            for i in range(count)
        )
    )
