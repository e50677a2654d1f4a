"""What the fused op keeps for its backward, and what it allocates while it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from unittest import mock

import pytest
import torch

from bench.allocations import allocations
from qlora_compile.kernels import workspace
from qlora_compile.kernels.formats import blocks
from qlora_compile.kernels.op import QLORA_LINEAR
from qlora_compile.kernels.problem import Direction
from qlora_compile.kernels.registry import FORMATS, UNQUANTIZED
from qlora_compile.kernels.variants import dense, native_adapter
from qlora_compile.kernels.variants.base import Config, NeedsGradient
from tests.kernels.linear_cases import DTYPES, Call, Case, Dtypes


@pytest.mark.parametrize("keeps", [False, True])
@pytest.mark.parametrize("dropout", [None, 0.1])
@pytest.mark.parametrize("dtypes", DTYPES, ids=lambda d: f"{d.x}-{d.lora}")
@pytest.mark.parametrize("format", [UNQUANTIZED, *(each.name for each in FORMATS[::4])])
def test_only_inputs_are_saved(
    format: str, dtypes: Any, dropout: float | None, keeps: bool
) -> None:
    """Saved are the inputs, and x Aᵀ [M, rank] if it is kept."""
    case = Case((2, 3), format=format, dtypes=dtypes, bias=True, dropout=dropout)
    call, _ = case.build().leaves()
    arguments = call.arguments(keeps)
    x, tensors, seed, _ = arguments
    saved = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y, *_ = QLORA_LINEAR(*arguments)
    known = {each.data_ptr() for each in (x, *tensors, seed) if each is not None}
    others = [tensor for tensor in saved if tensor.data_ptr() not in known]
    assert len(saved) - len(others) == len(known)
    assert [(t.shape, t.dtype) for t in others] == [((6, case.rank), dtypes.lora)] * keeps
    y.backward(call.grad)


def runs(call: Call, direction: Direction) -> Iterator[tuple[Config, Callable[[], Any]]]:
    """Yield one direction of the call by every config of dense."""
    group = [(call.linear_tensors, call.spec)]
    needs = NeedsGradient(True, True, True)
    variant = dense.Dense()
    for config in variant.configs(call.problem(direction)):
        if direction == "forward":
            yield config, lambda c=config: variant.forward_group(group, c)
        else:
            yield config, lambda c=config: variant.backward_group([call.grad], group, needs, c)


def test_allocations_are_counted() -> None:
    def run() -> torch.Tensor:
        x = torch.ones(1000, 1000)
        return (x + 1).sum()

    sizes, most, *_ = allocations(run)
    assert sizes.count(4_000_000) == 2
    assert 8_000_000 <= most < 8_100_000


by_direction = pytest.mark.parametrize("direction", ["forward", "backward"])


@by_direction
@pytest.mark.parametrize("dropout", [None, 0.1])
@pytest.mark.parametrize(
    "dtypes", [DTYPES[i] for i in (1, 2, 4, 6)], ids=lambda d: f"{d.x}-{d.lora}"
)
def test_nothing_grows_with_the_rows_but_the_output(
    direction: Direction, dropout: float | None, dtypes: Dtypes
) -> None:
    # So many that a copy dwarfs oneDNN's scratch for bfloat16, which does not grow with them.
    rows, width = 12288, 64
    call = Case((rows,), width, width, rank=4, dtypes=dtypes, dropout=dropout, bias=True).build()
    output = rows * width * (dtypes.out if direction == "forward" else dtypes.x).itemsize
    copy = rows * width * dtypes.lowest.itemsize
    with mock.patch.object(native_adapter, "ROW_BLOCK", 256):
        for config, run in runs(call, direction):
            sizes, most, *_ = allocations(run)
            assert output in sizes
            sizes.remove(output)
            assert max(sizes, default=0) < copy / 2, config
            assert most - output < copy, config


@by_direction
@pytest.mark.parametrize("dtypes", [DTYPES[1], DTYPES[2]], ids=lambda d: f"{d.x}-{d.lora}")
def test_no_decoded_weight_is_allocated(direction: Direction, dtypes: Dtypes) -> None:
    """Once the workspace has grown to it."""
    n, k = 1024, 1024
    call = Case((4,), n, k, dtypes=dtypes).build()
    with (
        mock.patch.object(dense, "WEIGHT_BLOCKS", (1 << 16,)),
        mock.patch.object(blocks, "_CPU_CHUNK", 1 << 14),
    ):
        for config, run in runs(call, direction):
            most = allocations(run).most
            assert most < n * k * torch.bfloat16.itemsize, config


def test_blocks_need_a_workspace_of_one_block() -> None:
    call = Case((4,), 1024, 1024).build()
    with (
        mock.patch.object(dense, "WEIGHT_BLOCKS", (1 << 16,)),
        mock.patch.object(workspace, "_buffers", workspace._Buffers()),
    ):
        for config, run in runs(call, "forward"):
            assert isinstance(config, dense.DenseConfig)
            if config.weight_block is not None:
                run()
        (buffer,) = workspace._buffers.by_stream.values()
    assert buffer.numel() == (1 << 16) * torch.float32.itemsize


def test_threads_have_workspaces_of_their_own() -> None:
    def address() -> int:
        made = workspace.workspace(3, 5, dtype=torch.float32, device=torch.device("cpu"))
        assert made.shape == (3, 5)
        assert made.isnan().all()  # as torch.empty in this mode
        return made.data_ptr()

    with ThreadPoolExecutor(1) as other:
        assert address() == address()
        assert other.submit(address).result() != address()
