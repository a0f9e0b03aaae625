"""A new run, resolved for a card; imports no JAX."""

import functools
from pathlib import Path

from jaxgpt.config.fields import Config, Dtype
from jaxgpt.config.mesh_shape import ONE_DEVICE, MeshShape
from jaxgpt.config.resolved import Origin, Resolved, resolve
from jaxgpt.data.tokenizer import load_tokenizer


def resolve_new(asked: Config, dtype: Dtype, mesh: MeshShape = ONE_DEVICE) -> Resolved:
    """`asked` as a new run with random weights. Raises ConfigError as `resolve` does."""
    n_vocab = _n_vocab(asked.tokenizer, *filter(None, asked.mixture.folders.values()))
    return resolve(asked, Origin.of(asked), n_vocab=n_vocab, mesh=mesh, dtype=dtype)


@functools.cache
def _n_vocab(tokenizer: str, *folders: Path) -> int:  # which may have a copy of the tokenizer
    return load_tokenizer(tokenizer, *folders).n_vocab  # a tenth of a second, of many presets
