"""Ctrl-C while training: where training stops, what is saved and said, and going on from there."""

import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest

from qlora_compile.hf.interruption import TrainingInterrupt
from qlora_compile.hf.training import FineTuning, StepObserver, seed_everything
from tests.interrupts import interruptible
from tests.toy_language_model import toy_llama

__all__ = ["interruptible"]

pytestmark = pytest.mark.usefixtures("interruptible")

STEPS = 6
ROWS = [{"input_ids": list(range(n, n + 5))} for n in range(9)]


class Presses(StepObserver):
    """Does something at the beginning of a step, such as pressing Ctrl-C."""

    def __init__(self, step: int, press: Callable[[], None]) -> None:
        super().__init__(lambda step, total, loss: None)
        self.step, self.press = step, press

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        super().on_step_begin(args, state, control)
        if state.global_step + 1 == self.step:
            self.press()


def ctrl_c() -> None:
    signal.raise_signal(signal.SIGINT)


def train(output_dir: Path | None, observer: StepObserver, **options: Any) -> list[float]:
    seed_everything(0)
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], lora_dropout=0.3)
    model = peft.get_peft_model(toy_llama(), config)
    fixed = {"max_steps": STEPS, "per_device_train_batch_size": 2, "logging_steps": 1}
    options = {"disable_tqdm": True, "save_strategy": "no", "learning_rate": 0.1} | fixed | options
    if output_dir is not None:
        options["output_dir"] = str(output_dir)
    tuning = FineTuning(model, ROWS, observer=observer, options=options)
    tuning.train()
    return [entry["loss"] for entry in tuning.trainer.state.log_history if "loss" in entry]


def test_an_epoch_that_goes_on_later_is_not_evaluated(tmp_path: Path) -> None:
    evaluated: list[float] = []

    class Evaluations(Presses):
        def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            evaluated.append(state.epoch)

    seed_everything(0)
    model = peft.get_peft_model(toy_llama(), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    for step, expected in ((2, []), (5, [1.0])):  # five steps are an epoch
        evaluated.clear()
        options = {"output_dir": str(tmp_path / str(step)), "num_train_epochs": 2}
        options |= {"save_strategy": "epoch", "per_device_train_batch_size": 2}
        options |= {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss"}
        watching = Evaluations(step, ctrl_c)
        tuning = FineTuning(model, ROWS, eval_dataset=ROWS[:2], observer=watching, options=options)
        with pytest.raises(TrainingInterrupt, match=f"checkpoint-{step} holds"):
            tuning.train()
        assert evaluated == expected


@pytest.fixture(scope="module")
def whole() -> list[float]:
    return train(None, Presses(0, ctrl_c))


def sigterm() -> None:
    signal.raise_signal(signal.SIGTERM)


@pytest.mark.parametrize(
    ("step", "stop", "number", "answer"),
    [
        (1, ctrl_c, signal.SIGINT, "press Ctrl-C again"),
        (STEPS - 1, ctrl_c, signal.SIGINT, "press Ctrl-C again"),
        (2, sigterm, signal.SIGTERM, "SIGTERM: training stops"),
    ],
)
def test_a_run_goes_on_where_a_signal_stopped_it(
    step: int,
    stop: Callable[[], None],
    number: signal.Signals,
    answer: str,
    whole: list[float],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    before = signal.getsignal(number)
    with pytest.raises(TrainingInterrupt) as raised:
        train(tmp_path, Presses(step, stop))
    assert raised.value.signal == number
    assert signal.getsignal(number) is before
    saved = tmp_path / f"checkpoint-{step}"
    assert (saved / "adapter_model.safetensors").is_file()
    assert f"after step {step} of {STEPS}; {saved} holds" in str(raised.value)
    assert f"resume_from_checkpoint={str(saved)!r}" in str(raised.value)
    assert answer in capfd.readouterr().err
    assert train(tmp_path, Presses(0, ctrl_c), resume_from_checkpoint=str(saved)) == whole


def twice() -> None:
    ctrl_c()
    ctrl_c()


def interrupted() -> None:
    raise KeyboardInterrupt


def killed() -> None:
    ctrl_c()
    raise OSError("the compiler was interrupted, too")


@pytest.mark.parametrize("stop", [twice, interrupted, killed])
@pytest.mark.parametrize("every", [1, 4])
def test_what_stops_at_once_names_the_last_checkpoint(
    stop: Callable[[], None], every: int, tmp_path: Path
) -> None:
    (tmp_path / "checkpoint-3").mkdir()  # one that was not written to its end
    with pytest.raises(TrainingInterrupt, match=r"after step 2 of 6") as raised:
        train(tmp_path, Presses(3, stop), save_strategy="steps", save_steps=every)
    saved = tmp_path / "checkpoint-2"
    assert (f"{saved} holds" if every == 1 else "nothing was saved") in str(raised.value)


def test_without_an_output_directory_the_model_keeps_what_it_learnt() -> None:
    with pytest.raises(TrainingInterrupt, match=r"step 2 of 6, and nothing was saved; .*save\("):
        train(None, Presses(2, ctrl_c))


def test_an_error_of_its_own_stays_one() -> None:
    def fail() -> None:
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        train(None, Presses(2, fail))


def test_ctrl_c_that_is_not_ours_is_left_alone(whole: list[float]) -> None:
    pressed: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: pressed.append(number))
    try:
        assert train(None, Presses(2, ctrl_c)) == whole
    finally:
        signal.signal(signal.SIGINT, before)
    assert pressed == [signal.SIGINT]
    losses: list[float] = []
    thread = threading.Thread(target=lambda: losses.extend(train(None, Presses(0, ctrl_c))))
    thread.start()
    thread.join()
    assert losses == whole
