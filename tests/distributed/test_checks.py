"""DDP and FSDP2 with packed models: gradients, casts, checkpoints and memory."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.jobs import LONG, start

pytestmark = pytest.mark.skipif(not LONG, reason="`make test-distributed` runs these jobs")


@pytest.mark.parametrize("check", ["ragged", "unused", "mixed_precision"])
def test_two_ranks(check: str) -> None:
    start(2, "checks", check)


@pytest.mark.parametrize("ranks", [2, 4])
def test_memory_of_a_rank(ranks: int) -> None:
    start(ranks, "checks", "memory")


def test_a_checkpoint_loads_into_another_number_of_ranks(tmp_path: Path) -> None:
    start(2, "checks", "save", str(tmp_path))
    for ranks in (1, 4):
        start(ranks, "checks", "load", str(tmp_path))
