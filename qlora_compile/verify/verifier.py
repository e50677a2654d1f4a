"""Verifier: checks every rewritten graph of one kind of region, and keeps the results."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from torch import Tensor
from torch.fx import GraphModule

from qlora_compile.errors import OptionError, VerificationError
from qlora_compile.kernels.experts.registry import choose
from qlora_compile.kernels.selector import ModelledSelector
from qlora_compile.passes.context import FusedExperts, FusedSite
from qlora_compile.tuning.cache_folder import cache_folder
from qlora_compile.verify.certificate import Certificate, versions_here
from qlora_compile.verify.check import CapturedInput, Checked, check
from qlora_compile.verify.comparing import FACTOR
from qlora_compile.verify.graph_pattern import graph_pattern
from qlora_compile.verify.store import CertificateStore

Verify = bool | Literal["once"]


def check_option(verify: object) -> Verify:
    """Return `verify`. Raises OptionError unless it is True, False or "once"."""
    if verify is True or verify is False or verify == "once":
        return verify  # pyright: ignore[reportReturnType]
    raise OptionError(option="verify", value=verify, known="True, False, 'once'")


@dataclass
class Verifier:
    """Checks the graphs of one kind of region.

    region: the class of the block. strict: whether to raise on a mismatch. once: whether a stored
    certificate for the same pattern, kernels and versions replaces the check. certificates: those
    of the graphs that have passed, by pattern. mismatches: what was wrong with the others.
    """

    region: str
    strict: bool
    once: bool
    certificates: dict[str, Certificate] = field(default_factory=dict)
    mismatches: list[str] = field(default_factory=list)

    def checks(
        self,
        original: GraphModule,
        rewritten: GraphModule,
        compiled: Callable[..., Any],
        inputs: Sequence[CapturedInput],
        fused: Iterable[FusedSite | FusedExperts],
        selector: ModelledSelector,
    ) -> Callable[[Sequence[Any]], str | None]:
        """Return the check of one graph, a function to call with the graph's first arguments.

        The check returns what differs, or None. In strict mode it raises VerificationError for a
        difference. compiled: as in `check`. fused: the sites of the graph. selector: chooses their
        variants.
        """

        def first_call(args: Sequence[Any]) -> str | None:
            device = next((str(a.device) for a in args if isinstance(a, Tensor)), "cpu")
            pattern, kernels = graph_pattern(rewritten, inputs, args), _kernels(fused, selector)
            checked = functools.partial(check, original, rewritten, compiled, inputs, args)
            return self.judge(pattern, kernels, device, checked)

        return first_call

    def judge(
        self, pattern: str, kernels: tuple[str, ...], device: str, check: Callable[[], Checked]
    ) -> str | None:
        """Keep the certificate of what `check` finds, or return what is wrong.

        pattern, kernels, device: as in Certificate. With `once`, a stored certificate is kept in
        place of a check. Raises VerificationError in strict mode.
        """
        versions, store = versions_here(device), CertificateStore(cache_folder())
        known = None
        if self.once and versions is not None:
            known = store.find((pattern, kernels, versions))
        if known is None:
            result = check()
            if result.mismatch is not None:
                problem = f"{self.region}: {result.mismatch}"
                self.mismatches.append(problem)
                if self.strict:
                    raise VerificationError(problem=problem)
                return problem
            known = Certificate(
                pattern=pattern,
                region=self.region,
                kernels=kernels,
                versions=versions,
                device=device,
                dtype=str(result.dtype).removeprefix("torch."),
                reference=result.reference,
                factor=FACTOR,
                comparisons=result.comparisons,
                uncompared=result.uncompared,
            )
            store.append(known)
        self.certificates[pattern] = known
        return None


def _kernels(
    fused: Iterable[FusedSite | FusedExperts], selector: ModelledSelector
) -> tuple[str, ...]:
    """Return the variants that compute the sites, with directions, as `build_report` finds them."""
    names = set()
    for site in fused:
        if isinstance(site, FusedExperts):
            backward = [replace(site.forward, direction="backward")] * site.trains
            names |= {f"{p.direction} {choose(p).variant.name}" for p in (site.forward, *backward)}
            continue
        saves = site.trains and selector.prefers_saving(site.forward)
        forward = replace(site.forward, keeps_low_rank=saves)
        names.add(f"forward {selector.look_up(forward).name}")
        if site.trains:
            backward = replace(forward, direction="backward")
            names.add(f"backward {selector.look_up(backward).name}")
    return tuple(sorted(names))
