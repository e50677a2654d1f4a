"""`qlora-compile train --processes`: one message however it ends, and the losses of one process."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy
import pytest
import typer
from typer.testing import CliRunner

from qlora_compile.cli import processes
from qlora_compile.cli.app import app
from qlora_compile.outputs import last_checkpoint
from qlora_compile.training.settings import RunSettings, settings_from
from tests.cli.test_train import arguments, inputs, losses
from tests.distributed.jobs import LONG, PATHS
from tests.waiting import Job, job

__all__ = ["inputs"]


@pytest.fixture
def handlers() -> Iterator[None]:
    """Take back what torchrun sets in this process, which would end after it."""
    before = {each: signal.getsignal(each) for each in signal.valid_signals() if each < 32}
    yield
    for number, handler in before.items():
        if number not in (signal.SIGKILL, signal.SIGSTOP):
            signal.signal(number, handler)


# The first rank would outlive the other one by far.
SAYS = "; first = os.environ['RANK'] == '0'; time.sleep(600) if first else "
OUTLIVED = "; open('outlived', 'w')"
RECORDS = (
    "json.dump({'message': {'message': 'ResumeError: cannot resume', 'extraInfo': {'timestamp': "
    "'1'}}}, open(os.environ['TORCHELASTIC_ERROR_FILE'], 'w')) or sys.exit(2)"
)
ENDINGS = {
    "killed": ("os.kill(os.getpid(), 9)", 1, ("killed by SIGKILL, and the others", "nothing was")),
    "a bug": ("1 / 0", 1, ("ZeroDivisionError", "ended with status 1")),
    "bad input": (RECORDS, 2, (": cannot resume\n",)),
}


@pytest.mark.usefixtures("handlers")
@pytest.mark.parametrize("name", ENDINGS)
def test_a_rank_that_ends_is_named_and_ends_the_others(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    act, status, parts = ENDINGS[name]
    script = f"import json, os, sys, time{SAYS}{act}{OUTLIVED}"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(processes, "_TRAIN", ("-c", script))
    settings = RunSettings("model", ("data",), output=str(tmp_path), processes=2)
    with pytest.raises(typer.Exit) as raised:
        processes.start_processes(settings, resume=False, overwrite=False)
    assert not Path("outlived").exists()
    said = capfd.readouterr().err
    assert raised.value.exit_code == status
    assert said.count("error: ") == 1
    assert "error: rank 1 (process " in said
    for part in parts:
        assert part in said


@pytest.mark.usefixtures("handlers")
def test_the_rank_that_was_killed_is_named_though_the_other_fails_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    script = """
import os, pathlib, time
from tests.waiting import runs
noted = pathlib.Path("noted")
if os.environ["RANK"] == "1":
    noted.with_suffix(".part").write_text(str(os.getpid()))
    noted.with_suffix(".part").rename(noted)
    os.kill(os.getpid(), 9)
while not noted.exists() or runs(int(noted.read_text())):
    time.sleep(0.001)
raise RuntimeError("Connection closed by peer")
"""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", PATHS)
    monkeypatch.setattr(processes, "_TRAIN", ("-c", script))
    settings = RunSettings("model", ("data",), output=str(tmp_path), processes=2)
    with pytest.raises(typer.Exit):
        processes.start_processes(settings, resume=False, overwrite=False)
    assert "error: rank 1 (process " in capfd.readouterr().err


@pytest.mark.usefixtures("handlers")
def test_ctrl_c_ends_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    script = f"""
import os, pathlib, signal, time
signal.signal(signal.SIGINT, signal.SIG_DFL)  # as `end_by_signal` does
pathlib.Path(os.environ["RANK"]).touch()
if os.environ["RANK"] == "1":
    while not pathlib.Path("0").exists():
        time.sleep(0.01)
    os.kill({os.getpid()}, signal.SIGINT)
time.sleep(60)
"""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(processes, "_TRAIN", ("-c", script))
    settings = RunSettings("model", ("data",), output=str(tmp_path), processes=2)
    with pytest.raises(typer.Exit) as raised:
        processes.start_processes(settings, resume=False, overwrite=False)
    assert raised.value.exit_code == 130
    assert capfd.readouterr().err == "stopped: nothing was saved\n"


@pytest.mark.usefixtures("handlers")
def test_each_process_gets_the_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = "import os, shutil, sys; shutil.copy(sys.argv[2], 'got' + os.environ['LOCAL_RANK'])"
    monkeypatch.setattr(processes, "_TRAIN", ("-c", script))
    monkeypatch.chdir(tmp_path)
    settings = RunSettings(
        "model", ("a", "b"), processes=2, rank_pattern={"q_proj": 3}, options={"adam_beta1": 0.5}
    )
    with pytest.raises(typer.Exit) as raised:
        processes.start_processes(settings, resume=True, overwrite=False)
    assert raised.value.exit_code == 0
    assert [settings_from({}, tmp_path / f"got{rank}") for rank in (0, 1)] == [settings] * 2


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="the system has no affinities")
@pytest.mark.usefixtures("handlers")
@pytest.mark.parametrize("usable", [1, 3, 8])
def test_processes_share_the_cpus_that_the_job_may_use(
    usable: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = "import os; open(os.environ['RANK'], 'w').write(os.environ['OMP_NUM_THREADS'])"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(processes, "_TRAIN", ("-c", script))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(usable)))
    settings = RunSettings("model", ("data",), output=str(tmp_path), processes=2)
    with pytest.raises(typer.Exit):
        processes.start_processes(settings, resume=False, overwrite=False)
    assert Path("0").read_text() == Path("1").read_text() == str(max(1, usable // 2))


def test_none_is_too_few(inputs: Path, tmp_path: Path) -> None:
    refused = CliRunner().invoke(app, arguments(inputs, tmp_path / "run", processes=0))
    assert refused.exit_code == 2
    assert "--processes=0 is out of range; use 1 or more" in refused.stderr


# ---- real ones ----

jobs = pytest.mark.skipif(not LONG, reason="`make test-distributed` runs these jobs")
CHANGED: dict[str, Any] = {"format": "nf4", "tune": "model", "checkpoint_every": 1, "held_out": 0}


def _training(given: list[str]) -> AbstractContextManager[Job]:
    environment = os.environ | {"PYTHONPATH": PATHS}
    return job([sys.executable, "-m", "qlora_compile.cli.app", *given], env=environment)


@jobs
def test_losses_are_those_of_one_process(inputs: Path, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    assert CliRunner().invoke(app, arguments(inputs, one, **CHANGED)).exit_code == 0
    with _training(arguments(inputs, two, **CHANGED, processes=2, batch_size=1)) as training:
        said = training.wait()
    assert training.process.returncode == 0, said
    numpy.testing.assert_allclose(losses(two), losses(one), rtol=1e-5)


@jobs
@pytest.mark.parametrize("ended", ["rank", "all"])
def test_what_ends_a_job_leaves_a_checkpoint(ended: str, inputs: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    given = arguments(inputs, output, **CHANGED, processes=2, batch_size=1, steps=100_000)
    with _training(given) as training:
        training.wait_until(lambda: last_checkpoint(output) is not None)
        children = training.children()
        assert len(children) == 2
        if ended == "rank":
            os.kill(children[1], signal.SIGKILL)
        else:
            training.process.send_signal(signal.SIGINT)
        said = training.wait()
    assert training.process.returncode == (1 if ended == "rank" else 130), said
    expected = f"error: rank 1 (process {children[1]}): killed" if ended == "rank" else "stopped: "
    assert said.count(expected) == 1
    assert "Traceback" not in said, said
    assert "holds adapter and training state; --resume goes on from there" in said
    assert not any(Path(f"/proc/{child}").exists() for child in children)


# Rank 1 is killed where rank 0 has saved all of its part of a checkpoint, and rank 1 a part of its
# own is missing.
KILLED = """
import os, pathlib, signal, sys, time
from transformers import Trainer
from qlora_compile.cli.app import app

save = Trainer._save_rng_state

def killed(trainer, folder):
    if os.environ["RANK"] == "1" and folder.endswith("checkpoint-4"):
        while not pathlib.Path(folder, "trainer_state.json").exists():
            time.sleep(0.01)
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGKILL)
    save(trainer, folder)

Trainer._save_rng_state = killed
app(["train", *sys.argv[1:]])
"""


@jobs
@pytest.mark.usefixtures("handlers")
def test_a_job_that_is_killed_while_it_saves_resumes_to_the_same_losses(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, output = tmp_path / "whole", tmp_path / "run"
    changed = {**CHANGED, "processes": 2, "batch_size": 1, "dropout": 0.1}
    with _training(arguments(inputs, whole, **changed)) as training:
        said = training.wait()
    assert training.process.returncode == 0, said
    with monkeypatch.context() as patched:
        patched.setattr(processes, "_TRAIN", ("-c", KILLED))
        patched.setenv("PYTHONPATH", PATHS)
        killed = CliRunner().invoke(app, arguments(inputs, output, **changed))
    assert killed.exit_code == 1, killed.stderr
    assert "error: rank 1 (process " in killed.stderr
    assert f"{output / 'checkpoint-3'} holds adapter and training state" in killed.stderr
    assert (output / "checkpoint-4" / "trainer_state.json").exists()
    with _training(arguments(inputs, output, **changed, resume=True)) as training:
        said = training.wait()
    assert training.process.returncode == 0, said
    assert losses(output) == losses(whole)
