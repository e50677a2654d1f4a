"""Times training steps over every format beside NF4's, in turn, and decoding alone.

The model is a Llama of two blocks in the shape of SmolLM2-135M, with random weights, adapters of
rank 16 on all Linears, and a vocabulary so small that the blocks take nearly all time. Steps of NF4
and of a format take turns; times are the thread's, which other work on the machine hardly changes.
Writes bench/results/format_steps.{md,json}.
"""

from __future__ import annotations

import copy
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from peft import LoraConfig
from transformers import LlamaConfig

import qlora_compile
from bench.formats.cases import FormatCase, cases
from bench.measured_on import in_words, measured_on
from bench.paired import interval_of_median
from bench.random_model import random_model
from qlora_compile.kernels.formats.formats import format_named

RESULTS = Path(__file__).parents[1] / "results"
BATCH, LENGTH, RANK = 2, 256, 16
SHAPE: dict[str, Any] = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "num_hidden_layers": 2,
    "vocab_size": 256,
}
MOST = 1.1
"""A step over NF4's that a format may take."""
_DECODES = 40


@dataclass(frozen=True)
class Compared:
    """A format's times. decoding: nanoseconds per weight. ratios: of a step to NF4's in its
    turn."""

    name: str
    decoding: float
    ratios: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.ratios)


def model_of(base: Any, case: FormatCase) -> Any:
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear")
    options: dict[str, Any] = {"double_quantize": False} | case.options
    torch.manual_seed(0)
    model = qlora_compile.optimize(
        copy.deepcopy(base), config, quantize=case.format, tune="model", **options
    )
    return model.train()


def step(model: Any, ids: torch.Tensor) -> float:
    """Return the seconds of this thread for one forward and backward."""
    model.zero_grad()
    return _seconds(lambda: model(input_ids=ids, labels=ids).loss.backward())


def decoding(case: FormatCase) -> float:
    """Return nanoseconds per weight of the largest Linear, in blocks of rows as in a product."""
    torch.manual_seed(0)
    n, k, rows = SHAPE["intermediate_size"], SHAPE["hidden_size"], 256
    quant_format = format_named(case.format)
    packed = quant_format.quantize(torch.randn(n, k) * 0.02, **case.options)
    memory = torch.empty(rows * k, dtype=torch.bfloat16)

    def decode() -> None:
        blocks = quant_format.decoded(
            packed, torch.bfloat16, rows, lambda count: memory[: count * k].view(count, k)
        )
        for _ in blocks:
            pass

    return 1e9 * statistics.median(_seconds(decode) for _ in range(_DECODES)) / (n * k)


def _seconds(run: Callable[[], object]) -> float:
    start = time.thread_time()
    run()
    return time.thread_time() - start


def compare(base: Any, nf4: Any, case: FormatCase, pairs: int) -> Compared:
    model = model_of(base, case)
    ids = torch.randint(0, SHAPE["vocab_size"], (BATCH, LENGTH))
    for each in (nf4, model, nf4, model):
        step(each, ids)
    ratios = []
    for index in range(pairs):
        order = (model, nf4) if index % 2 else (nf4, model)
        taken = {id(each): step(each, ids) for each in order}
        ratios.append(taken[id(model)] / taken[id(nf4)])
    return Compared(case.name, decoding(case), ratios)


def markdown(found: list[Compared], figures: dict[str, Any]) -> str:
    nf4 = found[0].decoding
    lines = [
        "# Steps over each format",
        "",
        f"By `python -m bench.formats.steps`: {in_words(figures)}, one thread. Two blocks in the",
        f"shape of SmolLM2-135M, {BATCH} x {LENGTH} tokens, rank {RANK}, bfloat16; seconds of the",
        "thread, medians of pairs in turn with NF4's step, and what holds the median with 95 %",
        "confidence. Decoding alone: nanoseconds a weight, and over NF4's.",
        f"At most {MOST} is asked of a step.",
        "",
        "| format | decoding ns | over NF4's | step over NF4's | 95 % of the median |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for each in found:
        low, high = interval_of_median(each.ratios)
        lines.append(
            f"| {each.name} | {each.decoding:.3f} | {each.decoding / nf4:.2f} |"
            f" {each.median:.3f} | {low:.3f} to {high:.3f} |"
        )
    return "\n".join(lines) + "\n"


def main(pairs: Annotated[int, typer.Option(help="Pairs of steps per format.")] = 30) -> None:
    """Time steps over every format beside NF4's. Exit with 1 if one takes more than 1.1 of it."""
    torch.set_num_threads(1)
    base = random_model(LlamaConfig(**SHAPE, max_position_embeddings=LENGTH))
    # How codes were found does not change how they are read.
    chosen = [case for case in cases() if "refine" not in case.options]
    nf4 = model_of(base, chosen[0])
    found = []
    for case in chosen:
        found.append(compare(base, nf4, case, pairs))
        typer.echo(f"{case.name}: step {found[-1].median:.3f}, {found[-1].decoding:.3f} ns")
    figures = {**measured_on(), "compared": [asdict(each) for each in found]}
    (RESULTS / "format_steps.json").write_text(json.dumps(figures, indent=1) + "\n")
    (RESULTS / "format_steps.md").write_text(markdown(found, figures))
    raise typer.Exit(int(any(each.median > MOST for each in found)))


if __name__ == "__main__":
    typer.run(main)
