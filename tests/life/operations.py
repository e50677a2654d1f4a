"""What people do to a model between two training steps.

An operation is a frozen dataclass. `drawn` is a strategy for it, or None where stock PEFT does not
allow it or it would do nothing; `apply` does it to both models of a pair. An operation that is
added to OPERATIONS is drawn from that line on.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn

from tests.life.pair import Hooked, Pair
from tests.test_equality import lora

Strategy = st.SearchStrategy[Any]

TARGETS = (
    ("q_proj",),
    ("down_proj",),
    ("q_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("k_proj", "o_proj", "down_proj"),
)
NAMES = ("default", "second", "third")
BLOCK = "base_model.model.model.layers"


@dataclass(frozen=True)
class Attach:
    """add_adapter; saved: modules_to_save"""

    name: str
    targets: tuple[str, ...]
    dora: bool = False
    saved: tuple[str, ...] = ()

    @staticmethod
    def drawn(pair: Pair) -> Strategy | None:
        free = [name for name in NAMES if name not in pair.adapters]
        if not free or pair.merged:
            return None
        return st.builds(
            Attach,
            st.just(free[0]),
            st.sampled_from((pair.start.targets, *TARGETS)),
            st.booleans(),
            st.sampled_from(((), ("lm_head",), ("post_attention_layernorm",))),
        )

    def apply(self, pair: Pair) -> None:
        config = lora(
            r=2,
            target_modules=list(self.targets),
            use_dora=self.dora,
            modules_to_save=list(self.saved) or None,
        )
        pair.both(lambda model: model.add_adapter(self.name, config))
        # PEFT makes an adapter in the dtype of the base weight, which may be rounded or not.
        pair.share_parameters()


@dataclass(frozen=True)
class Reload:
    """save_pretrained and load_adapter, each model loading what the other wrote"""

    saved: str
    name: str

    @staticmethod
    def drawn(pair: Pair) -> Strategy | None:
        free = [name for name in NAMES if name not in pair.adapters]
        if not free or pair.merged:
            return None
        return st.builds(Reload, st.sampled_from(pair.adapters), st.just(free[0]))

    def apply(self, pair: Pair) -> None:
        with tempfile.TemporaryDirectory() as folder:
            paths = [Path(folder, side) for side in ("stock", "ours")]
            for model, path in zip((pair.stock, pair.ours), paths, strict=True):
                model.save_pretrained(path, selected_adapters=[self.saved])
            if self.saved != "default":
                paths = [path / self.saved for path in paths]
            theirs, mine = (load_file(path / "adapter_model.safetensors") for path in paths)
            assert theirs.keys() == mine.keys()
            assert all(torch.equal(mine[name], value) for name, value in theirs.items())
            for model, path in zip((pair.ours, pair.stock), paths, strict=True):
                model.load_adapter(path, self.name, is_trainable=True)
        pair.share_parameters()


@dataclass(frozen=True)
class Switch:
    """set_adapter, also to several"""

    names: tuple[str, ...]

    @staticmethod
    def drawn(pair: Pair) -> Strategy | None:
        if len(pair.adapters) < 2:
            return None
        adapters = st.sampled_from(pair.adapters)
        return st.builds(Switch, st.lists(adapters, min_size=1, max_size=2, unique=True).map(tuple))

    def apply(self, pair: Pair) -> None:
        if len(self.names) == 1:
            pair.both_merging(lambda model: model.set_adapter(self.names[0]))
        else:
            pair.both_merging(lambda model: model.base_model.set_adapter(list(self.names)))


@dataclass(frozen=True)
class Delete:
    """delete_adapter"""

    name: str

    @staticmethod
    def drawn(pair: Pair) -> Strategy | None:
        if len(pair.adapters) < 2 or pair.merged:
            return None
        return st.builds(Delete, st.sampled_from(pair.adapters))

    def apply(self, pair: Pair) -> None:
        pair.both(lambda model: model.delete_adapter(self.name))


@dataclass(frozen=True)
class Merge:
    """merge_adapter"""

    safe: bool = False

    @staticmethod
    def drawn(pair: Pair) -> Strategy | None:
        # Stock unmerges a disabled adapter in its next forward.
        return None if pair.disabled else st.builds(Merge, st.booleans())

    def apply(self, pair: Pair) -> None:
        pair.both_merging(lambda model: model.merge_adapter(safe_merge=self.safe))


@dataclass(frozen=True)
class Unmerge:
    """unmerge_adapter"""

    @staticmethod
    def drawn(pair: Pair) -> Strategy | None:
        return st.builds(Unmerge)

    def apply(self, pair: Pair) -> None:
        pair.both_merging(lambda model: model.unmerge_adapter())


@dataclass(frozen=True)
class Disable:
    """disable_adapter_layers, which has the next forward unmerge"""

    @staticmethod
    def drawn(pair: Pair) -> Strategy | None:
        return None if pair.disabled else st.builds(Disable)

    def apply(self, pair: Pair) -> None:
        pair.stock.base_model.disable_adapter_layers()
        pair.ours.base_model.disable_adapter_layers()
        if pair.merged:
            pair.stock_merging(lambda model: model.unmerge_adapter())


@dataclass(frozen=True)
class Enable:
    """enable_adapter_layers"""

    @staticmethod
    def drawn(pair: Pair) -> Strategy | None:
        return st.builds(Enable) if pair.disabled else None

    def apply(self, pair: Pair) -> None:
        pair.both(lambda model: model.base_model.enable_adapter_layers())


@dataclass(frozen=True)
class Scale:
    """set_scale, scale_layer or unscale_layer, on one adapter layer or on all"""

    method: str
    factor: float | None
    layer: int | None

    @staticmethod
    def drawn(pair: Pair) -> Strategy | None:
        method = st.sampled_from(("set_scale", "scale_layer", "unscale_layer"))
        factor = st.sampled_from((0.5, 1.5, 0.0))
        return method.flatmap(
            lambda method: st.builds(
                Scale,
                st.just(method),
                st.none() if method == "unscale_layer" else factor,
                st.none() | st.integers(0, len(pair.layers) - 1),
            )
        ).filter(lambda each: not (pair.merged and each.factor == 0.0))

    def apply(self, pair: Pair) -> None:
        def scale(model: Any) -> None:
            layers = [module for module in model.modules() if hasattr(module, "lora_A")]
            for layer in layers if self.layer is None else [layers[self.layer]]:
                if self.method == "set_scale":
                    for name in layer.active_adapters:
                        layer.set_scale(name, self.factor)
                else:
                    getattr(layer, self.method)(self.factor)

        pair.both(scale)


def _first_replaced(value: Any, new: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, tuple):
        return (_first_replaced(value[0], new), *value[1:])
    return new(value)


def _first(value: Any) -> Any:
    return _first(value[0]) if isinstance(value, tuple) and value else value


def _halved(value: Tensor | None) -> Any:
    return None if value is None else value * 0.5


@dataclass(frozen=True)
class Hook:
    """A hook on any module: it halves what it is given, or looks at it"""

    module: str
    kind: str
    edits: bool

    @staticmethod
    def drawn(pair: Pair) -> Strategy | None:
        return st.builds(
            Hook,
            st.sampled_from(hookable(pair)),
            st.sampled_from(("forward", "forward_pre", "full_backward", "full_backward_pre")),
            st.booleans(),
        )

    def apply(self, pair: Pair) -> None:
        number = len(pair.hooks)
        hooked = Hooked(f"{number} {self.kind} {self.module}")
        for model, seen in zip((pair.stock, pair.ours), pair.seen, strict=True):
            module: Any = model.get_submodule(self.module)
            hook = getattr(self, f"_{self.kind}")(seen, hooked.name)
            options = {"with_kwargs": True} if self.kind == "forward_pre" else {}
            hooked.handles.append(getattr(module, f"register_{self.kind}_hook")(hook, **options))
        pair.hooks.append(hooked)

    def _forward(self, seen: dict[str, Tensor], name: str) -> Callable[..., Any]:
        def edit(module, args, output):
            return _first_replaced(output, _halved)

        def look(module, args, output):
            seen[name] = _first(output).detach()

        return edit if self.edits else look

    def _forward_pre(self, seen: dict[str, Tensor], name: str) -> Callable[..., Any]:
        def edit(module, args, kwargs):
            if args:
                return (args[0] * 0.5, *args[1:]), kwargs
            return args, kwargs | {"hidden_states": kwargs["hidden_states"] * 0.5}

        def look(module, args, kwargs):
            seen[name] = (args[0] if args else kwargs["hidden_states"]).detach()

        return edit if self.edits else look

    def _full_backward(self, seen: dict[str, Tensor], name: str) -> Callable[..., Any]:
        def edit(module, grad_input, grad_output):
            return tuple(map(_halved, grad_input))

        def look(module, grad_input, grad_output):
            seen[name] = grad_output[0].detach()

        return edit if self.edits else look

    def _full_backward_pre(self, seen: dict[str, Tensor], name: str) -> Callable[..., Any]:
        def edit(module, grad_output):
            return tuple(map(_halved, grad_output))

        def look(module, grad_output):
            seen[name] = grad_output[0].detach()

        return edit if self.edits else look


def hookable(pair: Pair) -> list[str]:
    """The modules that a forward may call with a tensor: no containers, no rotary embedding."""
    left = (nn.ModuleList, nn.ModuleDict, nn.ParameterDict)
    return [
        name
        for name, module in pair.stock.named_modules()
        if name.startswith((f"{BLOCK}.0", f"{BLOCK}.1", "base_model.model.lm_head"))
        or name == "base_model.model.model.norm"
        if not isinstance(module, left)
    ]


@dataclass(frozen=True)
class Unhook:
    """handle.remove()"""

    number: int

    @staticmethod
    def drawn(pair: Pair) -> Strategy | None:
        on = [number for number, hooked in enumerate(pair.hooks) if hooked.handles]
        return st.builds(Unhook, st.sampled_from(on)) if on else None

    def apply(self, pair: Pair) -> None:
        for handle in pair.hooks[self.number].handles:
            handle.remove()
        pair.hooks[self.number].handles.clear()


@dataclass(frozen=True)
class ReplaceForward:
    """Another forward on the instance of a module inside a block, as Liger does, or no longer"""

    module: str

    @staticmethod
    def drawn(pair: Pair) -> Strategy | None:
        paths = ("mlp", "input_layernorm", "self_attn.o_proj")
        return st.sampled_from(
            [f"{BLOCK}.{layer}.{path}" for layer in (0, 1) for path in paths]
        ).map(ReplaceForward)

    def apply(self, pair: Pair) -> None:
        def replace(model: Any) -> None:
            module = model.get_submodule(self.module)
            if "forward" in module.__dict__:
                del module.forward
            else:
                module.forward = partial(_halved_forward, module)

        pair.both(replace)


def _halved_forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return type(module).forward(module, *args, **kwargs) * 0.5


@dataclass(frozen=True)
class Mode:
    """train() or eval(), on the model or on a module"""

    training: bool
    module: str = ""

    @staticmethod
    def drawn(pair: Pair) -> Strategy | None:
        return st.builds(
            Mode, st.booleans(), st.sampled_from(("", f"{BLOCK}.0", f"{BLOCK}.1.mlp"))
        ).filter(lambda each: pair.stock.get_submodule(each.module).training != each.training)

    def apply(self, pair: Pair) -> None:
        pair.both(lambda model: model.get_submodule(self.module).train(self.training))


@dataclass(frozen=True)
class Train:
    """requires_grad_ on one parameter, of an adapter or of the base"""

    parameter: str
    trains: bool

    @staticmethod
    def drawn(pair: Pair) -> Strategy | None:
        names = [n for n, p in pair.ours.named_parameters() if p.is_floating_point()]
        return st.sampled_from(names).map(
            lambda name: Train(name, not pair.stock.get_parameter(name).requires_grad)
        )

    def apply(self, pair: Pair) -> None:
        pair.both(lambda model: model.get_parameter(self.parameter).requires_grad_(self.trains))


@dataclass(frozen=True)
class Cast:
    """.to(torch.bfloat16) or .float()"""

    dtype: str

    @staticmethod
    def drawn(pair: Pair) -> Strategy | None:
        low = pair.stock.get_input_embeddings().weight.dtype == torch.bfloat16
        return st.just(Cast("float32" if low else "bfloat16"))

    def apply(self, pair: Pair) -> None:
        pair.both(lambda model: model.to(getattr(torch, self.dtype)))
        pair.decode()


@dataclass(frozen=True)
class Autocast:
    """torch.autocast around the forward"""

    on: bool

    @staticmethod
    def drawn(pair: Pair) -> Strategy | None:
        return st.just(Autocast(not pair.autocast))

    def apply(self, pair: Pair) -> None:
        pair.autocast = self.on


@dataclass(frozen=True)
class Copy:
    """copy.deepcopy; what was copied is used no more"""

    @staticmethod
    def drawn(pair: Pair) -> Strategy | None:
        return None if pair.compiled_outside else st.builds(Copy)

    def apply(self, pair: Pair) -> None:
        handles = [hooked.handles for hooked in pair.hooks]
        pair.stock, pair.ours, handles = copy.deepcopy((pair.stock, pair.ours, handles))
        for hooked, copied in zip(pair.hooks, handles, strict=True):
            hooked.handles = copied


@dataclass(frozen=True)
class OptimizerStep:
    """optimizer.step() on the last step's gradients"""

    @staticmethod
    def drawn(pair: Pair) -> Strategy | None:
        # Codes are rounded: what is merged would differ by a code where a sum differs by nothing.
        return None if pair.merged else st.builds(OptimizerStep)

    def apply(self, pair: Pair) -> None:
        def learn(model: Any) -> None:
            trained = [p for p in model.parameters() if p.requires_grad]
            if trained:
                torch.optim.SGD(trained, lr=0.1).step()

        pair.both(learn)
        named = (
            {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
            for model in (pair.stock, pair.ours)
        )
        expected, actual = named
        pair.assert_equal(actual, expected)
        pair.share_parameters()


@dataclass(frozen=True)
class Batch:
    """Batches of another shape, padded or not"""

    rows: tuple[int, int]
    padded: bool = False

    @staticmethod
    def drawn(pair: Pair) -> Strategy | None:
        rows = st.tuples(st.integers(1, 4), st.integers(2, 12))
        return st.builds(Batch, rows, st.booleans())

    def apply(self, pair: Pair) -> None:
        pair.rows, pair.padded = self.rows, self.padded


@dataclass(frozen=True)
class Checkpointing:
    """gradient_checkpointing_enable of both kinds, or disable"""

    kind: str

    @staticmethod
    def drawn(pair: Pair) -> Strategy | None:
        kinds = {"none", "reentrant", "nonreentrant"} - {pair.checkpointing}
        if pair.backward == "autograd.grad":
            kinds -= {"reentrant"}  # torch's own checkpointing refuses torch.autograd.grad.
        return st.sampled_from(sorted(kinds)).map(Checkpointing)

    def apply(self, pair: Pair) -> None:
        def change(model: Any) -> None:
            if self.kind == "none":
                model.gradient_checkpointing_disable()
            else:
                model.enable_input_require_grads()
                reentrant = self.kind == "reentrant"
                model.gradient_checkpointing_enable({"use_reentrant": reentrant})

        pair.both(change)


@dataclass(frozen=True)
class OuterCompile:
    """torch.compile around the optimised model, or no longer"""

    on: bool

    @staticmethod
    def drawn(pair: Pair) -> Strategy | None:
        return st.just(OuterCompile(not pair.compiled_outside))

    def apply(self, pair: Pair) -> None:
        pair.compile_outside(self.on)


@dataclass(frozen=True)
class Backward:
    """Another way from the loss to the gradients"""

    kind: str

    @staticmethod
    def drawn(pair: Pair) -> Strategy | None:
        kinds = {"once", "twice", "two losses", "accumulated", "autograd.grad"} - {pair.backward}
        if pair.checkpointing == "reentrant":
            kinds -= {"autograd.grad"}
        return st.sampled_from(sorted(kinds)).map(Backward)

    def apply(self, pair: Pair) -> None:
        pair.backward = self.kind


@dataclass(frozen=True)
class Ask:
    """output_hidden_states or output_attentions"""

    what: str | None

    @staticmethod
    def drawn(pair: Pair) -> Strategy | None:
        asked = next(iter(pair.asked), None)
        answers = {None, "output_hidden_states", "output_attentions"} - {asked}
        return st.sampled_from(sorted(answers, key=str)).map(Ask)

    def apply(self, pair: Pair) -> None:
        attention = "eager" if self.what == "output_attentions" else "sdpa"
        pair.both(lambda model: model.get_base_model().set_attn_implementation(attention))
        pair.asked = {self.what: True} if self.what else {}


@dataclass(frozen=True)
class Evaluate:
    """A call without gradients, and greedy generation"""

    context: str

    @staticmethod
    def drawn(pair: Pair) -> Strategy | None:
        return st.sampled_from(("no_grad", "inference_mode", "generate")).map(Evaluate)

    def apply(self, pair: Pair) -> None:
        ids = pair.inputs()["input_ids"]

        def logits(model: Any) -> Tensor:
            training = {module: module.training for module in model.modules()}
            model.eval()
            if self.context == "generate":
                written = model.generate(
                    input_ids=ids, max_new_tokens=3, do_sample=False, pad_token_id=0,
                    output_logits=True, return_dict_in_generate=True,
                )  # fmt: skip
                result = torch.stack(written.logits)
            else:
                with getattr(torch, self.context)():
                    result = model(input_ids=ids).logits.clone()
            for module, mode in training.items():
                module.training = mode
            return result

        expected, actual = pair.both(logits)
        pair.assert_equal({"evaluated": actual}, {"evaluated": expected})


@dataclass(frozen=True)
class FunctionalGradient:
    """torch.func.grad over the model"""

    @staticmethod
    def drawn(pair: Pair) -> Strategy | None:
        # torch's checkpointing refuses it, and so do bitsandbytes' products.
        left = pair.checkpointing != "none" or pair.start.base.startswith("bnb")
        return None if left or pair.disabled or pair.merged else st.builds(FunctionalGradient)

    def apply(self, pair: Pair) -> None:
        def gradients(model: Any) -> dict[str, Tensor]:
            adapters = {n: p.detach() for n, p in model.named_parameters() if "lora_" in n}

            def loss(values: dict[str, Tensor]) -> Tensor:
                return torch.func.functional_call(model, values, kwargs=pair.inputs()).loss

            return torch.func.grad(loss)(adapters)

        expected, actual = pair.both(gradients)
        pair.assert_equal(actual, expected)


@dataclass(frozen=True)
class LoadState:
    """load_state_dict of the model's own state_dict"""

    @staticmethod
    def drawn(pair: Pair) -> Strategy | None:
        # bitsandbytes does not load into a layer that is quantised already.
        return None if pair.start.base.startswith("bnb") else st.builds(LoadState)

    def apply(self, pair: Pair) -> None:
        pair.both(lambda model: model.load_state_dict(copy.deepcopy(model.state_dict())))


OPERATIONS: tuple[Any, ...] = (
    Attach,
    Reload,
    Switch,
    Delete,
    Merge,
    Unmerge,
    Disable,
    Enable,
    Scale,
    Hook,
    Unhook,
    ReplaceForward,
    Mode,
    Train,
    Cast,
    Autocast,
    Copy,
    OptimizerStep,
    Batch,
    Checkpointing,
    OuterCompile,
    Backward,
    Ask,
    Evaluate,
    FunctionalGradient,
    LoadState,
)
