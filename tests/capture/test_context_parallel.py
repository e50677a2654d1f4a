"""Rows that torch's context parallelism splits are refused: compiled blocks would not see it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor.experimental import context_parallel

import qlora_compile
from qlora_compile.training_errors import ContextParallelError
from tests.toy_models import toy


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_a_step_whose_rows_are_split_is_refused(mesh: DeviceMesh) -> None:
    """accelerate enters this context for each step if cp_size is above 1."""
    model: Any = qlora_compile.optimize(toy(), quantize="nf4", tune="off").train()
    ids = torch.arange(16)[None]
    with (
        context_parallel(mesh, buffers=[ids], buffer_seq_dims=[1]),
        pytest.raises(ContextParallelError, match=r"context_parallel.*cp_size=1"),
    ):
        model(input_ids=ids)
    assert model(input_ids=ids).logits.isfinite().all()
