"""Measures the host's part of a GPU step without a GPU; writes bench/results/host.{md,json}.

Every contender trains a tiny model in a process of its own, in turn. The driver's cost of a launch
is added for each launch, ours and torch's alike.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from bench.host.settings import LLAMA, MODELS
from bench.host.table import calls_section, replays_section, section
from bench.measured_on import in_words, measured_on, processor_of
from bench.peers.contenders import OURS, STOCK, STOCK_COMPILED
from bench.peers.race import Process
from qlora_compile.kernels.cpu.instructions import multiplies
from tests.fake_device.device import LAUNCH_SECONDS

RESULTS = Path(__file__).parents[1] / "results"
CONTENDERS = (OURS, STOCK, STOCK_COMPILED)
LAYERS, ROUNDS, STEPS = 4, 9, 6


def main(
    models: Annotated[list[str] | None, typer.Argument(help="Models; all by default.")] = None,
    layers: Annotated[int, typer.Option(min=1)] = LAYERS,
    rounds: Annotated[int, typer.Option(min=1, help="Turns of each contender.")] = ROUNDS,
    steps: Annotated[int, typer.Option(min=1, help="Steps of a turn; the fastest counts.")] = STEPS,
) -> None:
    """Compare the host's time of whole steps, and split that of fused calls."""
    if not multiplies(torch.bfloat16):
        # Without instructions for 16-bit products, the peers' products alone, however small, take
        # more than half of their steps, and the ratio would not be the host's.
        message = "this CPU computes bfloat16 products too slowly to measure the host beside them"
        raise typer.BadParameter(f"{message}; use a CPU with AVX-512 and BF16")
    for name in models or ():
        if name not in MODELS:
            raise typer.BadParameter(f"{name!r}; there are {', '.join(MODELS)}")
    for name in models or MODELS:
        found = measured_on() | {"layers": layers, "rounds": rounds, "steps": steps}
        found["runs"] = measured(name, layers, rounds, steps)
        typer.echo("\n".join(_told(name, found)))
        _write(name, found)


def measured(model: str, layers: int, rounds: int, steps: int) -> dict[str, Any]:
    """Return by contender the `launches` of a step, and the `seconds` of each round's fastest
    step."""
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


def _told(name: str, found: dict[str, Any]) -> list[str]:
    """Return one model's results as Markdown."""
    runs = found["runs"]
    title, *rest = section(name, found["layers"], runs)
    lines = [f"{title}, {processor_of(found)}", *rest]
    if name == LLAMA.name:
        lines += [*calls_section(runs[OURS]["calls"]), *replays_section(runs[OURS]["replays"])]
    counts = f"{found['rounds']} rounds of {found['steps']} steps"
    return [*lines, f"{counts}; {in_words(found)}.", ""]


def _write(name: str, found: dict[str, Any]) -> None:
    """Write one model's results, keeping those of other models and of other processors."""
    path = RESULTS / "host.json"
    models = json.loads(path.read_text()) if path.exists() else {}
    models.setdefault(name, {})[processor_of(found)] = found
    path.write_text(json.dumps(models, indent=1) + "\n")
    lines = [
        *("# The host's part of a GPU step", ""),
        "By `make bench-host`, without a GPU: no figure here is a GPU's. CPU time of one thread in",
        "forward and backward of tiny blocks, NF4, adapters of rank 16 on all linears. Ours runs",
        "for an sm_90 that is not there: its kernels are compiled and launched, by a driver that",
        "starts nothing; torch's operators run on the CPU on tiny tensors, for all contenders.",
        f"{1e6 * LAUNCH_SECONDS:.1f} µs are charged for every launch, ours and torch's. The",
        "fastest step of each round, in turn; ratios are medians over the rounds, with 95 %",
        "confidence.",
        "",
    ]
    for each in filter(models.__contains__, MODELS):
        for processor in sorted(models[each]):
            lines += _told(each, models[each][processor])
    (RESULTS / "host.md").write_text("\n".join(lines))


if __name__ == "__main__":
    typer.run(main)
