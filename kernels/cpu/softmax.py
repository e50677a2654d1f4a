"""Cross-entropy and its gradient over rows of logits, in place, without copies of them."""

from __future__ import annotations

import torch
from torch import Tensor

from qlora_compile.kernels.cpu.toolchain import BFLOAT16, VECTORISED, compiled, has_compiler

_SOURCE = (
    VECTORISED
    + BFLOAT16
    + r"""
#include <cmath>

// e^x within two units in the last place; NaN stays NaN, and below -87 it is as good as 0.
static inline float exponential(float x) {
  x = x < -87.0f ? -87.0f : x;
  const float shifted = x * 1.44269504f + 12582912.0f;  // rounds to an integer, in the low bits
  const float whole = shifted - 12582912.0f;
  const float r = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  int32_t bits;
  std::memcpy(&bits, &shifted, sizeof(bits));
  const int32_t power = static_cast<int32_t>(static_cast<uint32_t>(bits + 127) << 23);
  float scale;
  std::memcpy(&scale, &power, sizeof(scale));
  return p * scale;
}

extern "C" void kernel(
    TYPE* logits, const int64_t* labels, float* sums, int64_t stride, float factor, float smoothing,
    int64_t rows, int64_t size, int64_t ignored, int64_t detailed, int64_t differentiates,
    int64_t threads) {
  float *log_sum = sums, *target = sums + stride, *total = sums + 2 * stride;
  float *entropy = sums + 3 * stride, *squares = sums + 4 * stride, *first = sums + 5 * stride;
#pragma omp parallel for num_threads(threads)
  for (int64_t m = 0; m < rows; ++m) {
    TYPE* row = logits + m * size;
    const bool counts = labels[m] != ignored;
    const int64_t label = counts ? labels[m] : 0;
    const bool inside = label >= 0 && label < size;
    float most = -INFINITY, sum = 0.0f, all = 0.0f, weighted = 0.0f, squared = 0.0f;
#pragma omp simd reduction(max : most)
    for (int64_t i = 0; i < size; ++i) {
      const float z = load(row + i) * factor;
      most = z > most ? z : most;
    }
    if (detailed) {
#pragma omp simd reduction(+ : sum, all, weighted, squared)
      for (int64_t i = 0; i < size; ++i) {
        const float z = load(row + i) * factor, below = z - most, e = exponential(below);
        sum += e;
        all += z;
        weighted += e * below;
        squared += e * e;
      }
    } else {
#pragma omp simd reduction(+ : sum, all)
      for (int64_t i = 0; i < size; ++i) {
        const float z = load(row + i) * factor;
        sum += exponential(z - most);
        all += z;
      }
    }
    const float logarithm = most + std::log(sum);
    log_sum[m] = logarithm;
    total[m] = all;
    const float z = inside ? load(row + label) * factor : 0.0f;
    target[m] = z;
    if (detailed) {
      entropy[m] = std::log(sum) - weighted / sum;
      squares[m] = squared / (sum * sum);
      bool is_first = z >= most;
      const int64_t before = label < size ? label : size;
      for (int64_t i = 0; i < before && is_first; ++i) is_first = load(row + i) * factor < z;
      first[m] = is_first;
    }
    if (!differentiates) continue;
    const float each = smoothing / size, scale = counts ? factor : 0.0f;
#pragma omp simd
    for (int64_t i = 0; i < size; ++i) {
      const float p = exponential(load(row + i) * factor - logarithm);
      store(row + i, (p - each) * scale);
    }
    if (!inside) continue;
    const float p = exponential(z - logarithm);
    store(row + label, (p - each - (1.0f - smoothing)) * scale);
  }
}
"""
)

_ARGUMENTS = ("const int64_t*", "float*", "int64_t", "float", "float", *["int64_t"] * 6)

SUMS, DETAILED = 3, 6
"""How many sums of each row `cross_entropy_rows` writes, without details and with them."""

_TYPES = {torch.bfloat16: "uint16_t", torch.float32: "float"}


def available(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `cross_entropy_rows` takes logits of that dtype."""
    return device.type == "cpu" and dtype in _TYPES and has_compiler()


def cross_entropy_rows(
    logits: Tensor,
    labels: Tensor,
    sums: Tensor,
    *,
    factor: float,
    smoothing: float,
    ignored: int,
    differentiates: bool,
) -> None:
    """Write what z = factor * `logits` comes to in every row to `sums`, float32 [SUMS or DETAILED,
    m] with contiguous rows: its log-sum-exp, its label's z, the sum of its z; then with p, the
    softmax of z, the entropy, the sum of p², and 1 if the label's is the first largest z, else 0.

    If it `differentiates`, it overwrites `logits`, bfloat16 or float32 [m, V] and contiguous, with
    the gradient of each row's loss, which is 0 in the `ignored` rows.

    labels: int64 [m], in [0, V) or `ignored`. The z of any other label counts as 0, and has no
    gradient, as in TRL.
    """
    number = _TYPES[logits.dtype]
    kernel = compiled(_SOURCE.replace("TYPE", number), (f"{number}*", *_ARGUMENTS))
    rows, size = logits.shape
    switches = int(len(sums) == DETAILED), int(differentiates), torch.get_num_threads()
    kernel(
        *(logits, labels, sums, sums.stride(0), factor, smoothing),
        *(rows, size, ignored, *switches),
    )
