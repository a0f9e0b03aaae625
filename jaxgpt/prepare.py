"""Text to token shards: `python -m jaxgpt.prepare fineweb`. The same command goes on after a kill.

The order of the tokens is the order of the inputs, whatever the number of workers: workers encode
pieces of the input (`preparation/tokenize.py`), and shards are cut from the pieces in order
(`preparation/assemble.py`). Everything but the flags is imported once they are understood.
"""

import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from jaxgpt.config.command_line import fail
from jaxgpt.errors import UserError
from jaxgpt.preparation.flags import PROG, Flags, parse
from jaxgpt.run.console import unfailing_output

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(KeyboardInterrupt):
    """Ctrl-C or SIGTERM; `number` is the signal's."""

    def __init__(self, number: int):
        super().__init__()
        self.number = number


@unfailing_output()
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    flags = parse(sys.argv[1:] if argv is None else argv)
    # What is ignored stays so: a Ctrl-C is not meant for what a script runs in the background.
    heard = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, _stop) for number in heard}
    try:
        return run(flags)
    except UserError as error:
        fail(PROG, str(error))
    except OSError as error:
        if error.strerror is None:
            raise
        where = f"{error.filename}: " if error.filename else ""
        fail(PROG, f"{where}{error.strerror}; the same command goes on once that is mended")
    except Stopped as stop:
        print(f"{PROG}: stopped; the same command goes on from here", file=sys.stderr)
        return 128 + stop.number
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _stop(number: int, _: object) -> None:
    """Leave all work; a second signal is ignored, or it would break into the clearing up."""
    for each in SIGNALS:
        signal.signal(each, signal.SIG_IGN)
    raise Stopped(number)


def run(flags: Flags) -> int:
    """Do what the flags say; returns the exit code. Raises UserError."""
    from jaxgpt.preparation.inspect_folder import inspect
    from jaxgpt.preparation.manifest import merge_ranks, print_result
    from jaxgpt.preparation.output_folder import open_folder
    from jaxgpt.preparation.pipeline import prepare_text
    from jaxgpt.preparation.pretokenized import fetch_ready

    if flags.inspect:
        return inspect(Path(flags.inputs[0]).expanduser(), flags.tokenizer)
    if flags.merge:
        out = Path(flags.inputs[0]).expanduser()
        print_result(out, merge_ranks(out))
        return 0
    with open_folder(flags) as folder:
        manifest = fetch_ready(flags, folder) if flags.ready else prepare_text(flags, folder)
        print_result(folder.out, manifest, folder.world_size)
    return 0


if __name__ == "__main__":
    sys.exit(main())
