"""Which variant is chosen for a problem, and why the others are not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_compile.errors import NoVariantError
from qlora_compile.kernels import registry, selection
from qlora_compile.kernels.device_model import CPU, DEVICE_MODELS, DeviceModel, model_of_target
from qlora_compile.kernels.gpu import target as targets
from qlora_compile.kernels.layout import Layout
from qlora_compile.kernels.problem import Problem, bucket_rows
from qlora_compile.kernels.registry import FORMATS, UNQUANTIZED, VARIANTS, format_named
from qlora_compile.kernels.selection import Measured
from qlora_compile.kernels.selector import select
from qlora_compile.kernels.variants import native_adapter
from qlora_compile.kernels.variants.base import Variant
from qlora_compile.kernels.variants.dense import DenseConfig
from qlora_compile.kernels.variants.triton_variant import TritonVariant
from tests.format_options import fitting

TYPICAL = Problem(
    direction="forward",
    m=4096,
    layout=FORMATS[0].usual_layout((4096, 4096)),
    rank=16,
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
def target(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Problems for "cuda:0" are for a card of this target."""
    model = model_of_target(request.param)
    monkeypatch.setattr(selection, "device_model", lambda device, target: model)
    with targets.assuming(request.param, kind="cuda"):
        yield request.param


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
        ({"layout": FORMATS[0].layout((4096, 4100))}, "K = 4100 is not a multiple of 8"),
        ({"compute_dtype": torch.float32}, "torch.float32 products"),
        ({"x_dtype": torch.float32}, "adapter and activations are both in float32"),
        ({"layout": FORMATS[0].layout((2**21, 2**21))}, "blocks of absmax"),
    ],
)
def test_what_triton_leaves_to_dense_is_said(target: str, change: dict, reason: str) -> None:
    problem = replace(TYPICAL, **change)
    assert select(problem).variant.name == "dense"
    for variant in VARIANTS:
        if isinstance(variant, TritonVariant):
            assert any(reason in why for why in variant.rejects(problem)), variant.name


def test_an_unquantised_weight_needs_no_decoder(target: str) -> None:
    problem = replace(TYPICAL, layout=Layout(UNQUANTIZED, TYPICAL.layout.shape))
    fused = next(v for v in VARIANTS if v.name == "fused")
    assert fused.rejects(problem) == ["the weight is not packed"]
    assert select(problem).variant.name in ("tail", "dense")


def test_every_card_has_configs_and_costs() -> None:
    problem = replace(TYPICAL, m=16)
    for model in DEVICE_MODELS:
        with targets.assuming(model.target, kind="cuda"):
            for variant in VARIANTS:
                if variant.rejects(problem):
                    assert variant.name == "augmented" or variant.name == "augmented_native"
                    continue
                assert variant.configs(problem), (variant.name, model.name)
                for config in variant.configs(problem):
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


DTYPES = st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16])


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    size = st.sampled_from([1, 7, 8, 64, 1000, 4096, 2**20])
    shape = (draw(size), draw(size))
    layout = Layout(UNQUANTIZED, shape)
    if quant_format := draw(st.sampled_from([None, *FORMATS])):
        layout = quant_format.layout(
            shape,
            **fitting(quant_format, draw(st.sampled_from([32, 64, 4096])), draw(st.booleans())),
        )
    return Problem(
        direction=draw(st.sampled_from(["forward", "backward"])),
        m=bucket_rows(draw(st.integers(1, 2**20))),
        layout=layout,
        rank=draw(st.sampled_from([0, 1, 16, 100])),
        x_dtype=draw(DTYPES),
        compute_dtype=draw(DTYPES),
        lora_dtype=draw(DTYPES),
        out_dtype=draw(DTYPES),
        bias=draw(st.booleans()),
        dropout=draw(st.booleans()),
        keeps_low_rank=draw(st.booleans()),
        device=draw(st.sampled_from(["cpu", "cuda:0"])),
    )


@settings(max_examples=300)
@given(
    problem=problems(),
    model=st.sampled_from(DEVICE_MODELS),
    offered=st.sets(st.sampled_from(VARIANTS), min_size=1),
)
def test_what_is_chosen_does_not_reject(
    problem: Problem, model: DeviceModel, offered: set[Variant]
) -> None:
    model = CPU if problem.device == "cpu" else model
    variants = tuple(variant for variant in VARIANTS if variant in offered)
    with (
        mock.patch.object(registry, "VARIANTS", variants),
        targets.assuming(model.target, kind="cuda"),
    ):
        reasons = {variant.name: variant.rejects(problem) for variant in variants}
        if all(reasons.values()):
            with pytest.raises(NoVariantError) as raised:
                selection.choose(problem, {}, model)
            for name, why in reasons.items():
                assert f"{name}: {'; '.join(why)}" in str(raised.value)
            return
        choice = selection.choose(problem, {}, model)
        assert not choice.variant.rejects(problem)
        assert choice.config in choice.variant.configs(problem)
        assert choice == selection.choose(problem, {}, model)
        others = {problem: replace(choice, seconds=7.0, measured=Measured(1.0, None, None))}
        assert selection.choose(problem, others, model) is others[problem]


def test_what_is_modelled_far_slower_than_dense_is_not_measured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(native_adapter, "multiplies", lambda dtype: True)
    problem = replace(TYPICAL, device="cpu")
    standard = next(v for v in VARIANTS if v.name == "dense").configs(problem)[0].label
    own, other = ("float32", "bfloat16") if "float32" in standard else ("bfloat16", "float32")
    rates = dict(zip(("float64", "float32", "bfloat16", "float16"), CPU.gemm, strict=True))
    slow = replace(CPU, gemm=tuple((rates | {other: rates[own] / 9}).values()))
    ranked = selection.candidates(problem, slow)
    listed = selection.shortlist(ranked, problem)
    assert listed
    assert all(own in choice.name for choice in listed)
    # Unless those have turned out wrong.
    left = [choice for choice in ranked if own not in choice.name]
    assert any(other in choice.name for choice in selection.shortlist(left, problem))


@pytest.mark.parametrize("format", [each.name for each in FORMATS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dense_decodes_by_what_the_target_has(target: str, format: str, dtype: torch.dtype) -> None:
    layout = format_named(format).layout(TYPICAL.layout.shape)
    problem = replace(TYPICAL, layout=layout, compute_dtype=dtype)
    config = next(v for v in VARIANTS if v.name == "dense").configs(problem)[0]
    assert isinstance(config, DenseConfig)
    [decoder] = [d for d in format_named(format).device_decoders() if d.name == config.decoder]
    assert not decoder.rejects(target, dtype)
