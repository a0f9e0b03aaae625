"""jaxgpt: train language models in JAX, tuned to the GPU memory you own."""

import sys
from collections.abc import Sequence
from importlib import import_module

COMMANDS = {
    "train": "train a model, or resume a run",
    "prepare": "text to token shards",
    "tokenizer": "train a tokenizer on your text",
    "plan": "what fits a card, and how long it takes",
    "bench": "how fast a step is here",
    "sample": "continue a text",
    "evaluate": "measure a model",
    "export": "write a model for transformers or Ollama",
}


def main(argv: Sequence[str] | None = None) -> int:
    """`jaxgpt train ...`, which is `python -m jaxgpt.train ...`; returns its exit code."""
    name, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    lines = [f"  jaxgpt {command:<9} {what}" for command, what in COMMANDS.items()]
    text = "\n".join(("usage: jaxgpt COMMAND --help", *lines))
    if name in ("-h", "--help"):
        print(text)
        return 0
    if name not in COMMANDS:
        from jaxgpt.config.checks import did_you_mean
        from jaxgpt.errors import fail

        fail("jaxgpt", f"no command {name!r}{did_you_mean(name, COMMANDS)}\n{text}")
    module = "tokenizer.__main__" if name == "tokenizer" else name
    code: int = import_module(f"jaxgpt.{module}").main(rest)
    return code
