"""RefutedRecords: decides which of the records that real calls contradict to drop."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from qlora_compile.kernels.call_times import Contradiction
from qlora_compile.kernels.problem import Problem
from qlora_compile.tuning.caution import Caution
from qlora_compile.tuning.load import Counters


class RefutedRecords:
    """Judges contradictions between real calls and the records of one tuner.

    Each problem's record is refuted at most once: if the next measurement says the same again,
    calls and measurements differ for a reason that further measurements do not remove.
    """

    def __init__(self) -> None:
        self._refuted: set[Problem] = set()
        self._watched: dict[Problem, Counters] = {}

    def among(
        self, found: Mapping[Problem, Contradiction], caution: Caution
    ) -> Iterator[tuple[Problem, Contradiction]]:
        """Yield those of the contradictions that refute a record.

        Faster calls than recorded refute it at once, as other work only ever adds time. Slower
        calls must occur once more, while there is no other work on the machine.
        """
        for problem, contradiction in found.items():
            if problem in self._refuted:
                continue
            if contradiction.factor > 1:
                now = Counters.now()
                before = self._watched.pop(problem, None)
                if before is None:
                    self._watched[problem] = now
                    continue
                if now.load_since(before).disturbance(caution) is not None:
                    continue
            self._refuted.add(problem)
            yield problem, contradiction
