"""The least time of a step: of each operator the longer of its arithmetic and its bytes, summed.

Arithmetic is what every algorithm needs: each frozen weight's product in the forward, again where
it is recomputed, and in the gradient of the input; LoRA's six thin products (two and four);
attention's causal pairs (two products forward, four backward); the head's logits and the gradient
of its input. Bytes are each packed weight once per use, the adapters' factors and the gradients of
those, and the hidden states where a block begins and ends: whatever else a block computes could
stay on the chip.
"""

from __future__ import annotations

from bench.projection.seconds import Seconds
from bench.projection.step import PACKED_BYTES, RANK, Step
from qlora_compile.kernels.device_model import DeviceModel

FACTOR_BYTES = 4


def floor(step: Step, device: DeviceModel, efficiency: float | None = None) -> Seconds:
    """At that part of the card's 16-bit peak; None is what its vendor's GEMM reaches."""
    rate = device.flops * (device.vendor_efficiency if efficiency is None else efficiency)
    model = step.model

    def operator(flops: float, thin: float, weights: float, factors: float) -> Seconds:
        """flops of the product and `thin` ones of its adapter; bytes of its weights, factors."""
        product = max(flops / rate, device.stream_seconds(weights))
        whole = max((flops + thin) / rate, device.stream_seconds(weights + factors))
        return Seconds(products=product, adapters=whole - product)

    def both(rows: int, weights: float, moved: float, factors: float, thin: int) -> Seconds:
        """Every forward, and the backward; weights: those that a row meets, `moved` those that
        have any; thin: rank times what they are wide."""
        products, adapters = 2 * rows * weights, 2 * rows * thin
        moved, kept = PACKED_BYTES * moved, FACTOR_BYTES * factors
        forward = operator(products, adapters, moved, kept)
        return step.forwards * forward + operator(products, 2 * adapters, moved, 2 * kept)

    block = Seconds()
    for group in step.linears:
        block += both(step.rows, group.weights, group.weights, group.factors, group.factors)
    for each in step.experts:
        weights, thin = each.n * each.k, RANK * (each.n + each.k)
        block += both(each.rows, weights, each.busy * weights, each.busy * thin, thin)
    passes = step.forwards + 1
    router = operator(2 * step.rows * model.experts * model.hidden, 0, 0, 0)
    boundary = Seconds(bytes=device.stream_seconds(4 * step.rows * model.hidden))
    attention = Seconds(attention=(2 * step.forwards + 4) * step.score_flops / rate)
    block += passes * (router + boundary) + attention
    head = operator(2 * step.rows * model.head_weights, 0, 2 * model.head_weights, 0)
    update = Seconds(optimizer=device.stream_seconds(step.optimizer_bytes))
    return model.layers * block + 2 * head + update


def flops(step: Step) -> float:
    """The floor's arithmetic."""
    # What takes a device with no more than one operation a second, and all bytes at once.
    slow = DeviceModel("one", "", 1.0, float("inf"), 1.0, 1)
    return floor(step, slow).total
