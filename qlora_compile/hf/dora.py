"""DoRA (Liu et al. 2024) in a form that the passes match as LoRA: y = m / ‖W + sBA‖ ⊙ (W + sBA) x.

Parameters, files, merging and switching are PEFT's; only the product is computed differently. The
norm of each row is a constant to autograd, as in the paper (section 4.3), and is computed without
an [N, K] tensor:

    ‖W + sBA‖² = ‖W‖² + 2s (B ⊙ W Aᵀ) 1 + s² (B (A Aᵀ) ⊙ B) 1
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora.variants import DoraLinearVariant
from torch import Tensor, nn

from qlora_compile.hf.adapter_slots import SlottedLayer
from qlora_compile.kernels.packed import PackedWeight
from qlora_compile.kernels.registry import format_named
from qlora_compile.modules.linear import QuantizedLinear

_ELEMENTS_AT_ONCE = 2**22


class FactoredDora(DoraLinearVariant):
    """PEFT's DoRA with the norm computed from the factors, for any number of active adapters."""

    @staticmethod
    def init(module: Any, adapter_name: str, **kwargs: Any) -> None:
        base = module.get_base_layer()
        if isinstance(base, QuantizedLinear):
            module.fan_in_fan_out = False  # Conv1D's [K, N] is packed as [N, K]
            with base.unpacked():
                DoraLinearVariant.init(module, adapter_name, **kwargs)
        else:
            DoraLinearVariant.init(module, adapter_name, **kwargs)
        module.measure_base()

    @staticmethod
    def forward(
        module: Any, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any
    ) -> Tensor:
        base = module.get_base_layer()
        if module.drops_out(active_adapter):
            x = module.lora_dropout[active_adapter](x)
            product = _product(base, x)
        else:
            product = result if base.bias is None else result - base.bias
        scale = module.dora_scale(active_adapter)
        return result + (scale - 1) * product + scale * module.low_rank(active_adapter, x)


class DoraLayer(SlottedLayer):
    """Mixin, listed before a PEFT adapter layer among the bases, that runs DoRA by its factors.

    `base_squared_norms`: ‖W‖² of each row, [N], float32 or wider, a buffer that is not saved. It is
    computed again after everything that changes the base weight: merging, loading, a cast.
    """

    def adopt_variants(self: Any) -> None:
        """Convert the DoRA adapters that stock PEFT has attached."""
        for name, variant in self.lora_variant.items():
            if type(variant) is DoraLinearVariant:
                self.lora_variant[name] = FactoredDora()
                self.lora_magnitude_vector[name].fan_in_fan_out = self.fan_in_fan_out
                self.measure_base()

    def measure_base(self: Any) -> None:
        if "base_squared_norms" not in self._buffers:
            self.register_load_state_dict_post_hook(_measure_loaded)
        norms = squared_row_norms(self.get_base_layer())
        self.register_buffer("base_squared_norms", norms, persistent=False)

    def remeasure_base(self: Any) -> None:
        if "base_squared_norms" in self._buffers:
            self.measure_base()

    def resolve_lora_variant(self: Any, *, config: Any, **kwargs: Any) -> Any:
        variant = super().resolve_lora_variant(config=config, **kwargs)  # type: ignore[misc]
        return FactoredDora() if type(variant) is DoraLinearVariant else variant

    def update_layer(self: Any, *args: Any, **kwargs: Any) -> None:
        super().update_layer(*args, **kwargs)  # type: ignore[misc]
        # Another adapter may be initialised from the base weight, and change the weight.
        self.remeasure_base()

    def merge(self: Any, *args: Any, **kwargs: Any) -> None:
        super().merge(*args, **kwargs)  # type: ignore[misc]
        self.remeasure_base()

    def unmerge(self: Any) -> None:
        super().unmerge()  # type: ignore[misc]
        self.remeasure_base()

    def _apply(self: Any, fn: Any, recurse: bool = True) -> Any:
        super()._apply(fn, recurse)  # type: ignore[misc]
        self.remeasure_base()
        return self

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.slots is not None:
            return super().forward(x, *args, **kwargs)  # type: ignore[misc]
        adapter = self._only_dora_adapter()
        plain = not args and all(value is None for value in kwargs.values())
        if torch.compiler.is_compiling() and adapter is not None and plain:
            return self._adapted(adapter, x)
        return super().forward(x, *args, **kwargs)  # type: ignore[misc]

    def _only_dora_adapter(self: Any) -> str | None:
        if self.disable_adapters or self.merged:
            return None
        base = self.get_base_layer()
        if base._forward_hooks or base._forward_pre_hooks:
            return None
        active = [name for name in self.active_adapters if name in self.lora_A]
        only_one = len(active) == 1 and isinstance(self.lora_variant.get(active[0]), FactoredDora)
        return active[0] if only_one else None

    def _adapted(self: Any, adapter: str, x: Tensor) -> Tensor:
        """Return the layer's output as one LoRA product without bias, scaled, plus the bias.

        With dropout, PEFT scales W drop(x) and not W x. So does this, and adds W (x - drop(x)),
        which is then missing from the base's product.
        """
        base = self.get_base_layer()
        dropped = self.lora_dropout[adapter](x)
        product = _product(base, dropped)
        low = self._cast_input_dtype(dropped, self.lora_A[adapter].weight.dtype)
        adapted = product + self.low_rank(adapter, low)
        if self.drops_out(adapter):
            y = adapted * self.dora_scale(adapter) + _product(base, x - dropped, base.bias)
        else:
            # Rounded, because autograd saves this for m's gradient, and so in half the memory. With
            # dropout this would be one rounding more than in PEFT.
            y = adapted.to(product.dtype) * self.dora_scale(adapter)
            y = y if base.bias is None else y + base.bias
        return y.to(product.dtype)

    def drops_out(self: Any, adapter: str) -> bool:
        return self.training and not isinstance(self.lora_dropout[adapter], nn.Identity)

    def low_rank(self: Any, adapter: str, x: Tensor) -> Tensor:
        return self.lora_B[adapter](self.lora_A[adapter](x)) * self.scaling[adapter]

    def dora_scale(self: Any, adapter: str) -> Tensor:
        """Return m / ‖W + sBA‖, [N]; only m gets a gradient."""
        base, magnitude = self.get_base_layer(), self.lora_magnitude_vector[adapter].weight
        # A weight that is trained changes at every step.
        trained = base.weight.requires_grad
        norms = squared_row_norms(base) if trained else self.base_squared_norms
        a, b = (f[adapter].weight.detach().to(norms.dtype) for f in (self.lora_A, self.lora_B))
        scaling = self.scaling[adapter]
        with torch.autocast(a.device.type, enabled=False):
            crossed = _product(base, a).t().detach()
            within = torch.mm(b, torch.mm(a, a.t()))
            squares = norms + ((2 * scaling * crossed + scaling**2 * within) * b).sum(dim=1)
            # In a row where W and sBA cancel, rounding may make the sum slightly negative.
            return magnitude / squares.clamp_min(0).sqrt()


class DoraLinear(DoraLayer, LoraLinear):  # type: ignore[misc]
    """PEFT's LoRA layer over a plain Linear, by slots and with DoRA by its factors."""


def _measure_loaded(module: Any, incompatible_keys: object) -> None:
    module.remeasure_base()


def _product(base: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x @ Wᵀ + bias for the weight W of `base`, packed or not."""
    # Not hasattr `packed`: that is a property, which Dynamo would trace.
    if hasattr(base, "product"):
        return base.product(x, bias)
    weight = base.weight if torch.is_autocast_enabled(x.device.type) else base.weight.to(x.dtype)
    return nn.functional.linear(x, weight, bias)


@torch.no_grad()
def squared_row_norms(base: Any) -> Tensor:
    """Return ‖W‖² of each row of a base layer's weight, [N], float32 or wider.

    Makes no float32 copy of the whole weight.
    """
    if not hasattr(base, "packed"):
        dtype = torch.promote_types(base.weight.dtype, torch.float32)
        return torch.linalg.vector_norm(base.weight, dim=1, dtype=dtype).square()
    packed: PackedWeight = base.packed
    rows, columns = packed.shape
    if packed.codes.device.type == "meta":
        return packed.codes.new_empty(rows, dtype=torch.float32)
    blocks = format_named(packed.format).decoded(
        packed, torch.float32, _ELEMENTS_AT_ONCE // columns
    )
    return torch.cat([weight.square().sum(dim=1) for _, weight in blocks])
