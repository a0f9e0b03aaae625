"""The network's configuration and the shape of each of its parameters; imports no JAX."""

import dataclasses
import math
from typing import Annotated, Literal

from tyro.conf import Suppress

from jaxgpt.config.batch import nearest_multiple
from jaxgpt.config.checks import bad_counts
from jaxgpt.config.flag_types import IntIfSet, TrueOrFalse
from jaxgpt.config.roles import Role

Shapes = dict[str, tuple[int, ...]]  # by path in the parameter tree
Gelu = Literal["tanh", "erf"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The architecture: everything the model needs to know."""

    n_layer: Annotated[int, Role.FIXED, Role.PLANNED] = 12  # transformer blocks
    n_head: Annotated[int, Role.FIXED, Role.PLANNED] = 12  # attention heads in each block
    n_embd: Annotated[int, Role.FIXED, Role.PLANNED] = 768  # model width, a multiple of n_head
    block_size: Annotated[int, Role.FIXED] = 1024  # context length in tokens
    # rows of the embedding; if unset, the size of the tokenizer, padded to a multiple of 64
    vocab_size: Annotated[IntIfSet, Role.FIXED, Role.INHERITED] = None
    # dropout rate, on embeddings and on the outputs of attention and MLP; not on attention weights
    dropout: Annotated[float, Role.TUNABLE] = 0.0
    # biases in linear layers and layer norms (GPT-2: True)
    bias: Annotated[TrueOrFalse, Role.FIXED] = False
    # GELU of the MLP: tanh approximation as in GPT-2, or exact (erf) as in nanoGPT
    gelu: Annotated[Gelu, Role.FIXED] = "tanh"
    # Ids the tokenizer can produce. Rows beyond them are padding, masked out of every softmax.
    n_vocab: Annotated[
        int | None, Role.FIXED, Role.INHERITED, Role.DERIVED, Role.IMPLIED, Suppress
    ] = None

    def errors(self) -> list[str]:
        """One sentence for each invalid value."""
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
                f"({self.n_vocab or 'at least 1'}); leave it out to derive it from the tokenizer"
            )
        elif self.vocab_size is not None:
            errors += bad_counts(self, "vocab_size")
        return errors

    def parameter_count(self, padding: bool = True) -> int:
        """Trainable parameters, the tied head counted once, as nanoGPT counts them.

        Without `padding`, only the embedding rows of ids that the tokenizer can produce.
        """
        rows = self.vocab_size if padding else self.n_vocab or self.vocab_size
        return sum(parameter_sizes(dataclasses.replace(self, vocab_size=rows)).values())

    @property
    def padding_parameters(self) -> int:
        """Parameters in embedding rows of ids that the tokenizer cannot produce."""
        return self.parameter_count() - self.parameter_count(padding=False)

    def describe_parameters(self) -> str:
        """'124,373,760 parameters, 36,096 of them padding'."""
        padding = self.padding_parameters
        in_all = f"{self.parameter_count():,} parameters"
        return in_all + (f", {padding:,} of them padding" if padding else "")


def parameter_shapes(cfg: ModelConfig) -> Shapes:
    """The shape of each parameter, by its path in the tree: 'blocks/0/attn/c_attn/kernel'."""
    assert cfg.vocab_size is not None, "resolve the vocabulary first"
    D, F = cfg.n_embd, 4 * cfg.n_embd

    def layer(path: str, weight: str, *shape: int) -> Shapes:
        bias = {f"{path}/bias": shape[-1:]} if cfg.bias else {}
        return {f"{path}/{weight}": shape, **bias}

    shapes: Shapes = {"wte/embedding": (cfg.vocab_size, D), "wpe/embedding": (cfg.block_size, D)}
    for i in range(cfg.n_layer):
        block = f"blocks/{i}"
        shapes |= layer(f"{block}/ln_1", "scale", D)
        shapes |= layer(f"{block}/attn/c_attn", "kernel", D, 3 * D)
        shapes |= layer(f"{block}/attn/c_proj", "kernel", D, D)
        shapes |= layer(f"{block}/ln_2", "scale", D)
        shapes |= layer(f"{block}/mlp/c_fc", "kernel", D, F)
        shapes |= layer(f"{block}/mlp/c_proj", "kernel", F, D)
    return shapes | layer("ln_f", "scale", D)


def parameter_sizes(cfg: ModelConfig) -> dict[str, int]:
    """Elements of each parameter, by path; 'blocks/0/...' counts all blocks."""
    shapes = parameter_shapes(dataclasses.replace(cfg, n_layer=1))  # for speed
    return {
        path: math.prod(shape) * (cfg.n_layer if path.startswith("blocks/") else 1)
        for path, shape in shapes.items()
    }
