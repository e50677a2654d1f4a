"""Regions in several threads at once, as autograd's threads recompute checkpoints."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

import qlora_compile
from qlora_compile.capture.regions import Region, region_of
from tests.test_equality import without_inductor

__all__ = ["without_inductor"]

THREADS = 2


class Meeting:
    """A place where blocks of several threads wait for each other, once there is a barrier."""

    barrier: threading.Barrier | None = None
    met = 0


@torch.compiler.disable
def meet() -> None:
    if Meeting.barrier is not None:
        Meeting.barrier.wait(timeout=60)
        Meeting.met += 1


class First(nn.Module):
    """Two Linears, and between them the end of a graph, at which the threads meet."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.up(x)
        meet()  # pyright: ignore[reportCallIssue]
        return self.down(y) + x


class Second(First):
    """The same as a kind of its own."""


def compiled(block: nn.Module) -> Any:
    model = nn.Sequential(block, nn.Linear(8, 8))
    config = LoraConfig(r=2, target_modules=["up", "down"], init_lora_weights=False)
    return qlora_compile.optimize(model, config, quantize="int8", scope="model").train()


def recomputed(model: Any, x: torch.Tensor) -> torch.Tensor:
    """Return the loss of a call that runs again, to its end, in the backward."""
    with set_checkpoint_early_stop(False):
        return checkpoint(model, x, use_reentrant=False).sum()


def regions(model: Any) -> list[Region]:
    found = (region_of(module) for module in model.modules())
    return [region for region in found if region is not None]


def graphs(model: Any) -> list[list[int]]:
    return [[id(graph) for graph, _ in region.graphs or ()] for region in regions(model)]


@pytest.mark.usefixtures("without_inductor")
def test_regions_recomputed_in_two_threads_do_not_mix() -> None:
    """Each thread enters its region, and only then do both go on to its second graph."""
    models = [compiled(First()), compiled(Second())]
    x = torch.randn(4, 8)
    for model in models:
        recomputed(model, x).backward()
    alone = [graphs(model) for model in models]
    reports = [str(qlora_compile.explain(model)) for model in models]
    gradients = [[p.grad.clone() for p in m.parameters() if p.grad is not None] for m in models]
    losses = []
    for model in models:
        model.zero_grad()
        losses.append(recomputed(model, x))
    Meeting.barrier, Meeting.met = threading.Barrier(THREADS), 0
    try:
        with ThreadPoolExecutor(THREADS) as pool:
            for done in [pool.submit(loss.backward) for loss in losses]:
                done.result(timeout=120)
    finally:
        Meeting.barrier = None
    assert Meeting.met == THREADS
    assert [graphs(model) for model in models] == alone
    assert all(len(set(each)) == len(each) > 1 for model in alone for each in model)
    assert [str(qlora_compile.explain(model)) for model in models] == reports
    for model, expected in zip(models, gradients, strict=True):
        found = [p.grad for p in model.parameters() if p.grad is not None]
        for mine, its in zip(found, expected, strict=True):
            torch.testing.assert_close(mine, its)
