"""Faults of long runs: they are killed, run out of disk or memory, and meet NaN."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import filelock
import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers.training_args import ParallelMode
from typer.testing import CliRunner

from qlora_compile.cli.app import app
from qlora_compile.errors import OptionError
from qlora_compile.hf.trainer.failures import check_parallelism
from qlora_compile.hf.training import FineTuning, StepObserver, seed_everything
from qlora_compile.outputs import DIGESTS, damage, held, last_checkpoint, write_digests
from qlora_compile.training_errors import (
    CheckpointWriteError,
    ContextParallelError,
    NotFiniteError,
    TrainingMemoryError,
)
from tests.cli.test_train import arguments, inputs, losses, stock
from tests.examples import LONG, examples
from tests.toy_language_model import toy_llama, toy_tokenizer
from tests.waiting import wait_until

__all__ = ["inputs", "stock"]

STEPS = 6
CHANGED: dict[str, Any] = {
    "steps": STEPS,
    "dropout": 0.1,
    "checkpoint_every": 1,
    "format": "none",
    "held_out": 0,
}
ROWS = [{"input_ids": list(range(n, n + 5))} for n in range(2 * STEPS)]


def run(inputs: Path, output: Path, **changed: Any) -> Any:
    return CliRunner().invoke(app, arguments(inputs, output, **CHANGED, **changed))


@pytest.fixture(scope="module")
def whole(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of a run that nothing disturbs."""
    output = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as patched:
        stock.__wrapped__(patched)  # type: ignore[attr-defined]
        result = run(inputs, output)
    assert result.exit_code == 0, result.output
    return output


def after_seconds(seconds: float) -> None:
    """Kill this process after so long, wherever it is then."""
    signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    signal.setitimer(signal.ITIMER_REAL, seconds)


def at_write(output: Path, count: int) -> None:
    """Kill this process when it opens a file of `output` to write, renames or removes one, for the
    `count`-th time."""
    left = [count]

    def watch(event: str, given: tuple[Any, ...]) -> None:
        if event not in ("open", "os.rename", "os.remove", "os.mkdir"):
            return
        writes = event != "open" or (isinstance(given[1], str) and given[1][:1] in "wxa")
        if writes and str(given[0]).startswith(str(output)):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)


def _in_child(act: Callable[[], None], inputs: Path, output: Path) -> int:
    """Run in a process of its own, of which `act` is the beginning; return its exit status."""

    def work() -> None:
        # After a fork, torch makes its pool of threads anew, and fails if two threads ask at once.
        torch.set_num_threads(torch.get_num_threads())
        act()
        result = run(inputs, output)
        if result.exit_code:
            traceback.print_exception(result.exception)
            print(result.output, file=sys.stderr, flush=True)
        os._exit(result.exit_code)

    child = multiprocessing.get_context("fork").Process(target=work)
    child.start()
    assert child.pid is not None
    wait_until(child.pid, lambda: not child.is_alive())
    assert child.exitcode is not None
    return child.exitcode


@pytest.mark.usefixtures("stock")
@pytest.mark.parametrize("moment", range(20 if LONG else 2))
def test_a_killed_run_resumes_to_the_same_losses(
    moment: int, inputs: Path, whole: Path, tmp_path: Path
) -> None:
    drawn = random.Random(moment)
    output = tmp_path / "run"
    status, part = 0, 1.0
    while status == 0:  # at first, or it ended before it was killed
        shutil.rmtree(output, ignore_errors=True)
        if moment % 2:
            kill = partial(at_write, output, 1 + int(part * drawn.randrange(12 * STEPS)))
        else:
            kill = partial(after_seconds, part * drawn.uniform(0.2, 3))
        status = _in_child(kill, inputs, output)
        part *= 0.8
    assert status == -signal.SIGKILL
    result = run(inputs, output, resume=last_checkpoint(output) is not None or None)
    assert result.exit_code == 0, result.output
    assert losses(output) == losses(whole)
    adapters = [folder / "adapter_model.safetensors" for folder in (output, whole)]
    assert adapters[0].read_bytes() == adapters[1].read_bytes()


@pytest.mark.usefixtures("stock")
def test_a_run_killed_before_its_results_writes_them(
    inputs: Path, whole: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    shutil.copytree(whole, output)
    (output / "metrics.json").unlink()
    (output / "adapter_model.safetensors").unlink()
    result = run(inputs, output, resume=True)
    assert result.exit_code == 0, result.output
    assert losses(output) == losses(whole)
    again = run(inputs, output, resume=True)
    assert again.exit_code == 2
    assert f"step {STEPS} of {STEPS} is done already" in again.stderr


READ_ON_RESUME = (".json", ".safetensors", ".pt", ".pth", ".bin")


@settings(max_examples=examples(200, 10))
@given(st.data())
def test_a_checkpoint_cut_at_any_byte_is_passed_over(whole: Path, data: st.DataObject) -> None:
    newest = last_checkpoint(whole)
    assert newest is not None
    assert newest == whole / f"checkpoint-{STEPS}"
    file = data.draw(
        st.sampled_from(sorted(f for f in newest.iterdir() if f.suffix in READ_ON_RESUME))
    )
    content = file.read_bytes()
    kept = data.draw(st.integers(0, len(content.rstrip()) - 1))
    try:
        file.write_bytes(content[:kept])
        assert damage(newest) == f"{file.name} is cut"
        assert last_checkpoint(whole) == whole / f"checkpoint-{STEPS - 1}"
    finally:
        file.write_bytes(content)
    assert damage(newest) is None


def test_a_checkpoint_with_another_byte_is_passed_over(whole: Path) -> None:
    newest = whole / f"checkpoint-{STEPS}"
    noted = json.loads((newest / DIGESTS).read_text())
    assert {*noted, DIGESTS} == {file.name for file in newest.iterdir()}
    file = newest / "adapter_model.safetensors"
    content = file.read_bytes()
    try:
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        assert damage(newest) == f"{file.name} is not what was saved"
        assert last_checkpoint(whole) == whole / f"checkpoint-{STEPS - 1}"
    finally:
        file.write_bytes(content)


def test_a_part_of_several_processes_may_be_missing_until_there_are_digests(
    whole: Path, tmp_path: Path
) -> None:
    one = tmp_path / f"checkpoint-{STEPS}"
    shutil.copytree(whole / one.name, one)
    (one / DIGESTS).unlink()
    assert damage(one) is None
    # As the Trainer names what each of several processes writes.
    (one / "rng_state.pth").rename(one / "rng_state_0.pth")
    assert damage(one) == f"{DIGESTS} is missing"
    for _twice in range(2):
        write_digests(one)
        assert damage(one) is None


def test_damaged_checkpoints_are_named(inputs: Path, whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "run")
    for folder in (tmp_path / "run").glob("checkpoint-*"):
        (folder / "optimizer.pt").write_bytes(b"PK")
    result = run(inputs, tmp_path / "run", resume=True)
    assert result.exit_code == 2
    assert f"checkpoint-{STEPS}: optimizer.pt is cut" in " ".join(result.stderr.split())


def test_a_second_run_on_one_folder_is_refused(inputs: Path, tmp_path: Path) -> None:
    with held(tmp_path):
        result = run(inputs, tmp_path)
    assert result.exit_code == 2
    assert "another run writes there now; wait for its end" in result.stderr
    assert not list(tmp_path.glob("run.yaml"))


NO_LOCKS = [OSError(errno.ENOLCK, "no locks"), OSError(errno.EOPNOTSUPP, "no locks")]


# Older versions of filelock raise the last one.
@pytest.mark.parametrize("error", [*NO_LOCKS, NotImplementedError("no locks")], ids=repr)
def test_a_file_system_without_locks_is_written(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def acquire(*_: Any, **__: Any) -> Any:
        raise error

    monkeypatch.setattr(filelock.FileLock, "acquire", acquire)
    written = []
    with held(tmp_path):
        written.append(True)
    assert written


def test_a_lock_that_the_run_itself_waits_for_is_not_taken_for_another_run(tmp_path: Path) -> None:
    with pytest.raises(filelock.Timeout), held(tmp_path):
        raise filelock.Timeout("a compiler's lock")
    with held(tmp_path):
        pass


# ---- from Python ----


def tuning(observer: StepObserver | None = None, **given: Any) -> FineTuning:
    seed_everything(0)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"])
    model = peft.get_peft_model(toy_llama(), config)
    options = {
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "logging_steps": 1,
        "disable_tqdm": True,
        "learning_rate": 0.01,
        "logging_nan_inf_filter": False,
        **given.pop("options", {}),
    }
    return FineTuning(model, ROWS, observer=observer, options=options, **given)


def logged(tuned: FineTuning) -> list[float]:
    return [each["loss"] for each in tuned.trainer.state.log_history if "loss" in each]


class At(StepObserver):
    """Acts at the beginning of one step, and undoes that at the next."""

    def __init__(self, step: int, act: Callable[[Any], Callable[[], None]]) -> None:
        super().__init__(lambda step, total, loss: None)
        self.step, self.act = step, act
        self.undo: Callable[[], None] = lambda: None

    def on_step_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, **_: Any
    ) -> None:
        super().on_step_begin(args, state, control)
        self.undo()
        self.undo = self.act(model) if state.global_step + 1 == self.step else lambda: None


def spoil_output(model: Any) -> Callable[[], None]:
    layer = model.get_base_model().model.layers[1]
    return layer.register_forward_hook(lambda *given: given[-1] * float("nan")).remove


def spoil_gradient(model: Any) -> Callable[[], None]:
    layer: nn.Module = model.get_base_model().model.layers[1].mlp.down_proj.lora_A["default"]
    weight: Any = layer.weight
    return weight.register_hook(lambda grad: grad * float("inf")).remove


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (spoil_output, "model.layers.1 gives NaN"),
        (spoil_gradient, "model.layers.1.mlp.down_proj.lora_A.default.weight has a gradient"),
    ],
)
def test_nan_stops_at_its_step_and_site(spoil: Any, named: str) -> None:
    tuned = tuning(At(3, spoil))
    with pytest.raises(NotFiniteError, match=r"^step 3: ") as raised:
        tuned.train()
    assert named in str(raised.value)
    assert "--on-nan skip" in str(raised.value)
    for parameter in tuned.trainer.model.parameters():
        assert parameter.isfinite().all()


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("spoil", [spoil_output, spoil_gradient])
def test_nan_is_skipped(spoil: Any, accumulation: int) -> None:
    options = {"max_steps": 3, "gradient_accumulation_steps": accumulation}
    before: list[torch.Tensor] = []

    def remember(model: Any) -> Callable[[], None]:
        before.extend(p.detach().clone() for p in model.parameters() if p.requires_grad)
        return spoil(model)

    tuned = tuning(At(2, remember), on_nan="skip", options=options)
    at_step_2: list[bool] = []
    tuned.trainer.add_callback(_Compares(before, at_step_2))
    tuned.train()
    assert tuned.trainer.skipped_steps == [2]
    assert at_step_2 == [True]
    assert all(loss == loss for loss in logged(tuned))
    after = [p for p in tuned.trainer.model.parameters() if p.requires_grad]
    assert not all(map(torch.equal, before, after))


class _Compares(StepObserver):
    """Notes whether the trained weights are those of before, at the end of step 2."""

    def __init__(self, before: list[torch.Tensor], found: list[bool]) -> None:
        super().__init__(lambda step, total, loss: None)
        self.before, self.found = before, found

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if state.global_step == 2:
            now = [p for p in model.parameters() if p.requires_grad]
            self.found.append(all(map(torch.equal, self.before, now)))


def test_watching_changes_no_loss() -> None:
    tuned = {on_nan: tuning(on_nan=on_nan) for on_nan in ("stop", "skip")}
    for each in tuned.values():
        each.train()
    assert logged(tuned["stop"]) == logged(tuned["skip"])
    with pytest.raises(OptionError, match=r"'ignore'.*stop or skip"):
        tuning(on_nan="ignore")


@pytest.mark.parametrize("rows", [ROWS, ["a text", "another one"]], ids=["plain", "TRL"])
def test_one_of_several_gpus_trains(rows: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    options = {"per_device_train_batch_size": 2, "use_cpu": False}
    tuned = FineTuning(toy_llama(), rows, tokenizer=toy_tokenizer(), options=options)
    args = tuned.trainer.args
    assert args.n_gpu == 1
    assert args.parallel_mode == ParallelMode.NOT_PARALLEL
    assert tuned.trainer._train_batch_size == 2


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate"),
    ],
)
def test_out_of_memory_says_what_holds_it(error: Exception) -> None:
    def fail(model: Any) -> Any:
        raise error

    with pytest.raises(TrainingMemoryError) as raised:
        tuning(At(2, fail)).train()
    text = str(raised.value)
    for part in ("step 2", "cpu", "frozen weights 0.0", "optimizer", "--batch-size", "--max-len"):
        assert part in text
    with pytest.raises(RuntimeError, match="another"):
        tuning(At(2, lambda model: _raise(RuntimeError("another")))).train()


def _raise(error: Exception) -> Any:
    raise error


@pytest.fixture
def full(tmp_path: Path) -> Path:
    """A folder in which the second checkpoint's optimizer state finds a full disk."""
    folder = tmp_path / "checkpoint-2"
    folder.mkdir()
    (folder / "optimizer.pt").symlink_to("/dev/full")
    return tmp_path


def test_a_full_disk_names_what_is_saved(full: Path) -> None:
    options = {"output_dir": str(full), "save_steps": 1}
    with pytest.raises(CheckpointWriteError) as raised:
        tuning(options=options).train()
    assert f"{full / 'checkpoint-1'} is whole" in str(raised.value)
    assert str(full) in str(raised.value)


def test_context_parallel_is_refused() -> None:
    sizes = SimpleNamespace(parallelism_config=SimpleNamespace(cp_size=2))
    with pytest.raises(ContextParallelError, match=r"cp_size=2.*their own process only"):
        check_parallelism(sizes)
    check_parallelism(SimpleNamespace(parallelism_config=None))
