"""The shape of the network, and the parameters that follow from it; imports no JAX."""

import dataclasses
from typing import Annotated, Literal

from tyro.conf import Suppress

from jaxgpt.config.batch import nearest_multiple
from jaxgpt.config.checks import bad_counts
from jaxgpt.config.flag_types import IntIfSet, TrueOrFalse
from jaxgpt.config.roles import Role

Gelu = Literal["tanh", "erf"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The shape of the network: all that the model has to know."""

    n_layer: Annotated[int, Role.FIXED, Role.PLANNED] = 12  # transformer blocks
    n_head: Annotated[int, Role.FIXED, Role.PLANNED] = 12  # attention heads in each block
    n_embd: Annotated[int, Role.FIXED, Role.PLANNED] = 768  # model width, a multiple of n_head
    block_size: Annotated[int, Role.FIXED] = 1024  # context length in tokens
    # rows of the embedding; if unset, the tokenizer's ids, padded to a multiple of 64
    vocab_size: Annotated[IntIfSet, Role.FIXED, Role.INHERITED] = None
    # on embeddings and on each block's two outputs; not on attention weights
    dropout: Annotated[float, Role.TUNABLE] = 0.0
    # biases in linear layers and layer norms (GPT-2: True)
    bias: Annotated[TrueOrFalse, Role.FIXED] = False
    # the MLP's: tanh as in GPT-2, or exact (erf) as in nanoGPT
    gelu: Annotated[Gelu, Role.FIXED] = "tanh"
    # Ids the tokenizer can produce. Rows beyond them are padding, masked out of every softmax.
    n_vocab: Annotated[
        int | None, Role.FIXED, Role.INHERITED, Role.DERIVED, Role.IMPLIED, Suppress
    ] = None

    def errors(self) -> list[str]:
        """What is wrong with it, a sentence for each error."""
        errors = bad_counts(self, "n_layer", "n_head", "n_embd", "block_size")
        if not errors and self.n_embd % self.n_head:
            errors.append(
                f"n_embd {self.n_embd} is not a multiple of n_head {self.n_head}; "
                f"the nearest that is: {nearest_multiple(self.n_embd, self.n_head)}"
            )
        if not 0 <= self.dropout < 1:
            errors.append(f"dropout {self.dropout} must be at least 0 and below 1")
        if self.vocab_size is not None and self.vocab_size < (self.n_vocab or 1):
            errors.append(
                f"vocab_size {self.vocab_size} has fewer rows than the tokenizer has ids "
                f"({self.n_vocab or 'at least 1'}); leave it out to have it chosen"
            )
        elif self.vocab_size is not None:
            errors += bad_counts(self, "vocab_size")
        return errors

    def parameter_count(self, padding: bool = True) -> int:
        """Trainable parameters, the tied head counted once (nanoGPT's count adds up the same).

        Without `padding` only the rows of the embedding that the tokenizer has ids for are counted.
        """
        assert self.vocab_size is not None, "resolve the vocabulary before counting"
        rows = self.vocab_size if padding else self.n_vocab or self.vocab_size
        D, F = self.n_embd, 4 * self.n_embd
        block = 2 * D + D * 3 * D + D * D + 2 * D * F
        biases = (2 * D + 3 * D + D + F + D) if self.bias else 0
        final_norm = 2 * D if self.bias else D
        return (rows + self.block_size) * D + self.n_layer * (block + biases) + final_norm
