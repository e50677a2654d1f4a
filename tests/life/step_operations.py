"""What changes the step: its batches, precision, checkpointing, backward, outputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from tests.life.pair import Pair, Strategy


@dataclass(frozen=True)
class Batch:
    """Batches of another shape, padded or not"""

    rows: tuple[int, int]
    padded: bool = False

    @staticmethod
    def drawn(pair: Pair) -> Strategy | None:
        # Of two tokens one is predicted, by the one before, which attends to itself: gradients of
        # queries and keys are 0, and rounding all that there is to compare. Padding takes half.
        whole = st.builds(Batch, st.tuples(st.integers(1, 4), st.integers(3, 12)))
        padded = st.tuples(st.integers(1, 4), st.integers(6, 12))
        return whole | st.builds(Batch, padded, st.just(True))

    def apply(self, pair: Pair) -> None:
        pair.rows, pair.padded = self.rows, self.padded


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


RETAINING = {"twice", "two losses", "autograd.grad"}
"""Kinds of Backward that retain the graph. Code of Inductor's that uses saved tensors as memory of
its own refuses them, around a stock model too."""


@dataclass(frozen=True)
class Backward:
    """Another way from the loss to the gradients"""

    kind: str

    @staticmethod
    def drawn(pair: Pair) -> Strategy | None:
        kinds = {"once", "twice", "two losses", "accumulated", "autograd.grad"} - {pair.backward}
        if pair.checkpointing == "reentrant":
            kinds -= {"autograd.grad"}
        if pair.compiled_outside and pair.backend_outside == "inductor":
            kinds -= RETAINING
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
        if pair.quantizes_inputs:
            return None
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
        # torch's checkpointing and backward hooks refuse it, and so do bitsandbytes' products.
        left = pair.checkpointing != "none" or pair.start.base.startswith("bnb")
        left |= any(hooked.handles and "backward" in hooked.name for hooked in pair.hooks)
        return None if left or pair.disabled or pair.merged else st.builds(FunctionalGradient)

    def apply(self, pair: Pair) -> None:
        def gradients(model: Any) -> dict[str, Tensor]:
            adapters = {n: p.detach() for n, p in model.named_parameters() if "lora_" in n}

            def loss(values: dict[str, Tensor]) -> Tensor:
                return torch.func.functional_call(model, values, kwargs=pair.inputs()).loss

            return torch.func.grad(loss)(adapters)

        expected, actual = pair.both(gradients)
        again = (lambda: gradients(pair.ours), lambda: gradients(pair.stock))
        pair.assert_equal(actual, expected, again)
