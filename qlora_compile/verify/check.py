"""Numerical check of a rewrite: compares outputs and all gradients with a float64 evaluation of the
captured graph, and the errors with those that the captured graph makes in its own dtypes."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.fx import GraphModule

from qlora_compile.verify.calls import CallInterpreter
from qlora_compile.verify.certificate import Comparison
from qlora_compile.verify.comparing import CALL_FACTOR, FACTOR, NOISE, Comparing, dtype_name
from qlora_compile.verify.graph_forms import (
    Masks,
    fused_masks,
    lost_dropout,
    packed_inputs,
    specified,
    widened,
    with_masks,
)
from qlora_compile.verify.graph_results import (
    Results,
    outputs_and_gradients,
    placed_as,
    random_states,
)

_OWN_DTYPES = "its own dtypes"

_DRAWS = "the graph draws random numbers of its own"

_SEED = 1
"""The seed of random inputs."""

IN_FLOAT32 = "random, in float32"

_MODULE = re.compile(r"_(?:modules|parameters|buffers)\['([^']*)'\]")


@dataclass(frozen=True)
class Checked:
    """The result of a check. reference, uncompared: as in Certificate. dtype: the lowest precision
    that the graph computes in. mismatch: the first failure, in words, or None."""

    comparisons: tuple[Comparison, ...]
    reference: str
    dtype: torch.dtype
    mismatch: str | None
    uncompared: str | None = None


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
    compiled: Callable[..., Any],
    inputs: Sequence[CapturedInput],
    args: Sequence[Any],
) -> Checked:
    """Compare both graphs, and compiled code, on up to four sets of inputs, up to a mismatch.

    "real": `args`, dropout off. "random": random activations and trained parameters of the same
    shapes and dtypes. "random, dropped out": these with the fused op's masks in both graphs, if
    fused ops have dropout. "random, in float32": these in float32, whose small errors hide no wrong
    rewrite, if the graphs compute in 16 bits. In the graphs' own dtypes each fused call is compared
    by itself too: the small errors of one call hide no wrong kernel.

    compiled: what was compiled of the rewritten graph, or of that graph with the masks of the check
    if the graph drops out. It is not compared if the graph draws other random numbers.
    """
    # A checkpoint that is under way would count the tensors saved here.
    with saved_tensors_hooks(lambda saved: saved, lambda saved: saved):
        return _check(original, rewritten, compiled, inputs, args)


def _check(
    original: GraphModule,
    rewritten: GraphModule,
    compiled: Callable[..., Any],
    inputs: Sequence[CapturedInput],
    args: Sequence[Any],
) -> Checked:
    masks, lowest = fused_masks(rewritten), lowest_precision(_computed_with(rewritten, args))
    random = _randomized(inputs, args)
    given: Any = {"names": [each.name for each in inputs], "lowest": lowest}
    shown = {**given, "args": random}
    cases = [
        _Case(inputs="real", args=args, masks={}, **given),
        _Case(inputs="random", masks={}, **shown),
    ]
    if masks:
        cases.append(_Case(inputs="random, dropped out", masks=masks, **shown))
    if torch.finfo(lowest).bits < 32:
        in_float32 = {**shown, "lowest": torch.float32, "wide": torch.float32}
        cases.append(_Case(inputs=IN_FLOAT32, masks=masks, **in_float32))
    lost = lost_dropout(original, rewritten, masks)
    if lost is not None:
        placeholders = original.graph.find_nodes(op="placeholder")
        called = dict(zip((node.name for node in placeholders), given["names"], strict=True))
        return Checked((), "", lowest, f"the dropout before {called[lost]} is not the original's")
    comparisons: list[Comparison] = []
    uncompared = None
    for case in cases:
        if case.wide is not None and cases[0].reference.startswith(_OWN_DTYPES):
            break
        fits = case.masks == masks and case.wide is None
        case.run(original, rewritten, compiled if fits else None)
        comparisons += case.comparisons
        uncompared = _DRAWS if fits and case.draws else uncompared
        if case.mismatch is not None:
            break
    mismatch = next((case.mismatch for case in cases if case.mismatch is not None), None)
    # All cases share the first one's kind of reference, which does not depend on the case.
    return Checked(tuple(comparisons), cases[0].reference, lowest, mismatch, uncompared)


@dataclass(kw_only=True)
class _Case(Comparing):
    """One set of inputs. wide: the dtype that both graphs are converted to, None for their own.
    draws: whether the rewritten graph drew random numbers, once it has run."""

    names: list[str]
    args: Sequence[Any]
    masks: Masks
    wide: torch.dtype | None = None
    reference: str = "float64"
    draws: bool = False

    def run(
        self,
        original: GraphModule,
        rewritten: GraphModule,
        compiled: Callable[..., Any] | None,
    ) -> None:
        captured = with_masks(original, self.masks)
        plain = self._results(specified(captured, self.wide), self.wide)
        exact = self._exact(captured)
        rewritten = with_masks(rewritten, self.masks)
        if self.wide is None:
            calls = CallInterpreter(rewritten, self.names, self._compare_call)
            actual = self._results(lambda *args: self._watched(calls.run, args), None)
        else:
            actual = self._results(widened(rewritten, self.wide), self.wide)
        self.compare_all(plain, exact, actual, FACTOR)
        if compiled is not None and not self.draws:
            self.inputs = f"{self.inputs}, compiled"
            self.compare_all(plain, exact, self._results(compiled, None), FACTOR)

    def _watched(self, graph: Callable[..., Any], args: Sequence[Any]) -> Any:
        before = random_states(args)
        outputs = graph(*args)
        self.draws = not all(map(torch.equal, before, random_states(args)))
        return outputs

    def _compare_call(self, plain: Results, exact: Results, actual: Results) -> None:
        self.compare_all(plain, exact, actual, CALL_FACTOR)

    def _exact(self, captured: GraphModule) -> Results | None:
        """Return the results in float64, or in float32 if float64 does not run; None if neither."""
        reasons = []
        for dtype in (torch.float64, torch.float32):
            self.reference = "; ".join([dtype_name(dtype), *reasons])
            try:
                return self._results(specified(captured, dtype), dtype)
            except (RuntimeError, TypeError, ValueError, AssertionError) as error:
                line = (str(error).splitlines() or [type(error).__name__])[0]
                reasons.append(f"in {dtype_name(dtype)} it does not run: {line:.200}")
        self.reference = "; ".join([_OWN_DTYPES, *reasons])
        return None

    def _results(self, graph: Callable[..., Any], wide: torch.dtype | None) -> Results:
        return outputs_and_gradients(graph, self.names, self.args, wide)


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
            value = placed_as(arg, value.to(arg.dtype)).requires_grad_(arg.requires_grad)
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


def lowest_precision(args: Sequence[Any]) -> torch.dtype:
    """Return the coarsest of the tensors' dtypes, or of autocast's where that is on."""
    dtypes = [a.dtype for a in args if isinstance(a, Tensor) and a.is_floating_point()]
    for device in {a.device.type for a in args if isinstance(a, Tensor)}:
        if torch.is_autocast_enabled(device):
            dtypes.append(torch.get_autocast_dtype(device))
    return max((d for d in dtypes if d in NOISE), key=lambda dtype: torch.finfo(dtype).eps)
