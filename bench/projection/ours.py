"""The step of this project: each group's variant as selection chooses it, by its own cost model.

A choice's seconds are taken apart by asking the variant's cost model again: without an adapter, on
a device without limits (which leaves the launches), and with a weight that needs no decoding.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeVar

import torch

from bench.projection.peer import common, outside
from bench.projection.seconds import Seconds
from bench.projection.step import RANK, Experts, Linears, Step
from bench.projection.traffic import EAGER_LOSS, Elementwise, Traffic
from qlora_compile.kernels.device_model import DeviceModel
from qlora_compile.kernels.experts.base import ExpertsProblem
from qlora_compile.kernels.experts.registry import cheapest
from qlora_compile.kernels.gpu.configs import FUSED_UTILIZATION
from qlora_compile.kernels.gpu.target import assuming
from qlora_compile.kernels.problem import Direction, Problem, bucket_rows
from qlora_compile.kernels.registry import UNQUANTIZED
from qlora_compile.kernels.selection import Choice, choose, saving_is_faster, problems_of_call
from qlora_compile.kernels.variants.fused import Fused

AnyProblem = TypeVar("AnyProblem", Problem, ExpertsProblem)

WRITTEN = {"hidden": (3, 4), "heads": (1, 3), "inner": (1, 4)}
"""16-bit values per token and column that Inductor's kernels write in a block's forward and
backward, as bench/results/block_bytes.json has them."""
READ = {"hidden": (5, 6), "heads": (1, 3), "inner": (2, 5)}


def _traffic(backward: bool, launches: int) -> Traffic:
    def moved(columns: str) -> int:
        return 2 * (WRITTEN[columns][backward] + READ[columns][backward])

    # A head's norm goes into the kernel that rotates it, which reads its rows twice.
    return Traffic(moved("hidden"), moved("heads"), 2, moved("inner"), launches, 0)


INDUCTOR = Elementwise(
    forward=_traffic(False, 6 + 1),
    backward=_traffic(True, 9 + 3),
    # optimize() leaves the model's own loss as it is unless asked.
    loss=EAGER_LOSS,
)


@dataclass(frozen=True)
class Chosen:
    """name: of the variant and its config. seconds: of one call."""

    group: str
    direction: Direction
    name: str
    seconds: float


def ours(step: Step, device: DeviceModel) -> Seconds:
    """What `chosen` takes in all blocks, and everything around it."""
    block = Seconds()
    for group in step.linears:
        forward, backward = _linears(step.rows, group, device)
        block += step.forwards * _taken_apart(*forward, device) + _taken_apart(*backward, device)
    for each in step.experts:
        forward, backward = (_experts(each, direction) for direction in ("forward", "backward"))
        block += step.forwards * _experts_taken_apart(forward, device)
        block += _experts_taken_apart(backward, device)
    block += common(step, device)
    return step.model.layers * block + INDUCTOR.seconds(step, device) + outside(step, device)


def chosen(step: Step, device: DeviceModel) -> list[Chosen]:
    """For every group of a block, forward and backward."""
    found = [
        Chosen(group.name, problem.direction, choice.name, choice.seconds)
        for group in step.linears
        for problem, choice in _linears(step.rows, group, device)
    ]
    for each in step.experts:
        for direction in ("forward", "backward"):
            problem = _experts(each, direction)
            with assuming(device.target, kind="cuda"):
                choice = cheapest(problem, device)
            found.append(Chosen(each.name, direction, choice.variant.name, choice.seconds))
    return found


def _linears(
    rows: int, group: Linears, device: DeviceModel
) -> tuple[tuple[Problem, Choice], tuple[Problem, Choice]]:
    """Forward and backward of a call, S kept if that is faster."""
    forward = Problem.of_group([_problem(rows, n, group.k) for n in group.n])
    problems = problems_of_call(forward, trains=True)
    with assuming(device.target, kind="cuda"):
        choices = [choose(problem, {}, device) for problem in problems]
    keeps = saving_is_faster(problems, [choice.seconds for choice in choices])
    pairs = zip(problems, choices, strict=True)
    first, second = (pair for pair in pairs if pair[0].keeps_low_rank == keeps)
    return first, second


def _problem(rows: int, n: int, k: int) -> Problem:
    bfloat16 = torch.bfloat16
    return Problem(
        direction="forward",
        m=bucket_rows(rows),
        n=n,
        k=k,
        rank=RANK,
        format="nf4",
        block_size=64,
        double_quantized=True,
        x_dtype=bfloat16,
        compute_dtype=bfloat16,
        lora_dtype=torch.float32,
        out_dtype=bfloat16,
        bias=False,
        dropout=False,
        keeps_low_rank=False,
        device="cuda",
    )


def _experts(each: Experts, direction: Direction) -> ExpertsProblem:
    return ExpertsProblem(
        direction=direction,
        m=bucket_rows(each.rows),
        experts=each.experts,
        n=each.n,
        k=each.k,
        rank=RANK,
        format="nf4",
        block_size=64,
        double_quantized=True,
        x_dtype=torch.bfloat16,
        compute_dtype=torch.bfloat16,
        out_dtype=torch.bfloat16,
        bias=False,
        device="cuda",
    )


Cost = Callable[[AnyProblem, DeviceModel], float]


def _taken_apart(problem: Problem, choice: Choice, device: DeviceModel) -> Seconds:
    variant, config = choice.variant, choice.config

    def cost(problem: Problem, device: DeviceModel) -> float:
        return variant.cost(problem, config, device)

    siblings = tuple(replace(each, rank=0) for each in problem.siblings)
    bare = replace(problem, rank=0, siblings=siblings)
    if isinstance(variant, Fused):
        # It decodes while it multiplies, which keeps it from the vendor's pace.
        undisturbed = replace(device, flops=device.flops / FUSED_UTILIZATION[device.target])
        product = _working(cost, bare, undisturbed)
    else:
        product = _working(cost, replace(bare, format=UNQUANTIZED), device)
    return _split(cost, problem, bare, product, device)


def _experts_taken_apart(problem: ExpertsProblem, device: DeviceModel) -> Seconds:
    with assuming(device.target, kind="cuda"):
        cost = cheapest(problem, device).variant.cost
    bare = replace(problem, rank=0)
    unlimited = replace(device, bandwidth=math.inf)
    arithmetic = _working(cost, replace(bare, format=UNQUANTIZED), unlimited)
    memory = _working(cost, bare, replace(device, flops=math.inf))
    product = min(max(arithmetic, memory), _working(cost, bare, device))
    return _split(cost, problem, bare, product, device)


def _split(
    cost: Cost[AnyProblem],
    problem: AnyProblem,
    bare: AnyProblem,
    product: float,
    device: DeviceModel,
) -> Seconds:
    """bare: `problem` without adapter; product: of its seconds, those that are no decoding."""
    base = _working(cost, bare, device)
    return Seconds(
        products=product,
        decode=base - product,
        adapters=_working(cost, problem, device) - base,
        launches=_starting(cost, problem, device),
    )


def _working(cost: Cost[AnyProblem], problem: AnyProblem, device: DeviceModel) -> float:
    return cost(problem, device) - _starting(cost, problem, device)


def _starting(cost: Cost[AnyProblem], problem: AnyProblem, device: DeviceModel) -> float:
    return cost(problem, replace(device, flops=math.inf, bandwidth=math.inf))
