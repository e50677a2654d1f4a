"""HeadOperands: the tensors of an output head, however PEFT has wrapped the head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from peft.tuners.lora import Linear as LoraLinear
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn

from qlora_compile.hf.replaced_forward import replaced_forward
from qlora_compile.kernels.packed import PackedWeight
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
