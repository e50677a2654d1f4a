"""Targets: what Triton compiles for on each device. This module needs no Triton."""

from __future__ import annotations

import functools
import importlib.util
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class _Assumed(threading.local):
    """The kind of torch device that one thread treats as a device of a target, or None."""

    device: tuple[str, str] | None = None


_assumed = _Assumed()


@contextmanager
def assuming(target: str, kind: str = "meta") -> Iterator[None]:
    """Let torch devices of a kind count as devices of `target` inside the context, in this thread,
    so that launches can be recorded without such a device."""
    before, _assumed.device = _assumed.device, (kind, target)
    try:
        yield
    finally:
        _assumed.device = before


def target_of(device: str) -> str | None:
    """Return the target of a torch device, such as "sm_90"; None if Triton has none for it."""
    if _assumed.device is not None and torch.device(device).type == _assumed.device[0]:
        return _assumed.device[1]
    return _present_target(device)


@functools.cache
def _present_target(device: str) -> str | None:
    kind = torch.device(device).type
    if kind != "cuda" or importlib.util.find_spec("triton") is None:
        return None
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def why_no_target(device: str) -> str:
    """Return why `target_of` finds no target."""
    missing = importlib.util.find_spec("triton") is None
    return "Triton is not installed" if missing else f"no Triton on {device}"


def tuned_target(target: str) -> str | None:
    """Return the target whose configs serve `target`: itself, or the nearest of its kind; None if
    the tensor cores lack bfloat16."""
    if not target.startswith("sm_"):
        return "gfx950" if target == "gfx950" else "gfx942" if target.startswith("gfx9") else None
    capability = int(target.removeprefix("sm_"))
    if capability < 80:
        return None
    if capability in (80, 87):
        return "sm_80"
    if capability < 90 or capability >= 120:
        return "sm_89"
    return "sm_90" if capability < 100 else "sm_100"
