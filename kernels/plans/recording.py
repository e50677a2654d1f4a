"""Recorder: notes what a run of a variant starts, and makes steps of a plan of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from qlora_compile.kernels.gpu.launch import Launch
from qlora_compile.kernels.gpu.launch_step import launch_step
from qlora_compile.kernels.plans.steps import Step, UnplannableError, operator_step
from qlora_compile.kernels.plans.tracer import Tracer


class Recorder(Tracer):
    """Collects the steps of what runs inside the context. kernels: the compiled kernels."""

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        super().__init__(inputs)
        self.steps: list[Step] = []
        self.kernels: list[Any] = []
        self._stream = self._current_stream()

    def launched(self, launch: Launch, compiled: Any) -> None:
        """Note a launch that was made just now; compiled: Triton's CompiledKernel."""
        try:
            if self._current_stream() != self._stream:
                raise UnplannableError("it uses a second stream")
            self.steps.append(launch_step(launch, compiled, self.place))
            self.kernels.append(compiled)
        except UnplannableError as error:
            self.stopped(str(error))

    def operated(
        self, func: Any, args: Any, kwargs: dict[str, Any], results: list[int | None]
    ) -> None:
        self.steps.append(operator_step(func, args, kwargs, results, self.place, self.device))

    def _current_stream(self) -> int:
        if self.device.type != "cuda":
            return 0
        return torch.cuda.current_stream(self.device).cuda_stream
