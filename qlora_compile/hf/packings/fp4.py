"""4-bit floats e2m1, MXFP4 and NVFP4, packed with the first of two weights in the low bits."""

from __future__ import annotations

import torch
from torch import Tensor

from qlora_compile.kernels.formats.microscaling import MXFP4, NVFP4
from qlora_compile.kernels.packed import PackedWeight

MX_GROUP, NV_GROUP = MXFP4.size, NVFP4.size


def packed_mxfp4(blocks: Tensor, scales: Tensor) -> PackedWeight:
    """Make a PackedWeight of MXFP4 codes, sharing their memory.

    blocks: bytes of any dtype, [N, K / 2], [E, N, K / 2], or [E, N, K / 32, 16] as gpt-oss has
    them. scales: bytes e8m0, as many as K / 32 for each row.
    """
    codes = blocks.view(torch.uint8)
    codes = codes.flatten(2) if codes.dim() == 4 else codes
    k = 2 * codes.shape[-1]
    codes = codes.reshape(-1, k // 2)
    layout = MXFP4.layout((codes.shape[0], k))
    return MXFP4.packed(layout, [codes, scales.view(torch.uint8).reshape(codes.shape[0], -1)])


def packed_nvfp4(codes: Tensor, scales: Tensor, global_scale: Tensor) -> PackedWeight:
    """Make a PackedWeight of NVFP4 codes, sharing their memory.

    codes: uint8 [N, K / 2] or [E, N, K / 2]. scales: float8_e4m3fn, K / 16 for each row.
    global_scale: float32, one for the tensor or for each expert. A weight is the product of its
    code and both scales.
    """
    k = 2 * codes.shape[-1]
    experts = codes.shape[0] if codes.dim() == 3 else 1
    codes = codes.reshape(-1, k // 2)
    rows = codes.shape[0]
    per = "tensor" if global_scale.numel() == 1 else "row"
    whole = global_scale.reshape(())
    if per == "row":
        whole = global_scale.reshape(experts, 1).expand(experts, rows // experts).reshape(rows)
    layout = NVFP4.layout((rows, k), global_scale_per=per)
    return NVFP4.packed(layout, [codes, scales.view(torch.uint8).reshape(rows, -1), whole])
