"""Text to token shards: `python -m jaxgpt.prepare fineweb`. The same command resumes after a kill.

The order of the tokens is the order of the inputs, for any number of workers: workers encode units
of the input (`preparation/tokenize.py`), and shards are cut from them in order
(`preparation/assemble.py`). Everything but the flags is imported after they are parsed.
"""

import signal
import sys
from collections.abc import Sequence

from jaxgpt.errors import Stopped, run_command
from jaxgpt.files import user_path
from jaxgpt.preparation.flags import PROG, parse_flags
from jaxgpt.run.console import unfailing_output
from jaxgpt.run.signals import StopRequest


@unfailing_output()
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    # An ignored signal stays ignored: a script's background jobs must not react to Ctrl-C.
    handled = [
        number for number in StopRequest.STOPPING if signal.getsignal(number) is not signal.SIG_IGN
    ]
    previous = {number: signal.signal(number, _raise_stopped) for number in handled}
    try:
        return run_command(PROG, lambda: run(sys.argv[1:] if argv is None else argv))
    finally:
        # Only where called as a function: while a process ends, a second Ctrl-C stays ignored.
        if argv is not None:
            for number, handler in previous.items():
                signal.signal(number, handler)


def _raise_stopped(number: int, _: object) -> None:
    for each in StopRequest.STOPPING:  # a second signal must not interrupt the cleanup
        signal.signal(each, signal.SIG_IGN)
    raise Stopped(number, "stopped; run the same command again to resume")


def run(argv: Sequence[str]) -> int:
    """Do what the flags say; returns the exit code. Raises UserError."""
    flags = parse_flags(argv)
    from jaxgpt.planning.local_gpus import visible_card
    from jaxgpt.preparation.inspect_folder import inspect_folder
    from jaxgpt.preparation.output_folder import open_output_folder
    from jaxgpt.preparation.pipeline import prepare_text
    from jaxgpt.preparation.pretokenized import download_ready
    from jaxgpt.preparation.text_manifest import print_result

    if flags.inspect:
        return inspect_folder(user_path(flags.inputs[0], "--inspect"), flags.tokenizer)
    with open_output_folder(flags) as folder:
        has_shards = flags.ready and not flags.reads_ids
        manifest = (download_ready if has_shards else prepare_text)(flags, folder)
        print_result(folder.out, manifest, visible_card() is not None)
    return 0


if __name__ == "__main__":
    sys.exit(main())
