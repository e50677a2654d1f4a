"""What elementwise kernels of one block move and how many they are, as tables."""

from __future__ import annotations

from dataclasses import dataclass

from bench.projection.seconds import Seconds
from bench.projection.step import Step
from qlora_compile.kernels.device_model import LAUNCH_SECONDS, DeviceModel


@dataclass(frozen=True)
class Routed:
    """Of routing tokens to experts and back: bytes per token, expert and hidden column."""

    columns: float
    launches: int


ROUTED_FORWARD = Routed(columns=16, launches=18)
"""Rows are gathered (4), weighted (4), put back over zeros (6) and summed (2); launches with the
router's, softmax, top-k and sort."""
ROUTED_BACKWARD = Routed(columns=18, launches=16)
"""Rows of the gradient are gathered and weighted (8), the weights' own gradient is a product of
two (4), rows are added up (6)."""


@dataclass(frozen=True)
class Traffic:
    """Bytes per token and column of: the hidden states (norms and residuals), q and k (rotation),
    q and k again where they are normalised, and an MLP's inner columns; and kernels, those of
    such norms apart."""

    hidden: float
    heads: float
    head_norm: float
    inner: float
    launches: int
    head_norm_launches: int

    def seconds(self, step: Step, routed: Routed, device: DeviceModel) -> Seconds:
        """Of one block; attention's launches and the experts' permutation included."""
        model = step.model
        inner = self.inner * model.inner * (model.active or 1)
        heads = self.heads + self.head_norm * model.head_norm
        columns = self.hidden * model.hidden + heads * (model.q_columns + model.kv_columns) + inner
        launches = self.launches + self.head_norm_launches * model.head_norm
        if model.experts:
            columns += routed.columns * model.active * model.hidden
            launches += routed.launches
        return Seconds(
            bytes=device.stream_seconds(step.rows * columns), launches=launches * LAUNCH_SECONDS
        )


@dataclass(frozen=True)
class Elementwise:
    """loss: bytes per logit and kernels, forward and backward."""

    forward: Traffic
    backward: Traffic
    loss: tuple[float, int]

    def seconds(self, step: Step, device: DeviceModel) -> Seconds:
        """Of the whole step."""
        moved, launches = self.loss
        logits = step.rows * step.model.vocabulary
        loss = Seconds(
            loss=device.stream_seconds(moved * logits), launches=launches * LAUNCH_SECONDS
        )
        forward = self.forward.seconds(step, ROUTED_FORWARD, device)
        backward = self.backward.seconds(step, ROUTED_BACKWARD, device)
        return step.model.layers * (step.forwards * forward + backward) + loss


EAGER_LOSS = (36, 8)
"""transformers' loss: logits to float32 (6), log-softmax (8), the backward of that and of the
choice of a label (16), and back to 16 bits (6)."""
