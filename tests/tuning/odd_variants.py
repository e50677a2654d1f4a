"""Variants that the cost model prefers to all others and that must never be chosen."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from qlora_compile.kernels.problem import Problem
from qlora_compile.kernels.variants.dense import Dense, DenseConfig


class Preferred(Dense):
    """Dense, in one config that seems to take no time."""

    def configs(self, problem: Problem) -> tuple[DenseConfig]:
        return (DenseConfig(problem.compute_dtype),)

    def cost(self, problem: Any, config: Any, device: Any) -> float:
        return 1e-12


class Wrong(Preferred):
    """Off by a hundredth."""

    name = "wrong"

    def forward_group(self, group: Any, config: Any) -> list[Tensor]:
        return [y * 1.01 for y in super().forward_group(group, config)]


class WrongAtTheEnd(Preferred):
    """In the last number of y, or of the gradient of x, as where a tail is forgotten."""

    name = "wrong_at_the_end"

    def forward_group(self, group: Any, config: Any) -> list[Tensor]:
        ys = super().forward_group(group, config)
        for y in ys:
            y[-1, -1] = 0
        return ys

    def backward_group(self, grads: Any, group: Any, needs: Any, config: Any) -> Any:
        grad_x, others = super().backward_group(grads, group, needs, config)
        assert grad_x is not None
        grad_x[-1, -1] = 0
        return grad_x, others


class Nan(Preferred):
    name = "nan"

    def forward_group(self, group: Any, config: Any) -> list[Tensor]:
        return [y * float("nan") for y in super().forward_group(group, config)]


class OutOfMemory(Preferred):
    name = "out_of_memory"

    def forward_group(self, group: Any, config: Any) -> list[Tensor]:
        raise torch.OutOfMemoryError("tried to allocate 1 PiB\nand more lines")


class Mistaken(Preferred):
    """Has a bug that has nothing to do with the machine."""

    name = "mistaken"

    def forward_group(self, group: Any, config: Any) -> list[Tensor]:
        raise TypeError("a mistake")


class Crashing(Preferred):
    name = "crashing"
    isolated = True

    def forward_group(self, group: Any, config: Any) -> list[Tensor]:
        os.kill(os.getpid(), signal.SIGSEGV)
        raise AssertionError("unreachable")


class Hanging(Preferred):
    name = "hanging"
    isolated = True

    def forward_group(self, group: Any, config: Any) -> list[Tensor]:
        time.sleep(600)
        raise AssertionError("unreachable")


class CrashingLater(Preferred):
    """Right at first."""

    name = "crashing_later"
    isolated = True
    calls = 0

    def forward_group(self, group: Any, config: Any) -> list[Tensor]:
        type(self).calls += 1
        if self.calls > 3:
            os.abort()
        return super().forward_group(group, config)


class FailingLater(CrashingLater):
    """Right at first, then fails as a fault that stays with a CUDA context does."""

    name = "failing_later"

    def forward_group(self, group: Any, config: Any) -> list[Tensor]:
        type(self).calls += 1
        if self.calls > 3:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return Preferred.forward_group(self, group, config)


class TooLarge(Preferred):
    """Raises one of Triton's errors, which are not RuntimeErrors."""

    name = "too_large"

    def forward_group(self, group: Any, config: Any) -> list[Tensor]:
        from triton.runtime.errors import OutOfResources

        raise OutOfResources(1 << 20, 1 << 17, "shared memory")


class IsolatedMistaken(Mistaken):
    name = "isolated_mistaken"
    isolated = True


class Forgetful(Preferred):
    """Keeps no S. It is the last to run."""

    name = "forgetful"

    def cost(self, problem: Any, config: Any, device: Any) -> float:
        return 1.9 * Dense().cost(problem, Dense().configs(problem)[0], device)

    def forward_group(self, group: Any, config: Any) -> list[Tensor]:
        forgotten = [(replace(tensors, low_rank=None), spec) for tensors, spec in group]
        return super().forward_group(forgotten, config)
