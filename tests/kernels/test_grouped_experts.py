"""The experts' Triton products in the interpreter, against the specification in float64."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_compile.kernels.device_model import DEVICE_MODELS, LAUNCH_SECONDS, DeviceModel
from qlora_compile.kernels.experts import grouped
from qlora_compile.kernels.experts.base import ExpertsProblem
from qlora_compile.kernels.experts.grouped import GroupedExperts, adapter_seconds, grouped_config
from qlora_compile.kernels.experts.native import NativeExperts
from qlora_compile.kernels.gpu.configs import GROUPED, GROUPED_DENSE, GemmConfig
from qlora_compile.kernels.gpu.target import assuming
from qlora_compile.kernels.layout import Layout
from qlora_compile.kernels.registry import FORMATS, UNQUANTIZED, format_named
from tests.examples import examples
from tests.kernels.linear_cases import double_quantizes
from tests.kernels.test_qlora_experts import Case, assert_no_worse_than_plain
from tests.pairwise import pairwise

pytestmark = pytest.mark.usefixtures("interpreting")

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
PACKED, DENSE = (
    tuple(dict.fromkeys(config for configs in table.values() for config in configs))
    for table in (GROUPED, GROUPED_DENSE)
)


def configs(format: str, layout: Layout | None = None) -> list[GemmConfig]:
    """Return the configs of any target that can decode `format`, or a weight of `layout`."""
    if format == UNQUANTIZED:
        return list(DENSE)
    decoders = format_named(format).device_decoders()
    names = [decoder.name for decoder in decoders if not decoder.rejects("sm_90", BF16, layout)]
    return [config for config in PACKED if config.decoder in names]


@contextmanager
def configured(config: GemmConfig) -> Iterator[GroupedExperts]:
    """Have the variant use `config`, whatever the number of rows."""
    with (
        assuming("sm_90", "cpu"),
        mock.patch.object(grouped, "grouped_config", return_value=config),
    ):
        yield GroupedExperts()


@st.composite
def cases(draw: st.DrawFn, format: str) -> Case:
    dtype, parameter = draw(st.sampled_from(((BF16, F32), (BF16, BF16), (F16, F32), (F16, F16))))
    double = double_quantizes(format) and draw(st.booleans())
    counts = st.lists(st.sampled_from([0, 0, 1, 7, 16, 70, 131]), min_size=1, max_size=5)
    return Case(
        counts=tuple(draw(counts)),
        tail=draw(st.sampled_from([0, 0, 3, 140])),
        n=draw(st.sampled_from([1, 13, 72, 128])),
        k=draw(st.sampled_from([8, 40, 64, 136, 200])),
        rank=draw(st.sampled_from((0, 1, 3, 16, 64, 100))),
        format=format,
        block_size=draw(st.sampled_from((32, 64, 256, "row"))),
        double_quantize=double,
        dtype=dtype,
        parameter=parameter,
        bias=draw(st.booleans()),
        transposed=draw(st.booleans()),
        seed=draw(st.integers(0, 2**16)),
    )


@pytest.mark.parametrize("format", [UNQUANTIZED, *(each.name for each in FORMATS)])
@settings(max_examples=examples(8))
@given(data=st.data())
def test_error_of_output_and_gradients(format: str, data: st.DataObject) -> None:
    call = data.draw(cases(format)).build()
    with configured(data.draw(st.sampled_from(configs(format, call.layout)))) as variant:
        assert_no_worse_than_plain(call, call.fused(variant))


ONE_HOT = [
    (each.name, config, dtype)
    for each in FORMATS
    for config in configs(each.name)
    for dtype in (BF16, F16)
]


THINNED = pairwise(
    ONE_HOT,
    lambda row: {"decoder": (row[0], row[1].decoder), "dtype": row[2]},
    lambda row: {"config": row[1], "dtype": row[2]},
)


@pytest.mark.parametrize(
    ("format", "config", "dtype"),
    THINNED,
    ids=lambda value: str(getattr(value, "label", value)).replace(" ", "-"),
)
def test_one_hot_rows_give_the_decoded_weight(
    format: str, config: GemmConfig, dtype: torch.dtype
) -> None:
    """Every expert's own, to the last bit: one product with 1 and otherwise zeros."""
    case = Case((72, 0, 72), 5, 80, 72, 0, format, 64, double_quantizes(format), dtype, bias=False)
    call = case.build()
    call.leaves["x"] = torch.eye(72, dtype=dtype).repeat(2, 1)
    call.leaves["x"] = torch.cat([call.leaves["x"], torch.ones(5, 72, dtype=dtype)])
    with configured(config) as variant:
        y = call.fused(variant)["y"]
    assert torch.equal(y[:144].view(2, 72, 80).transpose(1, 2), call.weight[::2])
    assert not y[144:].any()


def test_repeated_calls_give_the_same_bits() -> None:
    call = Case((20, 0, 90), 3, 72, 136, 5, "nf4", dtype=BF16).build()
    with configured(PACKED[-1]) as variant:
        first, second = (call.fused(variant) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@pytest.mark.parametrize("format", [UNQUANTIZED, *(each.name for each in FORMATS)])
def test_more_rows_never_get_a_smaller_tile(format: str) -> None:
    layout = Layout(format, (8, 64))
    for target in GROUPED:
        tiles = [grouped_config(target, rows, 8, 16, layout).block_m for rows in range(0, 2000, 8)]
        assert tiles == sorted(tiles)
        assert tiles[0] == 16
        assert tiles[-1] >= 64


def problem(**changes: object) -> ExpertsProblem:
    layout = FORMATS[0].layout((64 * 1536, 2048))
    base = ExpertsProblem(
        direction="forward",
        m=4096,
        layout=layout,
        rank=16,
        x_dtype=BF16,
        compute_dtype=BF16,
        lora_dtype=BF16,
        out_dtype=BF16,
        bias=False,
        dropout=False,
        keeps_low_rank=False,
        device="cpu",
        experts=64,
    )
    return replace(base, **changes)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("target", "changes", "reason"),
    [
        ("sm_90", {}, None),
        ("gfx942", {"layout": Layout(UNQUANTIZED, (64, 2049))}, None),
        ("sm_75", {}, "sm_75 has no tensor cores for bfloat16"),
        (
            "sm_90",
            {"compute_dtype": F32},
            "the product is in torch.float32, not bfloat16 or float16",
        ),
        ("sm_90", {"out_dtype": F32}, "the output is in torch.float32, not bfloat16 or float16"),
        ("sm_90", {"layout": FORMATS[0].layout((64, 2052))}, "K = 2052 is not a multiple of 8"),
        (
            "sm_90",
            {"layout": FORMATS[0].layout((2**16 * 1536, 2048))},
            "3221225472 blocks of absmax, more than 2147483647",
        ),
    ],
)
def test_rejects_with_the_reason(target: str, changes: dict, reason: str | None) -> None:
    with assuming(target, "cpu"):
        assert GroupedExperts().rejects(problem(**changes)) == ([] if reason is None else [reason])


def test_without_a_device_it_rejects() -> None:
    assert GroupedExperts().rejects(problem()) == ["no Triton on cpu"]


def decoded_first_cost(problem: ExpertsProblem, device: DeviceModel) -> float:
    """Return modelled seconds of decoding all of W to memory, rows or no rows, and the vendor's
    grouped product after it (`torch.nn.functional.grouped_mm`)."""
    active = min(problem.experts, problem.m)
    tiles = active * -(-problem.m // (active * 128))
    n, k = problem.n, problem.k
    bytes_each = format_named(problem.layout.format).bytes_per_weight(problem.layout)
    seconds = device.stream_seconds(problem.experts * n * k * (bytes_each + 2)) + LAUNCH_SECONDS
    compute = 2 * tiles * 128 * n * k / (device.flops * device.vendor_efficiency)
    moved = 2 * active * n * k + 2 * problem.m * (n + k)
    seconds += max(compute, device.stream_seconds(moved)) + LAUNCH_SECONDS
    return seconds + adapter_seconds(problem, device)


@pytest.mark.parametrize("model", DEVICE_MODELS, ids=lambda model: model.name)
def test_modelled_seconds(model: DeviceModel) -> None:
    """The order of magnitude: no faster than memory and tensor cores, and faster than one expert
    after the other; decoding everything first pays for many rows, not for few."""
    for direction in ("forward", "backward"):
        few, many = (problem(m=m, direction=direction) for m in (64, 2**20))
        variant = GroupedExperts()
        assert 64 * 1536 * 2048 / 2 / model.bandwidth < variant.cost(few, model)
        assert 2 * many.m * 1536 * 2048 / model.flops < variant.cost(many, model)
        assert variant.cost(few, model) < NativeExperts().cost(few, model)
        assert variant.cost(few, model) < decoded_first_cost(few, model)
    if model.target in ("sm_80", "sm_90", "sm_100"):
        assert decoded_first_cost(many, model) < variant.cost(many, model)
