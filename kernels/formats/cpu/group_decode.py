"""Decodes rows of groups in one pass; each group has a scale and a zero of its own."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass

import torch
from torch import Tensor

from qlora_compile.kernels.cpu.stores import past_caches
from qlora_compile.kernels.cpu.toolchain import compiled, has_compiler
from qlora_compile.kernels.formats.cpu import decode
from qlora_compile.kernels.formats.cpu.decode import TYPES
from qlora_compile.kernels.formats.cpu.group_codes import EIGHT_BITS, FOUR_BITS, KINDS, NIBBLES

FACTOR_TYPES = {"F32": 0, "BF16": 1, "F16": 2, "U8": 3, "LOOKED_UP": 4}
FACTOR_NAMES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.uint8: "U8",
}

WIDEN = r"""
#include <vector>

static inline float half(uint16_t bits) {
  const uint32_t sign = (bits & 0x8000u) << 16, size = (bits & 0x7FFFu) << 13;
  // Infinity and NaN keep an exponent of ones; others have one that is biased by 15 and not by 127.
  const bool finite = size < 0x0F800000u;
  const uint32_t word = finite ? size : size | 0x7F800000u;
  float value;
  std::memcpy(&value, &word, sizeof(value));
  const float scaled = finite ? value * 0x1p112f : value;
  return sign ? -scaled : scaled;
}

// Factors `first` ... of a plane as float32.
static inline void widen(
    const uint8_t* plane, int64_t type, const float* table, float whole, int64_t first,
    int64_t count, float* to) {
  const uint16_t* halves = reinterpret_cast<const uint16_t*>(plane) + first;
  const uint8_t* bytes = plane + first;
  if (type == F32) {
    std::memcpy(to, reinterpret_cast<const float*>(plane) + first, count * sizeof(float));
  } else if (type == BF16) {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) to[i] = load(halves + i);
  } else if (type == F16) {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) to[i] = half(halves[i]);
  } else if (type == U8) {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) to[i] = bytes[i];
  } else {
    for (int64_t i = 0; i < count; ++i) to[i] = table[bytes[i]] * whole;
  }
}
"""
"""C++: reading factors of a type in `FACTOR_TYPES`."""

_ROWS = r"""
extern "C" void kernel(
    const uint8_t* codes, const float* values, const uint8_t* scales, const uint8_t* zeros,
    const float* table, const float* whole, int64_t scale_type, int64_t zero_type, int64_t kind,
    int64_t has_zeros, int64_t first_row, int64_t row_shift, int64_t whole_shift, int64_t adds,
    int64_t rows, int64_t columns, int64_t size, int64_t past_caches, int64_t threads,
    TYPE* out) {
  const int64_t groups = (columns + size - 1) / size;
  const int64_t row_bytes = (columns * BITS + 7) / 8;
  const bool streams = past_caches && whole_lines(columns * sizeof(TYPE), out) &&
                       whole_lines(size * sizeof(TYPE), out);
#pragma omp parallel num_threads(threads)
  {
    std::vector<float> factors(2 * groups);
    float *own_scales = factors.data(), *own_zeros = own_scales + groups;
    if (!has_zeros) widen(zeros, zero_type, nullptr, 1.0f, 0, 1, own_zeros);
    for (int64_t g = 1; g < groups && !has_zeros; ++g) own_zeros[g] = own_zeros[0];
#pragma omp for
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t at = ((first_row + r) >> row_shift) * groups;
      const float own_whole = whole[(first_row + r) >> whole_shift];
      widen(scales, scale_type, table, own_whole, at, groups, own_scales);
      if (has_zeros) widen(zeros, zero_type, nullptr, 1.0f, at, groups, own_zeros);
      for (int64_t g = 0; g < groups; ++g) {
        const int64_t first = g * size;
        const int64_t count = columns - first < size ? columns - first : size;
        decode_group(
            codes + (first_row + r) * row_bytes + first * BITS / 8, count, kind, values,
            own_zeros[g], own_scales[g], adds, streams, out + r * columns + first);
      }
    }
  }
}
"""


@dataclass(frozen=True)
class Factors:
    """Scales and zeros of all of a weight's groups, as stored.

    scales: [rows, groups] of float32, bfloat16 or float16, or of bytes that stand for the values in
    `table`, float32 [256], times `whole`, one number or one per row. zeros: of the same dtypes, or
    uint8; None if every zero is `constant`. row_shift: 2**row_shift rows share factors. adds:
    whether a value is v(code) * scale + zero, and not (v(code) - zero) * scale.
    """

    scales: Tensor
    zeros: Tensor | None = None
    constant: float = 0.0
    table: Tensor | None = None
    whole: Tensor | None = None
    row_shift: int = 0
    adds: bool = False


def writes(out: Tensor) -> bool:
    """Whether `write_rows` can write `out`."""
    return (
        out.device.type == "cpu"
        and out.numel() >= decode.SMALLEST
        and out.dtype in TYPES
        and has_compiler()
    )


def write_rows(
    codes: Tensor, values: Tensor, factors: Factors, size: int, kind: str, start: int, out: Tensor
) -> None:
    """Write the rows of the weight from `start` on, rounded once, to out [rows, K].

    kind: one of `group_codes`. codes: uint8 [N, K] or, of 4 bits, [N, ceil(K / 2)]. values: float32
    [256] or [16]. size: columns of a group, which begins with a byte. out: of a dtype in TYPES.
    """
    one = constant(1.0)
    scales, zeros, table = factors.scales, factors.zeros, factors.table
    whole = one if factors.whole is None else factors.whole
    has_zeros = zeros is not None
    if zeros is None:
        zeros = constant(factors.constant)
    rows, columns = out.shape
    sizes = (
        FACTOR_TYPES[FACTOR_NAMES[scales.dtype] if table is None else "LOOKED_UP"],
        FACTOR_TYPES[FACTOR_NAMES[zeros.dtype]],
        KINDS.get(kind, 0),
        *(int(has_zeros), start, factors.row_shift, 0 if whole.numel() > 1 else 31),
        *(int(factors.adds), rows, columns, min(size, columns)),
        *(int(past_caches(out)), torch.get_num_threads()),
    )
    kernel = compiled(*_typed(kind == NIBBLES, out.dtype))
    # A tensor that is not read must be given all the same.
    table = one if table is None else table
    planes = (each.contiguous() for each in (scales, zeros))
    kernel(codes.contiguous(), values, *planes, table, whole.contiguous(), *sizes, out)


@functools.cache
def constant(value: float) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor([value], dtype=torch.float32, device="cpu")


@functools.cache
def _typed(nibbles: bool, dtype: torch.dtype) -> tuple[str, tuple[str, ...]]:
    """Return the source for results of `dtype`, and the types of its arguments."""
    code = (FOUR_BITS if nibbles else EIGHT_BITS) + WIDEN + _ROWS
    names = KINDS | FACTOR_TYPES | {"TYPE": TYPES[dtype], "BITS": 4 if nibbles else 8}
    for name, meant in names.items():
        code = re.sub(rf"\b{name}\b", str(meant), code)
    pointers = ("uint8_t", "float", "uint8_t", "uint8_t", "float", "float")
    constants = [f"const {each}*" for each in pointers]
    arguments = (*constants, *["int64_t"] * 13, f"{TYPES[dtype]}*")
    return code, arguments
