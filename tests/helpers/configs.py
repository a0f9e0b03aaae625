"""Configurations: parsed, and resolved without a tokenizer or a machine."""

from collections.abc import Callable, Sequence
from typing import Any

from jaxgpt.config.command_line import RunFlags, parse_run
from jaxgpt.config.fields import Config, with_fields
from jaxgpt.config.mesh_shape import parse_mesh
from jaxgpt.config.resolved import Origin, Resolved, resolve


def resolved(asked: Config, dtype: str = "float32", **fields: Any) -> Resolved:
    """`asked` with `fields` changed, on the devices of its mesh; its ids are GPT-2's if unset."""
    asked = with_fields(asked, **fields)
    n_vocab = asked.model.n_vocab or 50257
    mesh = parse_mesh(asked.mesh)
    return resolve(asked, Origin.of(asked), n_vocab=n_vocab, mesh=mesh, dtype=dtype)


def parse(argv: Sequence[str], default: Callable[[], str | None] = lambda: None) -> Config:
    """What `train` is asked for by `argv`, or by the preset `default()`; raises ConfigError."""
    flags: dict[str, Any] = {"description": "Train.", "default_preset": default}
    return parse_run(RunFlags, argv, prog="train", **flags)[0]
