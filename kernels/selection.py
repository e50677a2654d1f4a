"""Which variant solves a problem: the measured one where there is a record, else the modelled one.

Records come by the name of their source ("cache", or the path of a file), which a compiled graph
carries, so that models with different sources run side by side. The tuner fills them in; kernels
only look them up.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from qlora_compile.errors import NoVariantError
from qlora_compile.kernels import registry
from qlora_compile.kernels.device_model import CPU, DeviceModel, device_model
from qlora_compile.kernels.gpu.target import target_of
from qlora_compile.kernels.problem import Direction, Problem
from qlora_compile.kernels.variants.base import Config, Variant

MODELLED = ""
"""The source without records."""


BASELINE = "dense"

HANDFUL = 5
"""Candidates measured for a problem: the cost model is right within 15 % or so."""

_OF_ONE_VARIANT = 3
"""Configs of one variant differ less, in the model, than variants do."""

_HOPELESS = 2.0
"""What is modelled at this many times the standard *dense* is not measured beside it: the model
would have to be wrong by as much."""


@dataclass(frozen=True)
class Measured:
    """What measuring told of a choice: how many times as fast as the standard *dense* it is, and as
    the second best; None where these were not right themselves."""

    gain: float | None
    runner_up: str | None
    margin: float | None


@dataclass(frozen=True)
class Choice:
    """A variant, one of its configs, and the seconds it takes: measured, or else modelled."""

    variant: Variant
    config: Config
    seconds: float
    measured: Measured | None = None

    @property
    def name(self) -> str:
        return f"{self.variant.name} {self.config.label}".removesuffix(" -")


def choose(
    problem: Problem,
    records: Mapping[Problem, Choice],
    model: DeviceModel,
    excluded: Collection[str] = (),
) -> Choice:
    """The recorded choice for `problem`, else the one with the least modelled cost, unless its name
    is `excluded`.

    A pure function of its arguments. Raises NoVariantError as `candidates` does.
    """
    if problem in records:
        return records[problem]
    ranked = candidates(problem, model)
    return next((choice for choice in ranked if choice.name not in excluded), ranked[0])


def candidates(problem: Problem, model: DeviceModel) -> list[Choice]:
    """Every config of every variant that does not reject `problem`, by modelled cost.

    Raises NoVariantError with every variant's reasons when all reject it.
    """
    reasons: dict[str, list[str]] = {}
    choices = []
    for variant in registry.VARIANTS:
        reasons[variant.name] = variant.rejects(problem)
        if not reasons[variant.name]:
            choices += [
                Choice(variant, config, variant.cost(problem, config, model))
                for config in variant.configs(problem)
            ]
    if choices:
        return sorted(choices, key=lambda choice: choice.seconds)
    listed = "\n".join(f"  {name}: {'; '.join(why)}" for name, why in reasons.items())
    raise NoVariantError(problem=problem, reasons=listed)


def shortlist(ranked: Sequence[Choice], problem: Problem, limit: int = HANDFUL) -> list[Choice]:
    """What is worth measuring of the candidates `ranked` by modelled cost: the best `limit`, no
    more than a few of one variant, and the standard *dense* that gains are counted from; nothing
    much slower than that one."""
    count: Counter[str] = Counter()
    listed = []
    standard = next((choice for choice in ranked if is_standard(choice, problem)), None)
    longest = math.inf if standard is None else _HOPELESS * standard.seconds
    for choice in ranked:
        count[choice.variant.name] += 1
        few = len(listed) < limit and count[choice.variant.name] <= _OF_ONE_VARIANT
        if choice is standard or (few and choice.seconds <= longest):
            listed.append(choice)
    return listed


def is_standard(choice: Choice, problem: Problem) -> bool:
    """Whether it is *dense* in its first config."""
    return choice.variant.name == BASELINE and choice.config == choice.variant.configs(problem)[0]


_Key = tuple[Problem, int]
_records: dict[str, dict[_Key, Choice]] = {}
_missed: dict[str, dict[Problem, None]] = {}
_excluded: dict[tuple[str, _Key], frozenset[str]] = {}
_keeping: dict[tuple[Problem, str], bool] = {}


def select(problem: Problem, source: str = MODELLED) -> Choice:
    """`choose` among the records of `source`; a miss is noted for `take_missed`."""
    if source != MODELLED and recorded(source, problem) is None:
        _missed.setdefault(source, {})[problem] = None
    return look_up(problem, source)


def look_up(problem: Problem, source: str = MODELLED) -> Choice:
    """As `select`, for whoever only wants to know."""
    known = recorded(source, problem)
    return known if known is not None else _look_up_modelled(problem, source)


def _look_up_modelled(problem: Problem, source: str) -> Choice:
    target = target_of(problem.device)
    # Without records the choice is the same on every run: no figures that were measured, either.
    model = CPU if target is None and source == MODELLED else device_model(problem.device, target)
    excluded = _excluded.get((source, _key(problem)), frozenset())
    return _modelled(problem, model, excluded)


@functools.lru_cache(maxsize=4096)
def _modelled(problem: Problem, model: DeviceModel, excluded: frozenset[str]) -> Choice:
    return choose(problem, {}, model, excluded)


def _key(problem: Problem) -> _Key:
    """A choice measured on so many threads holds for no other number."""
    return problem, torch.get_num_threads() if problem.device == "cpu" else 0


def keeps_low_rank(problem: Problem, source: str = MODELLED) -> bool:
    """Whether the forward `problem` had better keep S for its backward than compute it again.

    The first answer stays: a checkpoint's recomputation must save what its forward saved.
    """
    key = replace(problem, keeps_low_rank=False), source
    if key not in _keeping:
        _keeping.setdefault(key, prefers_keeping(problem, source))
    return _keeping[key]


def prefers_keeping(problem: Problem, source: str = MODELLED) -> bool:
    """What `keeps_low_rank` has answered or, asked now, would answer."""
    key = replace(problem, keeps_low_rank=False), source
    if key in _keeping or not problem.rank:
        return _keeping.get(key, False)
    problems = problems_of_call(problem, trains=True)
    # Measured seconds are compared with measured ones only.
    choices = [recorded(source, each) for each in problems]
    if None in choices:
        choices = [_look_up_modelled(each, source) for each in problems]
    return keeping_is_faster(problems, [choice.seconds for choice in choices if choice])


def keeping_is_faster(problems: Sequence[Problem], seconds: Sequence[float]) -> bool:
    """Of a call's `problems` and the seconds of each one's choice."""
    total = {True: 0.0, False: 0.0}
    for problem, each in zip(problems, seconds, strict=True):
        total[problem.keeps_low_rank] += each
    return total[True] < total[False]


def problems_of_call(forward: Problem, *, trains: bool) -> tuple[Problem, ...]:
    """What has to be chosen for a call whose forward is `forward`, with S kept and without."""
    directions: tuple[Direction, ...] = ("forward", "backward") if trains else ("forward",)
    keeping = (False, True) if trains and forward.rank else (False,)
    return tuple(
        replace(forward, direction=direction, keeps_low_rank=keeps)
        for keeps in keeping
        for direction in directions
    )


def problems_to_measure(forward: Problem, source: str, *, trains: bool) -> tuple[Problem, ...]:
    """Those of `problems_of_call` that a measurement decides between. Where, by the cost model, no
    forward is faster for leaving S to its backward, keeping S only spares that one a product."""
    problems = problems_of_call(forward, trains=trains)
    keeping = tuple(each for each in problems if each.keeps_low_rank)
    if keeping:
        kept, plain = (_look_up_modelled(each[0], source) for each in (keeping, problems))
        if kept.seconds <= plain.seconds:
            return keeping
    return problems


def remember(source: str, problem: Problem, choice: Choice) -> None:
    """Makes `choice` the answer of `source` for `problem`."""
    _records.setdefault(source, {})[_key(problem)] = choice
    _missed.get(source, {}).pop(problem, None)


def recorded(source: str, problem: Problem) -> Choice | None:
    return _records.get(source, {}).get(_key(problem))


def exclude(source: str, problem: Problem, names: Collection[str]) -> None:
    """Has the cost model not choose these candidates for `problem`."""
    _excluded[source, _key(problem)] = frozenset(names)


def forget_source(source: str) -> None:
    """Its records and misses."""
    _records.pop(source, None)
    _missed.pop(source, None)


def take_missed(source: str) -> list[Problem]:
    """The problems that `source` was asked for and had no record of, once each."""
    return list(_missed.pop(source, {}))


def forget() -> None:
    """Everything found out so far: records, misses and decisions."""
    for known in (_records, _missed, _excluded, _keeping):
        known.clear()
    _modelled.cache_clear()
