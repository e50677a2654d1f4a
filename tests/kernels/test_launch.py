"""Launches of a kernel that is compiled already, and launches that are recorded."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from triton.tools.tensor_descriptor import TensorDescriptor

from qlora_compile.kernels.gpu.configs import TAIL
from qlora_compile.kernels.gpu.gemm_launch import _x_operand
from qlora_compile.kernels.gpu.launch import Launch, recording
from qlora_compile.kernels.gpu.target import assuming, target_of
from tests.bench.compiled import run


class Kernel:
    """Stands for one of Triton's kernels; reports its launches."""

    def __init__(self) -> None:
        self.grids: list[tuple[int, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]):
        return lambda **arguments: self.grids.append(grid)


def test_what_is_recorded_or_assumed_in_one_thread_counts_in_no_other() -> None:
    kernel = Kernel()
    launch = Launch(kernel, (3,), {"x": torch.zeros(1)}, {})
    with ThreadPoolExecutor(1) as other, recording() as launches, assuming("sm_90", kind="cpu"):
        other.submit(launch.run).result()
        assert launches == []
        assert kernel.grids == [(3,)]
        launch.run()
        assert launches == [launch]
        assert kernel.grids == [(3,)]
        assert target_of("cpu") == "sm_90"
        assert other.submit(target_of, "cpu").result() is None


def test_only_what_is_compiled_anew_goes_through_tritons_jit() -> None:
    done = run("tests.kernels.launches_found")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["launched"] == len(found["asked"])
    assert found["same"]
    known = {"again", "another number", "packed again"}
    assert found["asked"] == {name: int(name not in known) for name in found["asked"]}


@pytest.mark.parametrize("offset", [0, 2, 8, 16])
def test_a_descriptor_begins_at_a_multiple_of_16_bytes(offset: int) -> None:
    """Also where the storage itself begins elsewhere."""
    buffer = bytearray(32 * 64 * 2 + 32)
    start = -torch.frombuffer(buffer, dtype=torch.uint8).data_ptr() % 16 + offset
    x = torch.frombuffer(buffer, dtype=torch.bfloat16, count=32 * 64, offset=start).view(32, 64)
    assert x.storage_offset() == 0
    config = next(each for each in TAIL["sm_90"] if each.descriptor)
    operand, described = _x_operand(x, config, torch.bfloat16)
    assert operand.data_ptr() % 16 == 0
    assert (operand is x) == (offset % 16 == 0)
    assert isinstance(described, TensorDescriptor)
