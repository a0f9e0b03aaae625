"""Continue a text: `python -m jaxgpt.sample --out-dir runs/24gb --prompt "The meaning of life is"`.

Standard output gets the texts and nothing else; what is said about them goes to standard error.
"""

import codecs
import dataclasses
import io
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from itertools import count, takewhile
from pathlib import Path

import numpy as np

from jaxgpt.config import command_line as cli
from jaxgpt.config.checks import ConfigError
from jaxgpt.config.flag_types import FloatIfSet
from jaxgpt.data.tokenizer import EOT_TEXT, Tokenizer
from jaxgpt.errors import UserError, explain_out_of_memory, fail
from jaxgpt.weights.source import Weights, WeightsFlags, build_network, open_weights, prepare_device

PROG = "python -m jaxgpt.sample"
FROM_FILE = "FILE:"
SEPARATOR = "---------------"  # nanoGPT's, between two samples
STREAM_CHUNK = 8  # tokens between two looks at the terminal
INSTEAD = {
    "start": "here it is --prompt",
    "compile": "drop it: generation is compiled by XLA",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleFlags(WeightsFlags):
    """What to continue, and how."""

    # the text to continue: as it stands, FILE:prompt.txt, or - for standard input; <|endoftext|>
    # in it is the token of that name; if unset, a new document begins
    prompt: str = ""
    num_samples: int = 1  # texts made at the same time; the first is shown as it grows
    max_new_tokens: int = 500  # length of each continuation
    temperature: float = 0.8  # below 1 likelier, above 1 wilder; 0 takes the likeliest token
    top_k: int = 200  # draw from so many of the likeliest tokens; 0: from all
    top_p: FloatIfSet = None  # draw from the likeliest tokens that have this probability together
    seed: int = 1337  # the same seed gives the same texts
    stop_at_eot: bool = False  # end a text where the model ends its document
    interactive: bool = False  # ask for one prompt after another

    def errors(self) -> list[str]:
        """What is wrong with them, a sentence for each error."""
        errors = super().errors()
        if self.num_samples < 1:
            errors.append(f"--num-samples {self.num_samples} must be at least 1")
        if self.max_new_tokens < 1:
            errors.append(f"--max-new-tokens {self.max_new_tokens} must be at least 1")
        if not 0 <= self.temperature < float("inf"):
            errors.append(f"--temperature {self.temperature:g} must be finite and at least 0")
        if self.top_k < 0:
            errors.append(f"--top-k {self.top_k} must be at least 0")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            errors.append(f"--top-p {self.top_p:g} must be above 0 and at most 1")
        if not 0 <= self.seed < 2**31:
            errors.append(f"--seed {self.seed} must be from 0 to {2**31 - 1}")
        if self.interactive and self.prompt:
            errors.append("--interactive asks for prompts; leave --prompt out")
        return errors


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    flags = cli.parse_command(
        sys.argv[1:] if argv is None else argv,
        SampleFlags,
        prog=PROG,
        description="Continue a text with a model of yours, or with GPT-2.",
        instead=INSTEAD,
    )
    for stream in (sys.stdout, sys.stderr):  # a terminal may lack a letter, and a text go on
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        prompt = read_prompt(flags.prompt)
        with explain_out_of_memory(lambda: "make fewer texts at a time with --num-samples"):
            run(flags, prompt)
    except UserError as error:
        fail(PROG, str(error))
    except BrokenPipeError:  # `| head` has seen enough
        sys.stderr.close()
        return 0
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    return 0


def run(flags: SampleFlags, prompt: str) -> None:
    """Load the model and write its texts."""
    weights = open_weights(flags)
    device, dtype = prepare_device(flags)

    import jax

    from jaxgpt.model.generate import Generator, Sampling

    sampling = Sampling(
        temperature=flags.temperature,
        top_k=flags.top_k or None,
        top_p=flags.top_p,
        stop_at=weights.tokenizer.eot if flags.stop_at_eot else None,
    )
    with jax.default_device(device):
        generator = Generator(
            build_network(weights, device, dtype),
            weights.model.block_size,
            sampling,
            chunk=STREAM_CHUNK,
        )
        params = weights.load(device)
        count = weights.model.parameter_count(padding=False)
        say(f"{weights.name}: {count:,} parameters, {dtype}, {device}")
        key = jax.random.key(flags.seed)

        def texts(prompt: str, turn: int) -> Iterator[np.ndarray]:
            ids = prompt_ids(prompt, weights)
            turn_key = jax.random.fold_in(key, turn)
            length, samples = flags.max_new_tokens, flags.num_samples
            return generator.stream(params, ids, length, turn_key, samples)

        decoder = partial(TextStream, weights.tokenizer, sampling.stop_at)
        if flags.interactive:
            converse(texts, decoder)
        else:
            write_texts(prompt, texts(prompt, 0), decoder)


def read_prompt(prompt: str) -> str:
    """The text that --prompt stands for.

    Raises:
        ConfigError: if it is to be read from a file that cannot be.
    """
    try:
        if prompt == "-":
            return sys.stdin.read()
        if not prompt.startswith(FROM_FILE):
            return prompt
        return Path(prompt.removeprefix(FROM_FILE)).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--prompt {prompt} cannot be read as text: {error}") from None


def prompt_ids(prompt: str, weights: Weights) -> list[int]:
    """The prompt as ids, end-of-text for its name; that alone, which begins a document, for ''."""
    tokenizer = weights.tokenizer
    first, *others = (tokenizer.encode(part).tolist() for part in prompt.split(EOT_TEXT))
    ids = [*first, *(id for part in others for id in (tokenizer.eot, *part))] or [tokenizer.eot]
    context = weights.model.block_size
    if len(ids) > context:
        say(f"the prompt has {len(ids):,} tokens; the model sees the last {context:,} of them")
    return ids


def write_texts(
    prompt: str, stream: Iterator[np.ndarray], new_text: Callable[[], "TextStream"]
) -> None:
    """Write the first text as it is made and then the others, each with its prompt before it."""
    start = time.perf_counter()
    print(prompt, end="", flush=True)
    parts, first = [], new_text()
    for tokens_BC in stream:
        parts.append(tokens_BC)
        print(first.feed(tokens_BC[0]), end="", flush=True)
    print(first.end())
    texts = [first]
    for tokens_L in np.concatenate(parts, axis=1)[1:]:
        texts.append(text := new_text())
        print(f"{SEPARATOR}\n{prompt}{text.feed(tokens_L)}{text.end()}")
    sys.stdout.flush()
    seconds, tokens = time.perf_counter() - start, sum(text.tokens for text in texts)
    say(f"{tokens:,} tokens in {seconds:.1f} s, compiling included")


def converse(
    texts: Callable[[str, int], Iterator[np.ndarray]], new_text: Callable[[], "TextStream"]
) -> None:
    """Ask for prompts until there are no more; Ctrl-C ends a text or a line, and Ctrl-D all."""
    with suppress(ImportError):  # which lets `input` edit a line and remember those before
        import readline  # noqa: F401
    say("Ctrl-C ends a text, Ctrl-D the conversation; nothing is remembered from one to the next")
    for turn in count():
        try:
            prompt = input("> ")
        except EOFError:
            say("")
            return
        except KeyboardInterrupt:  # meant for a text that had just ended, or for what was typed
            print()
            continue
        except UnicodeDecodeError as error:
            raise ConfigError(f"what was typed cannot be read as text: {error}") from None
        try:
            write_texts(prompt, texts(prompt, turn), new_text)
        except KeyboardInterrupt:
            print()


class TextStream:
    """One text from its ids, a few at a time: half a letter waits for its rest."""

    def __init__(self, tokenizer: Tokenizer, stop_at: int | None):
        self.tokens = 0  # in the text, `stop_at` not counted
        self._tokenizer, self._stop_at = tokenizer, stop_at
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, ids_C: np.ndarray) -> str:
        """The text that (C,) ids add; what comes from `stop_at` on is none."""
        ids = list(takewhile(lambda id: id != self._stop_at, ids_C.tolist()))
        self.tokens += len(ids)
        return self._decoder.decode(self._tokenizer.decode_bytes(ids))

    def end(self) -> str:
        """What is left of a letter that never came whole."""
        return self._decoder.decode(b"", final=True)


def say(text: str) -> None:
    """Tell the user something that belongs to no text."""
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
