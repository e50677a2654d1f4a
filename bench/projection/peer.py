"""The step of a library that dequantises each weight and calls the vendor's GEMM."""

from __future__ import annotations

from dataclasses import dataclass

from bench.projection.seconds import Seconds
from bench.projection.step import OPTIMIZER_BYTES, PACKED_BYTES, RANK, Experts, Linears, Step
from bench.projection.traffic import Elementwise
from qlora_compile.kernels.device_model import LAUNCH_SECONDS, DeviceModel

DEQUANTIZE_LAUNCHES = 3
"""Of a doubly quantised NF4 weight: its absmax decoded, the offset added, the weight decoded."""
GROUPED_ROWS = 128
"""Of a tile of the vendor's grouped product."""


@dataclass(frozen=True)
class Thin:
    """An adapter's kernels around one Linear: bytes per element of x [M, K] and of y [M, N], and
    launches. shared: bytes per element of x of every further Linear with the same input. The thin
    products run at the memory's pace, as in the variants' own cost models."""

    x: float
    y: float
    launches: int
    shared: float = 0
    shared_launches: int = 0

    def seconds(self, rows: int, group: Linears, device: DeviceModel) -> Seconds:
        count = len(group.n)
        x = (self.x * count + self.shared * (count - 1)) * group.k
        launches = self.launches * count + self.shared_launches * (count - 1)
        return Seconds(
            adapters=device.stream_seconds(rows * (x + self.y * sum(group.n))),
            launches=launches * LAUNCH_SECONDS,
        )


@dataclass(frozen=True)
class Peer:
    """merges: whether an expert's adapter is added to its weight, so that its gradient comes by way
    of the weight's; else its factors are multiplied by the rows, as a Linear's."""

    name: str
    forward: Thin
    backward: Thin
    elementwise: Elementwise
    merges: bool

    def seconds(self, step: Step, device: DeviceModel) -> Seconds:
        model = step.model
        block = Seconds()
        for group in step.linears:
            product = _dequantized(step.rows, group, device)
            block += step.forwards * (product + self.forward.seconds(step.rows, group, device))
            block += product + self.backward.seconds(step.rows, group, device)
        for each in step.experts:
            product = _grouped(each, device)
            adapters = (_merged if self.merges else _split)(each, device)
            block += (step.forwards + 1) * product
            block += step.forwards * adapters[0] + adapters[1]
        block += common(step, device)
        return model.layers * block + self.elementwise.seconds(step, device) + outside(step, device)


def common(step: Step, device: DeviceModel) -> Seconds:
    """What everybody does alike in a block: the flash form of attention, which computes the scores
    again in its backward, and the router."""
    rate = device.flops * device.vendor_efficiency
    attention = (2 * step.forwards + 5) * step.score_flops / rate
    router = 0.0
    if step.model.experts:
        router = device.gemm_seconds(
            step.rows, step.model.experts, step.model.hidden, device.vendor_efficiency
        )
    return Seconds(products=(step.forwards + 1) * router, attention=attention)


def outside(step: Step, device: DeviceModel) -> Seconds:
    """What everybody does alike outside the blocks: the head's two products and the update."""
    model = step.model
    head = device.gemm_seconds(step.rows, model.vocabulary, model.hidden, device.vendor_efficiency)
    return Seconds(
        products=2 * head,
        launches=2 * LAUNCH_SECONDS,
        optimizer=device.stream_seconds(step.optimizer_bytes),
    )


def _dequantized(rows: int, group: Linears, device: DeviceModel) -> Seconds:
    """The base products of a group: W decoded to memory, read by the GEMM; either direction."""
    products = (device.gemm_seconds(rows, n, group.k, device.vendor_efficiency) for n in group.n)
    return Seconds(
        products=sum(products),
        decode=device.stream_seconds((PACKED_BYTES + 2) * group.weights),
        launches=(DEQUANTIZE_LAUNCHES + 1) * len(group.n) * LAUNCH_SECONDS,
    )


def _grouped(each: Experts, device: DeviceModel) -> Seconds:
    """One product of all experts with their 16-bit weights; either direction."""
    tiles = each.busy * -(-each.rows // (each.busy * GROUPED_ROWS))
    flops = 2 * tiles * GROUPED_ROWS * each.n * each.k
    moved = 2 * (each.busy * each.n * each.k + each.rows * (each.n + each.k))
    rate = device.flops * device.vendor_efficiency
    return Seconds(
        products=max(flops / rate, device.stream_seconds(moved)), launches=LAUNCH_SECONDS
    )


def _merged(each: Experts, device: DeviceModel) -> tuple[Seconds, Seconds]:
    """(forward, backward): W + s B A of every expert, rows or no rows, is written in 16 bits; its
    gradient is a grouped product as large as the forward's, read for A's and for B's."""
    rate = device.flops * device.vendor_efficiency
    stack = 2 * each.experts * each.n * each.k
    thin = RANK * stack / rate
    merge = max(device.stream_seconds(2 * stack), thin)
    gradient = max(2 * each.rows * each.n * each.k / rate, device.stream_seconds(stack))
    factors = 2 * max(device.stream_seconds(stack), thin)
    return (
        Seconds(adapters=merge, launches=3 * LAUNCH_SECONDS),
        Seconds(adapters=gradient + factors, launches=5 * LAUNCH_SECONDS),
    )


def _split(each: Experts, device: DeviceModel) -> tuple[Seconds, Seconds]:
    """(forward, backward): grouped products with the factors, cast to 16 bits; what they give is
    added to the base's y or dX by a kernel of its own, and S is computed again."""
    x, y, factors = each.rows * each.k, each.rows * each.n, 8 * each.factors
    return (
        Seconds(
            adapters=device.stream_seconds(2 * x + 8 * y + factors), launches=5 * LAUNCH_SECONDS
        ),
        Seconds(
            adapters=device.stream_seconds(12 * x + 4 * y + 2 * factors),
            launches=8 * LAUNCH_SECONDS,
        ),
    )


def state_bytes(step: Step, *, packed_experts: bool) -> float:
    """Of weights, and of the adapters with their gradients and both moments; no activations."""
    model = step.model
    experts = PACKED_BYTES if packed_experts else 2
    weights = PACKED_BYTES * model.linear_weights + experts * model.expert_weights
    weights += 2 * (2 * model.head_weights + model.router_weights)
    return weights + 4 * OPTIMIZER_BYTES / 7 * model.adapter_parameters(RANK)
