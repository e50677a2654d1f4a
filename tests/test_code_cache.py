"""Code that torch keeps on disk does not serve runs with other settings."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import uuid
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.compiler.config as compiler_config
from peft import LoraConfig
from torch import nn
from torch._functorch import config as autograd_config
from torch._inductor import compile_fx
from torch._inductor.cpu_vec_isa import pick_vec_isa
from torch.fx.experimental import _config as symbolic_config

import qlora_compile
from qlora_compile.capture.code_cache import cache_key_tag
from tests.code_cache_process import SETTINGS, without_flash_attention, without_vectors

ROOT = Path(__file__).parents[1]


def test_two_processes_over_one_folder_compute_right_gradients() -> None:
    """The first fills the caches, the second changes one setting after another."""
    # A tag of the user's makes the caches as good as empty, but for what C++ was compiled to.
    tag = {"TORCH_COMPILE_CACHE_KEY_TAG": str(uuid.uuid4())}
    errors = {}
    for settings in (["default"], list(SETTINGS)):
        done = subprocess.run(
            [sys.executable, "-m", "tests.code_cache_process", *settings],
            cwd=ROOT,
            env=os.environ | tag | {"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        errors = json.loads(done.stdout.splitlines()[-1])
    assert errors.keys() == SETTINGS.keys()
    assert max(errors.values()) < 1e-5, errors


def test_forward_and_backward_are_looked_up_by_one_tag(monkeypatch: pytest.MonkeyPatch) -> None:
    tags = []
    compiler = compile_fx.compile_fx_inner

    def compiling(*args: Any, **options: Any) -> Any:
        tags.append(compiler_config.cache_key_tag)
        return compiler(*args, **options)

    monkeypatch.setattr(compile_fx, "compile_fx_inner", compiling)
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)).requires_grad_(False)
    lora = LoraConfig(r=1, target_modules=["0", "1"])
    model = qlora_compile.optimize(model, lora, scope="model", tune="model")
    with autograd_config.patch(enable_autograd_cache=False):
        model(torch.randn(3, 2)).sum().backward()
    first, second = tags
    assert first == second != ""


def changed(value: Any) -> Any:
    if isinstance(value, bool):
        return not value
    return value + 1 if isinstance(value, int | float) else "another"


CHANGES: dict[str, AbstractContextManager[Any]] = {
    f"{config.__name__}.{name}": config.patch({name: changed(value)})  # pyright: ignore[reportAttributeAccessIssue]
    for config in (autograd_config, symbolic_config)
    for name, value in config.get_config_copy().items()  # pyright: ignore[reportAttributeAccessIssue]
} | {
    "vectors": without_vectors(),
    "flash attention": without_flash_attention(),
    "mkldnn": torch.backends.mkldnn.flags(enabled=False),
    "the user's own tag": compiler_config.patch(cache_key_tag="mine"),  # pyright: ignore[reportAttributeAccessIssue]
}


@pytest.mark.parametrize("setting", CHANGES)
def test_every_setting_changes_the_tag(setting: str) -> None:
    if setting == "vectors" and not pick_vec_isa():
        pytest.skip("this processor or compiler has no vector instructions to do without")
    before = cache_key_tag(on_cpu=True)
    with CHANGES[setting]:
        assert cache_key_tag(on_cpu=True) != before
    assert cache_key_tag(on_cpu=True) == before != cache_key_tag("a part", on_cpu=True)


class Pass:
    def __init__(self, identity: str | None) -> None:
        self.identity = identity

    def __call__(self, *_: Any) -> None: ...

    def uuid(self) -> str | None:
        return self.identity


def test_functions_are_told_apart_by_their_identity() -> None:
    def tag(joint_pass: Any) -> str:
        with autograd_config.patch(joint_custom_pass=joint_pass):
            return cache_key_tag(on_cpu=False)

    assert tag(Pass("a")) == tag(Pass("a")) != tag(Pass("b"))
    # One of which nothing is known may have been edited.
    for unknown in (Pass(None), changed):
        assert tag(unknown) != tag(unknown)
