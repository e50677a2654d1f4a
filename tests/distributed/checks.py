"""One rank of a job that checks, in a step at most, what DDP and FSDP2 do with packed models.

Started by torchrun with the name of a check and its arguments.
"""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM

import qlora_compile
from qlora_compile.capture import backend
from qlora_compile.errors import ShardedWeightError
from qlora_compile.hf.training import StepObserver
from qlora_compile.kernels.problem import Problem
from qlora_compile.modules.packed import PackedModule
from qlora_compile.quantized_lora import QuantizedLoRA
from qlora_compile.saving_errors import SpreadModelError
from qlora_compile.training.model_choice import ModelChoice
from qlora_compile.training.run import TrainingRun
from qlora_compile.training.settings import RunSettings
from qlora_compile.tuning.caution import TRUSTING
from qlora_compile.tuning.judgement import Trial
from qlora_compile.tuning.trials import Trials
from qlora_compile.tuning.tuner import Tuner
from tests.distributed.cases import EXPERTS as MIXTRAL
from tests.distributed.cases import Case, batch, model_of
from tests.distributed.worker import ENGINES, compile_inner
from tests.hf.test_experts import toy as toy_experts
from tests.toy_language_model import toy_llama, toy_tokenizer

DENSE = Case("none", "nf4", "dense", "plain")
EXPERTS = Case("none", "int4", "experts", "plain")
RAGGED = ((slice(0, 3), 16), (slice(3, 4), 7))
"""The rows of each of two ranks, and how many of their tokens."""


def main(check: str, *arguments: str) -> None:
    torch.set_num_threads(1)
    backend.compile_inner = compile_inner
    dist.init_process_group("gloo")
    globals()[check](*arguments)
    dist.destroy_process_group()


# ---- DDP ----


def ragged() -> None:
    """Rows and tokens that differ between ranks; accumulation without a reduction in between."""
    rank, size = dist.get_rank(), dist.get_world_size()
    model = model_of(DENSE)
    parts = [[batch(number)[rows, :length] for rows, length in RAGGED] for number in (0, 1)]
    total = sum(_learnt(part) for micro in parts for part in micro)
    for micro in parts:
        for part in micro:
            (_summed(model, part) / total).backward()
    expected = _gradients(model)
    model.zero_grad()
    wrapped = DistributedDataParallel(model)
    for number, micro in enumerate(parts):
        last = number == len(parts) - 1
        with contextlib.nullcontext() if last else wrapped.no_sync():
            # DDP divides the sum of gradients by the number of ranks.
            (_summed(wrapped, micro[rank]) * size / total).backward()
    _same(_gradients(model), expected)


def unused() -> None:
    """Trained adapters that a step does not use, with and without gradient checkpointing."""
    rank, size = dist.get_rank(), dist.get_world_size()
    for checkpointing in ("plain", "checkpointed"):
        torch.compiler.reset()
        model = model_of(Case("none", "nf4", "dense", checkpointing))
        model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"]))
        for name, parameter in model.named_parameters():
            if ".other." in name:
                parameter.requires_grad_()
        model(input_ids=batch(0), labels=batch(0)).loss.backward()
        expected = _gradients(model)
        assert expected
        assert not any(".other." in name for name in expected)
        model.zero_grad()
        wrapped = DistributedDataParallel(model, find_unused_parameters=True)
        rows = batch(0).tensor_split(size)[rank]
        for _ in range(2):  # the second step waits for the marks of the first one
            model.zero_grad()
            wrapped(input_ids=rows, labels=rows).loss.backward()
        _same(_gradients(model), expected)


def _learnt(rows: Tensor) -> int:
    return rows.shape[0] * (rows.shape[1] - 1)


def _summed(model: Any, rows: Tensor) -> Tensor:
    return model(input_ids=rows, labels=rows).loss * _learnt(rows)


def _gradients(model: Any) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def _same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-6)


def records(folder: str, job: str) -> None:
    """One rank of the first job measures each problem, the others find the record; no rank of the
    second job measures. All choose the same."""
    os.environ["QLORA_COMPILE_CACHE"] = folder
    Tuner.caution = TRUSTING
    measured: list[str] = []
    run = Trials.run

    def noting(self: Trials, problem: Problem, *args: Any, **options: Any) -> Trial | None:
        trial = run(self, problem, *args, **options)
        measured.extend([str(problem)] * (trial is not None))
        return trial

    Trials.run = noting
    model = model_of(DENSE, tune="auto")
    _step(DistributedDataParallel(model))
    mine = measured, qlora_compile.explain(model).to_dict()["sites"]
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    of_all = [problem for measured, _ in everyone for problem in measured]
    assert len(set(of_all)) == len(of_all)
    assert bool(of_all) == (job == "first")
    assert all(sites == mine[1] for _, sites in everyone)


# ---- FSDP2 ----


def sharded(case: Case, **policy: Any) -> Any:
    return spread_out(model_of(case), **policy)


def spread_out(model: Any, **policy: Any) -> Any:
    for layer in _blocks(model):
        fully_shard(layer, **policy)
    return fully_shard(model, **policy)


def _blocks(model: Any) -> Any:
    return model.get_base_model().model.layers


def _planes(model: Any) -> dict[str, Tensor]:
    return {
        f"{name}.{plane}": value.detach().clone()
        for name, module in model.named_modules()
        if isinstance(module, PackedModule)
        for plane, value in module.named_parameters(recurse=False)
    }


def mixed_precision() -> None:
    """A policy that casts parameters to bfloat16 leaves the planes of all weights bit for bit."""
    for case in (DENSE, EXPERTS):
        torch.compiler.reset()
        expected = _planes(model_of(case))
        assert expected
        torch.compiler.reset()
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        model = sharded(case, mp_policy=policy)
        looks = [_Look(block) for block in _blocks(model)]
        model(input_ids=batch(0), labels=batch(0)).loss.backward()
        found: dict[str, Tensor] = {}
        for number, look in enumerate(looks):
            assert look.trained == {torch.bfloat16}
            prefix = f"base_model.model.model.layers.{number}"
            found |= {f"{prefix}.{name}": plane for name, plane in look.planes.items()}
        assert found.keys() == expected.keys()
        for name, plane in expected.items():
            assert torch.equal(found[name], plane), name


class _Look:
    """The planes of a block, and the dtypes of what is trained in it, when it runs."""

    def __init__(self, block: Any) -> None:
        self.planes: dict[str, Tensor] = {}
        self.trained: set[torch.dtype] = set()
        block.register_forward_pre_hook(self._look)

    def _look(self, block: Any, args: Any) -> None:
        self.planes = _planes(block)
        self.trained = {p.dtype for p in block.parameters() if p.requires_grad}


def save(folder: str) -> None:
    model = sharded(DENSE)
    _step(model)
    checkpoint.save(get_model_state_dict(model), checkpoint_id=folder)
    loss = _loss(model)
    qlora_compile.merge(model, Path(folder, "merged"), torch.float32)
    if dist.get_rank() == 0:
        Path(folder, "loss").write_text(str(loss))


def load(folder: str) -> None:
    """In any number of ranks, that then merge what the ranks of `save` merged."""
    model = sharded(DENSE)
    before = _loss(model)
    state = get_model_state_dict(model)
    checkpoint.load(state, checkpoint_id=folder)
    set_model_state_dict(model, state)
    expected = float(Path(folder, "loss").read_text())
    assert abs(before - expected) > 1e-3
    assert abs(_loss(model) - expected) < 1e-6 * expected
    again = Path(folder, f"merged by {dist.get_world_size()}")
    qlora_compile.merge(model, again, torch.float32)
    if dist.get_rank() == 0:
        assert _files(again) == _files(Path(folder, "merged"))


def _loss(model: Any) -> float:
    with torch.no_grad():
        return model(input_ids=batch(5), labels=batch(5)).loss.item()


def _step(model: Any) -> None:
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, 1.0)
    model(input_ids=batch(0), labels=batch(0)).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def merged(folder: str, engine: str) -> None:
    """Weights that `engine` has spread are merged and saved as whole ones are, and train on."""
    first = dist.get_rank() == 0
    for base in ("nf4", "bitsandbytes"):
        torch.compiler.reset()
        path = Path(folder, base)
        model = model_of(Case("none", base, "dense", "plain"))
        if first:
            _write(model, path / "whole")
        step = ENGINES[engine](model)
        _write(model, path / "spread")
        step(batch(0))
        if first:
            whole, spread = _files(path / "whole"), _files(path / "spread")
            assert spread.keys() == whole.keys()
            assert len(whole) == 3
            for name, content in whole.items():
                assert spread[name] == content, name


def _write(model: Any, folder: Path) -> None:
    qlora_compile.merge(model, folder / "merged", torch.float32)
    qlora_compile.save(model, folder / "packed")


def _files(folder: Path) -> dict[str, bytes]:
    paths = folder.rglob("*.safetensors")
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def adapters(folder: str, engine: str) -> None:
    """PEFT's files of adapters that `engine` has spread are those of whole ones: of the trained
    adapter, of one that does not train, of a trained copy of a module, and of embeddings."""
    first = dist.get_rank() == 0
    for part in ("copy", "embeddings"):
        torch.compiler.reset()
        path = Path(folder, part)
        q = QuantizedLoRA.__new__(QuantizedLoRA)
        q.tokenizer = None
        targets, copied = ["q_proj", "down_proj"], ["norm"]
        if part == "embeddings":
            targets, copied = [*targets, "embed_tokens"], None
        torch.manual_seed(0)
        lora = LoraConfig(
            r=4, target_modules=targets, modules_to_save=copied, init_lora_weights=False
        )
        q.model = get_peft_model(toy_llama(), lora)
        q.model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"]))
        q.model = qlora_compile.optimize(q.model, quantize="nf4", tune="model").train()
        if first:
            q.model.save_pretrained(str(path / "whole"))
        step = ENGINES[engine](q.model)
        for saved in ("spread", "trained"):
            q.save(path / saved)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(PeftModel, "push_to_hub", PeftModel.save_pretrained)
                q.push_to_hub(str(path / f"{saved} and pushed"))
            step(batch(0))
        if first:
            whole, spread, trained = (_files(path / n) for n in ("whole", "spread", "trained"))
            assert len(whole) == 2
            assert spread == whole
            assert _files(path / "trained and pushed") == trained
            assert trained.keys() == whole.keys()
            assert trained != whole


def command(folder: str) -> None:
    """A run of the command line writes the adapter of a model that FSDP2 has spread."""
    inputs = Path(folder)
    if dist.get_rank() == 0:
        toy_llama().save_pretrained(inputs / "model")
        toy_tokenizer().save_pretrained(inputs / "model")
        (inputs / "text.txt").write_text("\n\n".join(f"{n} brown foxes" for n in range(40)))
    dist.barrier()
    settings = RunSettings(
        str(inputs / "model"),
        (str(inputs / "text.txt"),),
        output=str(inputs / "run"),
        format="nf4",
        steps=2,
        tune="model",
        options={"save_strategy": "no", "use_cpu": True},
    )
    optimized = ModelChoice.optimized
    with pytest.MonkeyPatch.context() as patch:
        # What accelerate's FSDP2 does, which does not choose itself on a CPU.
        patch.setattr(ModelChoice, "optimized", lambda *args: spread_out(optimized(*args)))
        patch.setattr(Accelerator, "prepare_model", lambda self, model, **_: model)
        run = TrainingRun(settings)
        run.execute(lambda _: None, StepObserver(lambda *_: None))
    if dist.get_rank() == 0:
        base = AutoModelForCausalLM.from_pretrained(inputs / "model")
        adapted = PeftModel.from_pretrained(base, str(inputs / "run"))
        lora_b = [p for n, p in adapted.named_parameters() if "lora_B" in n]
        assert all(p.dim() == 2 for p in lora_b)
        assert all(p.any() for p in lora_b)


def measured() -> None:
    """A spread model cannot be called by the one process that merges."""
    model = sharded(DENSE)
    with pytest.raises(SpreadModelError, match="pass no tokenizer"):
        qlora_compile.merge(model, "nowhere", tokenizer=toy_tokenizer())
    assert not Path("nowhere").exists()


# ---- tensor parallelism ----


def tensor_parallel(folder: str) -> None:
    """Weights that transformers' own plan has spread, of Linears and of experts, are refused."""
    for name, make in (("dense", toy_llama), ("experts", lambda: toy_experts(MIXTRAL))):
        path = Path(folder, name)
        if dist.get_rank() == 0:
            make().save_pretrained(path)
        dist.barrier()
        model = AutoModelForCausalLM.from_pretrained(path, tp_plan="auto")
        with pytest.raises(ShardedWeightError, match=r"embed_tokens.*Shard.*tp_plan"):
            qlora_compile.optimize(model, quantize="nf4")


if __name__ == "__main__":
    main(*sys.argv[1:])
