"""The head of an optimised model in TRL's trainers: our kernel computes what TRL's function does.
tests/hf/test_trl.py trains by it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from qlora_compile.hf import trl_head
from qlora_compile.kernels import head_log_probs
from tests.toy_models import toy

kernels: Any = pytest.importorskip("trl.kernels")
if not hasattr(kernels, "ChunkedLogProbFunction"):
    pytest.skip("this TRL computes log-probabilities elsewhere", allow_module_level=True)

TRL = kernels.ChunkedLogProbFunction
NAMES = ("log_probs", *trl_head._OUTPUTS)


@pytest.fixture(autouse=True)
def own_apply() -> Iterator[None]:
    """Give TRL's function back afterwards."""
    yield
    if "apply" in TRL.__dict__:
        del TRL.apply


def computed(weight: Tensor, outputs: tuple[str, ...], temperature: float = 1.0) -> dict[str, Any]:
    """Return the results of TRL's function, and the gradient of hidden."""
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(9, weight.shape[1], generator=generator).to(weight.dtype).requires_grad_()
    labels = torch.randint(len(weight), (9,), generator=generator)
    # Outside, as the tokens of images are in some models, whose trainers leave such rows out.
    labels[:4] = torch.tensor([len(weight), -1, -100, len(weight) + 7])
    found = TRL.apply(hidden, weight, None, labels, temperature, 32, None, 0.5, outputs)
    results = dict(zip(NAMES, found, strict=True))
    loss = results["log_probs"].square().sum()
    if results["entropy"] is not None:
        loss = loss + results["entropy"].sum()
    loss.backward()
    return {**results, "gradient": hidden.grad}


@pytest.mark.parametrize("outputs", [(), ("entropy", "is_top1"), trl_head._OUTPUTS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_computes_what_trl_does(
    dtype: torch.dtype, outputs: tuple[str, ...], temperature: float
) -> None:
    model = toy().to(dtype).requires_grad_(False)
    weight = model.lm_head.weight
    expected = computed(weight, outputs, temperature)
    trl_head.serve(model)
    with pytest.MonkeyPatch.context() as patch:
        patch.delattr(TRL, "forward")  # ours runs without it
        actual = computed(weight, outputs, temperature)
    tolerance = 1e-5 if dtype == torch.float32 else 0.03
    for name, value in expected.items():
        if value is None:
            assert actual[name] is None
        else:
            assert actual[name].dtype == value.dtype, name
            torch.testing.assert_close(actual[name], value, rtol=tolerance, atol=tolerance)


def test_other_models_keep_trls_function(monkeypatch: pytest.MonkeyPatch) -> None:
    trl_head.serve(toy().requires_grad_(False))
    monkeypatch.delattr(head_log_probs, "head_log_probs")
    computed(toy().requires_grad_(False).lm_head.weight, trl_head._OUTPUTS)


@pytest.mark.parametrize("change", ["trained", "other dtype"])
def test_what_our_kernel_does_not_compute_is_left_to_trl(change: str) -> None:
    model = toy().requires_grad_(False)
    trl_head.serve(model)
    weight = model.lm_head.weight
    if change == "trained":
        weight.requires_grad_()
        computed(weight, ())
        assert weight.grad is not None
    else:
        with torch.autocast("cpu", torch.bfloat16):
            computed(weight, ())
    assert "by TRL's operators, because our kernel needs" in str(trl_head.described(model))


def test_a_changed_trl_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TRL, "forward", staticmethod(lambda ctx, hidden: hidden))
    model = toy()
    trl_head.serve(model)
    assert "apply" not in TRL.__dict__
    assert trl_head.described(model) is None
