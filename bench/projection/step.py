"""One training step as a list of operators, whoever computes them."""

from __future__ import annotations

from dataclasses import dataclass

from bench.projection.shapes import ModelShape

RANK = 16
PACKED_BYTES = 0.5 + 4 / 64
"""Of one NF4 weight, a float32 absmax per 64 included, as the variants' cost models take it."""
OPTIMIZER_BYTES = 7 * 4
"""Of one float32 adapter parameter: AdamW in one kernel reads it, its gradient and both moments,
and writes all but the gradient."""


@dataclass(frozen=True)
class Linears:
    """Linears of a block that share their input [rows, k], as passes/siblings.py groups them."""

    name: str
    n: tuple[int, ...]
    k: int

    @property
    def weights(self) -> int:
        return sum(self.n) * self.k

    @property
    def factors(self) -> int:
        """Elements of all A and B."""
        return RANK * sum(n + self.k for n in self.n)


@dataclass(frozen=True)
class Experts:
    """One weight [n, k] of every expert of a block; `rows` of all together."""

    name: str
    experts: int
    n: int
    k: int
    rows: int

    @property
    def busy(self) -> int:
        """Experts with rows, which are spread evenly."""
        return min(self.experts, self.rows)

    @property
    def factors(self) -> int:
        return RANK * self.experts * (self.n + self.k)


@dataclass(frozen=True)
class Step:
    """Forward and backward over batch x length tokens, and the adapters' update. Checkpointing of
    every block computes its forward twice."""

    model: ModelShape
    batch: int
    length: int
    checkpointing: bool = True

    @property
    def rows(self) -> int:
        return self.batch * self.length

    @property
    def forwards(self) -> int:
        """Of each block; embedding and head are outside."""
        return 2 if self.checkpointing else 1

    @property
    def linears(self) -> tuple[Linears, ...]:
        """Of one block."""
        model = self.model
        q, kv = model.q_columns, model.kv_columns
        groups = (Linears("q, k, v", (q, kv, kv), model.hidden), Linears("o", (model.hidden,), q))
        if model.experts:
            return groups
        return (
            *groups,
            Linears("gate, up", (model.inner, model.inner), model.hidden),
            Linears("down", (model.hidden,), model.inner),
        )

    @property
    def experts(self) -> tuple[Experts, ...]:
        """Of one block."""
        model = self.model
        if not model.experts:
            return ()
        rows = self.rows * model.active
        return (
            Experts("experts' gate and up", model.experts, 2 * model.inner, model.hidden, rows),
            Experts("experts' down", model.experts, model.hidden, model.inner, rows),
        )

    @property
    def score_flops(self) -> float:
        """Of one of attention's products over a block's causal pairs: scores, or scores times v."""
        return self.batch * self.length**2 * self.model.q_columns

    @property
    def optimizer_bytes(self) -> int:
        return OPTIMIZER_BYTES * self.model.adapter_parameters(RANK)
