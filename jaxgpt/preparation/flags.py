"""The flags of `jaxgpt.prepare`, and answers to those that cannot be meant.

Nothing heavy is imported here: a mistake is answered before datasets and pyarrow are loaded.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from decimal import Decimal
from typing import Annotated, Literal

import tyro

from jaxgpt.config.command_line import parse_command
from jaxgpt.config.flag_types import FloatIfSet, IntIfSet, PathIfSet, TextIfSet, unless_none
from jaxgpt.errors import UserError

PROG = "python -m jaxgpt.prepare"
DATASETS = {"fineweb": "HuggingFaceFW/fineweb", "fineweb-edu": "HuggingFaceFW/fineweb-edu"}
SHARD_TOKENS = 100_000_000  # llm.c's
SUFFIXES = {"K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}

COUNTS = ("limit_tokens", "tokens", "val_tokens", "shard_tokens", "unit_bytes")

# The flags that mean something beside these.
OF_READY = frozenset(
    {"inputs", "out", "name", "revision", "ready", "tokens", "workers", "rank", "world_size"}
)
OF_MERGE = frozenset({"inputs", "merge"})
OF_INSPECT = frozenset({"inputs", "inspect", "tokenizer"})

DESCRIPTION = """Make token shards for training from FineWeb, from another data set of the Hugging \
Face Hub, or from text files. The same command goes on where one was stopped.

  python -m jaxgpt.prepare fineweb --name sample-10BT
  python -m jaxgpt.prepare fineweb --name sample-100BT --limit-tokens 27B
  python -m jaxgpt.prepare fineweb --ready --tokens 10B
  python -m jaxgpt.prepare path/to/*.parquet *.jsonl.zst *.txt --out data/mine
  python -m jaxgpt.prepare --inspect data/fineweb"""

Count = Annotated[str | None, tyro.conf.arg(metavar="N", help_behavior_hint=unless_none)]
Inputs = tyro.conf.Positional[
    Annotated[tuple[str, ...], tyro.conf.arg(metavar="[SOURCE ...]", help_behavior_hint="")]
]


@dataclass(frozen=True, kw_only=True)
class Flags:
    """The command line; what is None follows from the rest."""

    inputs: Inputs = ()
    """fineweb, fineweb-edu, owner/name of a data set of the Hub; or files, patterns, a folder of
    text, a folder of save_to_disk: .parquet .jsonl .txt, .gz and .zst of the last two"""
    out: PathIfSet = None
    """folder for the shards; by default data/ and the source's name"""
    name: TextIfSet = None
    """configuration of a Hub data set, for FineWeb a sample: sample-10BT, sample-100BT, ..."""
    split: str = "train"
    """split of a Hub data set"""
    revision: TextIfSet = None
    """branch, tag or commit of a Hub data set"""
    limit_tokens: Count = None
    """stop after so many training tokens (27B, 500M); a larger one later goes on from there"""
    ready: bool = False
    """download GPT-2 tokens that others have made, in place of text"""
    tokens: Count = None
    """with --ready: how many training tokens"""
    tokenizer: str = "gpt2"
    """gpt2, byte, or a name of tiktoken's with at most 65,535 tokens"""
    text_column: str = "text"
    """column or JSON key that holds the text"""
    sample_by: Literal["document", "paragraph", "line"] = "document"
    """what one document of a .txt file is: the file, or what blank lines part, or a line"""
    encoding_errors: Literal["skip", "replace"] = "skip"
    """leave out documents that are not UTF-8, or put U+FFFD for what is not"""
    val_tokens: Count = None
    """validation is the first so many tokens: FineWeb's default, 100M as in llm.c"""
    val_fraction: FloatIfSet = None
    """validation is this share of the documents, by their hash: the default for all else, 0.1
    of less than 100 MB of text and 0.01 of more"""
    shard_tokens: Count = "100M"
    """tokens in a shard"""
    workers: IntIfSet = None
    """processes; by default one for each CPU"""
    rank: IntIfSet = None
    """which of --world-size processes this is; by default from Slurm, torchrun or Open MPI"""
    world_size: IntIfSet = None
    """over how many machines the input is split; --merge joins what they made"""
    merge: bool = False
    """write the manifest of a folder in which all ranks have finished"""
    inspect: bool = False
    """say what a folder of tokens holds, and check every file"""
    unit_bytes: Count = "256M"
    """text that a process takes at a time, which is what a kill can cost it"""

    def errors(self) -> list[str]:
        """What is wrong with them, a sentence for each error."""
        errors = [error for name in COUNTS if (error := self._error_of_count(name))]
        if self.val_tokens is not None and self.val_fraction is not None:
            errors.append("--val-tokens and --val-fraction are two rules for validation; give one")
        if self.val_fraction is not None and not 0 < self.val_fraction < 1:
            errors.append(f"--val-fraction {self.val_fraction:g} must be between 0 and 1")
        if self.workers is not None and self.workers < 1:
            errors.append(f"--workers {self.workers} must be at least 1")
        if self.merge or self.inspect:
            return errors + self._errors_of_one_folder()
        if not self.inputs:
            errors.append(
                "name what to prepare: fineweb, a data set of the Hub (owner/name), or text files; "
                "--help has examples"
            )
        if self.ready:
            return errors + self._errors_of_ready()
        if self.tokens is not None:
            errors.append("--tokens belongs to --ready; --limit-tokens stops tokenizing")
        return errors

    def _error_of_count(self, name: str) -> str | None:
        try:
            count(self, name)
        except UserError as error:
            return str(error)
        return None

    def _errors_of_one_folder(self) -> list[str]:
        if self.merge and self.inspect:
            return ["--merge and --inspect are two commands; give one"]
        what = "--merge" if self.merge else "--inspect"
        errors = []
        if len(self.inputs) != 1:
            errors.append(f"{what} takes one folder: {PROG} {what} data/fineweb")
        if others := self._given_beside(OF_MERGE if self.merge else OF_INSPECT):
            errors.append(f"{what} reads what is there; leave out {others}")
        return errors

    def _errors_of_ready(self) -> list[str]:
        """Flags that say how to make tokens which are made already."""
        if self.limit_tokens is not None:
            return ["--limit-tokens stops tokenizing; with --ready it is --tokens"]
        if others := self._given_beside(OF_READY):
            return [f"--ready downloads tokens as they are; leave out {others}"]
        if len(self.inputs) > 1:
            return ["--ready takes one name: fineweb, fineweb-edu or owner/name"]
        return []

    def _given_beside(self, names: frozenset[str]) -> str:
        """The flags that were given and are none of `names`, for a sentence."""
        given = {f.name for f in fields(self) if getattr(self, f.name) != f.default}
        return ", ".join(f"--{name.replace('_', '-')}" for name in sorted(given - names))


def parse(argv: Sequence[str]) -> Flags:
    """The flags in `argv`; a mistake ends the process with exit code 2."""
    return parse_command(argv, Flags, prog=PROG, description=DESCRIPTION)


def count(flags: Flags, name: str) -> int | None:
    """A flag's number: 27B, 100M, 5_000, 1e9. Raises UserError."""
    text = getattr(flags, name)
    if text is None:
        return None
    digits, factor = text.strip().upper().replace("_", "").replace(",", ""), 1
    if digits[-1:] in SUFFIXES:
        digits, factor = digits[:-1], SUFFIXES[digits[-1]]
    try:
        value = Decimal(digits) * factor  # as a float, 4.1B would be no whole number
    except ArithmeticError:  # decimal's errors, of which an overflow is no InvalidOperation
        value = Decimal(-1)
    if value.is_nan() or not 1 <= value < 2**62 or value != int(value):
        raise UserError(
            f"--{name.replace('_', '-')} {text}: is no number above 0; write 27B, 100M or 5000"
        )
    if name == "shard_tokens" and value >= 2**31:
        raise UserError(f"--shard-tokens {text}: a shard's header holds at most 2,147,483,647")
    return int(value)
