"""Times training steps of the demo model by the chosen variants and by *dense* alone, in turn.

For each setting the model is tuned into an empty cache folder, and once more by a new process,
which must measure nothing. Then steps of both models on the same batch take turns. Reported are the
median ratio of pairs, and the interval that holds the median with 95 % confidence.
"""

from __future__ import annotations

import copy
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from peft import LoraConfig

import qlora_compile
from bench.paired import interval_of_median
from bench.run import batches
from qlora_compile.hf import loading
from qlora_compile.text_table import text_table
from qlora_compile.training.demo import demo_model_file
from qlora_compile.tuning.cache_folder import cache_folder
from qlora_compile.tuning.modes import tuner_of
from qlora_compile.tuning.record import to_line
from qlora_compile.tuning.store import RecordStore

RESULTS = Path(__file__).parents[1] / "results"


@dataclass(frozen=True)
class Setting:
    """One setting. dtype: the model's; its adapters are float32."""

    dtype: str
    batch_size: int
    length: int
    dropout: float = 0.0

    def __str__(self) -> str:
        dropout = f", dropout {self.dropout}" if self.dropout else ""
        return f"{self.dtype}, {self.batch_size} x {self.length}{dropout}"


SETTINGS = (
    Setting("float32", 2, 256),
    Setting("bfloat16", 2, 256),
    Setting("float32", 4, 128, 0.1),
    Setting("bfloat16", 4, 512),
)


@dataclass(frozen=True)
class Comparison:
    """One comparison. ratios: seconds of a step by the chosen variants over one by *dense*, in
    pairs."""

    setting: str
    measured: int
    tuning_seconds: float
    measured_again: int
    ratios: list[float]

    @property
    def row(self) -> tuple[str, ...]:
        low, high = interval_of_median(self.ratios)
        return (
            self.setting,
            str(self.measured),
            f"{self.tuning_seconds:.1f}",
            str(self.measured_again),
            str(len(self.ratios)),
            f"{statistics.median(self.ratios):.3f}",
            f"{low:.3f} to {high:.3f}",
            "slower" if low > 1 else "faster" if high < 1 else "equal within noise",
        )


HEADER = (
    *("setting", "problems measured", "in s", "by a second run", "pairs", "chosen / dense"),
    *("95 % of the median", "so it is"),
)


def load(setting: Setting) -> Any:
    return loading.load_model(demo_model_file(), dtype=getattr(torch, setting.dtype))


def optimized(base: Any, setting: Setting, tune: str) -> Any:
    torch.manual_seed(0)
    config = LoraConfig(
        r=16, lora_alpha=32, target_modules="all-linear", lora_dropout=setting.dropout
    )
    return qlora_compile.optimize(base, config, quantize="nf4", tune=tune).train()


def step(model: Any, ids: torch.Tensor) -> float:
    """Return the seconds of one forward and backward."""
    model.zero_grad()
    start = time.perf_counter()
    model(input_ids=ids, labels=ids).loss.backward()
    return time.perf_counter() - start


def measured_by_a_new_process(setting: Setting) -> int:
    """Return how many problems a new process measures in its first step, with the present cache."""
    command = [sys.executable, "-m", "bench.tuning.steps", "--count", json.dumps(asdict(setting))]
    result = subprocess.run(command, check=True, capture_output=True, text=True)
    return int(result.stdout.split()[-1])


def tuned(setting: Setting, base: Any) -> tuple[Any, int, float]:
    """Return the model after its first step, how many problems the step measured, and how long."""
    model = optimized(base, setting, "auto")
    tuner = tuner_of("auto")
    assert tuner is not None
    before, budget = tuner.measurements, tuner.budget
    ids, _ = batches(1, setting.batch_size, setting.length)
    step(model, ids[0])
    return model, tuner.measurements - before, budget - tuner.budget


def dense_alone(path: Path) -> Path:
    """Return a file of the cache's records that keeps only *dense* in its standard config."""
    records = RecordStore(cache_folder()).read().values()
    lines = [to_line(replace(r, timings=(r.baseline,))) for r in records if r.baseline is not None]
    path.write_text("\n".join(lines) + "\n")
    return path


def compare(setting: Setting, pairs: int, folder: Path) -> Comparison:
    base = load(setting)
    chosen, measured, seconds = tuned(setting, copy.deepcopy(base))
    again = measured_by_a_new_process(setting)
    dense = optimized(base, setting, str(dense_alone(folder / f"{hash(setting)}.jsonl")))
    ids, _ = batches(pairs, setting.batch_size, setting.length)
    step(dense, ids[0])
    ratios = []
    for index, batch in enumerate(ids):
        order = (chosen, dense) if index % 2 else (dense, chosen)
        taken = {id(model): step(model, batch) for model in order}
        ratios.append(taken[id(chosen)] / taken[id(dense)])
    return Comparison(str(setting), measured, seconds, again, ratios)


def main(
    pairs: Annotated[int, typer.Option(help="Pairs of steps per setting.")] = 16,
    count: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    """Compare the chosen variants with dense alone; write bench/results/tuning.json."""
    if count is not None:
        setting = Setting(**json.loads(count))
        typer.echo(tuned(setting, load(setting))[1])
        return
    with tempfile.TemporaryDirectory() as folder:
        os.environ["QLORA_COMPILE_CACHE"] = str(Path(folder) / "cache")
        compared = [compare(setting, pairs, Path(folder)) for setting in SETTINGS]
    typer.echo("\n".join(text_table(HEADER, [each.row for each in compared])))
    figures = {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "comparisons": [asdict(each) for each in compared],
    }
    (RESULTS / "tuning.json").write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
