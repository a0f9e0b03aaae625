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
    if name not in COMMANDS:
        from jaxgpt.errors import run_command

        return run_command("jaxgpt", lambda: _print_usage(name))
    command = import_module(f"jaxgpt.{'tokenizer.__main__' if name == 'tokenizer' else name}").main
    # Without arguments a command knows that it is the whole process; `prepare` depends on that.
    if argv is None:
        sys.argv[1:] = rest
    code: int = command() if argv is None else command(rest)
    return code


def _print_usage(name: str) -> int:
    lines = [f"  jaxgpt {command:<9} {what}" for command, what in COMMANDS.items()]
    text = "\n".join(("usage: jaxgpt COMMAND --help", *lines))
    if name not in ("-h", "--help"):
        from jaxgpt.config.checks import did_you_mean
        from jaxgpt.errors import UserError

        raise UserError(f"no command {name!r}{did_you_mean(name, COMMANDS)}\n{text}")
    print(text)
    return 0
