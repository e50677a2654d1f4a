"""Row: the result for one model type."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

EQUAL, UNEQUAL, TRAINS = "equal", "unequal", "ok"

_LONGEST = 240


@dataclass
class Row:
    """The result for one model type.

    stock: "ok", or why stock PEFT cannot train it. ours: "equal", "unequal", or the exception;
    empty if stock fails.
    errors: the distance of ours from stock, per group of results. exact, floor: if these are large,
    the same in float64, and stock's distance from stock with its parameters one rounding off.
    worst: the parameter whose gradients differ most in the first step.
    sites: all Linears; targets: those that stock adapts; fused, fused_targets: how many of these
    are fused. left, left_targets: why the others were left alone, with their number; examples: the
    first site for each of these reasons. expert_targets, fused_experts, left_experts: the same for
    adapted weights of experts. target_parameters, fused_parameters: the elements of the weights of
    both. other_targets: what else stock adapts.
    breaks: graph breaks inside blocks, by reason. kinds: the number of block classes that are
    compiled; graphs: the number of graphs that Dynamo captured of them.
    """

    name: str
    family: str
    model: str = ""
    stock: str = ""
    ours: str = ""
    errors: dict[str, float] = field(default_factory=dict)
    exact: dict[str, float] = field(default_factory=dict)
    floor: dict[str, float] = field(default_factory=dict)
    worst: str = ""
    parameters: int = 0
    sites: int = 0
    fused: int = 0
    targets: int = 0
    fused_targets: int = 0
    left: dict[str, int] = field(default_factory=dict)
    left_targets: dict[str, int] = field(default_factory=dict)
    examples: dict[str, str] = field(default_factory=dict)
    expert_targets: int = 0
    fused_experts: int = 0
    left_experts: dict[str, int] = field(default_factory=dict)
    target_parameters: int = 0
    fused_parameters: int = 0
    other_targets: dict[str, int] = field(default_factory=dict)
    breaks: dict[str, int] = field(default_factory=dict)
    kinds: int = 0
    graphs: int = 0
    seconds: float = 0.0


def first_line(error: BaseException) -> str:
    """Return the exception's type and its first line that is not blank."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:_LONGEST]


def target_kind(class_name: str) -> str:
    """Return the kind of an adapted module that is not a Linear, by its class."""
    for ending, kind in (("Experts", "fused experts"), ("outer", "router"), ("Gate", "router")):
        if class_name.endswith(ending):
            return kind
    return class_name


def without_names(reason: str) -> str:
    """Return a reason without names of single modules or calls, and without Dynamo's hints, so that
    equal reasons of different models are grouped."""
    text = " ".join(reason.split())
    text = re.split(r" (?:Hint|Developer debug context):", text)[0].replace(" Explanation:", ":")
    text = re.sub(r"\binto \d+ graphs", "into several graphs", text)
    text = re.sub(r"`[^`]*\.(\w+)`", r"`\1`", text)
    text = re.sub(r"\bits weight is tied to [\w.]+", "its weight is tied", text)
    return text[:_LONGEST]
