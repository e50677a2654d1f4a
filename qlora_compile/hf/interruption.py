"""Ctrl-C while training: ends it after a whole step, from where a checkpoint goes on exactly."""

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

_ANSWER = b"\nCtrl-C: training stops after this step; press Ctrl-C again to stop at once\n"


class TrainingInterrupt(KeyboardInterrupt):
    """Ctrl-C stopped a training; the message says what is saved and how to go on."""


class Interruption(TrainerCallback):
    """Ends training after the step in which Ctrl-C is pressed, and saves a checkpoint there.

    Pressed again, Ctrl-C raises KeyboardInterrupt at once. output_dir: None to save nothing.
    """

    def __init__(self, output_dir: str | None) -> None:
        self.output_dir = output_dir
        self.pressed = False
        self._process = os.getpid()

    @contextlib.contextmanager
    def watching(self, trainer: Trainer) -> Iterator[None]:
        """Answer Ctrl-C while `trainer` trains inside of this context.

        Raises:
            TrainingInterrupt: Ctrl-C was pressed.
        """
        # Elsewhere than in the main thread, or with a handler of the user's, Ctrl-C is not ours.
        ours = threading.current_thread() is threading.main_thread()
        ours = ours and signal.getsignal(signal.SIGINT) is signal.default_int_handler
        if ours:
            signal.signal(signal.SIGINT, self._press)
        try:
            yield
        except (Exception, KeyboardInterrupt) as error:
            # A terminal also interrupts the compilers that training waits for, which then fail.
            if isinstance(error, KeyboardInterrupt) or self.pressed:
                raise TrainingInterrupt(self._message(trainer.state)) from error
            raise
        finally:
            if ours:
                signal.signal(signal.SIGINT, signal.default_int_handler)
        if self.pressed:
            raise TrainingInterrupt(self._message(trainer.state))

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.pressed:
            control.should_save = self.output_dir is not None
            control.should_training_stop = True

    def _press(self, number: int, frame: FrameType | None) -> None:
        if self.pressed:
            signal.default_int_handler(number, frame)
        self.pressed = True
        if os.getpid() == self._process:  # and not in a worker that loads data
            # A handler may run inside of a write to sys.stderr, which cannot be entered twice.
            os.write(2, _ANSWER)

    def _message(self, state: TrainerState) -> str:
        done = f"training was stopped after step {state.global_step} of {state.max_steps}"
        folder = self.output_dir and last_checkpoint(Path(self.output_dir), state.global_step)
        if not folder:
            return (
                f"{done}, and nothing was saved; the model has the adapters as trained so far, "
                "and save(path) writes them"
            )
        return (
            f"{done}; {folder} holds adapter and training state; to go on from there, train with "
            f"the same arguments and resume_from_checkpoint={str(folder)!r}"
        )
