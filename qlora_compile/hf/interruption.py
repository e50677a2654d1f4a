"""Ctrl-C and SIGTERM end a training after a whole step, with a checkpoint to go on from."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from transformers import Trainer, TrainerCallback, TrainerState

from qlora_compile.outputs import last_checkpoint

_ANSWERS = {
    signal.SIGINT: b"\nCtrl-C: training stops after this step; press Ctrl-C again to end at once\n",
    signal.SIGTERM: b"\nSIGTERM: training stops after this step; a second one stops it at once\n",
}


class TrainingInterrupt(KeyboardInterrupt):
    """Ctrl-C or SIGTERM stopped a training; the message says what is saved and how to go on.

    signal: the number of the signal.
    """

    def __init__(self, message: str, number: int = signal.SIGINT) -> None:
        super().__init__(message)
        self.signal = number


class Interruption(TrainerCallback):
    """Ends training after the step in which Ctrl-C is pressed or SIGTERM comes, and saves a
    checkpoint there.

    The second time, KeyboardInterrupt is raised at once. output_dir: None to save nothing.
    """

    def __init__(self, output_dir: str | None) -> None:
        self.output_dir = output_dir
        self.pressed = False
        self.number: int = signal.SIGINT
        self._process = os.getpid()

    @contextlib.contextmanager
    def watching(self, trainer: Trainer) -> Iterator[None]:
        """Answer both signals while `trainer` trains inside of this context.

        Raises:
            TrainingInterrupt: one of them came.
        """
        # Leave signals alone outside the main thread, and if the user has a handler.
        alone = threading.current_thread() is threading.main_thread()
        before = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
        ours = [each for each, usual in before.items() if alone and signal.getsignal(each) is usual]
        for each in ours:
            signal.signal(each, self._press)
        try:
            yield
        except (Exception, KeyboardInterrupt) as error:
            # A terminal also interrupts the compilers that training waits for, which then fail.
            if isinstance(error, KeyboardInterrupt) or self.pressed:
                raise TrainingInterrupt(self._message(trainer.state), self.number) from error
            raise
        finally:
            for each in ours:
                signal.signal(each, before[each])
        if self.pressed:
            raise TrainingInterrupt(self._message(trainer.state), self.number)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.pressed:
            control.should_save = self.output_dir is not None
            control.should_training_stop = True

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.pressed and state.epoch % 1:
            # The epoch goes on when the training is resumed.
            control.should_evaluate = control.should_save = False

    def _press(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process and number == signal.SIGTERM:
            raise SystemExit(128 + number)  # a worker that loads data, which is to end
        if self.pressed:
            signal.default_int_handler(number, frame)
        self.pressed, self.number = True, number
        if os.getpid() == self._process:
            # A handler may run inside of a write to sys.stderr, which cannot be entered twice.
            os.write(2, _ANSWERS[signal.Signals(number)])

    def _message(self, state: TrainerState) -> str:
        done = f"training was stopped after step {state.global_step} of {state.max_steps}"
        folder = self.output_dir and last_checkpoint(Path(self.output_dir), state.global_step)
        if not folder:
            return (
                f"{done}, and nothing was saved; the model has the adapters as trained so far; "
                "save(path) writes them"
            )
        return (
            f"{done}; {folder} holds adapter and training state; to go on from there, train with "
            f"the same arguments and resume_from_checkpoint={str(folder)!r}"
        )
