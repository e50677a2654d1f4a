"""DDP and FSDP2 with packed models: gradients, casts, checkpoints and memory."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.jobs import LONG, obstacle, start

pytestmark = pytest.mark.skipif(not LONG, reason="`make test-distributed` runs these jobs")


@pytest.mark.parametrize("check", ["ragged", "unused", "mixed_precision", "measured"])
def test_two_ranks(check: str) -> None:
    start(2, "checks", check)


def test_a_job_measures_each_problem_once(tmp_path: Path) -> None:
    for job in ("first", "second"):
        start(2, "checks", "records", str(tmp_path), job)


def test_tensor_parallel_by_the_plan_of_transformers_is_refused(tmp_path: Path) -> None:
    start(2, "checks", "tensor_parallel", str(tmp_path))


@pytest.mark.parametrize("ranks", [2, 4])
def test_memory_of_a_rank(ranks: int) -> None:
    start(ranks, "memory")


def test_a_checkpoint_loads_into_another_number_of_ranks(tmp_path: Path) -> None:
    start(2, "checks", "save", str(tmp_path))
    for ranks in (1, 4):
        start(ranks, "checks", "load", str(tmp_path))


@pytest.mark.parametrize("engine", ["fsdp2", "zero3"])
def test_spread_adapters_are_saved(engine: str, tmp_path: Path) -> None:
    if reason := obstacle(engine):
        pytest.skip(reason)
    start(2, "checks", "adapters", str(tmp_path), engine)


def test_a_run_writes_spread_adapters(tmp_path: Path) -> None:
    if reason := obstacle("fsdp2"):
        pytest.skip(reason)
    start(2, "checks", "command", str(tmp_path))


@pytest.mark.parametrize("engine", ["fsdp2", "zero3"])
def test_spread_weights_are_merged_and_saved(engine: str, tmp_path: Path) -> None:
    if reason := obstacle(engine):
        pytest.skip(reason)
    start(2, "checks", "merged", str(tmp_path), engine)
