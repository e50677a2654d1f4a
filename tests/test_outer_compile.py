"""A torch.compile around an optimised model leaves its blocks fused, and the report stays true."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.utils import compile_regions
from torch import Tensor
from torch._dynamo.exc import Unsupported
from torch._dynamo.utils import counters
from transformers import Trainer, TrainingArguments

import qlora_compile
from bench.agreement import distance, training_step
from tests.capture.test_regions import calls
from tests.test_equality import FLOAT32_TOLERANCE, as_rewritten, build
from tests.toy_models import tokens

__all__ = ["as_rewritten", "calls"]

pytestmark = pytest.mark.usefixtures("as_rewritten")


def compiled(model: Any) -> Any:
    return torch.compile(model, backend="aot_eager")


def compiled_in_place(model: Any) -> Any:
    model.compile(backend="aot_eager")
    return model


def compiled_by_regions(model: Any) -> Any:
    return compile_regions(model, backend="aot_eager")


def results(model: Any, ids: Tensor) -> dict[str, Tensor]:
    """Return the results of a training step, by the names of the model inside."""
    named = training_step(model, ids)
    return {name.replace("_orig_mod.", ""): value for name, value in named.items()}


@pytest.mark.parametrize("outer", [compiled, compiled_in_place, compiled_by_regions])
def test_blocks_stay_fused(outer: Callable[[Any], Any], calls: dict[str, int]) -> None:
    stock, ours = build("nf4", torch.float32, 0.0, False)
    model = outer(ours)
    for length in (16, 20, 12, 16, 24):
        ids = tokens(2, length)
        counters.clear()
        calls.update(forward=0, backward=0)
        actual = results(model, ids)
        assert calls == {"forward": 14, "backward": 14}
        for group, error in distance(actual, results(stock, ids)).items():
            assert error < FLOAT32_TOLERANCE, group
        assert length > 12 or not counters["stats"]["unique_graphs"]
    assert qlora_compile.explain(model).fused == 14


def test_one_graph_of_the_whole_model_is_refused_with_the_remedy() -> None:
    stock, ours = build("nf4", torch.float32, 0.0, False)
    ids = tokens()
    with pytest.raises(Unsupported, match=r"call that torch\.compile without fullgraph=True"):
        torch.compile(ours, backend="aot_eager", fullgraph=True)(input_ids=ids, labels=ids)
    for group, error in distance(results(ours, ids), results(stock, ids)).items():
        assert error < FLOAT32_TOLERANCE, group
    assert qlora_compile.explain(ours).fused == 14


def test_a_cache_in_a_compiled_call_agrees_with_stock() -> None:
    stock, ours = build("nf4", torch.float32, 0.0, False)
    ids, model = tokens(), compiled(ours.eval())
    with torch.no_grad():
        actual = model(input_ids=ids, use_cache=True)
        expected = stock.eval()(input_ids=ids, use_cache=True)
    torch.testing.assert_close(actual.logits, expected.logits, rtol=1e-4, atol=1e-5)
    assert actual.past_key_values.get_seq_length() == ids.shape[1]


def test_the_trainer_with_torch_compile(tmp_path: Path, calls: dict[str, int]) -> None:
    stock, ours = build("nf4", torch.float32, 0.0, False)
    data = [{"input_ids": ids, "labels": ids} for ids in tokens(8, 16)]
    for model, options in (
        (stock, {}),
        (ours, {"torch_compile": True, "torch_compile_backend": "aot_eager"}),
    ):
        arguments = TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=4,
            per_device_train_batch_size=2,
            learning_rate=1e-3,
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            **options,
        )
        Trainer(model=model, args=arguments, train_dataset=data).train()  # pyright: ignore[reportArgumentType]
    assert calls == {"forward": 4 * 14, "backward": 4 * 14}
    assert qlora_compile.explain(ours).fused == 14
    expected = dict(stock.named_parameters())
    for name, parameter in ours.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter, expected[name], rtol=1e-3, atol=1e-4)
