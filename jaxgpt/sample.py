"""Continue a text: `python -m jaxgpt.sample --out-dir runs/24gb --prompt "The meaning of life is"`.

Standard output gets the texts and nothing else; messages go to standard error.
"""

import dataclasses
import functools
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import numpy as np

from jaxgpt.config import command_line as cli
from jaxgpt.config.architecture import ModelConfig
from jaxgpt.config.checks import ConfigError, bad_counts
from jaxgpt.config.fields import Dtype
from jaxgpt.config.flag_types import FloatIfSet
from jaxgpt.data.text_stream import TextStream
from jaxgpt.errors import explain_out_of_memory, make_main, raise_on_ctrl_c, warn
from jaxgpt.files import read_file, user_path
from jaxgpt.weights.source import Weights, WeightsFlags, build_network, open_weights, prepare_device

PROG = "python -m jaxgpt.sample"
FROM_FILE = "FILE:"
LONGEST_PROMPT = 10_000_000  # characters from standard input, which may never end
BYTE_ORDER_MARK = "\N{ZERO WIDTH NO-BREAK SPACE}"
SEPARATOR = "---------------"  # nanoGPT's, between two samples
CACHE_STEP = 1024  # the cache's length in tokens is a multiple of this
STREAM_CHUNK = 8  # tokens generated between two writes
INSTEAD = {
    "start": "here it is --prompt",
    "compile": "drop it: generation is compiled by XLA",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleFlags(WeightsFlags):
    """What to continue, and how."""

    # the text to continue: the text itself, FILE:prompt.txt, or - for standard input; in it,
    # <|endoftext|> is the end-of-text token; if unset, a new document begins
    prompt: str = ""
    num_samples: int = 1  # texts generated at the same time; the first is shown as it grows
    max_new_tokens: int = 500  # length of each continuation
    temperature: float = 0.8  # below 1 more predictable, above 1 more varied; 0: greedy
    top_k: int = 200  # sample from the k most likely tokens; 0: from all
    top_p: FloatIfSet = None  # sample from the most likely tokens up to this total probability
    seed: int = 1337  # the same seed gives the same texts
    stop_at_eot: bool = False  # end a text at the end-of-text token
    interactive: bool = False  # read one prompt after another from the terminal

    def errors(self) -> list[str]:
        errors = super().errors()
        errors += bad_counts(self, "num_samples", "max_new_tokens", as_flags=True)
        errors += bad_counts(self, "top_k", "seed", least=0, as_flags=True)
        if not 0 <= self.temperature <= float(np.finfo(np.float32).max):
            errors.append(
                f"--temperature {self.temperature:g} must be at least 0 and finite in float32"
            )
        if self.top_p is not None and not 0 < self.top_p <= 1:
            errors.append(f"--top-p {self.top_p:g} must be above 0 and at most 1")
        if self.interactive and self.prompt:
            errors.append("--interactive reads prompts from the terminal; drop --prompt")
        return errors


def run(argv: Sequence[str]) -> int:
    """Parse the flags, open and load the weights, and write texts for each prompt."""
    flags = cli.parse_command(
        argv,
        SampleFlags,
        prog=PROG,
        description="Continue a text with your model, or with GPT-2.",
        instead=INSTEAD,
    )
    prompts = typed_prompts() if flags.interactive else iter([read_prompt(flags.prompt)])
    weights = open_weights(flags)
    device, dtype = prepare_device(flags.device, flags.dtype)

    import jax

    from jaxgpt.model.generate import Generator, Sampling

    sampling = Sampling(
        temperature=flags.temperature,
        top_k=flags.top_k or None,
        top_p=flags.top_p,
        stop_at=weights.tokenizer.eot if flags.stop_at_eot else None,
    )
    fewer = "generate fewer texts at a time with --num-samples"
    with explain_out_of_memory(lambda: fewer), jax.default_device(device):

        @functools.cache
        def make_generator(context: int) -> Generator:
            network = build_network(weights.with_context(context), device, dtype)
            return Generator(network, context, sampling, chunk=STREAM_CHUNK)

        params = weights.load(device)
        warn(f"{weights.name}: {weights.model.describe_parameters()}, {dtype}, {device}")
        if flags.interactive:
            raise_on_ctrl_c()  # it ends a text
        for turn, prompt in enumerate(prompts):
            key = jax.random.fold_in(jax.random.key(flags.seed), turn)
            tokens = prompt_tokens(prompt, weights)
            if flags.interactive and turn == 0:
                warn("compiling, before the first text and again before much longer ones ...")
            context = context_for(weights.model, len(tokens) + flags.max_new_tokens)
            check_room(weights.model, context, flags.num_samples, device, dtype)
            stream = make_generator(context).stream(
                params, tokens, flags.max_new_tokens, key, flags.num_samples
            )
            try:
                write_texts(
                    prompt, stream, partial(TextStream, weights.tokenizer, sampling.stop_at)
                )
            except KeyboardInterrupt:
                if not flags.interactive:
                    raise
                print()  # it ended this text, not the conversation
    return 0


def read_prompt(prompt: str) -> str:
    """The text that --prompt stands for.

    Raises:
        ConfigError: if its file or standard input cannot be read as text.
    """
    try:
        if prompt == "-":
            text = sys.stdin.read(LONGEST_PROMPT + 1).removeprefix(BYTE_ORDER_MARK)
            if len(text) > LONGEST_PROMPT:
                raise ValueError(f"it has more than {LONGEST_PROMPT:,} characters")
            return text
        if not prompt.startswith(FROM_FILE):
            return prompt
        path = user_path(prompt.removeprefix(FROM_FILE), "--prompt")
        return read_file(path).decode("utf-8-sig").replace("\r\n", "\n")
    except (OSError, ValueError) as error:
        raise ConfigError(f"--prompt {prompt} cannot be read as text: {error}") from None


def typed_prompts() -> Iterator[str]:
    """Prompts from the terminal until Ctrl-D.

    Raises:
        ConfigError: if a line is not text.
    """
    with suppress(ImportError):  # gives `input` line editing and a history
        import readline  # noqa: F401
    warn("Ctrl-C ends a text, Ctrl-D the conversation; each prompt starts afresh")
    while True:
        try:
            yield input("> ")
        except EOFError:
            warn("")
            return
        except KeyboardInterrupt:  # it drops the line typed so far
            print()
        except UnicodeDecodeError as error:
            raise ConfigError(f"the line typed cannot be read as text: {error}") from None


def prompt_tokens(prompt: str, weights: Weights) -> list[int]:
    """The prompt's ids; the name of the end-of-text token is that token, as is an empty prompt."""
    tokenizer = weights.tokenizer
    end_of_text = tokenizer.decode([tokenizer.eot])
    first, *others = (tokenizer.encode(part).tolist() for part in prompt.split(end_of_text))
    ids = [*first, *(id for part in others for id in (tokenizer.eot, *part))] or [tokenizer.eot]
    context = weights.model.block_size
    if len(ids) > context:
        warn(f"the prompt has {len(ids):,} tokens; the model sees the last {context:,} of them")
    return ids


def context_for(model: ModelConfig, length: int) -> int:
    """A context that is long enough for a text, at most the model's.

    A model that others trained may have room for 40,960 tokens, whose cache takes gigabytes.
    """
    if model.has_learned_positions:
        return model.block_size
    return min(model.block_size, -(-length // CACHE_STEP) * CACHE_STEP)


def check_room(model: ModelConfig, context: int, samples: int, device: Any, dtype: Dtype) -> None:
    """Raises ConfigError if the texts do not fit the memory; on a CPU XLA would abort."""
    import jax.numpy as jnp

    from jaxgpt.planning.memory import device_limit

    numbers = 2 * model.n_layer * model.kv_heads * model.head_width  # cached, per token
    cached = jnp.dtype(dtype).itemsize * numbers * context
    need = samples * (cached + 4 * (context + (model.vocab_size or 0)))
    free = device_limit(device)
    if free is not None and need > free:
        raise ConfigError(
            f"--num-samples {samples:,}: so many texts need at least {need / 1e9:,.1f} GB, of "
            f"{free / 1e9:,.1f} on this device; generate fewer at a time"
        )


def write_texts(
    prompt: str, stream: Iterator[np.ndarray], new_text: Callable[[], TextStream]
) -> None:
    """Write the first text while it is generated, then the others, each after its prompt."""
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
    warn(f"{tokens:,} tokens in {seconds:.1f} s, including compilation")


main = make_main(PROG, run, read_only=True)

if __name__ == "__main__":
    sys.exit(main())
