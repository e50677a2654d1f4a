"""What ends a training from outside: no memory, a checkpoint that cannot be written; and what would
spoil it unseen."""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from qlora_compile.outputs import last_checkpoint
from qlora_compile.training_errors import (
    CheckpointWriteError,
    ContextParallelError,
    LostProcessError,
    TrainingMemoryError,
)

_ON_CPU = "DefaultCPUAllocator: "  # in torch's message, a RuntimeError
_WAITS = str(Path(torch.distributed.__file__).with_name("distributed_c10d.py"))
_GLOO = "/gloo/transport/"  # in the message, where C++ has waited, as for the gradients of DDP
_SAVING = ("_save_checkpoint", "on_save")  # the methods of transformers' Trainer and its callbacks


def check_parallelism(args: Any) -> None:
    """Raise ContextParallelError if the rows of a training are split along their tokens.

    accelerate then exchanges keys and values in attention, by replacing torch's function, which
    compiled code does not call.
    """
    size = getattr(args.parallelism_config, "cp_size", 1)
    if size > 1:
        raise ContextParallelError(value=f"parallelism_config with cp_size={size}")


def on_one_gpu(args: Any) -> Any:
    """Have a Trainer with these arguments train on one GPU at most in each process; return them.

    With several it would wrap the model in `nn.DataParallel`, which copies it in every step. It
    asks for their number when it is made, and computes its batches from that.
    """
    args._n_gpu = min(args.n_gpu, 1)
    return args


@contextlib.contextmanager
def failures_named(trainer: Any) -> Iterator[None]:
    """Say of a failure in `trainer.train()` what causes it, and what to do.

    Raises:
        TrainingMemoryError: memory ran out.
        CheckpointWriteError: a checkpoint could not be written.
        LostProcessError: another process has ended.
    """
    try:
        yield
    except (torch.OutOfMemoryError, OSError, RuntimeError, SafetensorError) as error:
        if isinstance(error, torch.OutOfMemoryError) or _ON_CPU in str(error):
            raise _memory_error(trainer) from error
        frames = traceback.extract_tb(error.__traceback__)
        # Before what saving does: it waits for the other processes too.
        if _is_lost(error, frames[-1].filename):
            raise _lost_error(trainer, error) from error
        if any(frame.name in _SAVING for frame in frames):
            raise _write_error(Path(trainer.args.output_dir), error) from error
        raise


def _is_lost(error: Exception, file: str) -> bool:
    """Whether another process did not answer. file: where Python was then."""
    return isinstance(error, RuntimeError) and (file == _WAITS or _GLOO in str(error))


def _lost_error(trainer: Any, error: Exception) -> LostProcessError:
    return LostProcessError(
        step=trainer.state.global_step + 1,
        problem=str(error).partition("\n")[0],
        saved=_saved(Path(trainer.args.output_dir)),
    )


def _write_error(output: Path, error: Exception) -> CheckpointWriteError:
    cause = next((each for each in _causes(error) if isinstance(each, OSError)), error)
    return CheckpointWriteError(
        value=str(output),
        problem=getattr(cause, "strerror", None) or str(cause).partition("\n")[0],
        saved=_saved(output),
    )


def _saved(output: Path) -> str:
    saved = last_checkpoint(output)
    if saved is None:
        return "no checkpoint was saved before"
    return f"{saved} is whole, and training can go on from there"


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _memory_error(trainer: Any) -> TrainingMemoryError:
    args, device = trainer.args, trainer.args.device
    held = _held(trainer)
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        held["activations and the rest"] = max(0, peak - sum(held.values()))
    remedies = []
    if args.per_device_train_batch_size > 1:
        remedies.append(
            "take fewer rows at once (per_device_train_batch_size, --batch-size) and more batches "
            "per step (gradient_accumulation_steps, --accumulation)"
        )
    if not args.gradient_checkpointing:
        remedies.append("pass gradient_checkpointing=True (--gradient-checkpointing)")
    remedies.append("shorten the rows (max_length, --max-length)")
    remedies.append("store weights in fewer bits (quantize, --format)")
    return TrainingMemoryError(
        step=trainer.state.global_step + 1,
        device=device,
        held=", ".join(f"{what} {size / 2**30:.3f} GiB" for what, size in held.items()),
        remedy="; or ".join(remedies),
    )


def _held(trainer: Any) -> dict[str, int]:
    """Return the bytes of what a training holds between steps, by what they hold."""
    parameters = list(trainer.model.parameters())
    trained = [each for each in parameters if each.requires_grad]
    states = trainer.optimizer.state.values() if trainer.optimizer is not None else ()
    return {
        "frozen weights": sum(each.nbytes for each in parameters if not each.requires_grad),
        "trained weights": sum(each.nbytes for each in trained),
        # One gradient of each trained weight, whether or not the step has made it.
        "their gradients": sum(each.nbytes for each in trained),
        "optimizer": sum(
            value.nbytes
            for state in states
            for value in state.values()
            if isinstance(value, torch.Tensor)
        ),
    }
