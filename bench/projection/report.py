"""The projection as a table of numbers and as text."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

from bench.projection.floor import floor, flops
from bench.projection.ours import Chosen, chosen, ours
from bench.projection.peer import state_bytes
from bench.projection.seconds import Seconds
from bench.projection.shapes import MODELS
from bench.projection.step import RANK, Step
from bench.projection.stock import STOCK, STOCK_AUTOCAST
from bench.projection.unsloth import UNSLOTH
from qlora_compile.kernels.device_model import DEVICE_MODELS, DeviceModel

CARD_GIGABYTES = {"A100": 80, "H100": 80, "RTX 4090": 24, "B200": 180}
CARDS = tuple(device for device in DEVICE_MODELS if device.name in CARD_GIGABYTES)
TOKENS = ((4, 2048), (1, 512))
PEERS = (UNSLOTH, STOCK_AUTOCAST, STOCK)
GAPS = {
    "decode": "decode",
    "adapters": "adapters",
    "launches": "launches",
    "products": "GEMM efficiency",
    "bytes": "bytes",
    "loss": "loss",
    "attention": "attention",
}
"""Of Seconds' parts: what a gap in them is called. The update is the same for all."""


@dataclass(frozen=True)
class Row:
    """One model's step on one card. sides: by name, the floor first, then ours."""

    step: Step
    device: DeviceModel
    at_peak: float
    sides: dict[str, Seconds]
    chosen: list[Chosen]

    @property
    def gap(self) -> Seconds:
        return self.sides["ours"] - self.sides["floor"]


def project(checkpointing: bool = True) -> list[Row]:
    return [
        _row(Step(model, batch, length, checkpointing), device)
        for batch, length in TOKENS
        for model in MODELS
        for device in CARDS
    ]


def _row(step: Step, device: DeviceModel) -> Row:
    sides = {"floor": floor(step, device), "ours": ours(step, device)}
    sides |= {peer.name: peer.seconds(step, device) for peer in PEERS}
    return Row(step, device, floor(step, device, 1.0).total, sides, chosen(step, device))


def as_json(rows: Sequence[Row]) -> str:
    found = [
        {
            "model": row.step.model.name,
            "card": row.device.name,
            "batch": row.step.batch,
            "length": row.step.length,
            "checkpointing": row.step.checkpointing,
            "floor_flops": flops(row.step),
            "floor_seconds_at_peak": row.at_peak,
            "modelled_seconds": {name: asdict(side) for name, side in row.sides.items()},
            "chosen": [asdict(each) for each in row.chosen],
        }
        for row in rows
    ]
    return json.dumps({"modelled": True, "steps": found}, indent=1) + "\n"


INTRODUCTION = """\
# Projected training steps on GPUs

**Everything here is modelled, nothing of it was run.** Cards are their data sheets' peak and
bandwidth, the part of the peak that the vendor's GEMM is taken to reach, 92 % of the bandwidth, and
{launch:.0f} µs for each kernel (kernels/device_model.py). The host is taken to keep up, which
favours whoever starts many kernels. Made by `make bench-project`.

A step is QLoRA as practised: bfloat16, NF4 doubly quantised in blocks of 64, float32 adapters of
rank {rank} on all Linears of the blocks, no dropout, AdamW in one kernel; {passes}.
Qwen3's experts have adapters of rank {rank} each (`target_parameters`), their rows evenly spread.
Attention is taken at the vendor GEMM's efficiency for everybody, thin products and elementwise
kernels at the memory's pace, embedding and final norm as nothing.

- **floor**: of each operator the longer of its arithmetic and its bytes, summed. Arithmetic counts
  what any algorithm needs at the vendor GEMM's efficiency ("at peak": at the data sheet's); bytes
  count packed weights once per use, the adapters' factors and their gradients, and a block's input
  and output. See bench/projection/floor.py.
- **ours**: for each group of Linears (q/k/v, o, gate/up, down) and for experts the implementation
  that selection's cost model chooses, forward and backward, at its own modelled cost; elementwise
  kernels as counted from Inductor's for CPU (block_bytes.md), their reads estimated; the loss is
  the model's own, in eager mode, as `optimize` leaves it.
- **Unsloth**: its published algorithm, from descriptions alone; experts in 16 bits, as published.
- **stock**: PEFT + bitsandbytes in eager mode, with autocast (bf16=True) and without it, where the
  adapters compute in float32; experts in 16 bits, their adapter merged for every forward.

Decoding in the GEMM's loop costs what kernels/gpu/configs.py takes for each target: on the RTX 4090
nothing, by the model of its compiled kernels (static.md); on A100 and H100 a figure between two of
that model; on B200, whose kernels it does not cover, a guess.

The gap's parts: *decode* of weights, before the product or in its loop; *adapters*, the thin
products beyond the floor's; *launches* of all kernels; *GEMM efficiency*, products with frozen
weights beyond the floor's (a pace below the vendor's, rows of padding, activations through memory);
*bytes* of elementwise kernels in blocks; *loss*, the bytes of the logits; *attention*, whose
backward computes the scores again.
"""


def markdown(rows: Sequence[Row]) -> str:
    from qlora_compile.kernels.device_model import LAUNCH_SECONDS

    again = rows[0].step.checkpointing
    passes = (
        "checkpointed, so that every block's forward runs twice" if again else "not checkpointed"
    )
    text = [INTRODUCTION.format(launch=LAUNCH_SECONDS * 1e6, rank=RANK, passes=passes)]
    for batch, length in TOKENS:
        part = [row for row in rows if (row.step.batch, row.step.length) == (batch, length)]
        text += [
            f"## {batch} x {length} tokens: modelled ms of a step",
            _table(_times(part)),
            "Where ours is above the floor, modelled ms:",
            _table(_gaps(part)),
            "Modelled choices of ours, forward / backward:",
            _table(_choices(part)),
        ]
    text += [
        "## Do they fit?",
        "GB of weights and of adapters with gradients and AdamW's moments, no activations. Steps"
        " that do not fit a card are modelled as if they did.",
        _table(_memory()),
    ]
    return "\n\n".join(each.strip("\n") for each in text) + "\n"


def _table(rows: Iterator[list[str]]) -> str:
    header, *rest = rows
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join(f"| {' | '.join(row)} |" for row in [header, rule, *rest])


def _label(row: Row) -> str:
    return f"{row.step.model.name}, {row.device.name}"


def _times(rows: Sequence[Row]) -> Iterator[list[str]]:
    yield ["", "floor at peak", *rows[0].sides, "ours / floor", "Unsloth / ours", "stock / ours"]
    for row in rows:
        total = {name: side.total for name, side in row.sides.items()}
        mine = total["ours"]
        ratios = (
            mine / total["floor"],
            total[UNSLOTH.name] / mine,
            total[STOCK_AUTOCAST.name] / mine,
        )
        yield [
            _label(row),
            *(f"{1e3 * seconds:.0f}" for seconds in (row.at_peak, *total.values())),
            *(f"{ratio:.2f}" for ratio in ratios),
        ]


def _gaps(rows: Sequence[Row]) -> Iterator[list[str]]:
    yield ["", "gap", *GAPS.values()]
    for row in rows:
        parts = [getattr(row.gap, name) for name in GAPS]
        # Differences of equals may be -0.0.
        cells = (f"{round(1e3 * seconds, 1) + 0.0:.1f}" for seconds in (row.gap.total, *parts))
        yield [_label(row), *cells]


def _choices(rows: Sequence[Row]) -> Iterator[list[str]]:
    """Variants alone; the configs are in the JSON."""
    groups = list(dict.fromkeys(each.group for row in rows for each in row.chosen))
    yield ["", *groups]
    for row in rows:
        names = {
            group: " / ".join(c.name.split()[0] for c in row.chosen if c.group == group)
            for group in groups
        }
        yield [_label(row), *names.values()]


def _memory() -> Iterator[list[str]]:
    cards = ", ".join(f"{name} {size}" for name, size in CARD_GIGABYTES.items())
    yield [f"of {cards} GB", "ours", "Unsloth, stock"]
    for model in MODELS:
        step = Step(model, *TOKENS[0])
        sizes = (state_bytes(step, packed_experts=packed) / 1e9 for packed in (True, False))
        yield [model.name, *(f"{size:.1f}" for size in sizes)]
