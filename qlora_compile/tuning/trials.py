"""Trials: measures the candidates for a problem, here or in a process that they may crash."""

from __future__ import annotations

import warnings

import torch

from qlora_compile.kernels import selection
from qlora_compile.kernels.problem import Problem
from qlora_compile.kernels.selection import Choice, model_for
from qlora_compile.kernels.selector import Selector
from qlora_compile.tuning.correctness import WRONG
from qlora_compile.tuning.errors import NoCorrectVariantError, TuningProcessError
from qlora_compile.tuning.isolated import IsolatedMeasurement
from qlora_compile.tuning.judgement import Measurement, Trial
from qlora_compile.tuning.measure import measure
from qlora_compile.tuning.warning import NotMeasuredWarning, WrongResultWarning


class Trials:
    """Measures problems by the cost model of `selector`, from which it excludes wrong candidates.

    broken: whether a process for measuring ended before it ran a candidate.
    """

    def __init__(self, selector: Selector) -> None:
        self.broken = False
        self._selector = selector
        self._isolated = IsolatedMeasurement()

    def close(self) -> None:
        """End the process for measuring, if there is one."""
        self._isolated.close()

    def run(self, problem: Problem, seconds: float, limit: float, *, lone: bool) -> Trial | None:
        """Time a handful of candidates, and further ones only while none gives right results.

        seconds: how long to time, about. limit: the seconds after which a candidate that may hang
        is given up. lone: whether to time a candidate that is the only one. Returns None if there
        is only one and `lone` is false, or if none could run. Raises NoCorrectVariantError if all
        ran and all gave wrong results.
        """
        ranked = selection.candidates(problem, model_for(problem.device, self._selector.cpu))
        rejected: dict[str, str] = {}
        while ranked:
            tried = selection.shortlist(ranked, problem)
            if not lone and len(tried) == 1 and not rejected:
                return None  # There is no choice to make.
            ranked = [choice for choice in ranked if choice not in tried]
            try:
                result = self._measured(problem, tried, seconds, limit)
            except TuningProcessError as error:
                self.broken = True
                rejected |= dict.fromkeys((choice.name for choice in tried), str(error))
                break
            for index, reason in result.rejected.items():
                rejected[tried[index].name] = reason
                if reason.startswith(WRONG):
                    message = f"{tried[index].name} is not used, {reason}, for {problem}"
                    warnings.warn(message, WrongResultWarning, stacklevel=2)
            if result.seconds:
                # Where no measurement counts, the cost model chooses, and not a wrong one.
                self._selector.exclude(problem, _wrong(rejected))
                return Trial(problem, tried, result, rejected)
        reasons = "\n".join(f"  {name}: {reason}" for name, reason in rejected.items())
        if len(_wrong(rejected)) == len(rejected):
            raise NoCorrectVariantError(problem=problem, reasons=reasons)
        # Exclude only candidates with wrong results. Those that ran out of memory here, beside the
        # operands of the measurement, may have enough memory in the call itself.
        self._selector.exclude(problem, _wrong(rejected))
        message = f"{problem} is chosen by the cost model, no candidate could be timed:\n{reasons}"
        warnings.warn(message, NotMeasuredWarning, stacklevel=2)
        return None

    def _measured(
        self, problem: Problem, tried: list[Choice], seconds: float, limit: float
    ) -> Measurement:
        if not any(choice.variant.isolated for choice in tried):
            return measure(problem, tried, seconds)
        if torch.cuda.is_initialized():
            # The other process needs the memory that this one has cached and does not use.
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        return self._isolated.measure(problem, tried, seconds, limit)


def _wrong(rejected: dict[str, str]) -> list[str]:
    return [name for name, reason in rejected.items() if reason.startswith(WRONG)]
