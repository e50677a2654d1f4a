"""Decoding rows of integers whose columns are in groups by an index, in one pass."""

from __future__ import annotations

import functools
import re

import torch
from torch import Tensor

from qlora_compile.kernels.cpu.toolchain import BFLOAT16, VECTORISED, compiled
from qlora_compile.kernels.formats.cpu.decode import TYPES
from qlora_compile.kernels.formats.cpu.group_decode import (
    AFFINE,
    FACTOR,
    FACTOR_NAMES,
    FACTOR_TYPES,
    constant,
)

_ROWS = r"""
#include <vector>

extern "C" void kernel(
    const uint8_t* codes, const uint8_t* scales, const uint8_t* zeros, const int32_t* index,
    int64_t scale_type, int64_t zero_type, int64_t zero_step, int64_t adds, int64_t bits,
    int64_t rows, int64_t columns, int64_t groups, int64_t threads, TYPE* out) {
  const int64_t row_bytes = (columns * bits + 7) / 8;
#pragma omp parallel num_threads(threads)
  {
    std::vector<float> row_scales(groups), row_zeros(groups);
    std::vector<uint8_t> unpacked(columns + 1);
#pragma omp for
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t g = 0; g < groups; ++g) {
        row_scales[g] = factor(scales, scale_type, r * groups + g);
        row_zeros[g] = factor(zeros, zero_type, zero_step * (r * groups + g));
      }
      const uint8_t* in = codes + r * row_bytes;
      if (bits == 4) {
        uint8_t* to = unpacked.data();
#pragma omp simd
        for (int64_t i = 0; i < row_bytes; ++i) {
          to[2 * i] = in[i] & 15;
          to[2 * i + 1] = in[i] >> 4;
        }
        in = to;
      }
      const float* s = row_scales.data();
      const float* z = row_zeros.data();
      TYPE* to = out + r * columns;
#pragma omp simd
      for (int64_t k = 0; k < columns; ++k)
        store(to + k, affine(static_cast<float>(in[k]), z[index[k]], s[index[k]], adds));
    }
  }
}
"""


def write_rows(
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    symmetric_zero: float,
    index: Tensor,
    bits: int,
    out: Tensor,
    *,
    adds: bool,
) -> None:
    """out [rows, K] = (code - zero) * scale of the group `index`, int32 [K], rounded once.

    The others as in `group_decode.write_rows`; codes have 4 or 8 `bits`.
    """
    step = int(zeros is not None)
    if zeros is None:
        zeros = constant(symmetric_zero)
    rows, columns = out.shape
    types = (FACTOR_TYPES[FACTOR_NAMES[each.dtype]] for each in (scales, zeros))
    sizes = (*types, step, int(adds), bits, rows, columns, scales.shape[1], torch.get_num_threads())
    compiled(*_typed(out.dtype))(codes, scales, zeros, index, *sizes, out)


@functools.cache
def _typed(dtype: torch.dtype) -> tuple[str, tuple[str, ...]]:
    """Return the source for results of `dtype`, and the types of its arguments."""
    code = VECTORISED + BFLOAT16 + AFFINE + FACTOR + _ROWS
    for name, meant in (FACTOR_TYPES | {"TYPE": TYPES[dtype]}).items():
        code = re.sub(rf"\b{name}\b", str(meant), code)
    pointers = (*["const uint8_t*"] * 3, "const int32_t*")
    return code, (*pointers, *["int64_t"] * 9, f"{TYPES[dtype]}*")
