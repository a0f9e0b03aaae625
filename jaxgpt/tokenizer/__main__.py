"""Train a tokenizer: `python -m jaxgpt.tokenizer texts/ --vocab-size 32768 --out tok/`.

A byte-level BPE like GPT-2's, trained on a sample of the text. That takes about a minute per 100 MB
of sample, so there is nothing to resume.
"""

import os
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.filesize import decimal

from jaxgpt.config.command_line import parse_command
from jaxgpt.config.flag_types import PathIfSet
from jaxgpt.data.token_file import PREPARE
from jaxgpt.data.tokenizer import EOT_TEXT, load_tokenizer
from jaxgpt.data.tokenizer_json import tokenizer_from_files, with_config
from jaxgpt.errors import UserError, make_main
from jaxgpt.files import user_path
from jaxgpt.preparation.documents import LongText, ReadOptions
from jaxgpt.preparation.flags import Inputs, parse_number
from jaxgpt.preparation.inputs import Slice, find_inputs, work_units
from jaxgpt.preparation.output_folder import is_hub_name
from jaxgpt.preparation.readers import read_slice
from jaxgpt.run.console import print_table, waiting
from jaxgpt.weights.gguf_file import WORDS_WITH_MARKS

PROG = "python -m jaxgpt.tokenizer"
DESCRIPTION = "Train a byte-level BPE tokenizer on text files, for a language or a kind of text."

SLICE_BYTES = 1 << 24  # the sample takes the beginning of each slice of this size
PIECE = 10_000  # characters that are used for training or held out together
HELD_OUT = 20  # every 20th piece is held out
MOST_HELD_OUT = 5_000_000  # characters, enough to measure
# Ids: 256 bytes, the end of text, and some merges; the library takes memory for all at once.
SMALLEST, LARGEST = 512, 2**22


@dataclass(frozen=True, kw_only=True)
class TokenizerFlags:
    """The command line."""

    inputs: Inputs = ()
    """text files, patterns, or a folder, as for jaxgpt.prepare"""
    out: PathIfSet = None
    """folder for tokenizer.json, which must not exist there yet"""
    vocab_size: int = 32768
    """number of ids, 256 for bytes and one for the end of text included"""
    sample: Annotated[str, tyro.conf.arg(metavar="BYTES")] = "100M"
    """bytes of text to train on, from all parts of the input"""
    text_column: str = "text"
    """column or JSON key with the text"""

    def errors(self) -> list[str]:
        """A sentence for each error in the flags."""
        errors = []
        if not self.inputs:
            errors.append("name the text to train on: files or a folder")
        if self.out is None:
            errors.append("name the folder to write: --out FOLDER")
        if not SMALLEST <= self.vocab_size <= LARGEST:
            errors.append(f"--vocab-size {self.vocab_size} must be from {SMALLEST} to {LARGEST}")
        try:
            parse_number("sample", self.sample)
        except UserError as error:
            errors.append(str(error))
        return errors


def run(argv: Sequence[str]) -> int:
    """Read a sample, train, write the files, and compare with GPT-2's. Raises UserError."""
    flags = parse_command(argv, TokenizerFlags, prog=PROG, description=DESCRIPTION)
    assert flags.out is not None
    out = user_path(flags.out, "--out")
    if (out / "tokenizer.json").exists():
        raise UserError(f"{out}: already has a tokenizer.json; choose another --out")
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: is a file; choose a folder with --out")
    if is_hub_name(flags.inputs):
        raise UserError(
            f"{flags.inputs[0]}: no such file or folder, and this command reads nothing from the "
            "Hub; name text files, such as a few that you have downloaded"
        )
    out.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    with waiting("reading the sample"):
        options = ReadOptions(text_column=flags.text_column)
        training, held_out = read_sample(
            flags.inputs, parse_number("sample", flags.sample), options
        )
    size = sum(len(text.encode(errors="replace")) for text in training)
    with waiting(f"training on {decimal(size)}"):
        library = train_bpe(training, flags.vocab_size)
    tokenizer = save(library, out)
    rows = {
        "vocabulary": f"{tokenizer.n_vocab:,} ids"
        + ("" if tokenizer.n_vocab == flags.vocab_size else ", all that this sample yields"),
        "trained on": f"{decimal(size)} of text, in {time.perf_counter() - started:.0f} s",
        **compare(tokenizer, held_out),
    }
    print_table(str(out), rows)
    inputs = shlex.join(flags.inputs[:3]) + " ..." * (len(flags.inputs) > 3)
    print(f"use it: {PREPARE} {inputs} --tokenizer {shlex.quote(str(out))}")
    return 0


def read_sample(
    arguments: Sequence[str], n_bytes: int, options: ReadOptions
) -> tuple[list[str], list[str]]:
    """(pieces of text to train on, pieces held out), about `n_bytes` of text from all inputs.

    Raises UserError.
    """
    slices = [slice for unit in work_units(find_inputs(arguments), SLICE_BYTES) for slice in unit]
    share = n_bytes / max(sum(slice.input.text_bytes / slice.parts for slice in slices), 1)
    training: list[str] = []
    held_out: list[str] = []
    characters = 0  # held out
    pieces = (piece for slice in slices for piece in _beginning_of(slice, share, options))
    for number, piece in enumerate(pieces):
        if number % HELD_OUT == HELD_OUT - 1 and characters < MOST_HELD_OUT:
            held_out.append(piece)
            characters += len(piece)
        else:
            training.append(piece)
    if not training:
        raise UserError(f"{arguments[0]}: has no text to train on; check the files")
    if not held_out:  # a few pages of text
        middle = len(training[-1]) * 9 // 10
        training[-1], held_out = training[-1][:middle], [training[-1][middle:]]
    return training, held_out


def _beginning_of(slice: Slice, share: float, options: ReadOptions) -> Iterator[str]:
    """Pieces of the first `share` of a slice's text."""
    left = slice.input.text_bytes / slice.parts * share
    for batch in read_slice(slice, options):
        for document in batch.documents:
            if not isinstance(document, str | LongText):
                continue
            chunks = document.chunks() if isinstance(document, LongText) else [document]
            for chunk in chunks:
                for start in range(0, len(chunk), PIECE):
                    if left <= 0:
                        return
                    piece = chunk[start : start + PIECE]
                    left -= len(piece.encode(errors="replace"))
                    yield piece


def train_bpe(texts: Sequence[str], vocab_size: int) -> Any:
    """A `tokenizers.Tokenizer` with at most `vocab_size` ids."""
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    library = Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS_WITH_MARKS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOT_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    clean = (text.encode(errors="replace").decode() for text in texts)  # of lone surrogates
    library.train_from_iterator(clean, trainer)
    return library


def save(library: Any, out: Path) -> Any:
    """Write the files of a trained tokenizer and open them as any other."""
    files = with_config(library.to_str(pretty=True).encode())
    tokenizer = tokenizer_from_files(files, str(out))
    tokenizer.save(out)
    return tokenizer


def compare(tokenizer: Any, held_out: Sequence[str]) -> dict[str, str]:
    """A row with the bytes per token on text that was held out, and GPT-2's."""
    n_bytes = sum(len(text.encode(errors="replace")) for text in held_out)

    def per_token(encode: Any) -> float:
        return n_bytes / max(sum(len(encode(text)) for text in held_out), 1)

    own, gpt2 = per_token(tokenizer.encode), per_token(load_tokenizer("gpt2").encode)
    return {
        "bytes per token": f"{own:.2f} on {decimal(n_bytes)} held out; with GPT-2: {gpt2:.2f}",
    }


main = make_main(PROG, run)

if __name__ == "__main__":
    sys.exit(main())
