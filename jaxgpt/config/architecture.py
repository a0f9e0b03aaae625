"""The network's configuration and the shape of each of its parameters; imports no JAX.

A network declares here which optional fields it has, and the axes of its parameters; its module in
`jaxgpt/model/` creates them.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Annotated, Literal, NamedTuple

from tyro.conf import Suppress

from jaxgpt.config.batch import nearest_multiple
from jaxgpt.config.checks import bad_amounts, bad_counts, bad_shares
from jaxgpt.config.flag_types import IntIfSet, TrueOrFalse
from jaxgpt.config.roles import Role

Arch = Literal["gpt2", "qwen3", "llama"]
Axes = dict[str, tuple[str, ...]]  # names of axes, by path; 'blocks/*/' is every block
Shapes = dict[str, tuple[int, ...]]  # by path in the parameter tree
Gelu = Literal["tanh", "erf"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The architecture: everything the model needs to know."""

    # network: gpt2; qwen3 (rotary positions, RMSNorm, SwiGLU, grouped-query attention with QK-norm,
    # no biases); llama (qwen3 without QK-norm)
    arch: Annotated[Arch, Role.FIXED] = "gpt2"
    n_layer: Annotated[int, Role.FIXED, Role.PLANNED] = 12  # transformer blocks
    n_head: Annotated[int, Role.FIXED, Role.PLANNED] = 12  # attention heads in each block
    # key/value heads, each shared by n_head / n_kv_head query heads (qwen3, llama); if unset,
    # n_head
    n_kv_head: Annotated[IntIfSet, Role.FIXED, Role.PLANNED] = None
    # model width, a multiple of n_head unless head_dim is set
    n_embd: Annotated[int, Role.FIXED, Role.PLANNED] = 768
    # width of a head, an even number (qwen3, llama); if unset, n_embd / n_head
    head_dim: Annotated[IntIfSet, Role.FIXED, Role.PLANNED] = None
    # hidden width of SwiGLU (qwen3, llama); if unset, 8/3 n_embd rounded up to a multiple of 64,
    # as many parameters as GPT-2's 4 n_embd
    mlp_width: Annotated[IntIfSet, Role.FIXED, Role.PLANNED] = None
    block_size: Annotated[int, Role.FIXED] = 1024  # context length in tokens
    # rows of the embedding; if unset, the size of the tokenizer, padded to a multiple of 64
    vocab_size: Annotated[IntIfSet, Role.FIXED, Role.INHERITED] = None
    # dropout rate, on embeddings and on the outputs of attention and MLP; not on attention weights
    dropout: Annotated[float, Role.TUNABLE] = 0.0
    # biases in linear layers and layer norms (GPT-2: True)
    bias: Annotated[TrueOrFalse, Role.FIXED] = False
    # GELU of GPT-2's MLP: tanh approximation as in GPT-2, or exact (erf) as in nanoGPT
    gelu: Annotated[Gelu, Role.FIXED] = "tanh"
    # base of the rotary positions' wavelengths (qwen3, llama); raise it for a long context
    rope_theta: Annotated[float, Role.FIXED] = 10000.0
    norm_eps: Annotated[float, Role.FIXED] = 1e-6  # epsilon of RMSNorm (qwen3, llama)
    # one matrix for the token embedding and the output head (gpt2: always)
    tied_head: Annotated[TrueOrFalse, Role.FIXED] = True
    # start with zeros in the matrices that write to the residual stream, and in an untied head
    # (qwen3, llama)
    zero_init: Annotated[TrueOrFalse, Role.FIXED] = False
    # RMSNorm without gain after the token embedding (qwen3, llama); needs an untied head
    embedding_norm: Annotated[TrueOrFalse, Role.FIXED] = False
    # Ids the tokenizer can produce. Rows beyond them are padding, masked out of every softmax.
    n_vocab: Annotated[
        int | None, Role.FIXED, Role.INHERITED, Role.DERIVED, Role.IMPLIED, Suppress
    ] = None

    def has(self, option: str) -> bool:
        """Whether the architecture has the field `option`, which not every one has."""
        return option in ARCHITECTURES[self.arch].options

    @property
    def has_learned_positions(self) -> bool:
        """Whether each position has an embedding row, so that block_size cannot grow later."""
        return any(axes[0] == "block_size" for axes in ARCHITECTURES[self.arch].axes(self).values())

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values, resolved."""
        return self.n_kv_head or self.n_head

    @property
    def head_width(self) -> int:
        """Width of one attention head, resolved."""
        return self.head_dim or self.n_embd // self.n_head

    @property
    def mlp_hidden(self) -> int:
        """Hidden width of SwiGLU, by default with as many parameters as GPT-2's MLP."""
        return self.mlp_width or -(-8 * self.n_embd // (3 * 64)) * 64

    def errors(self) -> list[str]:
        """One sentence for each invalid value."""
        errors = bad_counts(self, "n_layer", "n_head", "n_embd", "block_size")
        errors += self._misplaced() or bad_counts(self, "n_kv_head", "head_dim", "mlp_width")
        errors = errors or self._bad_heads()
        errors += bad_amounts(self, "rope_theta", "norm_eps", zero=False)
        if self.embedding_norm and self.tied_head:
            errors.append("embedding_norm needs an untied head: set tied_head to False")
        errors += bad_shares(self, "dropout")
        if self.vocab_size is not None and 0 < self.vocab_size < (self.n_vocab or 1):
            errors.append(
                f"vocab_size {self.vocab_size} has fewer rows than the tokenizer has ids "
                f"({self.n_vocab}); use --vocab-size {padded_vocab_size(self.n_vocab or 1)}"
            )
        return errors + bad_counts(self, "vocab_size")

    def _misplaced(self) -> list[str]:
        """A sentence for each option that the network does not have."""
        errors = []
        for field in dataclasses.fields(self):
            owners = [name for name, arch in ARCHITECTURES.items() if field.name in arch.options]
            value = getattr(self, field.name)
            if owners and self.arch not in owners and value != field.default:
                drop = "drop it" if field.default is None else f"set it to {field.default}"
                errors.append(
                    f"{field.name} {value}: arch {self.arch} has no such option; {drop}, or "
                    f"choose arch {' or '.join(owners)}"
                )
        return errors

    def _bad_heads(self) -> list[str]:
        """A sentence for each way in which heads and width do not go together."""
        errors = []
        if self.head_dim is None and self.n_embd % self.n_head:
            errors.append(
                f"n_embd {self.n_embd} is not a multiple of n_head {self.n_head}; "
                f"the nearest that is: {nearest_multiple(self.n_embd, self.n_head)}"
            )
        if self.n_head % self.kv_heads:
            errors.append(
                f"n_head {self.n_head} is not a multiple of n_kv_head {self.n_kv_head}; "
                f"the nearest that is: {nearest_multiple(self.n_head, self.kv_heads)}"
            )
        if self.has("rope_theta") and self.head_width % 2 and not errors:
            errors.append(
                f"heads of width {self.head_width}: rotary positions need an even width; set "
                f"head_dim to {self.head_width + 1}, or change n_embd or n_head"
            )
        return errors

    def parameter_count(self, padding: bool = True) -> int:
        """Trainable parameters, a tied head counted once, position embeddings included.

        Without `padding`, embedding rows of ids that the tokenizer cannot produce are left out.
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
        of_them = f", {padding:,} of them padding" if padding else ""
        return f"{self.parameter_count():,} parameters{of_them}"


# ---------------------------------------------------------------- networks


def _gpt2(cfg: ModelConfig) -> Axes:
    def layer(path: str, weight: str, *axes: str) -> Axes:
        bias = {f"{path}/bias": axes[-1:]} if cfg.bias else {}
        return {f"{path}/{weight}": axes, **bias}

    return {
        "wte/embedding": ("vocab_size", "n_embd"),
        "wpe/embedding": ("block_size", "n_embd"),
        **layer("blocks/*/ln_1", "scale", "n_embd"),
        **layer("blocks/*/attn/c_attn", "kernel", "n_embd", "3 x n_embd"),
        **layer("blocks/*/attn/c_proj", "kernel", "n_embd", "n_embd"),
        **layer("blocks/*/ln_2", "scale", "n_embd"),
        **layer("blocks/*/mlp/c_fc", "kernel", "n_embd", "4 x n_embd"),
        **layer("blocks/*/mlp/c_proj", "kernel", "4 x n_embd", "n_embd"),
        **layer("ln_f", "scale", "n_embd"),
    }


def _llama(cfg: ModelConfig) -> Axes:
    # An untied head has an embedding's path and layout, so that the same rules by path apply.
    head: Axes = {} if cfg.tied_head else {"lm_head/embedding": ("vocab_size", "n_embd")}
    return {
        "embed_tokens/embedding": ("vocab_size", "n_embd"),
        "blocks/*/input_layernorm/scale": ("n_embd",),
        "blocks/*/attn/q_proj/kernel": ("n_embd", "n_head x head_dim"),
        "blocks/*/attn/k_proj/kernel": ("n_embd", "n_kv_head x head_dim"),
        "blocks/*/attn/v_proj/kernel": ("n_embd", "n_kv_head x head_dim"),
        "blocks/*/attn/o_proj/kernel": ("n_head x head_dim", "n_embd"),
        "blocks/*/post_attention_layernorm/scale": ("n_embd",),
        "blocks/*/mlp/gate_proj/kernel": ("n_embd", "mlp_width"),
        "blocks/*/mlp/up_proj/kernel": ("n_embd", "mlp_width"),
        "blocks/*/mlp/down_proj/kernel": ("mlp_width", "n_embd"),
        "norm/scale": ("n_embd",),
        **head,
    }


def _qwen3(cfg: ModelConfig) -> Axes:
    return _llama(cfg) | {
        "blocks/*/attn/q_norm/scale": ("head_dim",),
        "blocks/*/attn/k_norm/scale": ("head_dim",),
    }


class Architecture(NamedTuple):
    """What one value of `arch` declares."""

    axes: Callable[[ModelConfig], Axes]
    options: frozenset[str]  # fields of ModelConfig that not every network has


LLAMA_OPTIONS = frozenset(
    {
        *("n_kv_head", "head_dim", "mlp_width", "rope_theta", "norm_eps"),
        *("tied_head", "zero_init", "embedding_norm"),
    }
)
ARCHITECTURES: dict[Arch, Architecture] = {
    "gpt2": Architecture(_gpt2, frozenset({"bias", "gelu"})),
    "qwen3": Architecture(_qwen3, LLAMA_OPTIONS),
    "llama": Architecture(_llama, LLAMA_OPTIONS),
}


# ---------------------------------------------------------------- sizes


def padded_vocab_size(n_vocab: int, multiple: int = 64) -> int:
    """`n_vocab` rounded up to rows that suit a GPU's matrix units: 50,257 -> 50,304, 257 -> 320."""
    return -(-n_vocab // multiple) * multiple


def axis_sizes(cfg: ModelConfig) -> dict[str, int]:
    """Length of every axis by the name that declarations and messages use."""
    assert cfg.vocab_size is not None, "resolve the vocabulary first"
    return {
        "n_embd": cfg.n_embd,
        "vocab_size": cfg.vocab_size,
        "block_size": cfg.block_size,
        "3 x n_embd": 3 * cfg.n_embd,
        "4 x n_embd": 4 * cfg.n_embd,
        "head_dim": cfg.head_width,
        "n_head x head_dim": cfg.n_head * cfg.head_width,
        "n_kv_head x head_dim": cfg.kv_heads * cfg.head_width,
        "mlp_width": cfg.mlp_hidden,
    }


def parameter_shapes(cfg: ModelConfig) -> Shapes:
    """The shape of each parameter, by its path in the tree: 'blocks/0/attn/c_attn/kernel'."""
    sizes = axis_sizes(cfg)
    return {
        path.replace("*", str(i)): tuple(sizes[axis] for axis in axes)
        for path, axes in ARCHITECTURES[cfg.arch].axes(cfg).items()
        for i in range(cfg.n_layer if "*" in path else 1)
    }


def first_axes(cfg: ModelConfig) -> dict[str, int]:
    """Length of the first axis of every matrix and embedding, by name.

    '4 x n_embd' is left out: what divides n_embd divides it, too.
    """
    firsts = {axes[0] for axes in ARCHITECTURES[cfg.arch].axes(cfg).values() if len(axes) > 1}
    return {axis: axis_sizes(cfg)[axis] for axis in firsts if not axis.endswith(" x n_embd")}


def parameter_sizes(cfg: ModelConfig) -> dict[str, int]:
    """Elements of each parameter, by path; 'blocks/0/...' counts all blocks."""
    shapes = parameter_shapes(dataclasses.replace(cfg, n_layer=1))  # for speed
    return {
        path: math.prod(shape) * (cfg.n_layer if path.startswith("blocks/") else 1)
        for path, shape in shapes.items()
    }
