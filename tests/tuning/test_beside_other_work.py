"""Records made beside three busy processes, and steps that run quietly with these records.

`make test-noise` runs this, several times, on a machine that is quiet but for these processes.
"""

from __future__ import annotations

import os
import statistics
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

import qlora_compile
from qlora_compile.tuning import cpu_figures, modes
from qlora_compile.tuning.caution import CAREFUL
from qlora_compile.tuning.load import usable_cpus
from qlora_compile.tuning.record import Record
from qlora_compile.tuning.store import RecordStore
from qlora_compile.tuning.tuner import Tuner
from tests.test_equality import lora, step, without_inductor
from tests.toy_models import tokens, toy
from tests.tuning.test_load import busy_processes

__all__ = ["without_inductor"]

REPETITIONS = int(os.environ.get("QLORA_COMPILE_NOISE_REPETITIONS", "0"))
BUSY = 3
PAIRS = 16
SIZES: dict[str, Any] = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "num_hidden_layers": 4,
    "max_position_embeddings": 256,
}
"""Four blocks of SmolLM2-135M."""

pytestmark = [
    pytest.mark.skipif(not REPETITIONS, reason="needs a quiet machine: make test-noise"),
    pytest.mark.filterwarnings("ignore::qlora_compile.tuning.warning.NotMeasuredWarning"),
    pytest.mark.usefixtures("without_inductor"),
]


@pytest.fixture(autouse=True)
def all_cpus(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The tuner of a user: all threads, real caution, a budget."""
    monkeypatch.setattr(Tuner, "caution", CAREFUL)
    monkeypatch.setattr(modes, "AUTO_BUDGET", 60.0)
    threads = torch.get_num_threads()
    torch.set_num_threads(len(usable_cpus()))
    yield
    torch.set_num_threads(threads)


def first_step(folder: Path, monkeypatch: pytest.MonkeyPatch, *, busy: int = 0) -> tuple[Any, int]:
    """Return a model after its first step, which tunes into `folder`, and how many problems it
    measured; beside so many busy processes, as in a new process of its own."""
    monkeypatch.setenv("QLORA_COMPILE_CACHE", str(folder))
    modes.forget_tuners()
    cpu_figures._known.clear()
    torch._dynamo.reset()
    with busy_processes(busy) if busy else nullcontext():
        model = qlora_compile.optimize(toy(**SIZES), lora(0.0), quantize="nf4").train()
        step(model, tokens(2, 256))
    tuner = modes.tuner_of("auto")
    assert tuner is not None
    return model, tuner.measurements


def records(folder: Path) -> dict[Any, Record]:
    return {record.problem: record for record in RecordStore(folder).read().values()}


def seconds(model: Any, ids: torch.Tensor) -> float:
    start = time.perf_counter()
    step(model, ids)
    return time.perf_counter() - start


@pytest.mark.parametrize("repetition", range(max(REPETITIONS, 1)))
def test_steps_over_records_made_beside_other_work(
    repetition: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    quiet, measured = first_step(tmp_path / "quiet", monkeypatch)
    assert measured > 0, "the machine is busy: nothing could be measured for comparison"
    _, beside = first_step(tmp_path / "noisy", monkeypatch, busy=BUSY)
    made_beside = records(tmp_path / "noisy")
    noisy, later = first_step(tmp_path / "noisy", monkeypatch)
    ratios = []
    for pair in range(PAIRS):
        ids = tokens(2, 256)
        order = (quiet, noisy) if pair % 2 else (noisy, quiet)
        taken = {id(model): seconds(model, ids) for model in order}
        ratios.append(taken[id(noisy)] / taken[id(quiet)])
    ratio = statistics.median(ratios)
    # Shown by pytest's -s: these are the figures of a repetition.
    print(
        f"\nrepetition {repetition}: {measured} problems measured quietly, {beside} beside {BUSY} "
        f"busy processes, {later} afterwards; a step takes {ratio:.3f} of one over quiet records"
    )
    assert ratio <= 1.05
    confirmed = records(tmp_path / "quiet")
    for problem, record in made_beside.items():
        if record.gain is not None and record.gain > 3:
            quiet_gain = confirmed[problem].gain
            assert quiet_gain is not None
            assert quiet_gain > record.gain / 2
