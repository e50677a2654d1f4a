"""What the fused op keeps for its backward, and what it allocates while it runs."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from qlora_compile.kernels.op import QLORA_LINEAR
from qlora_compile.kernels.registry import FORMATS, UNQUANTIZED
from qlora_compile.kernels.variants import dense
from qlora_compile.kernels.variants.base import NO_CONFIG, LinearTensors, NeedsGradient
from tests.kernels.linear_cases import DTYPES, Call, Case, Dtypes


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Matrices this small only wait for a second one, very long on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("dropout", [None, 0.1])
@pytest.mark.parametrize("dtypes", DTYPES, ids=lambda d: f"{d.x}-{d.lora}")
@pytest.mark.parametrize("format", [UNQUANTIZED, *(each.name for each in FORMATS)])
def test_only_inputs_are_saved(format: str, dtypes: Any, dropout: float | None) -> None:
    case = Case((2, 3), format=format, dtypes=dtypes, bias=True, dropout=dropout)
    call = case.build()
    tensors = [call.x, call.bias, call.lora_a, call.lora_b, call.seed, *call.planes]
    arguments = list(call.arguments)
    for position in (0, 2, 3, 4):
        arguments[position] = arguments[position].detach().requires_grad_()
    saved = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor.data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = QLORA_LINEAR(*arguments)
    assert sorted(saved) == sorted(each.data_ptr() for each in tensors if each is not None)
    y.backward(call.grad)


def allocations(run: Callable[[], Any]) -> tuple[list[int], int]:
    """(bytes of every allocation, most bytes held at a time) on CPU while `run` runs, inside
    torch's operators too; what it returns counts."""
    run()  # tables that are made once
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = run()
    held = most = 0
    sizes = []
    assert profiler.profiler is not None
    assert profiler.profiler.kineto_results is not None
    events = list(_walk(profiler.profiler.kineto_results.experimental_event_tree()))
    for event in sorted(events, key=lambda event: event.start_time_ns):
        size = event.typed[1].alloc_size
        held += size
        most = max(most, held)
        if size > 0:
            sizes.append(size)
    del result
    return sizes, most


def _walk(events: list[Any]) -> Iterator[Any]:
    for event in events:
        if event.tag.name == "Allocation":
            yield event
        yield from _walk(event.children)


def forward(call: Call) -> Callable[[], Any]:
    tensors = LinearTensors(call.x, call.planes, call.bias, call.lora_a, call.lora_b, call.seed)
    return lambda: dense.Dense().forward(tensors, call.spec, NO_CONFIG)


def backward(call: Call) -> Callable[[], Any]:
    tensors = LinearTensors(call.x, call.planes, call.bias, call.lora_a, call.lora_b, call.seed)
    needs = NeedsGradient(True, True, True)
    return lambda: dense.Dense().backward(call.grad, tensors, call.spec, needs, NO_CONFIG)


def test_allocations_are_counted() -> None:
    def run() -> torch.Tensor:
        x = torch.ones(1000, 1000)
        return (x + 1).sum()

    sizes, most = allocations(run)
    assert sizes.count(4_000_000) == 2
    assert 8_000_000 <= most < 8_100_000


@pytest.mark.parametrize("direction", [forward, backward])
@pytest.mark.parametrize("dropout", [None, 0.1])
@pytest.mark.parametrize(
    ("dtypes", "native"),
    [
        (DTYPES[1], False),
        *itertools.product((DTYPES[2], DTYPES[4], DTYPES[6]), (True, False)),
    ],
    ids=lambda value: f"{value.x}-{value.lora}" if isinstance(value, Dtypes) else f"{value}",
)
def test_nothing_grows_with_the_rows_but_the_output(
    direction: Callable[[Call], Callable[[], Any]], dropout: float | None, dtypes: Any, native: bool
) -> None:
    # So many that a copy dwarfs oneDNN's scratch for bfloat16, which does not grow with them.
    rows, width = 6144, 64
    call = Case((rows,), width, width, rank=4, dtypes=dtypes, dropout=dropout, bias=True).build()
    with (
        mock.patch.object(dense, "ROW_BLOCK", 64),
        mock.patch.object(dense, "_cpu_multiplies", return_value=native),
    ):
        sizes, most = allocations(direction(call))
    output = rows * width * (dtypes.out if direction is forward else dtypes.x).itemsize
    copy = rows * width * dtypes.lowest.itemsize
    assert output in sizes
    sizes.remove(output)
    assert max(sizes) < copy / 2
    assert most - output < copy


@pytest.mark.parametrize("direction", [forward, backward])
@pytest.mark.parametrize("row_blocks", [1, dense.REDECODED_BLOCKS, dense.REDECODED_BLOCKS + 1])
def test_one_decoded_weight_at_a_time(
    direction: Callable[[Call], Callable[[], Any]], row_blocks: int
) -> None:
    n, k, row_block = 1024, 1024, 4
    call = Case((row_block * row_blocks,), n, k, dtypes=DTYPES[2]).build()
    weight = n * k * torch.float32.itemsize
    with (
        mock.patch.object(dense, "ROW_BLOCK", row_block),
        mock.patch.object(dense, "_cpu_multiplies", return_value=False),
    ):
        sizes, most = allocations(direction(call))
        assert sizes.count(weight) == 1
        assert most < 2 * weight
        with mock.patch.object(dense, "WEIGHT_BLOCK", 1 << 16):
            sizes, most = allocations(direction(call))
    if row_blocks <= dense.REDECODED_BLOCKS:
        assert most < weight / 2
    else:
        assert sizes.count(weight) == 1
