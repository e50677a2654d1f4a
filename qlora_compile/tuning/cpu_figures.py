"""CPU figures: what the cost model must know of this CPU, measured once in about a second."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from qlora_compile.json_text import parsed_json
from qlora_compile.kernels.call_times import OFF
from qlora_compile.kernels.cpu import background, dropout, thin
from qlora_compile.kernels.cpu.instructions import multiplies
from qlora_compile.kernels.device_model import CPU, CpuModel
from qlora_compile.kernels.dropout import keep_mask
from qlora_compile.kernels.formats.formats import FORMATS
from qlora_compile.kernels.packed import PackedWeight
from qlora_compile.tuning.caution import CAREFUL, Caution
from qlora_compile.tuning.fingerprint import Fingerprint, fingerprint
from qlora_compile.tuning.load import Counters
from qlora_compile.tuning.plain_mode import plain_mode
from qlora_compile.tuning.warning import warn_of_folder
from qlora_compile.tuning.whole_files import UNLOCKED, replace_file

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_ROWS, _WIDTH, _RANK = 256, 1024, 16
_FEW_ROWS, _SMALL_WIDTH = 32, 128
"""Sizes for products without instructions on the CPU, of which larger ones would take seconds."""

_FEWEST_RUNS, _SECONDS = 3, 0.01
"""The least number of runs for each figure, and their least total seconds: on a machine with other
work, only some of the short runs are undisturbed."""

_ATTEMPTS = 2
"""The most runs: on a busy machine each takes many times the usual fraction of a second."""


def measure_cpu() -> CpuModel:
    """Measure this CPU with torch's present number of threads; each figure is the best of a few
    runs."""
    gemm, thin, decode = [], [], []
    packed, weight, quant_format = _packed(), _weight(), FORMATS[0]
    for dtype in _DTYPES:
        fast = multiplies(dtype)
        rows, width = (_ROWS, _WIDTH) if fast else (_FEW_ROWS, _SMALL_WIDTH)
        w = weight[:width, :width].to(dtype, memory_format=torch.contiguous_format)
        x = torch.ones(rows, width, dtype=dtype, device="cpu")
        out, low = x @ w, x[:, :_RANK].contiguous()
        a = w[:_RANK]
        gemm.append(2 * rows * width**2 / _best(lambda x=x, w=w, out=out: torch.mm(x, w, out=out)))
        seconds = _best(lambda x=x, a=a: x @ a.t()) + _best(lambda x=x, low=low: low.t() @ x)
        thin.append(4 * rows * width * _RANK / seconds)
        decoded = torch.empty(_WIDTH, _WIDTH, dtype=dtype, device="cpu")
        seconds = _best(
            lambda dtype=dtype, decoded=decoded: quant_format.dequantize_rows(
                packed, 0, _WIDTH, dtype, decoded
            )
        )
        decode.append(seconds / _WIDTH**2)
    source = torch.ones(1 << 23, device="cpu")
    target = torch.empty_like(source)
    small, seed = torch.ones(64, 1024, device="cpu"), torch.tensor([1], device="cpu")
    copy = _best(lambda: target.copy_(source))
    ones = torch.ones(_ROWS, _WIDTH, device="cpu")
    if dropout.is_built():
        mask = _best(lambda: dropout.dropped(ones, seed, 0, 0.1))
    else:
        mask = _best(lambda: keep_mask(seed, 0, 0.1, (0, _ROWS), _WIDTH, ones.dtype))
    return CpuModel(
        name="cpu",
        target=CPU.target,
        flops=max(gemm),
        bandwidth=2 * 4 * source.numel() / copy,
        vendor_efficiency=1.0,
        sms=1,
        gemm=tuple(gemm),
        thin=tuple(thin),
        decode=tuple(decode),
        operator=_best(lambda: small.add_(1.0)),
        dropout=mask / (_ROWS * _WIDTH),
    )


def _weight() -> Tensor:
    return torch.randn(_WIDTH, _WIDTH, generator=torch.Generator().manual_seed(0), device="cpu")


def _packed() -> PackedWeight:
    return FORMATS[0].pack(_weight(), FORMATS[0].usual_layout((_WIDTH, _WIDTH)))


def _decoded(dtype: torch.dtype) -> Tensor:
    return FORMATS[0].dequantize_rows(_packed(), 0, _WIDTH, dtype)


def builds() -> list[Callable[[], object]]:
    """Return the calls that build the C++ which is measured."""
    decoders = [partial(_decoded, dtype) for dtype in (torch.bfloat16, torch.float32)]
    return [*decoders, *thin.builds(torch.bfloat16), *dropout.builds()]


def _best(run: Callable[[], object]) -> float:
    """Return the least seconds of a few runs, or of many short ones.

    An untimed first run loads or compiles what `run` calls.
    """
    run()
    best, spent, runs = float("inf"), 0.0, 0
    while runs < _FEWEST_RUNS or spent < _SECONDS:
        start = time.perf_counter()
        run()
        seconds = time.perf_counter() - start
        best, spent, runs = min(best, seconds), spent + seconds, runs + 1
    return best


_known: dict[tuple[Path | None, int], CpuModel | None] = {}
"""The figures that were read or measured, by folder and number of threads; None where the machine
was busy."""


def measured_cpu(
    folder: Path | None, *, measures: bool = True, caution: Caution = CAREFUL
) -> CpuModel | None:
    """Return this machine's figures.

    They are read from `folder` if stored there; else measured, if `measures` is true, and stored
    there. Returns None if they are neither stored nor to be measured, or if the machine was busy by
    the limits of `caution`; in the latter case this process does not measure them again.
    """
    key = (folder, torch.get_num_threads())
    if key in _known:
        return _known[key]
    path = _path(folder)
    model = None if path is None else _read(path)
    if model is None:
        if not measures:
            return None
        model = quiet_figures(caution)
        if path is not None and model is not None:
            _store(path, model)
    return _known.setdefault(key, model)


def quiet_figures(caution: Caution) -> CpuModel | None:
    """Measure this CPU, if necessary twice; None if the machine was busy both times."""
    with plain_mode("cpu"):
        background.start(builds(), threads=2)
        background.finish()
        for _ in range(_ATTEMPTS):
            before = Counters.now()
            model = measure_cpu()
            if Counters.now().load_since(before).disturbance(caution) is None:
                return model
    return None


@dataclass(frozen=True)
class CheckedFigures:
    """What a check of the stored figures has found.

    model: the figures to use from now on; None if there were none to check, or if the machine was
    busy. changed: for each figure that was off by OFF or more, how many times as large it is now.
    busy: whether the machine was busy.
    """

    model: CpuModel | None
    changed: dict[str, float]
    busy: bool = False


def checked_cpu(folder: Path, caution: Caution) -> CheckedFigures:
    """Measure the figures stored in `folder` again; replace them if one was off by OFF or more.

    Nothing changes if the machine is busy by the limits of `caution`.
    """
    path = _path(folder)
    before = None if path is None else _read(path)
    if path is None or before is None:
        return CheckedFigures(None, {})
    after = quiet_figures(caution)
    if after is None:
        return CheckedFigures(None, {}, busy=True)
    old, new = _figures(before), _figures(after)
    factors = {name: new[name] / old[name] for name in new}
    changed = {name: f for name, f in factors.items() if not 1 / OFF < f < OFF}
    if not changed:
        return CheckedFigures(before, {})
    _store(path, after)
    _known[folder, torch.get_num_threads()] = after
    return CheckedFigures(after, changed)


def _figures(model: CpuModel) -> dict[str, float]:
    """Return every measured figure by a name for people."""
    names = [str(dtype).removeprefix("torch.") for dtype in _DTYPES]
    found = {name: getattr(model, name) for name in ("bandwidth", "operator", "dropout")}
    for kind in ("gemm", "thin", "decode"):
        found |= {f"{kind} {n}": v for n, v in zip(names, getattr(model, kind), strict=True)}
    return found


def _path(folder: Path | None) -> Path | None:
    here = fingerprint("cpu")
    return None if folder is None or here is None else folder / f"cpu-{_digest(here)}.json"


def _digest(here: Fingerprint) -> str:
    return hashlib.sha256(repr(here).encode()).hexdigest()[:16]


def _read(path: Path) -> CpuModel | None:
    """Read figures; None if there is no such file, or one that this version would not write."""
    try:
        model = CpuModel.from_json(parsed_json(path.read_bytes()))
    except (OSError, ValueError, TypeError, AttributeError):
        return None
    for each in (model.gemm, model.thin, model.decode):
        if not isinstance(each, tuple) or len(each) != len(_DTYPES):
            return None
    numbers = _figures(model).values()
    whole = all(isinstance(n, float) and 0 < n < math.inf for n in numbers)
    return model if whole else None


def _store(path: Path, model: CpuModel) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, [json.dumps(dataclasses.asdict(model)).encode()], UNLOCKED)
    except OSError as error:
        warn_of_folder(path.parent, error)
