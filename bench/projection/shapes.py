"""Shapes of the models whose training step is projected, as in their public configurations."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ModelShape:
    """inner: columns of an MLP's or of one expert's gate. experts: 0 for a dense MLP, else how many
    there are in a block, `active` of them for each token. head_norm: q and k are normalised per
    head. The output head and the embedding are two matrices [vocabulary, hidden] in 16 bits."""

    name: str
    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    experts: int = 0
    active: int = 0
    head_norm: bool = False

    @property
    def q_columns(self) -> int:
        return self.heads * self.head_dim

    @property
    def kv_columns(self) -> int:
        return self.kv_heads * self.head_dim

    @property
    def expert_weights(self) -> int:
        """Of all blocks."""
        return self.layers * self.experts * 3 * self.hidden * self.inner

    @property
    def linear_weights(self) -> int:
        """Of all blocks' Linears, packed ones: no experts, no router."""
        attention = 2 * self.hidden * (self.q_columns + self.kv_columns)
        mlp = 0 if self.experts else 3 * self.hidden * self.inner
        return self.layers * (attention + mlp)

    @property
    def head_weights(self) -> int:
        return self.vocabulary * self.hidden

    @property
    def router_weights(self) -> int:
        return self.layers * self.experts * self.hidden

    @property
    def parameters(self) -> int:
        """Without norms."""
        blocks = self.linear_weights + self.expert_weights + self.router_weights
        return blocks + 2 * self.head_weights

    def adapter_parameters(self, rank: int) -> int:
        """Of LoRA on every Linear of the blocks and on every expert's two weights."""
        q, kv, inner, hidden = self.q_columns, self.kv_columns, self.inner, self.hidden
        attention = 2 * (hidden + q) + 2 * (hidden + kv)
        if self.experts:
            mlp = self.experts * ((hidden + 2 * inner) + (inner + hidden))
        else:
            mlp = 3 * (hidden + inner)
        return self.layers * rank * (attention + mlp)


MODELS = (
    ModelShape("Llama-3-8B", 4096, 14336, 32, 32, 8, 128, 128256),
    ModelShape("Llama-3-70B", 8192, 28672, 80, 64, 8, 128, 128256),
    ModelShape("Qwen3-30B-A3B", 2048, 768, 48, 32, 4, 128, 151936, 128, 8, head_norm=True),
)
