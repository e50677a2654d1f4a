"""Encodes whole 4-bit blocks in one pass; torch's own search takes ten times as long."""

from __future__ import annotations

import torch
from torch import Tensor

from qlora_compile.kernels.cpu.toolchain import VECTORISED, compiled, has_compiler

SMALLEST = 1 << 16
"""Fewer elements do not repay building the kernel."""

_SOURCE = (
    VECTORISED
    + r"""
#include <algorithm>
#include <cstdint>

extern "C" void kernel(
    const float* values, const float* reciprocals, const float* boundaries, const uint8_t* order,
    int64_t blocks, int64_t size, int64_t threads, uint8_t* codes) {
  constexpr int64_t RUN = 64;
#pragma omp parallel for num_threads(threads)
  for (int64_t b = 0; b < blocks; ++b)
    for (int64_t first = 0; first < size; first += RUN) {
      const float* in = values + b * size + first;
      uint8_t* out = codes + (b * size + first) / 2;
      const int64_t count = std::min(RUN, size - first);
      int32_t above[RUN] = {};
      // A value equal to a boundary belongs to the lower code.
      for (int j = 0; j < 15; ++j)
#pragma omp simd
        for (int64_t i = 0; i < count; ++i) above[i] += in[i] * reciprocals[b] > boundaries[j];
      for (int64_t i = 0; i < count; i += 2)
        out[i / 2] = static_cast<uint8_t>(order[above[i]] << 4 | order[above[i + 1]]);
    }
}
"""
)

_ARGUMENTS = (*["const float*"] * 3, "const uint8_t*", *["int64_t"] * 3, "uint8_t*")


def encodes(blocks: Tensor) -> bool:
    """Whether `encode` takes `blocks` [b, s]."""
    return (
        blocks.device.type == "cpu"
        and blocks.numel() >= SMALLEST
        and blocks.shape[1] % 2 == 0
        and has_compiler()
    )


def encode(blocks: Tensor, reciprocals: Tensor, boundaries: Tensor, order: Tensor) -> Tensor:
    """Return codes, uint8 [b * s / 2], of contiguous float32 `blocks` [b, s], with the first of two
    in the high half of a byte. Each element is multiplied by its block's entry of `reciprocals`
    [b]; if i of the ascending `boundaries` [15] lie below the product, the code is `order[i]`. NaN
    gets any code."""
    codes = order.new_empty(blocks.numel() // 2)
    kernel = compiled(_SOURCE, _ARGUMENTS)
    sizes = (*blocks.shape, torch.get_num_threads())
    kernel(blocks, reciprocals, boundaries, order, *sizes, codes)
    return codes
