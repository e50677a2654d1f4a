"""Regions: one graph per kind of block, few graphs over many lengths, one call per fused site."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import nn
from torch._dynamo.utils import counters

import qlora_compile
from qlora_compile import errors
from qlora_compile.capture.regions import region_of
from qlora_compile.kernels.cpu import tapes
from qlora_compile.kernels.variants.dense import Dense
from qlora_compile.verify.verifier import Verifier
from tests.test_equality import as_rewritten, lora, step, without_inductor
from tests.toy_models import tokens, toy
from tests.verify.test_check import changed_scaling

__all__ = ["as_rewritten", "without_inductor"]

through_autograd = pytest.mark.usefixtures("without_inductor")
through_rewriting = pytest.mark.usefixtures("as_rewritten")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, int]]:
    """How many Linears the fused op ran, forward and backward, without tapes."""
    count = {"forward": 0, "backward": 0}
    for name in count:
        original = getattr(Dense, f"{name}_group")

        def counting(self, *args, _name=name, _original=original):
            count[_name] += len(args[0])
            return _original(self, *args)

        monkeypatch.setattr(Dense, f"{name}_group", counting)
    with tapes.off():
        yield count


@through_rewriting
def test_twenty_lengths_make_two_graphs_and_one_call_per_site(calls: dict[str, int]) -> None:
    model = qlora_compile.optimize(toy(num_hidden_layers=4), lora(0.1), quantize="nf4").train()
    counters.clear()
    for length in range(5, 25):
        calls.update(forward=0, backward=0)
        step(model, tokens(2, length))
        assert calls == {"forward": 28, "backward": 28}
    assert counters["stats"]["unique_graphs"] <= 2
    assert not counters["graph_break"]
    assert qlora_compile.explain(model).fused == 28


@through_rewriting
def test_compiling_is_flat_in_depth() -> None:
    graphs = []
    for layers in (2, 6):
        torch._dynamo.reset()
        counters.clear()
        model = qlora_compile.optimize(toy(num_hidden_layers=layers), lora(), quantize="nf4")
        step(model.train(), tokens())
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs == [1, 1]


@through_rewriting
def test_evaluation_without_a_cache_runs_compiled(calls: dict[str, int]) -> None:
    model = qlora_compile.optimize(toy(), lora(), quantize="nf4").eval()
    ids = tokens()
    with torch.no_grad():
        model(input_ids=ids, labels=ids)
    assert counters["stats"]["unique_graphs"] >= 1
    assert calls["forward"] == 14


@through_rewriting
def test_whole_model_scope_is_one_region() -> None:
    model = qlora_compile.optimize(toy(), lora(), quantize="nf4", scope="model").train()
    blocks = [module for module in model.modules() if region_of(module) is not None]
    assert blocks == [model.get_base_model()]
    step(model, tokens())
    report = qlora_compile.explain(model)
    assert report.fused == 14
    assert [s.reason for s in report.sites if not s.fused] == [
        "it is the output head, kept in full precision"
    ]


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.up(x)))


class Tower(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(4, 8)
        self.blocks = nn.ModuleList([Residual() for _ in range(3)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return x


@through_autograd
def test_any_module_can_be_optimised(calls: dict[str, int]) -> None:
    torch.manual_seed(0)
    model = Tower()
    config = LoraConfig(r=2, target_modules=["up", "embed"], init_lora_weights=False)
    model = qlora_compile.optimize(
        model, config, quantize="int8", example_inputs={"x": torch.randn(3, 4)}, strict=True
    )
    x = torch.randn(5, 4, requires_grad=True)
    calls.update(forward=0, backward=0)
    model(x).sum().backward()
    report = qlora_compile.explain(model)
    assert report.fused == len(report.sites) == 7
    assert calls == {"forward": 7, "backward": 7}
    assert x.grad is not None
    assert torch.isfinite(x.grad).all()


@through_autograd
def test_frozen_unquantised_linears_are_fused_and_trained_ones_named() -> None:
    model = Tower()
    model.blocks.requires_grad_(False)
    model = qlora_compile.optimize(model)
    model(torch.randn(2, 4))
    sites = {site.name: site for site in qlora_compile.explain(model).sites}
    assert sites["blocks.0.up"].fused
    assert sites["blocks.0.up"].format == "float32"
    assert sites["embed"].reason is not None
    trained = qlora_compile.optimize(Tower(), scope="model")
    trained(torch.randn(2, 4))
    assert {s.reason for s in qlora_compile.explain(trained).sites} == {
        "the base weight is trained"
    }


class Broken(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(self.first(x), self.second.weight * 2)


@through_rewriting
def test_strict_names_what_is_not_fused() -> None:
    model = Broken().requires_grad_(False)
    config = LoraConfig(r=2, target_modules=["first", "second"])
    with pytest.raises(errors.StrictError, match="second"):
        qlora_compile.optimize(model, config, strict=True, example_inputs={"x": torch.randn(2, 4)})
    assert all(region_of(module) is None for module in model.modules())


@through_rewriting
def test_verify_accepts_a_right_rewrite_and_refuses_a_wrong_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = qlora_compile.optimize(toy(), lora(0.1), quantize="nf4", verify=True).train()
    expected = step(model, tokens())["loss"]
    assert qlora_compile.explain(model).fused == 14
    assert torch.isfinite(expected).all()

    def wrong(graph_module, context):
        changed_scaling(graph_module)
        return 1

    import qlora_compile.capture.pipeline as pipeline

    monkeypatch.setattr(pipeline, "PASSES", (*pipeline.PASSES, wrong))
    model = qlora_compile.optimize(toy(), lora(), quantize="nf4", verify=True).train()
    step(model, tokens())
    report = qlora_compile.explain(model)
    assert report.fused == 0
    assert "is off by" in (report.sites[0].reason or "")
    model = qlora_compile.optimize(toy(), lora(), quantize="nf4")
    for module in model.modules():
        region = region_of(module)
        if region is not None:
            region.kind.verifier = Verifier("toy", strict=True, once=False)
    with pytest.raises(errors.VerificationError, match="is off by"):
        step(model.train(), tokens())


@through_rewriting
def test_scalings_may_differ_between_layers() -> None:
    config = lora(alpha_pattern={"layers.1": 16, "layers.2": 32})
    model = qlora_compile.optimize(toy(num_hidden_layers=4), config, quantize="nf4").train()
    assert torch.isfinite(step(model, tokens())["loss"]).all()
    assert qlora_compile.explain(model).fused == 28


class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x *= 2
        return x + self.inner(x)


@through_autograd
def test_a_block_may_write_to_its_input() -> None:
    tower = Tower()
    tower.blocks = nn.ModuleList([InPlace() for _ in range(3)])
    tower.embed.requires_grad_(False)
    config = LoraConfig(r=2, target_modules=["inner"], init_lora_weights=False)
    tower = qlora_compile.optimize(tower, config).train()
    tower(torch.randn(2, 4)).sum().backward()
    assert qlora_compile.explain(tower).fused == 3


class Wrapper(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.language_model = toy()

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.language_model(input_ids=input_ids, labels=input_ids).loss


@through_rewriting
def test_a_module_around_a_language_model_trains() -> None:
    model = qlora_compile.optimize(Wrapper(), lora(), quantize="nf4").train()
    model(tokens()).backward()
    # PEFT takes the head of a model it does not know for any other Linear.
    assert qlora_compile.explain(model).fused == 15


@through_autograd
def test_ragged_lengths_under_checkpointing_recompute_the_graph_they_ran() -> None:
    model = qlora_compile.optimize(toy(), lora(0.1), quantize="nf4").train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for length in (5, 9, 5, 12, 9):
        assert torch.isfinite(step(model, tokens(2, length))["loss"]).all()
    assert qlora_compile.explain(model).fused == 14


class WritesToOutputs(nn.Module):
    """Writes to what its Linear returned, as many models do with a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
            x += 1.0
            x[..., 0] *= 2.0
        return x


@pytest.mark.parametrize("shape", [(4, 8), (2, 3, 8)])
@pytest.mark.parametrize("quantize", [None, "int8"])
@through_autograd
def test_what_a_fused_linear_returns_may_be_written_to(
    shape: tuple[int, ...], quantize: Any
) -> None:
    model = qlora_compile.optimize(WritesToOutputs().requires_grad_(False), quantize=quantize)
    x = torch.randn(shape, requires_grad=True)
    y = model(x)
    y.sum().backward()
    assert qlora_compile.explain(model).fused == 2
    assert x.grad is not None
    with torch.no_grad():
        expected = x
        for layer in model.layers:
            expected = type(layer).forward(layer, expected) + 1.0
            expected[..., 0] *= 2.0
    torch.testing.assert_close(y, expected)


class Breaking(nn.Module):
    """Reads a value in Python, where Dynamo ends a graph."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.up(x)
        return self.down(y / y.abs().max().item()) + x


@through_autograd
def test_sites_of_a_split_block_are_known_by_their_weights(calls: dict[str, int]) -> None:
    model: Any = nn.Sequential(Breaking(), nn.Tanh(), Breaking(), nn.Linear(8, 8))
    model = qlora_compile.optimize(
        model, LoraConfig(r=2, target_modules=["up", "down"]), scope="model", quantize="int8"
    ).train()
    model(torch.randn(4, 8, requires_grad=True)).sum().backward()
    assert calls == {"forward": 5, "backward": 5}
    report = qlora_compile.explain(model)
    assert counters["graph_break"]
    assert [site.fused for site in report.sites] == [True] * 5, str(report)
