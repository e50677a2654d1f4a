"""Hooks inside a block work as in stock PEFT, whatever they see or change, whenever they come."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from peft import get_peft_model
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from torch.nn.modules import module as nn_module
from transformers import MixtralConfig, MixtralForCausalLM
from transformers.modeling_layers import GradientCheckpointingLayer

import qlora_compile
from bench.agreement import distance
from qlora_compile.capture import hooked_run
from qlora_compile.capture.hooks import has_hooks, hooks_inside
from qlora_compile.capture.regions import region_of
from qlora_compile.errors import StrictError
from qlora_compile.hf.blocks import checkpoints
from tests.test_equality import FLOAT32_TOLERANCE, as_rewritten, build, lora, step
from tests.toy_models import tokens, toy

MODULES = (
    "self_attn",
    "mlp",
    "input_layernorm",
    "self_attn.q_proj",
    "self_attn.q_proj.base_layer",
    "self_attn.k_proj.lora_A.default",
    "self_attn.q_proj.lora_dropout.default",
    "mlp.down_proj.lora_B.default",
    "mlp.act_fn",
    "self_attn.o_proj",
)
"""Of a block: what it fuses, the parts of what it fuses, and what stands around it."""

Seen = list[Tensor]


def first(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


def instead(output: Any, value: Tensor) -> Any:
    return value if isinstance(output, Tensor) else (value, *output[1:])


def replaces(module: nn.Module, seen: Seen) -> Any:
    return module.register_forward_hook(lambda m, args, y: instead(y, 0.5 * first(y)))


def writes(module: nn.Module, seen: Seen) -> Any:
    def hook(m: nn.Module, args: Any, y: Any) -> None:
        first(y).mul_(0.5)

    return module.register_forward_hook(hook)


def replaces_input(module: nn.Module, seen: Seen) -> Any:
    def hook(m: nn.Module, args: Any, kwargs: Any) -> Any:
        if args:
            return (args[0] * 0.5, *args[1:]), kwargs
        return args, kwargs | {"hidden_states": kwargs["hidden_states"] * 0.5}

    return module.register_forward_pre_hook(hook, with_kwargs=True)


def keeps(module: nn.Module, seen: Seen) -> Any:
    """Return what it sees, to be differentiated too: in one place, written anew at every call."""
    seen.append(torch.zeros(()))

    def hook(m: nn.Module, args: Any, y: Any) -> None:
        seen[0] = first(y) * 2.0

    return module.register_forward_hook(hook)


def counts(module: nn.Module, seen: Seen) -> Any:
    seen.append(torch.zeros(()))

    def hook(m: nn.Module, args: Any) -> None:
        seen[0] = seen[0] + 1

    return module.register_forward_pre_hook(hook)


def prints(module: nn.Module, seen: Seen) -> Any:
    def hook(m: nn.Module, args: Any, y: Any) -> None:
        print(first(y).abs().max().item())

    return module.register_forward_hook(hook)


def retains(module: nn.Module, seen: Seen) -> Any:
    def hook(m: nn.Module, args: Any, y: Any) -> None:
        first(y).register_hook(lambda gradient: seen.append(gradient.clone()))

    return module.register_forward_hook(hook)


def sees_gradients(module: nn.Module, seen: Seen) -> Any:
    def hook(m: nn.Module, inputs: Any, outputs: Any) -> None:
        seen.extend(each.clone() for each in (*inputs, *outputs) if each is not None)

    return module.register_full_backward_hook(hook)


def replaces_gradient(module: nn.Module, seen: Seen) -> Any:
    def hook(m: nn.Module, gradients: Any) -> Any:
        return tuple(g if g is None else 0.5 * g for g in gradients)

    return module.register_full_backward_pre_hook(hook)


Effect = Callable[[nn.Module, Seen], Any]

TRACED: tuple[Effect, ...] = (replaces, writes, replaces_input, keeps, counts)
UNTRACED: tuple[Effect, ...] = (prints, retains, sees_gradients, replaces_gradient)


def block(model: Any, layer: int) -> nn.Module:
    return model.base_model.model.model.layers[layer]


class Pair(NamedTuple):
    """A stock PeftModel and the optimised one, of the same weights."""

    stock: Any
    ours: Any

    @contextmanager
    def hooked(self, effect: Effect, path: str, layer: int) -> Iterator[tuple[Seen, Seen]]:
        """What the hooks on both see."""
        seen: tuple[Seen, Seen] = ([], [])
        with ExitStack() as stack:
            for model, each in zip(self, seen, strict=True):
                handle = effect(block(model, layer).get_submodule(path), each)
                stack.callback(handle.remove)
            yield seen

    def assert_agree(self, ids: Tensor, seen: tuple[Seen, Seen] = ([], [])) -> dict[str, Tensor]:
        stock, ours = (step(model, ids) for model in self)
        for group, error in distance(ours, stock).items():
            assert error < FLOAT32_TOLERANCE, group
        assert len(seen[0]) == len(seen[1])
        for expected, actual in zip(*seen, strict=True):
            # The rounding of a sum goes with its terms; the sum itself may be near zero.
            assert (actual.shape, actual.dtype) == (expected.shape, expected.dtype)
            assert (actual - expected).norm() <= FLOAT32_TOLERANCE * expected.norm()
        return stock

    def reasons(self, layer: int) -> set[str]:
        """Return why sites of the optimised model's layer are not fused."""
        sites = qlora_compile.explain(self.ours).sites
        return {str(s.reason) for s in sites if f"layers.{layer}." in s.name and not s.fused}


def pair() -> Pair:
    return Pair(*build("nf4", torch.float32, 0.0, False))


def changed(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return any(not torch.allclose(one[name], other[name], rtol=1e-3) for name in other)


@pytest.mark.usefixtures("as_rewritten")
def test_hooks_that_dynamo_traces_are_compiled() -> None:
    """Late hooks on one layer, which has a graph without hooks before and after."""
    both, ids = pair(), tokens()
    plain = both.assert_agree(ids)
    for i, path in enumerate(MODULES):
        effect, layer = TRACED[i % len(TRACED)], i // len(TRACED)
        counters.clear()
        with both.hooked(effect, path, layer) as seen:
            hooked = both.assert_agree(ids, seen)
            assert changed(hooked, plain) == (effect not in (keeps, counts)), path
        assert not counters["graph_break"], path
        # A site is left only where the hook looks into its adapter.
        left = both.reasons(layer)
        inside = changed(hooked, plain) and ("lora" in path or "base" in path)
        assert len(left) == inside, path
        assert all("not plain LoRA" in reason for reason in left), path
        counters.clear()
        both.assert_agree(ids)
        assert not both.reasons(layer), path
        assert not counters["stats"]["unique_graphs"], "a graph without hooks was there"


@pytest.mark.usefixtures("as_rewritten")
def test_with_other_hooks_the_block_runs_as_stock_and_the_report_names_them() -> None:
    both, ids = pair(), tokens()
    both.assert_agree(ids)
    for i, effect in enumerate(UNTRACED):
        for j, path in enumerate(MODULES[:-1]):
            if (i + j) % 2:
                continue
            layer = (j + 1) % 2  # the first norm's output requires no gradient
            with both.hooked(effect, path, layer) as seen:
                both.assert_agree(ids, seen)
                assert not both.reasons(1 - layer)
                (reason,) = both.reasons(layer)
                assert reason.endswith(f"hook {effect.__name__}.<locals>.hook on {path}")
    both.assert_agree(ids)
    assert not both.reasons(0) | both.reasons(1)


@pytest.mark.usefixtures("as_rewritten")
def test_hooks_of_a_block_itself_stand_around_what_is_compiled() -> None:
    both, ids = pair(), tokens()
    both.assert_agree(ids)
    counters.clear()
    for effect in (*TRACED, *UNTRACED):
        with both.hooked(effect, "", 1) as seen:
            both.assert_agree(ids, seen)
            assert not both.reasons(1)
    assert not counters["stats"]["unique_graphs"]


@pytest.mark.usefixtures("as_rewritten")
@pytest.mark.parametrize("effect", [keeps, sees_gradients])
def test_hooks_on_one_layer_before_the_first_call(effect: Effect) -> None:
    both, ids = pair(), tokens()
    with both.hooked(effect, "mlp.gate_proj", 1) as seen:
        both.assert_agree(ids, seen)
    both.assert_agree(ids)
    assert not both.reasons(0) | both.reasons(1)


@pytest.mark.usefixtures("as_rewritten")
def test_a_hook_that_keeps_everything_makes_few_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its list is longer at every call, which Dynamo would compile anew each time."""
    monkeypatch.setattr(hooked_run, "RECOMPILE_LIMIT", 2)
    both, ids = pair(), tokens()

    def appends(module: nn.Module, seen: Seen) -> Any:
        return module.register_forward_hook(lambda m, args, y: seen.append(first(y).detach()))

    counters.clear()
    with both.hooked(appends, "mlp", 0) as seen:
        for _ in range(5):
            both.assert_agree(ids, seen)
        assert len(seen[1]) == 5
        assert "Dynamo cannot trace it as one graph" in both.reasons(0).pop()
    assert counters["stats"]["unique_graphs"] <= 3


@pytest.mark.usefixtures("as_rewritten")
@pytest.mark.parametrize("how", ["reentrant", "nonreentrant", "around"])
def test_hooks_run_as_often_as_in_stock_under_checkpointing(how: str) -> None:
    both, ids = pair(), tokens()
    for model in both:
        checkpointed(model, how)
    both.assert_agree(ids)
    # transformers 5.17 checkpoints a block from outside; then a reentrant one, which recomputes all
    # of it, leaves compiled code free to call hooks.
    free = how == "reentrant" and not checkpoints(block(both.ours, 1))
    for effect in (counts, replaces, sees_gradients):
        for path in ("self_attn.q_proj", "mlp"):
            if how == "around":
                path = f"_checkpoint_wrapped_module.{path}"
            with both.hooked(effect, path, 1) as seen:
                both.assert_agree(ids, seen)
                assert free or both.reasons(1)
    both.assert_agree(ids)


def checkpointed(model: Any, how: str) -> None:
    if how == "around":
        model.config.use_cache = False  # stock would put the recomputed keys behind the first ones
        apply_activation_checkpointing(
            model,
            checkpoint_wrapper_fn=lambda m: checkpoint_wrapper(m, CheckpointImpl.NO_REENTRANT),
            check_fn=lambda m: isinstance(m, GradientCheckpointingLayer),
        )
        return
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": how == "reentrant"})


@pytest.mark.usefixtures("as_rewritten")
@pytest.mark.parametrize("kind", ["forward_hook", "forward_pre_hook", "full_backward_hook"])
def test_global_hooks(kind: str) -> None:
    both, ids = pair(), tokens()
    both.assert_agree(ids)
    seen: Seen = []

    def hook(module: nn.Module, given: Any, *result: Any) -> None:
        if isinstance(module, nn.Linear):
            seen.extend(each.detach() for each in given[:1] if each is not None)

    handle: Any = getattr(nn_module, f"register_module_{kind}")(hook)
    try:
        calls = []
        for model in both:
            seen.clear()
            step(model, ids)
            calls.append([x for x in seen if x.shape[-1] == 4])  # what every lora_B is given
    finally:
        handle.remove()
    for expected, actual in zip(*calls, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)
    both.assert_agree(ids)


@pytest.mark.usefixtures("as_rewritten")
def test_hooks_on_adapters_that_came_later() -> None:
    both, ids = pair(), tokens()
    both.assert_agree(ids)
    for model in both:
        torch.manual_seed(3)
        model.add_adapter("other", lora())
        model.set_adapter("other")
    with both.hooked(replaces, "self_attn.q_proj.lora_A.other", 0) as seen:
        both.assert_agree(ids, seen)


@pytest.mark.usefixtures("as_rewritten")
def test_hooks_added_and_cleared_past_their_handles() -> None:
    """The dict of a module's hooks may be another one than before."""
    both, ids = pair(), tokens()
    both.assert_agree(ids)
    for model in both:
        mlp = block(model, 0).get_submodule("mlp")
        mlp._forward_hooks = type(mlp._forward_hooks)()
        replaces(mlp, [])
    both.assert_agree(ids)
    for model in both:
        block(model, 0).get_submodule("mlp")._forward_hooks.clear()
    both.assert_agree(ids)
    assert not hooks_inside(block(both.ours, 0))


@pytest.mark.parametrize("kind", ["forward_hook", "forward_pre_hook", "full_backward_hook"])
def test_the_quick_look_at_a_block_misses_no_module(kind: str) -> None:
    model: Any = get_peft_model(toy(), lora(0.1))
    inside = block(model, 0)
    inside.register_module("absent", None)
    for name, module in inside.named_modules():
        handle = getattr(module, f"register_{kind}")(lambda *_: None)
        assert has_hooks(inside) == (module is not inside), name
        assert len(hooks_inside(inside)) == (module is not inside), name
        handle.remove()
        assert not has_hooks(inside)


def test_the_quick_look_at_a_block_misses_no_forward_on_an_instance() -> None:
    inside = block(get_peft_model(toy(), lora(0.1)), 0)
    for name, module in inside.named_modules():
        module.forward = nothing
        assert has_hooks(inside) == (module is not inside), name
        assert len(hooks_inside(inside)) == (module is not inside), name
        # As accelerate leaves it there.
        module.forward = type(module).forward.__get__(module)
        assert not has_hooks(inside)
        assert not hooks_inside(inside)


@pytest.mark.usefixtures("as_rewritten")
def test_copies_take_their_hooks_along() -> None:
    model, ids = pair().ours, tokens()
    block(model, 1).get_submodule("mlp").register_forward_hook(zeroes)
    block(model, 0).get_submodule("mlp").register_full_backward_hook(nothing)
    expected = step(model, ids)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        for group, error in distance(step(twin, ids), expected).items():
            assert error < FLOAT32_TOLERANCE, group


def zeroes(module: nn.Module, args: Any, y: Tensor) -> Tensor:
    return y * 0


def nothing(module: nn.Module, *gradients: Any) -> None:
    pass


@pytest.mark.usefixtures("as_rewritten")
def test_strict_refuses_hooks_that_leave_a_block_uncompiled() -> None:
    model = qlora_compile.optimize(toy(), lora(), quantize="nf4", strict=True)
    sees_gradients(block(model, 0).get_submodule("mlp"), [])
    with pytest.raises(StrictError, match=r"backward hook sees_gradients\.<locals>\.hook on mlp"):
        step(model.train(), tokens())


@pytest.mark.usefixtures("as_rewritten")
def test_whole_model_scope_sees_hooks() -> None:
    stock, _ = pair()
    ours: Any = get_peft_model(toy(), lora())
    ours.load_state_dict(stock.state_dict())
    both, ids = Pair(stock, qlora_compile.optimize(ours, scope="model").train()), tokens()
    both.assert_agree(ids)
    with both.hooked(replaces, "mlp", 1) as seen:
        both.assert_agree(ids, seen)
    both.assert_agree(ids)


class Halves(ModelHook):
    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return (args[0] * 0.5, *args[1:]), kwargs


@pytest.mark.usefixtures("as_rewritten")
@pytest.mark.parametrize("path", ["", "mlp", "self_attn.q_proj"])
def test_hooks_of_accelerate(path: str) -> None:
    """These hooks are forwards that replace the module's."""
    both, ids = pair(), tokens()
    both.assert_agree(ids)
    for model in both:
        add_hook_to_module(block(model, 1).get_submodule(path), Halves())
    both.assert_agree(ids)
    assert not both.reasons(0) | both.reasons(1)
    for model in both:
        remove_hook_from_module(block(model, 1).get_submodule(path))
    both.assert_agree(ids)
    assert region_of(block(both.ours, 1)) is not None


def mixtral() -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4}
    options: dict[str, Any] = {"vocab_size": 128, "attn_implementation": "eager"}
    return MixtralForCausalLM(MixtralConfig(**sizes, **heads, **options))


CAPTURED = {
    "attentions": lambda: toy(attn_implementation="eager"),
    "hidden_states": lambda: toy(attn_implementation="eager"),
    "router_logits": mixtral,
}


def captured_step(model: Any, ids: Tensor, name: str) -> dict[str, Tensor]:
    """Return loss, captured outputs, and gradients of a loss that includes the captured outputs."""
    model.zero_grad()
    output = model(input_ids=ids, labels=ids, **{f"output_{name}": True})
    loss, results = output.loss, {"loss": output.loss.detach()[None]}
    for i, value in enumerate(output[name]):
        results[f"{name}.{i}.value.captured"] = value.detach()
        if value.requires_grad:
            weights = torch.linspace(-1, 1, value.numel()).view(value.shape)
            loss = loss + (value.float() * weights).mean()
    loss.backward()
    assert len(results) == 1 + (3 if name == "hidden_states" else 2)
    return results | {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.usefixtures("as_rewritten")
@pytest.mark.parametrize(
    ("name", "checkpointing"),
    [
        ("attentions", None),
        ("attentions", "around"),
        ("hidden_states", "nonreentrant"),
        ("router_logits", None),
        ("router_logits", "reentrant"),
        ("router_logits", "nonreentrant"),
    ],
)
def test_what_transformers_captures_agrees_and_is_compiled(
    name: str, checkpointing: str | None
) -> None:
    """Also after plain calls. The router's logits are part of the auxiliary loss for balanced
    experts."""
    models: list[Any] = []
    for optimized in (False, True):
        base = CAPTURED[name]()
        torch.manual_seed(1)
        model: Any = get_peft_model(base, lora(target_modules=["q_proj", "v_proj"]))
        models.append((qlora_compile.optimize(model) if optimized else model).train())
        if checkpointing is not None:
            checkpointed(models[-1], checkpointing)
    both, ids = Pair(*models), tokens()
    counters.clear()
    both.assert_agree(ids)
    for _ in range(2):
        stock, ours = (captured_step(model, ids, name) for model in both)
        for group, error in distance(ours, stock).items():
            assert error < FLOAT32_TOLERANCE, group
        assert not both.reasons(0) | both.reasons(1)
    both.assert_agree(ids)
    assert not counters["graph_break"]
    # Without hooks; with them, capturing and not; a reentrant checkpoint runs without gradients.
    assert counters["stats"]["unique_graphs"] <= (6 if checkpointing == "reentrant" else 3)


def test_hooks_through_inductor() -> None:
    """AOTAutograd has to keep what a block returns to its hooks, and what they write to."""
    both, ids = Pair(*build("nf4", torch.float32, 0.0, False, layers=1)), tokens()
    with (
        both.hooked(writes, "mlp", 0),
        both.hooked(replaces_input, "self_attn.o_proj", 0),
        both.hooked(keeps, "self_attn.q_proj", 0) as seen,
    ):
        both.assert_agree(ids, seen)
        assert not both.reasons(0)


__all__ = ["as_rewritten"]
