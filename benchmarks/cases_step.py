"""Which models a whole training step is measured on: heads of real models, on bodies that a device can afford.

A body of few layers under a real head keeps a step short and its memory small; its rows therefore say what a head of
that size costs, and only those of qwen3-0.6b, which is whole, what a model's step costs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .cases import VOCABS, ScoredPairs, cases_of

# Beyond every length that is tried: rotary embeddings take no memory for it.
POSITIONS = 2**22


@dataclass(frozen=True)
class ModelShape:
    """A causal LM by its config's numbers; `kind` is the model_type of transformers."""

    kind: str  # "qwen3" or "llama"
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool = False

    def config(self, **tokens: int | None) -> Any:
        """The config of transformers; `tokens` are bos_token_id, eos_token_id and pad_token_id."""
        from transformers import AutoConfig

        return AutoConfig.for_model(
            self.kind,
            num_hidden_layers=self.layers,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            head_dim=self.head_dim,
            vocab_size=self.vocab,
            tie_word_embeddings=self.tied,
            max_position_embeddings=POSITIONS,
            **tokens,
        )

    @property
    def layer_weights(self) -> int:
        """Weights of the matrices of all layers: those that every token is multiplied with."""
        attention = self.hidden * self.head_dim * 2 * (self.heads + self.kv_heads)
        return self.layers * (attention + 3 * self.hidden * self.intermediate)


MODELS = {
    "tiny": ModelShape("qwen3", 2, 32, 96, 4, 2, 8, 507),
    "quick": ModelShape("qwen3", 2, 128, 384, 4, 2, 32, VOCABS["gpt2"]),
    "gpt2-head": ModelShape("qwen3", 4, 512, 1536, 8, 4, 64, VOCABS["gpt2"]),
    "gpt2-wide": ModelShape("qwen3", 12, 1024, 3072, 16, 8, 64, VOCABS["gpt2"]),
    "qwen3-shallow": ModelShape("qwen3", 2, 512, 1536, 8, 4, 64, VOCABS["qwen3"]),
    "qwen3-head": ModelShape("qwen3", 2, 1024, 3072, 16, 8, 128, VOCABS["qwen3"], tied=True),
    "qwen3-0.6b": ModelShape("qwen3", 28, 1024, 3072, 16, 8, 128, VOCABS["qwen3"], tied=True),
    "llama3-8b-head": ModelShape("llama", 4, 4096, 14336, 32, 8, 128, VOCABS["llama3"]),
}


@dataclass(frozen=True)
class StepCase(ScoredPairs):
    """One step on `pairs` pairs of `length` tokens, the last ones of each sequence scored."""

    name: str
    model: str  # a key of MODELS
    length: int
    share: float = 0.5
    dtype: str = "bf16"
    pairs: int = 1
    frozen: bool = False  # the head takes no gradient; it must not be tied to the embedding then
    checkpointing: bool = False  # of the layers: their activations are computed again in the backward
    beside: str = "all"  # a key of suites.step.BESIDE
    rounds: int = 3
    compiled: bool = True
    weighed: bool = True  # on a CPU memory takes a second model, in a process of its own
    series: str | None = None

    @property
    def shape(self) -> ModelShape:
        return MODELS[self.model]

    @property
    def vocab(self) -> int:
        return self.shape.vocab

    @property
    def hidden(self) -> int:
        return self.shape.hidden

    @property
    def layers(self) -> int:
        return self.shape.layers

    @property
    def tokens(self) -> int:
        return self.batch * self.length

    @property
    def body_operations(self) -> int:
        """Of the layers: 6 a weight and token, and attention's two products under a causal mask, forward and backward.

        What checkpointing computes again is not counted, as is usual: it is a choice, not work that must be done.
        """
        shape = self.shape
        attention = 6 * self.batch * self.length**2 * shape.heads * shape.head_dim * shape.layers
        return 6 * self.tokens * shape.layer_weights + attention

    @property
    def head_operations(self) -> int:
        return (2 if self.frozen else 3) * 2 * self.scored_rows * self.hidden * self.vocab


def step_cases(device_class: str, *, memory: int) -> list[StepCase]:
    """The set of a device class; `memory` is the GPU's, in bytes, and leaves out what cannot fit it."""
    cases = cases_of(StepCase, "step", device_class)
    return [case for case in cases if memory >= 40 * 2**30 or case.model != "llama3-8b-head"]
