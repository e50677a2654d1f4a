"""One call of siblings with everything it is compared with."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from unittest import mock

import torch
from hypothesis import strategies as st
from torch import Tensor

from qlora_compile.kernels import op
from qlora_compile.kernels.call import Call as FusedCall
from qlora_compile.kernels.dropout import keep_mask
from qlora_compile.kernels.linear_call import problem_of
from qlora_compile.kernels.problem import Direction, Problem
from qlora_compile.kernels.selection import Choice
from qlora_compile.kernels.variants.base import Config, Variant
from tests.kernels.linear_cases import Call, Case


@dataclass(frozen=True)
class GroupCall:
    """`calls` share x and the dropout's seed."""

    calls: tuple[Call, ...]

    @classmethod
    def of(cls, *cases: Case) -> GroupCall:
        """Return cases that differ in n, bias, rank, scaling and seed alone."""
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

    def fused_call(self, save_low_rank: bool = False) -> FusedCall:
        """Return the Call for the op."""
        calls = [call.fused_call() for call in self.calls]
        adapted = next((call for call in calls if call.rank), calls[0])
        linears = tuple(linear for call in calls for linear in call.linears)
        return replace(adapted, linears=linears, save_low_rank=save_low_rank)

    def problem(self, direction: Direction, keeps: bool = False) -> Problem:
        rows = math.prod(self.case.batch)
        return problem_of(self.fused_call(keeps), direction, rows, self.calls[0].x)

    def fused(
        self, variant: Variant, config: Config, backward_config: Config, keeps: bool
    ) -> dict[str, Tensor]:
        """Return every y and all gradients through the op, in the names of `reference`."""

        def choose(problem: Problem, records: str) -> Choice:
            is_backward = problem.direction == "backward"
            return Choice(variant, backward_config if is_backward else config, 0.0)

        leaves = {"x": self.calls[0].x.detach().requires_grad_()}
        tensors: list[Tensor] = []
        for i, each in enumerate(self.calls):
            call, own = each.leaves(("bias", "lora_a", "lora_b"))
            leaves |= {f"{name} {i}": leaf for name, leaf in own.items()}
            tensors += call.tensors
        seed = next((call.seed for call in self.calls if call.seed is not None), None)
        with mock.patch.object(op, "select", side_effect=choose):
            results = op.QLORA_LINEAR(leaves["x"], tensors, seed, str(self.fused_call(keeps)))
            ys = results[: len(self.calls)]
            grads = torch.autograd.grad(ys, list(leaves.values()), [c.grad for c in self.calls])
        found = {f"y {i}": y.detach() for i, y in enumerate(ys)}
        return found | {f"grad {n}": g for n, g in zip(leaves, grads, strict=True)}

    def reference(self, *, plain: bool = False, magnitudes: bool = False) -> dict[str, Tensor]:
        """Do as `Call.reference`; the gradients of x are added up as autograd does."""
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
    """Return two or three siblings of `case`."""
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
