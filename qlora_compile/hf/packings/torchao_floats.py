"""torchao's tensors of floats, version 0.18: Float8Tensor and NF4Tensor."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qlora_compile.hf.packings.fp8 import packed_fp8
from qlora_compile.kernels.formats.blocks import block_layout
from qlora_compile.kernels.formats.nf4 import NF4
from qlora_compile.kernels.packed import PackedWeight


def packed_float8(weight: Any) -> PackedWeight:
    """Make a PackedWeight of a Float8Tensor [N, K], sharing the memory of its codes.

    The tensor's settings for activations are ignored. Raises StoredWeightError.
    """
    block = tuple(weight.block_size or weight.shape)
    return packed_fp8(weight.qdata, weight.scale, (block[0], block[1]))


def packed_nf4(weight: Any) -> PackedWeight:
    """Make a PackedWeight of an NF4Tensor [N, K], sharing the memory of its codes.

    The scale of each block is decoded, since torchao quantises scales to 8-bit integers of its own.
    torchao writes the sixteen values with four digits, and multiplies in the weight's dtype; here
    they have all digits, and the product is rounded once.
    """
    rows, columns = weight.shape
    scales: Tensor = weight.dequantize_scalers(
        weight.quantized_scalers, weight.quantization_factor, weight.scaler_block_size
    )
    layout = block_layout(NF4.name, (rows, columns), weight.block_size, False)
    return NF4.packed(layout, [weight.quantized_data, scales.to(torch.float32)])
