"""The benchmarks' readings of a device."""

import pytest
import torch

from bench.gpu_memory import on_gpu

pytestmark = pytest.mark.gpu


def test_bytes_and_kernels_of_a_run() -> None:
    size = 1 << 22
    kept = torch.ones(size, dtype=torch.uint8, device="cuda")

    def run() -> torch.Tensor:
        return kept + 1 + 1

    run()
    before = torch.cuda.memory_allocated()
    found = on_gpu(run)
    assert (found.held, found.kernels) == (size, 2)
    assert found.most - before == 2 * size
