"""The host's part of a GPU step, measured without a GPU: writes bench/results/host.{md,json}.

Every contender trains a tiny model in a process of its own, in turn; what a launch costs in the
driver is added for each, ours and torch's alike.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from bench.host.settings import LLAMA, MODELS
from bench.host.table import calls_section, replays_section, section
from bench.measured_on import in_words, measured_on
from bench.peers.contenders import OURS, STOCK, STOCK_COMPILED
from bench.peers.race import Process
from tests.fake_device.device import LAUNCH_SECONDS

RESULTS = Path(__file__).parents[1] / "results"
CONTENDERS = (OURS, STOCK, STOCK_COMPILED)
LAYERS, ROUNDS, STEPS = 4, 21, 8


def main(
    models: Annotated[list[str] | None, typer.Argument(help="Models; all by default.")] = None,
    layers: Annotated[int, typer.Option(min=1)] = LAYERS,
    rounds: Annotated[int, typer.Option(min=1, help="Turns of each contender.")] = ROUNDS,
    steps: Annotated[int, typer.Option(min=1, help="Steps of a turn; the fastest counts.")] = STEPS,
) -> None:
    """Compare the host's time of whole steps, and split that of fused calls."""
    for name in models or ():
        if name not in MODELS:
            raise typer.BadParameter(f"{name!r}; there are {', '.join(MODELS)}")
    found: dict[str, Any] = {"models": {}}
    for name in models or MODELS:
        runs = measured(name, layers, rounds, steps)
        if name == LLAMA.name:
            for part in ("calls", "replays"):
                found[part] = runs[OURS].pop(part)
        found["models"][name] = runs
        typer.echo("\n".join(section(name, layers, runs)))
    if "calls" in found:
        typer.echo("\n".join([*calls_section(found["calls"]), *replays_section(found["replays"])]))
    if not models and (layers, rounds, steps) == (LAYERS, ROUNDS, STEPS):
        _write(found)


def measured(model: str, layers: int, rounds: int, steps: int) -> dict[str, Any]:
    """By contender: `launches` of a step, and `seconds` of the fastest step of each round."""
    runs: dict[str, Any] = {}
    processes: dict[str, Process] = {}
    with tempfile.TemporaryDirectory() as folder:
        try:
            for name in CONTENDERS:
                own = Path(folder) / str(len(processes))
                process = processes[name] = Process("bench.host.worker", own)
                order = {"contender": name, "model": model, "layers": layers}
                runs[name] = {"launches": process.ask(order), "seconds": []}
            for turn in range(rounds):
                first = turn % len(CONTENDERS)
                for name in CONTENDERS[first:] + CONTENDERS[:first]:
                    answer = processes[name].ask({"steps": steps})
                    runs[name]["seconds"].append(min(answer["seconds"]))
            if model == LLAMA.name:
                runs[OURS] |= processes[OURS].ask({"calls": rounds})
        finally:
            for process in processes.values():
                process.close()
    return runs


def _write(found: dict[str, Any]) -> None:
    surroundings = measured_on()
    (RESULTS / "host.json").write_text(json.dumps({**surroundings, **found}, indent=1) + "\n")
    lines = [
        *("# The host's part of a GPU step", ""),
        f"By `make bench-host`, without a GPU: {in_words(surroundings)}.",
        "CPU time of one thread in forward and backward of tiny blocks, NF4, adapters of rank 16",
        "on all linears. Ours runs for an sm_90 that is not there: its kernels are compiled and",
        "launched, by a driver that starts nothing; torch's operators run on the CPU on tiny",
        f"tensors, for all contenders. {1e6 * LAUNCH_SECONDS:.1f} µs are charged for every launch,",
        f"ours and torch's. The fastest of {STEPS} steps, in turn, {ROUNDS} rounds; ratios are",
        "medians over the rounds, with 95 % confidence. No figure here is a GPU's.",
        "",
    ]
    for name, runs in found["models"].items():
        lines += section(name, LAYERS, runs)
    lines += [*calls_section(found["calls"]), *replays_section(found["replays"])]
    (RESULTS / "host.md").write_text("\n".join(lines))


if __name__ == "__main__":
    typer.run(main)
