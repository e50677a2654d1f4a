"""Errors that end a training; their base class is in qlora_compile/errors.py."""

from __future__ import annotations

from qlora_compile.errors import QloraCompileError


class TrainingOptionValueError(QloraCompileError, ValueError):
    template = "the training options cannot be used with {value}: {problem}"


class NotFiniteError(QloraCompileError, ArithmeticError):
    template = (
        "step {step}: {site} {problem}; check the rows of this step or lower the learning rate; "
        "on_nan='skip' (--on-nan skip) leaves such batches out and goes on"
    )


class UnskippableStepError(QloraCompileError, ValueError):
    template = (
        "on_nan={value!r}: DeepSpeed's backward ends with the optimizer's step, after which no "
        "batch can be left out; use on_nan='stop' (--on-nan stop)"
    )


class TrainingMemoryError(QloraCompileError, MemoryError):
    template = "step {step}: out of memory on {device}: {held}; {remedy}"


class CheckpointWriteError(QloraCompileError, OSError):
    template = (
        "cannot write {value!r}: {problem}; free some space or choose another directory; {saved}"
    )


class LostProcessError(QloraCompileError, RuntimeError):
    template = (
        "step {step}: the connection to another process was lost ({problem}); look how that one "
        "ended; {saved}"
    )


class ContextParallelError(QloraCompileError, ValueError):
    template = (
        "{value} splits rows among processes, and compiled blocks would attend to the tokens of "
        "their own process only; use cp_size=1, and shorter rows or gradient checkpointing"
    )
