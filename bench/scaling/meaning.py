"""What a fitted exponent means, in a sentence."""

from __future__ import annotations

import math

from bench.scaling.axes import DEPTH, FIRST_STEP, RANK, TOKENS, WIDTH, Axis
from bench.scaling.quantities import FIRST, PEAK, SAVED, STEP, TUNE, Quantity

FLAT, LINEAR, ABOVE, QUADRATIC, BEYOND = 0.2, 0.9, 1.1, 1.9, 2.1
"""Where sentences change: below FLAT next to nothing grows, LINEAR to ABOVE is proportional,
QUADRATIC to BEYOND goes with the square."""

Sentences = tuple[tuple[float, str], ...]
"""Each with the exponent below which it holds."""


def _steps(flat: str, part: str, proportional: str, more: str) -> Sentences:
    return (FLAT, flat), (LINEAR, part), (ABOVE, proportional), (math.inf, more)


def _squares(flat: str, linear: str, between: str, square: str, more: str) -> Sentences:
    return (
        *((FLAT, flat), (ABOVE, linear), (QUADRATIC, between)),
        *((BEYOND, square), (math.inf, more)),
    )


SENTENCES: dict[tuple[str, str], Sentences] = {
    (TOKENS.name, STEP.name): _steps(
        "next to nothing of a step is paid per token; fixed costs are nearly all of it",
        "a fixed cost of every step, such as decoding the weights, is part of it at few tokens",
        "a step is paid per token; neither fixed costs nor attention's quadratic part weigh",
        "more than proportional, as attention's part is, quadratic in the length",
    ),
    (TOKENS.name, PEAK.name): _steps(
        "next to nothing of the peak is paid per token; decoded weights and the like are all of it",
        "memory that does not depend on the tokens, such as decoded weights, is part of the peak",
        "the peak is paid per token, in activations",
        "more than proportional: something is held for every pair of tokens",
    ),
    (TOKENS.name, SAVED.name): _steps(
        "next to nothing that is kept goes with the tokens",
        "part of what is kept does not depend on the tokens",
        "what is kept are activations, so many bytes for each token",
        "more than proportional: something is kept for every pair of tokens",
    ),
    (RANK.name, STEP.name): _steps(
        "the rank is all but free: next to nothing of a step is paid per unit of it",
        "the adapters' products are part of a step, and the rest has no rank",
        "the adapters are nearly all of a step",
        "a larger rank costs more than its products grow",
    ),
    (RANK.name, PEAK.name): _steps(
        "next to nothing of the peak goes with the rank",
        "the adapters' activations and gradients are part of the peak",
        "the adapters' activations and gradients are nearly all of the peak",
        "a larger rank holds more than its activations and gradients grow",
    ),
    (RANK.name, SAVED.name): _steps(
        "next to nothing that is kept goes with the rank",
        "the adapters' inner activations are part of what is kept",
        "the adapters' inner activations are nearly all that is kept",
        "a larger rank keeps more than its activations grow",
    ),
    (DEPTH.name, STEP.name): _steps(
        "next to nothing of a step is paid per layer; what is outside of them is nearly all of it",
        "what is outside of the layers, such as the head, is part of a step",
        "a step is paid per layer",
        "more than proportional: a layer of a deeper model takes longer",
    ),
    (DEPTH.name, PEAK.name): _steps(
        "next to nothing of the peak is paid per layer; one layer's or the head's is nearly all",
        "memory that is held for one layer or the head at a time is part of the peak",
        "the peak is paid per layer, in what is kept for the backward",
        "more than proportional: a layer of a deeper model holds more",
    ),
    (DEPTH.name, SAVED.name): _steps(
        "next to nothing is kept per layer",
        "part of what is kept is outside of the layers",
        "so many bytes are kept for each layer",
        "more than proportional: a layer of a deeper model keeps more",
    ),
    (WIDTH.name, STEP.name): _squares(
        "fixed costs of calls are nearly all of a step",
        "no more than proportional: calls and passes over activations outweigh the products, which "
        "go with the square",
        "between passes over activations, which are proportional, and products, which go with the "
        "square",
        "the products, which go with the square, are nearly all of a step",
        "more than the square: wider products take longer for each multiplication",
    ),
    (WIDTH.name, PEAK.name): _squares(
        "next to nothing of the peak goes with the width",
        "no more than proportional: activations, and what no width changes, make the peak",
        "activations, which are proportional, and decoded weights, which go with the square, "
        "make the peak",
        "decoded weights, which go with the square, are nearly all of the peak",
        "more than the square: a wider model holds more for each weight",
    ),
    (WIDTH.name, SAVED.name): _squares(
        "next to nothing that is kept goes with the width",
        "no more than proportional: what is kept are activations, and nothing of a weight's size",
        "more than proportional: part of what is kept is of a weight's size",
        "what is kept goes with the weights' size",
        "more than the square: a wider model keeps more for each weight",
    ),
    (FIRST_STEP.name, FIRST.name): _steps(
        "next to nothing is compiled or tuned per layer: layers alike share what was made for one",
        "part of it is paid once for layers alike, and part for every layer",
        "every layer is paid for as if there were no other like it",
        "more than proportional: a layer of a deeper model takes longer",
    ),
    (FIRST_STEP.name, TUNE.name): _steps(
        "next to nothing is paid per layer, quantising the weights included",
        "part of it is paid per layer, where weights are quantised, and part once",
        "it is paid per layer",
        "more than proportional: a layer of a deeper model takes longer",
    ),
}


def meaning(axis: Axis, quantity: Quantity, exponent: float) -> str:
    """The sentence for it, without a full stop."""
    if exponent < -FLAT:
        return "it falls towards larger sizes: the small ones pay for something that these do not"
    return next(text for bound, text in SENTENCES[axis.name, quantity.name] if exponent < bound)
