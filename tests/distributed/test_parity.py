"""Trained in several processes, losses and adapters are those of one process over all rows."""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy
import pytest

from tests.distributed.cases import Case

ROOT = Path(__file__).parents[2]
LONG = bool(os.environ.get("QLORA_COMPILE_DISTRIBUTED_TESTS"))
PROCESSES = (1, 2, 4)
ENGINES = ("ddp", "fsdp2", "accelerate", "zero2", "zero3")
BASES = ("nf4", "int8", "int4", "16bit", "bitsandbytes")
MODELS = ("dense", "experts")
CHECKPOINTING = ("plain", "checkpointed")
IMPOSSIBLE = {
    ("zero3", "bitsandbytes"): "DeepSpeed's parts are no Params4bit: the quant_state is lost",
    ("fsdp2", "bitsandbytes"): "a DTensor's parts are no Params4bit: the quant_state is lost",
}
"""Engines and bases that fail without us as well, by what `test_stock_fails_as_well` shows."""


def pairwise() -> list[tuple[int, Case]]:
    """Cases in which each two values of different properties meet, greedily chosen."""
    every = [
        case
        for case in itertools.product(PROCESSES, ENGINES, BASES, MODELS, CHECKPOINTING)
        if (case[1], case[2]) not in IMPOSSIBLE
    ]
    missing = {pair for case in every for pair in _pairs(case)}
    chosen = []
    while missing:
        best = max(every, key=lambda case: len(missing & _pairs(case)))
        missing -= _pairs(best)
        chosen.append((best[0], Case(*best[1:])))
    return chosen


def _pairs(case: tuple[Any, ...]) -> set[Any]:
    return set(itertools.combinations(enumerate(case), 2))


SAMPLE = [(2, Case("ddp", "nf4", "dense", "plain")), (2, Case("fsdp2", "int4", "experts", "plain"))]
CASES = pairwise() if LONG else SAMPLE


def run(processes: int, names: list[str], output: Path) -> dict[str, Any]:
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
        *("--nproc-per-node", str(processes), "-m", "tests.distributed.worker"),
        *(str(output), *names),
    ]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1200
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return json.loads(output.read_text())


@pytest.fixture(scope="session")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, str], Any]:
    """What each case gives, and under the engine "none" one process over all rows."""
    folder = tmp_path_factory.mktemp("jobs")
    jobs: dict[int, list[str]] = {}
    for processes, case in CASES:
        if case.engine.startswith("zero") and importlib.util.find_spec("deepspeed") is None:
            continue
        jobs.setdefault(processes, []).append(str(case))
        alone = str(Case("none", *str(case).split("-")[1:]))
        jobs.setdefault(1, []).append(alone)
    found = {}
    for processes, names in jobs.items():
        unique = list(dict.fromkeys(names))
        for name, result in run(processes, unique, folder / f"{processes}.json").items():
            found[processes, name] = result
    return found


@pytest.mark.parametrize(("processes", "case"), CASES, ids=lambda value: str(value))
def test_a_job_trains_as_one_process(processes: int, case: Case, results: Any) -> None:
    if case.engine.startswith("zero") and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed; `make test-distributed` installs it")
    ours = results[processes, str(case)]
    alone = results[1, str(Case("none", *str(case).split("-")[1:]))]
    numpy.testing.assert_allclose(ours["losses"], alone["losses"], rtol=1e-6)
    assert ours["adapters"].keys() == alone["adapters"].keys()
    for name, values in alone["adapters"].items():
        numpy.testing.assert_allclose(
            ours["adapters"][name], values, rtol=1e-5, atol=1e-6, err_msg=name
        )
    assert ours["fused"] == alone["fused"] > 0
    assert ours["unfused"] == alone["unfused"]
