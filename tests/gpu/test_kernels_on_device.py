"""The Triton variants on a real device: the interpreter's properties, races included.

They need a CUDA or ROCm device, and a process in which Triton compiles.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qlora_compile.kernels.dropout import keep_mask
from qlora_compile.kernels.gpu.target import target_of, tuned_target
from qlora_compile.kernels.layout import UNQUANTIZED, Layout
from qlora_compile.kernels.op import QLORA_LINEAR, quantized_linear
from qlora_compile.kernels.registry import FORMATS
from qlora_compile.kernels.selector import select
from qlora_compile.kernels.variants.base import Config, LinearSpec, Variant
from qlora_compile.kernels.variants.dense import Dense
from qlora_compile.kernels.variants.tail import Tail
from qlora_compile.kernels.variants.triton_variant import TritonVariant
from qlora_compile.tuning.store import RecordStore
from qlora_compile.tuning.tuner import Tuner
from tests.kernels.linear_cases import DTYPES, Call, Case, double_quantizes
from tests.kernels.test_qlora_linear import assert_no_worse_than_plain
from tests.kernels.triton_cases import PAIR_IDS, PAIRS, calls

pytestmark = pytest.mark.gpu

DEVICE = "cuda"


def target() -> str:
    found = target_of(DEVICE)
    assert found is not None
    assert tuned_target(found) is not None, f"no configs for {found}"
    return found


def on_device(
    call: Call, variant: Variant, config: Config, backward_config: Config | None = None
) -> dict[str, Tensor]:
    results = call.on(DEVICE).fused(variant, None, config, backward_config)
    return {name: value.cpu() for name, value in results.items()}


@pytest.mark.parametrize(("variant", "format"), PAIRS, ids=PAIR_IDS)
@settings(max_examples=60)
@given(data=st.data())
def test_error_of_output_and_gradients(
    variant: TritonVariant, format: str, data: st.DataObject
) -> None:
    call = data.draw(calls(variant, format, target()))
    forward, backward = (
        data.draw(st.sampled_from(variant.configs_on(target(), call.problem(direction))))
        for direction in ("forward", "backward")
    )
    results = call.on(DEVICE).fused(variant, None, forward, backward, data.draw(st.booleans()))
    assert_no_worse_than_plain(call, {name: value.cpu() for name, value in results.items()})


@settings(max_examples=60)
@given(data=st.data())
def test_dense_over_tritons_decoder(data: st.DataObject) -> None:
    call = data.draw(calls(Tail(), data.draw(st.sampled_from(FORMATS)).name, target()))
    variant = Dense()
    config = variant.configs(call.on(DEVICE).problem("forward"))[0]
    assert config.decoder is not None
    assert_no_worse_than_plain(call, on_device(call, variant, config))


def test_the_tuner_measures_in_another_process(tmp_path: Path) -> None:
    call = Case((64,), 512, 512, 16, dtypes=DTYPES[2]).build().on(DEVICE)
    store = RecordStore(tmp_path)
    tuner = Tuner("gpu", store, 300.0, each=0.2)
    problems = [call.problem(direction) for direction in ("forward", "backward")]
    tuner.ensure(problems)
    assert tuner.measurements == len(store.read()) == 2
    for record in store.read().values():
        assert record.baseline is not None
        assert len(record.timings) > 1
        assert not record.rejected


@settings(max_examples=100)
@given(data=st.data())
def test_the_op_takes_what_the_cost_model_chooses(data: st.DataObject) -> None:
    variant, format = data.draw(st.sampled_from(PAIRS))
    call = data.draw(calls(variant, format, target())).on(DEVICE)
    trained, leaves = call.leaves()
    (y,) = QLORA_LINEAR(*trained.arguments())
    grads = torch.autograd.grad(y, list(leaves.values()), call.grad)
    actual = {"y": y.detach().cpu()}
    actual |= {f"grad {n}": g.cpu() for n, g in zip(leaves, grads, strict=True)}
    assert_no_worse_than_plain(call.on("cpu"), actual)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("variant", "format"), PAIRS, ids=PAIR_IDS)
def test_one_hot_rows_give_the_decoded_weight(
    variant: TritonVariant, format: str, dtype: torch.dtype
) -> None:
    if variant.name == "augmented":
        pytest.skip("augmented has no product without an adapter")
    dtypes = next(d for d in DTYPES if d.x == d.compute == d.lora == dtype)
    double = double_quantizes(format)
    size = 16 if variant.name == "skinny" else 256
    call = Case((size,), 512, 256, 0, format, 64, double, dtypes).build()
    x = torch.eye(256, dtype=dtype)[:size]
    for config in variant.configs_on(target(), call.problem("forward")):
        results = on_device(replace(call, x=x), variant, config)
        assert torch.equal(results["y"], call.weight(dtype)[:, :size].t()), config.label
    grad = torch.eye(512, dtype=dtype)[:size]
    for config in variant.configs_on(target(), call.problem("backward")):
        results = on_device(replace(call, x=x * 0, grad=grad), variant, config)
        assert torch.equal(results["grad x"], call.weight(dtype)[:size]), config.label


@pytest.mark.parametrize(("variant", "format"), PAIRS, ids=PAIR_IDS)
def test_a_race_would_show(variant: TritonVariant, format: str) -> None:
    """Many programs, many times: the same bits every time."""
    rows = 16 if variant.name == "skinny" else 1500
    dropout = None if variant.name == "augmented" else 0.1
    case = Case((rows,), 1544, 2056, 16, format, 64, False, DTYPES[4], True, dropout)
    call = case.build().on(DEVICE)
    for config in variant.configs_on(target(), call.problem("backward")):
        first = call.fused(variant, config=config)
        for _ in range(20):
            for name, value in call.fused(variant, config=config).items():
                assert torch.equal(value, first[name]), (config.label, name)


def test_a_weight_of_more_than_2_to_the_31_elements() -> None:
    n, k, rows = 2**19 + 8, 2**12 + 64, 16
    if torch.cuda.mem_get_info()[0] < 20 * 2**30:
        pytest.skip("needs 20 GB of device memory")
    codes = torch.randint(0, 256, (n * k // 2,), dtype=torch.uint8, device=DEVICE)
    absmax = torch.rand(n * k // 64, device=DEVICE)
    x = torch.randn(rows, k, dtype=torch.bfloat16, device=DEVICE)
    y = quantized_linear(x, [codes, absmax], None, str(FORMATS[0].layout((n, k))))
    last = slice(n - 64, n)
    part = codes[(n - 64) * k // 2 :]
    planes = [part, absmax[(n - 64) * k // 64 :]]
    spec = LinearSpec(FORMATS[0].layout((64, k)), 0.0, 0, *(torch.bfloat16,) * 3)
    weight = spec.dequantize(planes, torch.bfloat16)
    torch.testing.assert_close(
        y[:, last].float(), x.float() @ weight.float().t(), rtol=0.02, atol=1
    )


def test_dropout_masks_have_the_bits_of_the_reference() -> None:
    from qlora_compile.kernels.gpu.products import keep_bits

    seed = torch.tensor([2**61 + 12345], device=DEVICE)
    spec = LinearSpec(Layout(UNQUANTIZED, (1, 4096)), 0.1, 3, *(torch.bfloat16,) * 3)
    bits = keep_bits(seed, spec, 2048).cpu()
    unpacked = ((bits[:, None] >> torch.arange(8)) & 1).bool().view(2048, 4096)
    assert torch.equal(unpacked, keep_mask(seed.cpu(), 3, 0.1, (0, 2048), 4096))


def test_a_typical_layer_gets_a_triton_variant() -> None:
    case = Case((4096,), 4096, 4096, 16, dtypes=DTYPES[2])
    assert select(case.build().on(DEVICE).problem("forward")).variant.name != "dense"
