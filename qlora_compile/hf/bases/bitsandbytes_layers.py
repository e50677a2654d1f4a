"""bitsandbytes' quantised layers, adopted in place: Parameters and state dict stay the same.

Adopting changes a layer's class to a subclass. Its forward is the fused op while a block is being
captured, and bitsandbytes' own otherwise. No weight is copied.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import bitsandbytes as bnb
import torch
from peft.tuners.lora.bnb import Linear4bit, Linear8bitLt
from torch import Tensor, nn

from qlora_compile.hf.dora import DoraLayer
from qlora_compile.kernels.formats.blocks import block_layout
from qlora_compile.kernels.formats.formats import format_named
from qlora_compile.kernels.formats.nested import NESTED_BLOCK_SIZE
from qlora_compile.kernels.layout import Layout
from qlora_compile.kernels.op import quantized_linear
from qlora_compile.kernels.packed import PackedWeight


class AdoptedLinear4bit(bnb.nn.Linear4bit):
    weight: Any

    def forward(self, x: Tensor) -> Tensor:
        if not torch.compiler.is_compiling():
            with _bias_kept(self):
                return super().forward(x)
        return self.product(x, self.bias)

    @property
    def tensors(self) -> list[Tensor]:
        """The planes, in the order of `PackedWeight.tensors`."""
        state = self.weight.quant_state
        nested = (state.state2.code, state.state2.absmax, state.offset) if state.nested else ()
        return [self.weight, state.absmax, *nested]

    @property
    def layout(self) -> str:
        """The weight's Layout, as text."""
        state, shape = self.weight.quant_state, (self.out_features, self.in_features)
        return _layout(state.quant_type, *shape, state.blocksize, bool(state.nested))

    @property
    def packed(self) -> PackedWeight:
        return _packed(self)

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Return x [..., K] @ Wᵀ + bias, in the dtype of x."""
        compute_dtype = _compute_dtype(x, self.compute_dtype)
        return quantized_linear(
            *(x, self.tensors, bias, self.layout), compute_dtype=compute_dtype, out_dtype=x.dtype
        )


class AdoptedLinear8bitLt(bnb.nn.Linear8bitLt):
    """8-bit layer. Unlike LLM.int8 (Dettmers et al. 2022), the fused op does not quantise x."""

    weight: Any

    def forward(self, x: Tensor) -> Tensor:
        if not torch.compiler.is_compiling():
            with _bias_kept(self):
                return super().forward(x)
        return self.product(x, self.bias)

    @property
    def tensors(self) -> list[Tensor]:
        """The planes, in the order of `PackedWeight.tensors`."""
        # A new weight, such as merging makes, keeps its scales until bitsandbytes' forward.
        scales = self.weight.SCB if self.state.SCB is None else self.state.SCB
        return [self.weight, scales]

    @property
    def layout(self) -> str:
        """The weight's Layout, as text."""
        return _layout("int8", self.out_features, self.in_features, self.in_features, False)

    @property
    def packed(self) -> PackedWeight:
        return _packed(self)

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Return x [..., K] @ Wᵀ + bias, in the dtype of x."""
        compute_dtype = _compute_dtype(x, x.dtype)
        return quantized_linear(
            *(x, self.tensors, bias, self.layout), compute_dtype=compute_dtype, out_dtype=x.dtype
        )


@contextmanager
def _bias_kept(layer: nn.Module) -> Iterator[None]:
    """Undo the cast that bitsandbytes' forward makes of the `layer`'s bias in place.

    The cast loses bits if a single call runs under autocast, and a bias cast in inference mode
    could not be used in training.
    """
    bias: Any = layer.bias
    kept = None if bias is None else bias.data
    try:
        yield
    finally:
        if bias is not None:
            bias.data = kept


class DoraLinear4bit(DoraLayer, Linear4bit):  # type: ignore[misc]
    """PEFT's adapter layer over 4-bit layers, by slots and with DoRA by its factors."""


class DoraLinear8bitLt(DoraLayer, Linear8bitLt):  # type: ignore[misc]
    """PEFT's adapter layer over 8-bit layers, by slots and with DoRA by its factors."""


ADAPTER_LAYERS = {Linear4bit: DoraLinear4bit, Linear8bitLt: DoraLinear8bitLt}
"""Our classes, by the PEFT class that each replaces."""


# Dynamo cannot trace the making of the text. The arguments are constants of a graph.
@torch.compiler.assume_constant_result
def _layout(format: str, n: int, k: int, block_size: int, double_quantized: bool) -> str:
    return str(block_layout(format, (n, k), block_size, double_quantized))


def _packed(layer: AdoptedLinear4bit | AdoptedLinear8bitLt) -> PackedWeight:
    layout = Layout.parse(layer.layout)
    return format_named(layout.format).packed(layout, layer.tensors)


def _compute_dtype(x: Tensor, configured: torch.dtype | None) -> torch.dtype:
    if torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    # As in bitsandbytes, a float32 or bfloat16 x decides the dtype of the product.
    if x.dtype in (torch.float32, torch.bfloat16) or configured is None:
        return x.dtype
    return configured


def obstacle(module: Any) -> str | None:
    """Return why a layer of bitsandbytes cannot be adopted, None if it can."""
    unquantized = "bitsandbytes has not quantised its weight yet; move the model to its device"
    if _is_8bit(module):
        if module.state.has_fp16_weights:
            return "bitsandbytes keeps its weight in 16 bits (has_fp16_weights)"
        quantized = module.weight.SCB is not None or module.state.SCB is not None
        return None if quantized else unquantized
    state = _quant_state(module)
    if state is None:
        return unquantized
    if getattr(state, "packing_format_for_cpu", False):
        return "bitsandbytes has repacked its weight for AVX-512; optimise before evaluating"
    if module.weight.dtype != torch.uint8:
        return f"its codes are stored as {module.weight.dtype}; load with quant_storage uint8"
    if state.nested and state.state2.blocksize != NESTED_BLOCK_SIZE:
        return f"its nested block size is {state.state2.blocksize}, not {NESTED_BLOCK_SIZE}"
    return None


def adopt(module: Any) -> None:
    """Adopt a layer without an obstacle, in place."""
    if _is_8bit(module):
        if module.weight.CB is not None:
            module.init_8bit_state()
        module.__class__ = AdoptedLinear8bitLt
        return
    # In evaluation bitsandbytes would repack the codes in place for AVX-512 CPUs.
    module.support_avx512bf16_for_cpu = False
    module.weight.quant_state = _quant_state(module)
    module.__class__ = AdoptedLinear4bit


def _is_8bit(module: Any) -> bool:
    return isinstance(module, bnb.nn.Linear8bitLt)


def _quant_state(module: Any) -> Any:
    # FSDP2 replaces the Parameter, and the quant_state attribute of the old one is lost.
    return module.weight.quant_state or module.quant_state
