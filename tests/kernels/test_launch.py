"""Launches of a kernel that is compiled already, and launches that are recorded."""

import json
from concurrent.futures import ThreadPoolExecutor

import torch

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
