"""Correctness: checks a candidate's results; only candidates with right results are timed."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from qlora_compile.kernels import workspace
from qlora_compile.kernels.selection import Choice
from qlora_compile.tuning.operands import Operands

FACTOR = 2.0
"""A candidate's error may be this many times that of the plain computation in the same dtypes."""


_FLOAT32 = torch.finfo(torch.float32).eps

WRONG = "wrong result"
"""The beginning of the reason for rejecting a candidate with wrong numbers."""


class Correctness:
    """The expected results for `operands`; `allowed` holds the largest error that each result may
    have, relative to its Euclidean norm."""

    def __init__(self, operands: Operands) -> None:
        self.operands = operands
        self._rows = operands.checked
        self._exact = operands.expected(exact=True)
        plain = operands.expected(exact=False)
        problem = operands.problem
        dtypes = (problem.compute_dtype, problem.lora_dtype, problem.out_dtype, problem.x_dtype)
        lowest = max(torch.finfo(dtype).eps for dtype in dtypes)
        # The order of a sum and the last rounding are a matter of luck, so their differences are
        # allowed on top: a chain of L additions is off by about eps √L / 5. In float64 the exact
        # results have such errors themselves.
        longest = max(problem.m, problem.k, *(part.n for part in problem.parts))
        chain = max(2.0, math.sqrt(longest) / 4)
        luck = 64 * lowest if lowest < _FLOAT32 else chain * _FLOAT32
        self.allowed = {
            name: FACTOR * max(_error(plain[name], exact), lowest / 4) + luck
            for name, exact in self._exact.items()
        }

    def problem_with(self, choice: Choice) -> str | None:
        """Run the choice; return which result is wrong and by how much, or None."""
        # Otherwise right results that an earlier candidate left in memory would be accepted.
        workspace.poison()
        for tensors, _ in self.operands.group:
            if tensors.low_rank is not None and self.operands.problem.direction == "forward":
                tensors.low_rank.fill_(math.nan)
        results = self.operands.run(choice.variant, choice.config)
        for name, exact in self._exact.items():
            if name not in results:
                return f"{WRONG}: it gives no {name}"
            value = results[name]
            if name == "grad x" or name.partition(" ")[0] == "y":
                value = value[self._rows]
            if value.shape != exact.shape:
                return f"{WRONG}: {name} is {list(value.shape)}, not {list(exact.shape)}"
            error = _error(value, exact)
            if not error <= self.allowed[name]:
                return (
                    f"{WRONG}: {name} is off by {error:.1e} of its norm, "
                    f"allowed {self.allowed[name]:.1e}"
                )
        return None


def _error(value: Tensor, exact: Tensor) -> float:
    scale = float(exact.norm()) or 1.0
    return float((value.to(exact.dtype) - exact).norm()) / scale
