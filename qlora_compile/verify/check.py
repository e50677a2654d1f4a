"""Numerical check of a rewrite: compares outputs and all gradients with a float64 evaluation of the
captured graph, and the errors with those that the captured graph makes in its own dtypes."""

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
    packed_inputs,
    specified,
    widened,
    with_masks,
)
from qlora_compile.verify.graph_results import Results, outputs_and_gradients

FACTOR = 4.0
"""A rewritten graph's error may be this many times that of the plain computation in the same
dtypes. Of hundreds of gradients some have, by luck, a plain error a third of the usual one."""

CALL_FACTOR = 2.0
"""The same for a single fused call, where few roundings add up."""

LOST_FACTOR = 10.0
"""The same if the plain computation has no correct digit, as for gradients that cancel out."""

_LOST = 0.5
"""From this plain error on, no digit is correct."""

NOISE = {
    torch.float64: 64 * torch.finfo(torch.float64).eps,
    torch.float32: 64 * torch.finfo(torch.float32).eps,
    torch.float16: torch.finfo(torch.float16).eps / 4,
    torch.bfloat16: torch.finfo(torch.bfloat16).eps / 4,
}
"""The least plain error to judge by: one rounding or another order of a sum causes as much. The
float64 reference itself is no more exact."""

_OWN = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 5e-2}
"""The allowed error if the captured graph, the reference, runs in its own dtypes only."""

_OWN_DTYPES = "its own dtypes"

_SEED = 1
"""The seed of random inputs."""

IN_FLOAT32 = "random, in float32"

_MODULE = re.compile(r"_(?:modules|parameters|buffers)\['([^']*)'\]")


@dataclass(frozen=True)
class Checked:
    """The result of a check. reference: as in Certificate. dtype: the lowest precision that the
    graph computes in. mismatch: the first failure, in words, or None."""

    comparisons: tuple[Comparison, ...]
    reference: str
    dtype: torch.dtype
    mismatch: str | None


@dataclass(frozen=True)
class CapturedInput:
    """A placeholder: a readable name, and whether it is a parameter or buffer of the block."""

    name: str
    stored: bool


def captured_inputs(
    graph_module: GraphModule, names: Mapping[int, Sequence[str]]
) -> list[CapturedInput]:
    """Describe the inputs of a graph that Dynamo has just captured; later Dynamo forgets them.

    names: of the block's parameters and buffers, by their `id`. Compiled code reads the tensors of
    an adapter from slots, not by name.
    """
    found = []
    for node in graph_module.graph.find_nodes(op="placeholder"):
        argument = node.meta.get("grapharg")
        source = getattr(argument, "source", None)
        path = ".".join(_MODULE.findall(source.name)) if source is not None else ""
        known = names.get(id(getattr(argument, "example", None)), ())
        name = path if path in known or not known else known[0]
        # A slot's scaling is an attribute of a module, but neither a parameter nor a buffer.
        is_named = bool(known) or not (names and path)
        found.append(CapturedInput(name if name and is_named else node.name, bool(name)))
    return found


def check(
    original: GraphModule,
    rewritten: GraphModule,
    inputs: Sequence[CapturedInput],
    args: Sequence[Any],
) -> Checked:
    """Compare both graphs on up to four sets of inputs; stop at the first one with a mismatch.

    "real": `args`, dropout off. "random": random activations and trained parameters of the same
    shapes and dtypes. "random, dropped out": these with the fused op's masks in both graphs, if
    fused ops have dropout. "random, in float32": these in float32, whose small errors hide no wrong
    rewrite, if the graphs compute in 16 bits. In the graphs' own dtypes each fused call is compared
    by itself too: the small errors of one call hide no wrong kernel.
    """
    # A checkpoint that is under way would count the tensors saved here.
    with saved_tensors_hooks(lambda saved: saved, lambda saved: saved):
        return _check(original, rewritten, inputs, args)


def _check(
    original: GraphModule,
    rewritten: GraphModule,
    inputs: Sequence[CapturedInput],
    args: Sequence[Any],
) -> Checked:
    masks, lowest = fused_masks(rewritten), _lowest_precision(_computed_with(rewritten, args))
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
    # All cases share the first one's kind of reference, which does not depend on the case.
    return Checked(tuple(comparisons), cases[0].reference, lowest, mismatch)


@dataclass
class _Case:
    """One set of inputs and its comparisons. inputs: the kind, as in Comparison. lowest: the lowest
    precision computed in. wide: the dtype that both graphs are converted to, None for their own."""

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
        """Return the results in float64, or in float32 if float64 does not run; None if neither."""
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
        """Record one comparison; return what is wrong, None if it passes."""
        plain, actual = plains.get(name), actuals.get(name)
        exact = plain if exacts is None else exacts.get(name)
        subject = f"{name} (inputs: {self.inputs})"
        if plain is None and actual is None:
            return None
        if plain is None or exact is None or actual is None:
            side = "the rewritten" if actual is None else "the original"
            return f"{subject} is missing from {side} graph"
        if (actual.shape, actual.dtype) != (plain.shape, plain.dtype):
            was = f"{_name(plain.dtype)} {list(plain.shape)}"
            return f"{subject} is {_name(actual.dtype)} {list(actual.shape)}, not {was}"
        if not plain.is_floating_point():
            return None if torch.equal(plain, actual) else f"{subject} differs"
        # Elements that overflow or divide by zero in the plain computation are not compared.
        defined = plain.isfinite() & exact.isfinite()
        if plain.numel() and not defined.any():
            return f"{subject} cannot be compared: the original computes no finite value of it"
        invalid = int((~actual.isfinite() & defined).sum())
        if invalid:
            return f"{subject} holds {invalid} NaN or infinite values that the original does not"
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
            f"{subject} is off by {error:.1e} of its norm, allowed {allowed:.1e} "
            f"(the original's own error is {plain_error:.1e})"
        )


def _error(value: Tensor, exact: Tensor) -> float:
    """Return ‖value - exact‖ / ‖exact‖ by Euclidean norms, or ‖value‖ if `exact` is zero."""
    return float((value.double() - exact).norm()) / (float(exact.norm()) or 1.0)


def _randomized(inputs: Sequence[CapturedInput], args: Sequence[Any]) -> list[Any]:
    """Return `args` with random normal numbers in place of activations and trained parameters.

    Activations keep their mean and deviation. Trained matrices get variance 1 / columns, because an
    adapter's B is all zeros at first. Trained vectors get added noise of deviation 0.1."""
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
    """Whether `arg` may be replaced by random numbers: not a frozen weight, nor an attention mask,
    which holds huge negative numbers to be added to scores."""
    if captured.stored:
        return arg.requires_grad
    hidden = ~arg.isfinite() | (arg < torch.finfo(arg.dtype).min / 2)
    return arg.numel() > 1 and not bool(hidden.any())


def _computed_with(graph_module: GraphModule, args: Sequence[Any]) -> list[Any]:
    """Return the inputs of the graph except the planes of packed weights, in whose dtypes nothing
    is computed."""
    packed = packed_inputs(graph_module)
    placeholders = graph_module.graph.find_nodes(op="placeholder")
    return [arg for node, arg in zip(placeholders, args, strict=True) if node.name not in packed]


def _lowest_precision(args: Sequence[Any]) -> torch.dtype:
    dtypes = [a.dtype for a in args if isinstance(a, Tensor) and a.is_floating_point()]
    for device in {a.device.type for a in args if isinstance(a, Tensor)}:
        if torch.is_autocast_enabled(device):
            dtypes.append(torch.get_autocast_dtype(device))
    return max((d for d in dtypes if d in NOISE), key=lambda dtype: torch.finfo(dtype).eps)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
