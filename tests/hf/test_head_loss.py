"""optimize(logits_free_loss=True): the loss and gradients of the plain optimised model, without
its logits in training and with them everywhere else."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn

import qlora_compile
from bench.agreement import distance
from qlora_compile.capture import backend
from tests.test_architectures import losses
from tests.test_equality import lora
from tests.toy_models import tokens
from tests.toy_models import toy as two_layers


@pytest.fixture(autouse=True)
def blocks_run_uncompiled() -> Iterator[None]:
    """The head stands outside them; some tests say otherwise."""
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.fixture
def blocks_run_rewritten(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(backend, "compile_inner", lambda graph, inputs, *_: graph)
    with torch.compiler.set_stance("default"):
        yield


def toy(*args: Any, **options: Any) -> Any:
    return two_layers(*args, **({"num_hidden_layers": 1} | options))


TOLERANCE = 2e-5

MODELS = {
    "Llama": {},
    "Qwen3": {"tie_word_embeddings": True},
    "Gemma3": {"final_logit_softcapping": 2.0},
    "Phi3": {"lm_head_bias": True},
}


def optimized(
    model: Any, config: Any, *, free: bool = True, quantize: Any = "nf4", **options: Any
) -> Any:
    torch.manual_seed(1)
    return qlora_compile.optimize(
        model, config, quantize=quantize, logits_free_loss=free, **options
    ).train()


def pair(architecture: str = "Llama", config: Any = None, **options: Any) -> list[Any]:
    """Return the plain optimised model and the one without logits."""
    return [
        optimized(toy(architecture, **options), config or lora(), free=free)
        for free in (False, True)
    ]


def step(model: nn.Module, ids: Tensor, **inputs: Any) -> dict[str, Tensor]:
    """Return the loss and all gradients."""
    model.zero_grad()
    loss = model(input_ids=ids, **({"labels": ids} | inputs)).loss
    loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert grads
    return {"loss": loss.detach(), **grads}


def assert_agree(models: list[Any], ids: Tensor, tolerance: float = TOLERANCE, **kw: Any) -> None:
    expected, actual = (step(model, ids, **kw) for model in models)
    assert expected.keys() == actual.keys()
    for name, error in distance(actual, expected).items():
        assert error < tolerance, name


@pytest.mark.parametrize("architecture", MODELS)
def test_losses_and_gradients_are_the_plain_ones(architecture: str) -> None:
    models = pair(architecture, **MODELS[architecture])
    ids = tokens()
    assert_agree(models, ids)
    labels = ids.masked_fill(torch.rand(ids.shape) < 0.4, -100)
    assert_agree(models, ids, labels=labels, num_items_in_batch=torch.tensor(40))
    assert_agree(models, ids, shift_labels=ids.roll(-2, 1), num_items_in_batch=40)
    free = models[1]
    output = free(input_ids=ids, labels=ids)
    assert type(output) is type(models[0](input_ids=ids, labels=ids))
    assert output.logits is None
    assert "logits" not in output
    assert len(free(input_ids=ids, labels=ids, return_dict=False)) == 1


@pytest.mark.parametrize("scale", ["Cohere", "Granite"])
def test_scaled_logits(scale: str) -> None:
    import transformers

    options = {"Cohere": {"logit_scale": 3.0}, "Granite": {"logits_scaling": 0.5}}[scale]
    models = []
    for free in (False, True):
        torch.manual_seed(0)
        config = getattr(transformers, f"{scale}Config")(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=128,
            pad_token_id=0,
            **options,
        )
        model = getattr(transformers, f"{scale}ForCausalLM")(config)
        models.append(optimized(model, lora(), free=free))
    assert_agree(models, tokens())


def test_logits_are_there_in_evaluation_and_where_they_are_asked_for() -> None:
    plain, free = pair()
    ids = tokens()
    for model in (plain, free):
        model.eval()
    expected, actual = (model(input_ids=ids, labels=ids) for model in (plain, free))
    assert torch.equal(actual.logits, expected.logits)
    assert torch.equal(actual.loss, expected.loss)
    arguments = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    written = [model.generate(input_ids=ids, **arguments) for model in (plain, free)]
    assert torch.equal(*written)
    for model in (plain, free):
        model.train()
    for inputs in ({}, {"labels": ids[:, -4:], "logits_to_keep": 4}):
        expected, actual = (model(input_ids=ids, **inputs) for model in (plain, free))
        assert torch.equal(actual.logits, expected.logits)


def test_after_an_error_in_a_call_the_next_has_its_logits() -> None:
    free = pair()[1]
    with pytest.raises(ValueError, match="exactly one of input_ids or inputs_embeds"):
        free(labels=tokens())
    assert free.get_base_model()(input_ids=tokens(), labels=tokens()).logits is not None


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.usefixtures("blocks_run_rewritten")
def test_gradient_checkpointing(reentrant: bool) -> None:
    models = pair("Gemma3", final_logit_softcapping=2.0)
    for model in models:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert_agree(models, tokens())


@pytest.mark.parametrize("tied", [False, True])
def test_a_trained_head_gets_its_gradient(tied: bool) -> None:
    """And without PEFT."""
    models = [
        optimized(toy(tie_word_embeddings=tied), None, free=free, quantize=None)
        for free in (False, True)
    ]
    head = models[1].lm_head.weight
    assert head.requires_grad
    assert (head is models[1].model.embed_tokens.weight) == tied
    assert_agree(models, tokens())


def test_a_head_trained_in_full() -> None:
    config = lora(target_modules=["q_proj"], modules_to_save=["lm_head"])
    models = pair(config=config)
    assert_agree(models, tokens())
    with models[1].disable_adapter(), models[0].disable_adapter():
        expected, actual = (m(input_ids=tokens(), labels=tokens()) for m in models)
    assert actual.logits is None
    assert expected.logits is not None


@pytest.mark.usefixtures("blocks_run_rewritten")
def test_an_adapted_head() -> None:
    models = pair(config=lora(target_modules=["q_proj", "lm_head"]))
    ids = tokens()
    assert_agree(models, ids)
    report = qlora_compile.explain(models[1])
    assert [site.fused for site in report.sites if site.name.endswith("lm_head")] == [True]
    assert models[1](input_ids=ids, labels=ids).logits is None
    for model in models:
        model.base_model.disable_adapter_layers()
    expected, actual = (model(input_ids=ids, labels=ids).loss for model in models)
    torch.testing.assert_close(actual, expected)


def test_bfloat16_and_autocast() -> None:
    ids = tokens(4, 24)
    for dtype, autocast in ((torch.bfloat16, False), (torch.float32, True)):
        models = [optimized(toy("Llama", dtype), lora(), free=free) for free in (False, True)]
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            assert_agree(models, ids, tolerance=3e-2)
            assert models[1](input_ids=ids, labels=ids).loss.dtype == torch.float32


def test_trainer_and_saved_adapters(tmp_path: Path) -> None:
    data = [{"input_ids": row, "labels": row} for row in tokens(6, 12)]
    plain, free = pair()
    expected = losses(plain, tmp_path, data)
    assert losses(free, tmp_path, data) == pytest.approx(expected, rel=1e-4)
    free.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(toy(), str(tmp_path / "adapter"))
    saved = [name for name, _ in again.named_parameters() if "lora_" in name]
    assert saved == [name for name, _ in free.named_parameters() if "lora_" in name]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_have_no_logits_either(copied: Any) -> None:
    free = pair()[1]
    other, ids = copied(free), tokens()
    expected = step(free, ids)
    free.get_base_model().lm_head.weight.data.zero_()  # not the copy's
    actual = step(other, ids)
    assert torch.equal(actual["loss"], expected["loss"])
    assert other(input_ids=ids, labels=ids).logits is None


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"dropout": 0.1}, "from the logits"),
        ({"use_dora": True}, "from the logits"),
        ({}, "without logits"),
    ],
    ids=str,
)
def test_the_report_says_whether_the_logits_are_made(options: dict[str, Any], why: str) -> None:
    """After another adapter has been put on the head."""
    free = pair(config=lora(target_modules=["q_proj", "lm_head"]))[1]
    free.add_adapter("later", lora(target_modules=["lm_head"], **options))
    free.set_adapter("later")
    ids = tokens()
    logits = free(input_ids=ids, labels=ids).logits
    assert (logits is None) == (why == "without logits")
    loss = qlora_compile.explain(free).loss
    assert loss is not None
    assert why in loss
