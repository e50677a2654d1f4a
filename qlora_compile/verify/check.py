"""Numerical check of a rewrite: outputs and all gradients of the rewritten graph against a float64
evaluation of the captured one, next to the errors the captured one makes in its own dtypes."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.fx import GraphModule

from qlora_compile.verify.calls import CallInterpreter
from qlora_compile.verify.certificate import Comparison
from qlora_compile.verify.graph_forms import (
    Masks,
    fused_masks,
    lost_dropout,
    specified,
    widened,
    with_masks,
)
from qlora_compile.verify.graph_results import Results, outputs_and_gradients

FACTOR = 4.0
"""An error may be this many times that of the plain computation in the same dtypes: of hundreds of
gradients the plain one's is, by luck, a third of the others' in some."""

CALL_FACTOR = 2.0
"""The same for a single fused call, where little adds up."""

LOST_FACTOR = 10.0
"""The same where the plain computation has no correct digit, as of gradients that cancel out."""

_LOST = 0.5

NOISE = {
    torch.float64: 64 * torch.finfo(torch.float64).eps,
    torch.float32: 64 * torch.finfo(torch.float32).eps,
    torch.float16: torch.finfo(torch.float16).eps / 4,
    torch.bfloat16: torch.finfo(torch.bfloat16).eps / 4,
}
"""Errors below this, of one rounding or of the order of a sum, are taken for a plain one's. In
float64 the reference itself is no better."""

_OWN = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 5e-2}
"""Allowed where the captured graph runs in no other dtype and is its own reference."""

_OWN_DTYPES = "its own dtypes"

_SEED = 1
"""Of random inputs."""

IN_FLOAT32 = "random, in float32"

_MODULE = re.compile(r"_(?:modules|parameters|buffers)\['([^']*)'\]")


@dataclass(frozen=True)
class Checked:
    """What a check found: every comparison it made, and the first that failed, in words."""

    comparisons: tuple[Comparison, ...]
    reference: str
    dtype: torch.dtype
    mismatch: str | None


@dataclass(frozen=True)
class CapturedInput:
    """A placeholder: what people call it, and whether it is a parameter or buffer of the block."""

    name: str
    stored: bool


def captured_inputs(
    graph_module: GraphModule, names: Mapping[int, Sequence[str]]
) -> list[CapturedInput]:
    """The inputs of a graph as Dynamo hands it over; later it has forgotten them. names: of the
    block's parameters and buffers, by their `id`; an adapter is read by its slot, not by name."""
    found = []
    for node in graph_module.graph.find_nodes(op="placeholder"):
        argument = node.meta.get("grapharg")
        source = getattr(argument, "source", None)
        path = ".".join(_MODULE.findall(source.name)) if source is not None else ""
        known = names.get(id(getattr(argument, "example", None)), ())
        name = path if path in known or not known else known[0]
        # A slot's scaling lies in a module, but is none of its parameters and buffers.
        is_named = bool(known) or not (names and path)
        found.append(CapturedInput(name if name and is_named else node.name, bool(name)))
    return found


def check(
    original: GraphModule,
    rewritten: GraphModule,
    inputs: Sequence[CapturedInput],
    args: Sequence[Any],
) -> Checked:
    """Compares both graphs on `args`, with dropout off; on random activations and trained
    parameters of the same shapes and dtypes; where the fused ops drop out, on these with the masks
    of the fused op in both; and, where they compute in 16 bits, on the same in float32, whose small
    errors hide no wrong rewrite. In its own dtypes each fused call is compared by itself too: the
    small errors of one call hide no wrong kernel. Stops at the first case with a mismatch."""
    # A checkpoint that is under way would count what is saved here.
    with saved_tensors_hooks(lambda saved: saved, lambda saved: saved):
        return _check(original, rewritten, inputs, args)


def _check(
    original: GraphModule,
    rewritten: GraphModule,
    inputs: Sequence[CapturedInput],
    args: Sequence[Any],
) -> Checked:
    masks, lowest = fused_masks(rewritten), _lowest_precision(args)
    random = _randomized(inputs, args)
    names = [each.name for each in inputs]
    cases = [_Case("real", names, args, {}, lowest), _Case("random", names, random, {}, lowest)]
    if masks:
        cases.append(_Case("random, dropped out", names, random, masks, lowest))
    if torch.finfo(lowest).bits < 32:
        cases.append(_Case(IN_FLOAT32, names, random, masks, torch.float32, torch.float32))
    lost = lost_dropout(original, rewritten, masks)
    if lost is not None:
        placeholders = original.graph.find_nodes(op="placeholder")
        called = dict(zip((node.name for node in placeholders), names, strict=True))
        return Checked((), "", lowest, f"the dropout before {called[lost]} is not the original's")
    comparisons: list[Comparison] = []
    for case in cases:
        if case.wide is not None and cases[0].reference.startswith(_OWN_DTYPES):
            break
        case.run(original, rewritten)
        comparisons += case.comparisons
        if case.mismatch is not None:
            break
    mismatch = next((case.mismatch for case in cases if case.mismatch is not None), None)
    # That of the first case: of all that ran, they differ in nothing it depends on.
    return Checked(tuple(comparisons), cases[0].reference, lowest, mismatch)


@dataclass
class _Case:
    """One set of inputs; `lowest` is the lowest dtype it is computed in, `wide` the one that both
    graphs are converted to, None for their own."""

    inputs: str
    names: list[str]
    args: Sequence[Any]
    masks: Masks
    lowest: torch.dtype
    wide: torch.dtype | None = None
    comparisons: list[Comparison] = field(default_factory=list)
    reference: str = "float64"
    mismatch: str | None = None

    def run(self, original: GraphModule, rewritten: GraphModule) -> None:
        captured = with_masks(original, self.masks)
        plain = self._results(specified(captured, self.wide), self.wide)
        exact = self._exact(captured)
        rewritten = with_masks(rewritten, self.masks)
        if self.wide is None:
            calls = CallInterpreter(rewritten, self.names, self._compare_call)
            actual = self._results(calls.run, None)
        else:
            actual = self._results(widened(rewritten, self.wide), self.wide)
        self._compare_all(plain, exact, actual, FACTOR)

    def _compare_call(self, plain: Results, exact: Results, actual: Results) -> None:
        self._compare_all(plain, exact, actual, CALL_FACTOR)

    def _compare_all(
        self, plain: Results, exact: Results | None, actual: Results, factor: float
    ) -> None:
        for name in dict.fromkeys([*plain, *actual]):
            self.mismatch = self.mismatch or self._compare(name, plain, exact, actual, factor)

    def _exact(self, captured: GraphModule) -> Results | None:
        """In float64 or, if it does not run in that, float32; None if in neither."""
        reasons = []
        for dtype in (torch.float64, torch.float32):
            self.reference = "; ".join([_name(dtype), *reasons])
            try:
                return self._results(specified(captured, dtype), dtype)
            except (RuntimeError, TypeError, ValueError, AssertionError) as error:
                line = (str(error).splitlines() or [type(error).__name__])[0]
                reasons.append(f"in {_name(dtype)} it does not run: {line:.200}")
        self.reference = "; ".join([_OWN_DTYPES, *reasons])
        return None

    def _results(self, graph: Callable[..., Any], wide: torch.dtype | None) -> Results:
        return outputs_and_gradients(graph, self.names, self.args, wide)

    def _compare(
        self,
        name: str,
        plains: Results,
        exacts: Results | None,
        actuals: Results,
        factor: float,
    ) -> str | None:
        """Notes the comparison; returns what is wrong with it."""
        plain, actual = plains.get(name), actuals.get(name)
        exact = plain if exacts is None else exacts.get(name)
        told = f"{name} (inputs: {self.inputs})"
        if plain is None and actual is None:
            return None
        if plain is None or exact is None or actual is None:
            side = "the rewritten" if actual is None else "the original"
            return f"{told} is missing from {side} graph"
        if (actual.shape, actual.dtype) != (plain.shape, plain.dtype):
            was = f"{_name(plain.dtype)} {list(plain.shape)}"
            return f"{told} is {_name(actual.dtype)} {list(actual.shape)}, not {was}"
        if not plain.is_floating_point():
            return None if torch.equal(plain, actual) else f"{told} differs"
        # Where the plain computation overflows, or divides by zero, nothing is right or wrong.
        defined = plain.isfinite() & exact.isfinite()
        if plain.numel() and not defined.any():
            return f"{told} cannot be compared: the original computes no finite value of it"
        invalid = int((~actual.isfinite() & defined).sum())
        if invalid:
            return f"{told} holds {invalid} NaN or infinite values that the original does not"
        exact = torch.where(defined, exact, 0.0).double()
        error = _error(torch.where(defined, actual, 0.0), exact)
        plain_error = _error(torch.where(defined, plain, 0.0), exact)
        factor = factor if plain_error < _LOST else LOST_FACTOR
        allowed = factor * max(plain_error, NOISE[self.lowest])
        if exacts is None:
            allowed = _OWN[self.lowest]
        result = Comparison(self.inputs, name, error, plain_error, allowed)
        self.comparisons.append(result)
        if result.passes:
            return None
        return (
            f"{told} is off by {error:.1e} of its norm, allowed {allowed:.1e} "
            f"(the original's own error is {plain_error:.1e})"
        )


def _error(value: Tensor, exact: Tensor) -> float:
    """Norm of the difference over that of `exact`; of an `exact` of zero the value's own norm."""
    return float((value.double() - exact).norm()) / (float(exact.norm()) or 1.0)


def _randomized(inputs: Sequence[CapturedInput], args: Sequence[Any]) -> list[Any]:
    """`args` with normal numbers for activations, of their own mean and deviation, and for trained
    parameters: matrices, which as adapters begin with zeros, of variance 1 / columns."""
    generator = torch.Generator().manual_seed(_SEED)
    values = []
    for each, arg in zip(inputs, args, strict=True):
        value = arg
        if isinstance(arg, Tensor) and arg.is_floating_point() and _is_random(each, arg):
            real = arg.detach().float()
            value = torch.randn(arg.shape, generator=generator).to(arg.device)
            if not each.stored:
                value = real.mean() + value * real.std()
            else:
                value = value / arg.shape[-1] ** 0.5 if arg.dim() > 1 else real + value / 10
            value = value.to(arg.dtype).requires_grad_(arg.requires_grad)
        values.append(value)
    return values


def _is_random(captured: CapturedInput, arg: Tensor) -> bool:
    """Whether other numbers may stand for it: frozen weights stay, and so do masks, which hold what
    is added to scores to hide them."""
    if captured.stored:
        return arg.requires_grad
    hidden = ~arg.isfinite() | (arg < torch.finfo(arg.dtype).min / 2)
    return arg.numel() > 1 and not bool(hidden.any())


def _lowest_precision(args: Sequence[Any]) -> torch.dtype:
    dtypes = [a.dtype for a in args if isinstance(a, Tensor) and a.is_floating_point()]
    for device in {a.device.type for a in args if isinstance(a, Tensor)}:
        if torch.is_autocast_enabled(device):
            dtypes.append(torch.get_autocast_dtype(device))
    return max((d for d in dtypes if d in NOISE), key=lambda dtype: torch.finfo(dtype).eps)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
