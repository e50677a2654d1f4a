"""What changes the model: its mode, dtype, weights, what is trained, the object itself."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st

from tests.life.pair import BLOCK, Pair, Strategy
from tests.life.step_operations import RETAINING


@dataclass(frozen=True)
class Mode:
    """train() or eval(), on the model or on a module"""

    training: bool
    module: str = ""

    @staticmethod
    def drawn(pair: Pair) -> Strategy | None:
        if pair.quantizes_inputs:
            return None
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
class LoadState:
    """load_state_dict of the model's own state_dict"""

    @staticmethod
    def drawn(pair: Pair) -> Strategy | None:
        # bitsandbytes does not load into a layer that is quantised already.
        return None if pair.start.base.startswith("bnb") else st.builds(LoadState)

    def apply(self, pair: Pair) -> None:
        pair.both(lambda model: model.load_state_dict(copy.deepcopy(model.state_dict())))


@dataclass(frozen=True)
class OuterCompile:
    """torch.compile around the optimised model, or no longer"""

    on: bool

    @staticmethod
    def drawn(pair: Pair) -> Strategy | None:
        if pair.backend_outside == "inductor" and pair.backward in RETAINING:
            return None
        return st.just(OuterCompile(not pair.compiled_outside))

    def apply(self, pair: Pair) -> None:
        pair.compile_outside(self.on)
