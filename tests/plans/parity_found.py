"""Prints as JSON where launches of plans differ from those of Triton's own launcher, for one config
of each kind, or with the argument "all" for every shipped config and format.

    python -m tests.plans.parity_found sm_90 all
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qlora_compile.kernels import op
from qlora_compile.kernels.call import NeedsGradient
from qlora_compile.kernels.experts import op as experts_op
from qlora_compile.kernels.experts.grouped import GroupedExperts
from qlora_compile.kernels.experts.registry import ExpertsChoice
from qlora_compile.kernels.library import REGISTERED
from qlora_compile.kernels.plans import native
from qlora_compile.kernels.problem import Direction
from qlora_compile.kernels.registry import FORMATS, VARIANTS
from qlora_compile.kernels.selection import Choice
from qlora_compile.kernels.variants.base import Config, Variant
from qlora_compile.kernels.variants.triton_variant import TritonVariant
from qlora_compile.kernels.workspace import fresh_workspaces
from tests.fake_device.device import FakeDevice, RecordedLaunch, fake_device
from tests.kernels.group_cases import GroupCall
from tests.kernels.linear_cases import DTYPES, Case, double_quantizes
from tests.kernels.test_qlora_experts import Case as ExpertsCase

ROWS = 67

Arguments = tuple[Any, ...]


class Keeping(TorchDispatchMode):
    """Keeps every tensor that operators make, so that no two of them have one address."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.kept.append(result)
        return result


def compared(device: FakeDevice, name: str, arguments: Arguments) -> list[str]:
    """Return the differences of one call, whose plan is made and replayed here."""
    fused = getattr(torch.ops.qlora_compile, name)
    torch.ops.qlora_plans.clear()
    with torch.no_grad():
        for _ in range(2):
            fused(*arguments)
        if torch.ops.qlora_plans.counts()[0] != 1:
            return torch.ops.qlora_plans.refusals()
        with device.recording() as by_plan:
            fused(*arguments)
        with Keeping(), fresh_workspaces(), device.recording() as by_triton:
            REGISTERED[name].compute(*arguments)
    given = [each for each in tree_leaves(arguments) if isinstance(each, Tensor)]
    return [*differences(by_triton, by_plan, given)] or [*(() if by_plan else ("no launch",))]


def differences(
    expected: list[RecordedLaunch], found: list[RecordedLaunch], given: list[Tensor]
) -> Iterator[str]:
    """Yield differences. All bytes must agree except pointers to memory that a call allocates,
    which must correspond one to one within a launch: memory not needed at once may be shared in a
    plan."""
    if len(expected) != len(found):
        yield f"{len(found)} launches instead of {len(expected)}"
        return
    moved: dict[bytes, bytes] = {}
    inputs = [(t.data_ptr(), t.data_ptr() + max(t.untyped_storage().nbytes(), 1)) for t in given]
    for one, other in zip(expected, found, strict=True):
        plain = [replace(each, parameters=()) for each in (one, other)]
        if plain[0] != plain[1]:
            yield f"{plain[1]} instead of {plain[0]}"
        here: dict[bytes, bytes] = {}
        for index, (p, q) in enumerate(zip(one.parameters, other.parameters, strict=True)):
            if p == q:
                continue
            where = f"parameter {index} of {one.kernel}"
            address = int.from_bytes(p[:8], "little")
            if len(p) not in (8, 128) or p[8:] != q[8:] or any(a <= address < b for a, b in inputs):
                yield f"{where}: {q.hex()} instead of {p.hex()}"
            if moved.setdefault(p[:8], q[:8]) != q[:8] or here.setdefault(q[:8], p[:8]) != p[:8]:
                yield f"{where}: another tensor"


def linear_calls(thorough: bool) -> Iterator[tuple[str, Variant, Config, GroupCall]]:
    for variant in VARIANTS:
        if not isinstance(variant, TritonVariant):
            continue
        for quant_format in FORMATS if thorough else FORMATS[:1]:
            double = double_quantizes(quant_format.name)
            for dropout in (0.1, None):
                rows = 13 if variant.name == "skinny" else ROWS
                case = Case((rows,), 128, 256, 16, quant_format.name, 64, double, DTYPES[2])
                case = replace(case, dropout=dropout)
                groups = [GroupCall.of(case), GroupCall.of(case, replace(case, n=72, rank=8))]
                for group in groups:
                    problem = group.problem("forward")
                    if variant.rejects(problem):
                        continue
                    for config in variant.configs(problem):
                        label = f"{variant.name} {config.label} {quant_format.name} {dropout}"
                        yield f"{label} x{len(group.calls)}", variant, config, group
                        if not thorough:
                            break


def linear_differences(device: FakeDevice, thorough: bool) -> Iterator[tuple[str, list[str]]]:
    seen: set[str] = set()
    for label, variant, config, group in linear_calls(thorough):
        kind = variant.name
        if not thorough and (kind in seen or (kind == "tail" and len(group.calls) == 1)):
            continue
        if not thorough and kind not in ("tail", "fused"):
            continue
        seen.add(kind)
        call = group.fused_call(save_low_rank=True)
        x = group.calls[0].x
        seed = next((each.seed for each in group.calls if each.seed is not None), None)
        tensors = [tensor for each in group.calls for tensor in each.tensors]
        low = torch.randn(x.shape[0], call.rank, dtype=call.lora_dtype)
        needs = replace(call, needs=NeedsGradient(True, True, False))
        grads = [each.grad for each in group.calls]
        by_direction: dict[Direction, Arguments] = {
            "forward": (x, tensors, seed, str(call)),
            "backward": (grads, x, [*tensors, low], seed, str(needs)),
        }
        for direction, arguments in by_direction.items():
            problem = group.problem(direction, keeps=True)
            if config not in variant.configs(problem):
                continue
            choice = Choice(variant, config, 0.0)
            with mock.patch.object(op, "select", return_value=choice):
                name = "qlora_linear" if direction == "forward" else "qlora_linear_backward"
                yield f"{direction} {label}", compared(device, name, arguments)


def experts_differences(device: FakeDevice, thorough: bool) -> Iterator[tuple[str, list[str]]]:
    for quant_format in FORMATS if thorough else FORMATS[:1]:
        case = ExpertsCase(
            counts=(5, 0, 12), tail=2, n=64, k=128, rank=16, format=quant_format.name,
            dtype=torch.bfloat16, transposed=False,
        )  # fmt: skip
        built = case.build()
        x, tensors, seed, text = built.arguments(built.leaves)
        needs = replace(op.Call.parse(text), needs=NeedsGradient(True, True, False))
        choice = ExpertsChoice(GroupedExperts(), 0.0)
        with mock.patch.object(experts_op, "choose", return_value=choice):
            arguments = (x, tensors, seed, text)
            yield f"experts {case.format}", compared(device, "qlora_experts", arguments)
            arguments = ([built.grad], x, tensors, seed, str(needs))
            name = "qlora_experts_backward"
            yield f"experts' backward {case.format}", compared(device, name, arguments)


def main(target: str, which: str = "") -> None:
    torch.set_num_threads(1)
    # What the fake device does not compute is NaN, and not what memory happens to hold.
    torch.use_deterministic_algorithms(True, warn_only=True)
    with fake_device(target) as device:
        native.install("CPU")
        found = dict(linear_differences(device, which == "all"))
        found |= dict(experts_differences(device, which == "all"))
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
