"""Parse the flags of a jaxgpt command without running it; exit code 2 for a mistake.

    python benchmarks/parse_flags.py train --preset 24gb --batch-size 16

check_docs.py uses it for commands that it cannot run.
"""

import importlib
import sys
from collections.abc import Sequence

from jaxgpt.config.command_line import RunFlags, parse_command, parse_run
from jaxgpt.errors import run_command

MODULES = {"prepare": "jaxgpt.preparation.flags"}  # elsewhere, the flags are in the command itself


def main(argv: Sequence[str] | None = None) -> int:
    command, *flags = sys.argv[1:] if argv is None else argv
    prog = f"python -m jaxgpt.{command}"
    return run_command(prog, lambda: parse(command, flags, prog))


def parse(command: str, argv: Sequence[str], prog: str) -> int:
    """Raises ConfigError, or exits, for flags that the command would refuse."""
    module = importlib.import_module(MODULES.get(command, f"jaxgpt.{command}"))
    kind = getattr(module, f"{command.capitalize()}Flags")
    if issubclass(kind, RunFlags):
        parse_run(kind, argv, prog=prog, description="", default_preset=lambda: RunFlags.preset)
    else:
        parse_command(argv, kind, prog=prog, description="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
