"""Which variant is chosen for a problem, and why the others are not."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from qlora_compile.errors import NoVariantError
from qlora_compile.kernels import registry, selection
from qlora_compile.kernels.device_model import DEVICE_MODELS, model_of_target
from qlora_compile.kernels.gpu import target as targets
from qlora_compile.kernels.registry import VARIANTS
from qlora_compile.kernels.selection import select
from qlora_compile.kernels.variants import native_augmented, triton_variant
from qlora_compile.kernels.variants.triton_variant import TritonVariant
from qlora_compile.problem import Problem

TYPICAL = Problem(
    direction="forward",
    m=4096,
    n=4096,
    k=4096,
    rank=16,
    format="nf4",
    block_size=64,
    double_quantized=True,
    x_dtype=torch.bfloat16,
    compute_dtype=torch.bfloat16,
    lora_dtype=torch.float32,
    out_dtype=torch.bfloat16,
    bias=False,
    dropout=False,
    keeps_low_rank=False,
    device="cuda:0",
)


@pytest.fixture(params=["sm_80", "sm_89", "sm_90", "sm_120", "gfx942"])
def target(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Problems for "cuda:0" are for a card of this target."""
    for module in (selection, triton_variant, native_augmented):
        monkeypatch.setattr(module, "target_of", lambda device: request.param)
    model = model_of_target(request.param)
    monkeypatch.setattr(selection, "device_model", lambda device, target: model)
    return request.param


def test_the_cpu_gets_a_native_variant() -> None:
    problem = replace(TYPICAL, device="cpu")
    assert not isinstance(select(problem).variant, TritonVariant)
    for variant in VARIANTS:
        expected = ["no Triton on cpu"] if isinstance(variant, TritonVariant) else []
        assert variant.rejects(problem) == expected, variant.name


def test_few_rows_are_skinny_and_many_are_not(target: str) -> None:
    few = select(replace(TYPICAL, m=8))
    many = select(replace(TYPICAL, m=1 << 16))
    assert few.variant.name == "skinny"
    assert many.variant.name in ("tail", "fused")
    assert 0 < few.seconds < many.seconds


def test_decoding_in_the_loop_pays_on_consumer_cards(target: str) -> None:
    choice = select(replace(TYPICAL, m=1 << 14))
    assert choice.variant.name == ("fused" if target in ("sm_89", "sm_120") else "tail")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"k": 4100}, "K = 4100 is not a multiple of 8"),
        ({"compute_dtype": torch.float32}, "torch.float32 products"),
        ({"x_dtype": torch.float32}, "a float32 adapter over float32 activations"),
        ({"n": 2**21, "k": 2**21, "block_size": 64}, "blocks of absmax"),
    ],
)
def test_what_triton_leaves_to_dense_is_said(target: str, change: dict, reason: str) -> None:
    problem = replace(TYPICAL, **change)
    assert select(problem).variant.name == "dense"
    for variant in VARIANTS:
        if isinstance(variant, TritonVariant):
            assert any(reason in why for why in variant.rejects(problem)), variant.name


def test_an_unquantised_weight_needs_no_decoder(target: str) -> None:
    problem = replace(TYPICAL, format="none", block_size=0, double_quantized=False)
    fused = next(v for v in VARIANTS if v.name == "fused")
    assert fused.rejects(problem) == ["the weight is not packed"]
    assert select(problem).variant.name in ("tail", "dense")


def test_every_card_has_configs_and_costs() -> None:
    problem = replace(TYPICAL, m=16)
    for model in DEVICE_MODELS:
        for variant in VARIANTS:
            native = not isinstance(variant, TritonVariant)
            configs = (
                variant.configs(problem) if native else variant.configs_on(model.target, problem)
            )
            assert configs, (variant.name, model.name)
            for config in configs:
                assert 0 < variant.cost(problem, config, model) < 1


def test_no_variant_names_everyones_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    only_triton = tuple(v for v in VARIANTS if isinstance(v, TritonVariant))
    monkeypatch.setattr(registry, "VARIANTS", only_triton)
    with pytest.raises(NoVariantError, match="tail: no Triton on cpu"):
        select(replace(TYPICAL, device="cpu"))


@pytest.mark.parametrize(
    ("target", "tuned"),
    [
        ("sm_75", None),
        ("sm_80", "sm_80"),
        ("sm_86", "sm_89"),
        ("sm_87", "sm_80"),
        ("sm_90", "sm_90"),
        ("sm_103", "sm_100"),
        ("sm_121", "sm_89"),
        ("gfx950", "gfx950"),
        ("gfx90a", "gfx942"),
        ("gfx1100", None),
    ],
)
def test_targets_take_the_configs_of_their_kind(target: str, tuned: str | None) -> None:
    assert targets.tuned_target(target) == tuned
