"""Training in several processes gives the losses and adapters of one process over all rows."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch.distributed as dist

from qlora_compile.capture import backend
from qlora_compile.kernels.formats.formats import FORMATS
from tests.distributed import worker
from tests.distributed.cases import Case
from tests.distributed.jobs import LONG, obstacle, start
from tests.pairwise import pairwise

PROCESSES = (2, 4, 1)  # where several cases serve, the first of them
ENGINES = ("ddp", "fsdp2", "accelerate", "zero2", "zero3")
BASES = (*(each.name for each in FORMATS[:4]), "16bit", "bitsandbytes")
MODELS = ("dense", "experts")
CHECKPOINTING = ("plain", "checkpointed")


def every_pair() -> list[tuple[int, Case]]:
    """Cases in which every two values of different properties meet."""
    possible = list(itertools.product(PROCESSES, ENGINES, BASES, MODELS, CHECKPOINTING))
    names = ("processes", "engine", "base", "model", "checkpointing")
    chosen = pairwise(possible, lambda row: dict(zip(names, row, strict=True)))
    return [(processes, Case(*rest)) for processes, *rest in chosen]


SAMPLE = [(2, Case("ddp", "nf4", "dense", "plain")), (2, Case("fsdp2", "int4", "experts", "plain"))]
CASES = every_pair() if LONG else SAMPLE


def run(processes: int, names: list[str], output: Path) -> dict[str, Any]:
    start(processes, "worker", str(output), *names)
    return json.loads(output.read_text())


@pytest.fixture(scope="session")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, str], Any]:
    """What each case gives in its job."""
    folder = tmp_path_factory.mktemp("jobs")
    jobs: dict[int, list[str]] = {}
    for processes, case in CASES:
        if not obstacle(case.engine):
            jobs.setdefault(processes, []).append(str(case))
    return {
        (processes, name): result
        for processes, names in jobs.items()
        for name, result in run(processes, names, folder / f"{processes}.json").items()
    }


@pytest.fixture(scope="module")
def group() -> Iterator[None]:
    """This process as a job of one."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def alone(case: Case, group: None, monkeypatch: pytest.MonkeyPatch) -> Any:
    """What one process gives that trains on all rows."""
    monkeypatch.setattr(backend, "compile_inner", worker.compile_inner)
    return worker.run(replace(case, engine="none"))


@pytest.mark.parametrize(("processes", "case"), CASES, ids=lambda value: str(value))
def test_a_job_trains_as_one_process(processes: int, case: Case, results: Any, alone: Any) -> None:
    if reason := obstacle(case.engine):
        pytest.skip(reason)
    ours = results[processes, str(case)]
    numpy.testing.assert_allclose(ours["losses"], alone["losses"], rtol=1e-6)
    assert ours["adapters"].keys() == alone["adapters"].keys()
    for name, values in alone["adapters"].items():
        numpy.testing.assert_allclose(
            ours["adapters"][name], values, rtol=1e-5, atol=1e-6, err_msg=name
        )
    assert ours["fused"] == alone["fused"] > 0
    assert ours["unfused"] == alone["unfused"]
