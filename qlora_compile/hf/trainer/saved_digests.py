"""Writes digests of checkpoints, by which `--resume` notices files that have changed since."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from qlora_compile.outputs import write_digests


class SavedDigests(TrainerCallback):
    """Writes the digests of a checkpoint once all processes have saved their part of it."""

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        args.distributed_state.wait_for_everyone()
        if args.should_save:
            write_digests(Path(args.output_dir) / f"checkpoint-{state.global_step}")
