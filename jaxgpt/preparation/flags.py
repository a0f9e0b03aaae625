"""The flags of `jaxgpt.prepare`, and error messages for wrong ones.

Nothing heavy is imported here: a mistake is reported before datasets and pyarrow are loaded.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from decimal import Decimal
from typing import Annotated, Literal

import tyro

from jaxgpt.config.checks import as_flag
from jaxgpt.config.command_line import parse_command
from jaxgpt.config.flag_types import FloatIfSet, IntIfSet, PathIfSet, TextIfSet, unless_none
from jaxgpt.errors import UserError
from jaxgpt.preparation.documents import PARTS, ReadOptions

PROG = "python -m jaxgpt.prepare"
# Both have the same samples, in the same folders.
FINEWEB = {"fineweb": "HuggingFaceFW/fineweb", "fineweb-edu": "HuggingFaceFW/fineweb-edu"}
DATASETS = FINEWEB | {
    "fineweb-2": "HuggingFaceFW/fineweb-2",
    "dclm": "mlfoundations/dclm-baseline-1.0-parquet",
    "climbmix": "OptimalScale/ClimbMix",  # as text
}
CLIMBMIX_TOKENS = "nvidia/Nemotron-ClimbMix"  # GPT-2's, a list in the column `tokens` of each row
LICENCES = {"climbmix": "CC BY-NC 4.0: for research, not for commercial use"}  # where restricted
SUFFIXES = {"K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}

COUNTS = ("limit_tokens", "tokens", "val_tokens", "shard_tokens", "unit_bytes")

VAL_RULES = ("val_tokens", "val_fraction")

# The flags that --ready and --inspect can be combined with.
OF_READY = frozenset({"inputs", "out", "name", "revision", "ready", "tokens", "workers"})
OF_INSPECT = frozenset({"inputs", "inspect", "tokenizer"})

DESCRIPTION = """Make token shards for training from FineWeb, another dataset of the Hugging Face \
Hub, or text files. Run the same command again to resume.

  python -m jaxgpt.prepare fineweb --name sample-10BT
  python -m jaxgpt.prepare fineweb --name sample-100BT --limit-tokens 27B
  python -m jaxgpt.prepare fineweb --ready --tokens 10B
  python -m jaxgpt.prepare path/to/*.parquet *.jsonl.zst *.txt --out data/mine
  python -m jaxgpt.prepare --inspect data/fineweb"""

Count = Annotated[str | None, tyro.conf.arg(metavar="N", help_behavior_hint=unless_none)]
Size = Annotated[str, tyro.conf.arg(metavar="N")]
Inputs = tyro.conf.Positional[
    Annotated[tuple[str, ...], tyro.conf.arg(metavar="[SOURCE ...]", help_behavior_hint="")]
]


@dataclass(frozen=True, kw_only=True)
class PrepareFlags:
    """The command line; None means that the default depends on other values."""

    inputs: Inputs = ()
    """fineweb, fineweb-edu, fineweb-2, dclm, climbmix, or owner/name of a Hub dataset; or files,
    patterns, a folder of text, a save_to_disk folder (.parquet, .jsonl, .csv, .txt, .md; compressed
    too)"""
    out: PathIfSet = None
    """folder for the shards; by default data/ and the source's name"""
    name: TextIfSet = None
    """configuration of a Hub dataset; for FineWeb a sample (sample-10BT, sample-100BT, ...), for
    fineweb-2 a language (arb_Arab, hin_Deva, ...)"""
    split: str = "train"
    """split of a Hub dataset"""
    revision: TextIfSet = None
    """branch, tag or commit of a Hub dataset"""
    limit_tokens: Count = None
    """stop after this many training tokens (27B, 500M); with a larger limit the same command
    continues from there"""
    ready: bool = False
    """download ready-made GPT-2 tokens instead of text"""
    tokens: Count = None
    """with --ready: download at least this many training tokens"""
    tokenizer: str = "gpt2"
    """gpt2, byte or char (the text's characters); a folder with tokenizer.json, such a file, or
    owner/name on the Hub; or a tiktoken encoding"""
    text_column: str = "text"
    """column or JSON key with the text; meta.text for the key text within meta"""
    sample_by: Annotated[str, tyro.conf.arg(metavar="document|paragraph|line|TEXT")] = "document"
    """what a document of a .txt file is: the complete file, a paragraph, a line, or what is between
    two occurrences of a text, such as '<|endoftext|>'"""
    encoding_errors: Literal["skip", "replace"] = "skip"
    """skip documents that are not UTF-8, or replace the invalid bytes with U+FFFD"""
    val: TextIfSet = None
    """validation text of your own: files or a folder, which are then not trained on; or a split of
    the dataset, such as validation"""
    val_tokens: Count = None
    """use the first N tokens for validation; default for FineWeb: 100M, as in llm.c"""
    val_fraction: FloatIfSet = None
    """use this fraction of the documents for validation, chosen by their hash; default for all
    other text: 0.1 below 100 MB, 0.01 above"""
    shard_tokens: Size = "100M"
    """tokens per shard"""
    workers: IntIfSet = None
    """worker processes; by default one per CPU"""
    cluster: TextIfSet = None
    """address of a Dask scheduler (tcp://host:8786) whose workers do the work instead; they read
    the text and write to --out by the same paths"""
    inspect: bool = False
    """show what a folder of tokens contains, and check every file"""
    unit_bytes: Size = "256M"
    """bytes of text in a unit of work; a kill costs each worker at most one unit"""

    def errors(self) -> list[str]:
        """A sentence for each error in the flags."""
        errors = []
        for name in COUNTS:
            try:
                self.number_of(name)
            except UserError as error:
                errors.append(str(error))
        ways = [name for name in ("val", *VAL_RULES) if getattr(self, name) is not None]
        if len(ways) > 1:
            names = " and ".join(map(as_flag, ways))
            errors.append(f"{names} are {len(ways)} ways to choose validation; give one")
        if self.val_fraction is not None and not 0 < self.val_fraction < 1:
            errors.append(f"--val-fraction {self.val_fraction:g} must be between 0 and 1")
        if self.sample_by.isalpha() and self.sample_by not in PARTS:
            errors.append(
                f"--sample-by {self.sample_by} must be {', '.join(PARTS)}, or the text between two "
                "documents, such as '<|endoftext|>'"
            )
        if self.workers is not None and self.workers < 1:
            errors.append(f"--workers {self.workers} must be at least 1")
        if self.cluster is not None and self.workers is not None:
            errors.append("--workers is for this machine, and a --cluster has its own; give one")
        if self.inspect:
            return errors + self._inspect_errors()
        if not self.inputs:
            errors.append(
                "name what to prepare: fineweb, a dataset of the Hub (owner/name), or text files; "
                "--help has examples"
            )
        if self.ready:
            return errors + self._ready_errors()
        if self.tokens is not None:
            errors.append("--tokens belongs to --ready; use --limit-tokens when tokenizing")
        return errors

    def _inspect_errors(self) -> list[str]:
        errors = []
        if len(self.inputs) != 1:
            errors.append(f"--inspect takes one folder: {PROG} --inspect data/fineweb")
        if others := self._given_beside(OF_INSPECT):
            errors.append(f"--inspect takes only a folder; leave out {others}")
        return errors

    def _ready_errors(self) -> list[str]:
        if self.limit_tokens is not None:
            return ["--limit-tokens is for tokenizing; with --ready use --tokens"]
        if others := self._given_beside(OF_READY):
            return [f"--ready downloads finished tokens; leave out {others}"]
        if len(self.inputs) > 1:
            return ["--ready takes one name: fineweb, fineweb-edu, climbmix or owner/name"]
        return []

    def _given_beside(self, names: frozenset[str]) -> str:
        """The given flags that are not in `names`, for a message."""
        given = {f.name for f in fields(self) if getattr(self, f.name) != f.default}
        return ", ".join(as_flag(name) for name in sorted(given - names))

    @property
    def reads_ids(self) -> bool:
        """Whether the source's rows have token ids instead of text."""
        return self.ready and self.inputs[0] == "climbmix"

    @property
    def most_tokens(self) -> int | None:
        """The number of training tokens after which to stop."""
        return self.number_of("tokens" if self.ready else "limit_tokens")

    @property
    def read_options(self) -> ReadOptions:
        """How files become documents."""
        return ReadOptions(
            text_column="tokens" if self.reads_ids else self.text_column,
            ids=self.reads_ids,
            sample_by=self.sample_by,
            encoding_errors=self.encoding_errors,
        )

    def number_of(self, name: str) -> int | None:
        """The value of a flag as a number (27B, 100M, 5_000, 1e9), None if it is not set.

        Raises:
            UserError: if it is not a positive integer.
        """
        text = getattr(self, name)
        return None if text is None else parse_number(name, text)


def parse_flags(argv: Sequence[str]) -> PrepareFlags:
    """The flags in `argv`; a mistake ends the process with exit code 2."""
    return parse_command(argv, PrepareFlags, prog=PROG, description=DESCRIPTION)


def parse_number(name: str, text: str) -> int:
    """A positive integer as 27B, 100M, 5_000 or 1e9; UserError, naming the flag, for another."""
    digits, factor = text.strip().upper().replace("_", "").replace(",", ""), 1
    if digits[-1:] in SUFFIXES:
        digits, factor = digits[:-1], SUFFIXES[digits[-1]]
    try:
        value = Decimal(digits) * factor  # as a float, 4.1B would not be an integer
    except ArithmeticError:  # an overflow is not an InvalidOperation
        value = Decimal(-1)
    if value.is_nan() or not 1 <= value < 2**62 or value != int(value):
        raise UserError(
            f"{as_flag(name)} {text}: is not a positive integer; write 27B, 100M or 5000"
        )
    if name == "shard_tokens" and value >= 2**31:
        raise UserError(f"--shard-tokens {text}: a shard has at most 2,147,483,647 tokens")
    return int(value)
