"""The figures of a training run: losses with their uncertainty, speed and memory."""

import math
import statistics
import sys
from collections.abc import Sequence
from typing import Any


def standard_error(values: Sequence[float]) -> float | None:
    """Return the standard error of the mean; None for fewer than two values, without a spread."""
    if len(values) < 2:
        return None
    return statistics.stdev(values) / math.sqrt(len(values))


def held_out_figures(before: Sequence[float], after: Sequence[float]) -> dict[str, Any]:
    """Return mean losses of the same sequences before and after training, and their difference.

    Losses differ far more between sequences than training changes any of them. So the standard
    error of the difference is that of the per-sequence differences.
    """
    if not before:
        return {}
    differences = [late - early for early, late in zip(before, after, strict=True)]
    return {
        "sequences": len(before),
        "before": statistics.fmean(before),
        "before_standard_error": standard_error(before),
        "after": statistics.fmean(after),
        "after_standard_error": standard_error(after),
        "difference": statistics.fmean(differences),
        "difference_standard_error": standard_error(differences),
    }


def training_figures(
    history: Sequence[dict[str, float]], step_seconds: Sequence[float]
) -> dict[str, Any]:
    """Return the loss of each step, and the speed without the first step, which compiles.

    history: the Trainer's log of each step; TRL's log has the number of tokens so far, without
    padding, as num_tokens. The speed is None if that number is missing.
    """
    later = step_seconds[1:]
    counts = [entry["num_tokens"] for entry in history if "num_tokens" in entry and "loss" in entry]
    counts = counts[-len(step_seconds) :]
    tokens = counts[-1] - counts[0] if len(counts) > 1 else None
    return {
        "losses": [
            {"step": int(entry["step"]), "loss": entry["loss"]}
            for entry in history
            if "loss" in entry
        ],
        "steps_timed": len(step_seconds),
        "first_step_seconds": step_seconds[0] if step_seconds else None,
        "later_step_seconds_median": statistics.median(later) if later else None,
        "tokens_per_second_after_first_step": (
            tokens / sum(later) if later and tokens is not None else None
        ),
    }


def peak_memory() -> dict[str, Any]:
    """Return the peak memory in bytes: of the GPU if CUDA is available, else of the process."""
    import torch

    if torch.cuda.is_available():
        return {"kind": "CUDA memory", "bytes": torch.cuda.max_memory_allocated()}
    if sys.platform == "win32":  # it has no getrusage
        return {"kind": "unknown", "bytes": None}
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"kind": "process memory", "bytes": peak if sys.platform == "darwin" else peak * 1024}
