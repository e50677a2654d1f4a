"""HeadOperands: the tensors of an output head, however PEFT has wrapped the head. HeadLoss: a loss
of these and the head's input."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import torch
from peft.tuners.lora import Linear as LoraLinear
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn

from qlora_compile.hf.replaced_forward import replaced_forward
from qlora_compile.kernels.head_loss import chunked_cross_entropy
from qlora_compile.kernels.packed import PackedWeight
from qlora_compile.kernels.registry import format_named
from qlora_compile.kernels.specification import linear_reference
from qlora_compile.modules.linear import QuantizedLinear


@dataclass(frozen=True)
class HeadOperands:
    """logits = hidden weightᵀ + bias + scaling * hidden lora_aᵀ lora_bᵀ.

    weight: [V, K]. bias: [V]. lora_a: [R, K]. lora_b: [V, R].
    """

    weight: Tensor | PackedWeight
    bias: Tensor | None
    lora_a: Tensor | None = None
    lora_b: Tensor | None = None
    scaling: float = 1.0


@dataclass(frozen=True)
class HeadLoss:
    """A cross-entropy to be computed from a head's input. hidden: [M, K]. labels: int64 [M]. The
    other fields are those of `chunked_cross_entropy`."""

    hidden: Tensor
    labels: Tensor
    operands: HeadOperands
    softcap: float | None
    logit_scale: float
    ignore_index: int
    reduction: Literal["mean", "sum"]

    def without_logits(self) -> Tensor:
        own = self.operands
        return chunked_cross_entropy(
            self.hidden,
            own.weight,
            self.labels,
            bias=own.bias,
            lora_a=own.lora_a,
            lora_b=own.lora_b,
            scaling=own.scaling,
            softcap=self.softcap,
            logit_scale=self.logit_scale,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
        )

    def with_logits(self) -> Tensor:
        """Compute the loss by plain operators of torch, which make all logits."""
        own, dtype = self.operands, self.hidden.dtype
        weight = own.weight
        if isinstance(weight, PackedWeight):
            stored = torch.float32 if dtype == torch.float64 else dtype
            weight = format_named(weight.format).dequantize(weight, stored).to(dtype)
        adapter = own.lora_a, own.lora_b
        z = linear_reference(self.hidden, weight, own.bias, *adapter, scaling=own.scaling)
        z = self.logit_scale * z.to(torch.promote_types(torch.float32, dtype))
        if self.softcap is not None:
            z = self.softcap * torch.tanh(z / self.softcap)
        ignored = self.ignore_index
        return nn.functional.cross_entropy(
            z, self.labels, ignore_index=ignored, reduction=self.reduction
        )

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The floating-point tensors that the loss may have a gradient for, by name."""
        found = {field.name: getattr(self.operands, field.name) for field in fields(self.operands)}
        return {
            "the head's input": self.hidden,
            **{f"the head's {k}": each for k, each in found.items() if isinstance(each, Tensor)},
        }

    def given(self, tensors: Sequence[Tensor]) -> HeadLoss:
        """Return the loss with others in place of `tensors`, in their order."""
        hidden, *others = tensors
        names = [name.removeprefix("the head's ") for name in self.tensors][1:]
        operands = replace(self.operands, **dict(zip(names, others, strict=True)))
        return replace(self, hidden=hidden, operands=operands)

    def of_rows(self, count: int) -> HeadLoss:
        """Return the loss of at most so many rows, first of those whose labels count."""
        rows = (self.labels == self.ignore_index).argsort(stable=True)[:count].sort().values
        return replace(self, hidden=self.hidden[rows], labels=self.labels[rows])


def head_operands(head: nn.Module) -> HeadOperands | None:
    """Return the operands of what `head` computes now, None if they are not known.

    Known are a Linear, packed or not, one that is trained in full (modules_to_save), and one with a
    single plain LoRA adapter without dropout. Unknown is what a forward on the instance computes.
    """
    if replaced_forward(head) is not None:
        return None
    if isinstance(head, ModulesToSaveWrapper):
        active: list[str] = head.active_adapters
        trained = bool(active) and not head.disable_adapters and active[0] in head.modules_to_save
        return head_operands(head.modules_to_save[active[0]] if trained else head.original_module)
    if isinstance(head, LoraLinear):
        return _adapted(head)
    if isinstance(head, QuantizedLinear):
        return HeadOperands(head.packed, head.bias)
    if not isinstance(head, nn.Linear) or type(head).forward is not nn.Linear.forward:
        return None
    return HeadOperands(head.weight, head.bias) if head.weight.is_floating_point() else None


def _adapted(head: Any) -> HeadOperands | None:
    base = head_operands(head.get_base_layer())
    if base is None or head.disable_adapters or head.merged:
        return base
    active = [name for name in head.active_adapters if name in head.lora_A]
    if not active:
        return base
    name = active[0]
    a, b = head.lora_A[name], head.lora_B[name]
    plain = (
        len(active) == 1
        and not head.lora_variant.get(name)
        and isinstance(head.lora_dropout[name], nn.Identity)
        and a.bias is None
        and b.bias is None
    )
    if not plain:
        return None
    return HeadOperands(base.weight, base.bias, a.weight, b.weight, head.scaling[name])
