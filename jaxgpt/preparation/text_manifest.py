"""The manifest of prepared text, and what is printed of it: a table, and the next command."""

import hashlib
import os
import shlex
from collections import Counter
from collections.abc import Sequence
from importlib.metadata import version
from itertools import chain, count
from pathlib import Path
from typing import Any

import msgspec

from jaxgpt.config.architecture import padded_vocab_size
from jaxgpt.config.presets import load_preset
from jaxgpt.data.manifest import (
    Documents,
    Manifest,
    ShardEntry,
    Splits,
    SplitTotals,
    TokenCount,
    TokenizerEntry,
    Validation,
)
from jaxgpt.data.token_file import UINT16
from jaxgpt.data.tokenizer import Tokenizer
from jaxgpt.data.tokenizer_files import RECOGNIZED
from jaxgpt.preparation.work_files import HubSource, Plan, Record
from jaxgpt.run.console import counted, print_table

AT_END = "end of the text"  # the rule for few documents
OWN = "text of its own"  # the rule of --val
SMALL_DATA = 5_000_000  # training tokens below which the demo's model is large enough

# With more ids than this the demo's 1,000 steps take a CPU far longer than the minute they should.
DEMO_VOCABULARY = 5_000
SHORT_RUN = ["--max-iters", "200", "--warmup-iters", "20", "--eval-interval", "100"]

LISTED_INPUTS = 200  # the manifest has only the number and a hash of more


def text_manifest(
    plan: Plan, tokenizer: Tokenizer, shards: Sequence[ShardEntry], records: Sequence[Record]
) -> Manifest:
    """Make the manifest, without dates and folders: the same work makes the same manifest."""
    s, inputs = plan.settings, plan.inputs
    lines = "\n".join(f"{item.name} {item.size} {item.check}" for item in inputs)
    source: dict[str, Any] = {
        **msgspec.to_builtins(plan.source),
        "inputs": len(inputs),
        "bytes": sum(item.size for item in inputs),
        "sha256_of_inputs": hashlib.sha256(lines.encode(errors="surrogateescape")).hexdigest(),
        "text_column": s.options.text_column,
        "sample_by": s.options.sample_by,
    }
    if len(inputs) <= LISTED_INPUTS:
        on_hub = isinstance(plan.source, HubSource)
        source["files"] = [item.path if on_hub else item.name for item in inputs]
    validation = Validation(rule="first tokens", tokens=s.val_tokens)
    if s.val is not None:
        own = [item.name for item in inputs if item.split == "val"]
        validation = Validation(rule=OWN, files=own[:LISTED_INPUTS])
    if s.val_fraction is not None:
        rule = AT_END if s.val_at_end else "hash of the document"
        validation = Validation(rule=rule, fraction=s.val_fraction)
    return Manifest(
        jaxgpt=version("jaxgpt"),
        source=source,
        tokenizer=tokenizer_entry(tokenizer),
        dtype="uint16" if tokenizer.dtype == UINT16 else "uint32",
        validation=validation,
        shard_tokens=s.shard_tokens,
        splits=total_splits(shards),
        shards=sorted(shards),
        documents=_sum_documents(records),
        # The column counts GPT-2's tokens; another tokenizer's differ without an error.
        token_count=_compare_counts(records) if tokenizer.name == "gpt2" else None,
    )


def tokenizer_entry(tokenizer: Tokenizer) -> TokenizerEntry:
    """The entry of a tokenizer in a manifest."""
    t = tokenizer
    return TokenizerEntry(name=t.name, sha256=t.sha256, n_vocab=t.n_vocab, eot=t.eot)


def total_splits(shards: Sequence[ShardEntry]) -> Splits:
    """The sums of tokens and documents in each split."""

    def total(split: str) -> SplitTotals:
        some = [shard for shard in shards if shard.split == split]
        return SplitTotals(
            tokens=sum(shard.tokens for shard in some),
            documents=sum(shard.documents for shard in some),
        )

    return Splits(train=total("train"), val=total("val"))


def _sum_documents(records: Sequence[Record]) -> Documents:
    """The sums of the counts, and the first example of each reason."""
    skipped, examples = Counter[str](), dict[str, str]()
    for record in records:
        skipped.update(record.skipped)
        examples = record.examples | examples
    return Documents(
        used=sum(record.documents for record in records),
        skipped=dict(sorted(skipped.items())),
        skipped_for_example={why: Path(path).name for why, path in sorted(examples.items())},
    )


def _compare_counts(records: Sequence[Record]) -> TokenCount | None:
    """The source's own token counts and ours, over the units that have them; None without any."""
    counted = [record for record in records if record.token_count is not None]
    theirs = sum(record.token_count or 0 for record in counted)
    ours = sum(sum(record.tokens.values()) - record.documents for record in counted)
    if not counted:
        return None
    return TokenCount(source_says=theirs, tokens_minus_documents=ours, equal=theirs == ours)


def summarize(manifest: Manifest) -> dict[str, str]:
    """A manifest as rows of a table."""
    source, tokenizer = manifest.source, manifest.tokenizer
    names = [str(source[k]) for k in ("repo", "name", "kind", "revision") if source.get(k)]
    rows = {
        "source": ", ".join(names),
        "tokenizer": f"{tokenizer.name}, {tokenizer.n_vocab:,} ids",
    }
    for split, totals in manifest.splits.items():
        n = sum(shard.split == split for shard in manifest.shards)
        sizes = (counted(totals.documents, "document"), counted(n, "shard"))
        rows[split] = f"{totals.tokens:,} tokens, {', '.join(sizes)}"
    rule = manifest.validation
    if rule.tokens:
        rows["validation"] = f"the first {rule.tokens:,} tokens, as in llm.c"
    elif rule.fraction and rule.rule == AT_END:
        rows["validation"] = f"the last {rule.fraction:.0%} of the text, which has few documents"
    elif rule.rule == OWN:
        more = ", ..." * (len(rule.files) > 3)
        rows["validation"] = f"{OWN}: {', '.join(rule.files[:3])}{more}"
    elif rule.fraction:
        rows["validation"] = f"{rule.fraction:.3g} of the documents, by their hash"
    if documents := manifest.documents:
        for reason, n in documents.skipped.items():
            example = documents.skipped_for_example.get(reason)
            rows[f"skipped: {reason}"] = f"{n:,} documents, the first in {example}"
    if count := manifest.token_count:
        verdict = "equal" if count.equal else "NOT EQUAL"
        rows["token_count"] = (
            f"the source says {count.source_says:,}; tokens minus documents are "
            f"{count.tokens_minus_documents:,}: {verdict}"
        )
    return rows


def print_result(out: Path, manifest: Manifest, has_gpu: bool) -> None:
    """Print what the folder contains now, and the next command."""
    print_table(str(out), summarize(manifest))
    print(f"train on it: {train_command(out, manifest, has_gpu)}")


def train_command(out: Path, manifest: Manifest, has_gpu: bool) -> str:
    """A command that runs on this machine: of the card's preset, or of the demo's size.

    The tokenizer needs no flag: training takes the one in the manifest.
    """
    words = ["python", "-m", "jaxgpt.train"]
    name = Path(os.path.abspath(out)).name  # "." has none
    splits = manifest.splits
    is_small = splits.train.tokens < SMALL_DATA
    if is_small or not has_gpu:
        words += ["--preset", "demo"]
    if is_small or not has_gpu or out != Path("data/fineweb"):
        words += ["--dataset", name]
    if out.parent != Path("data"):
        words += ["--data-dir", str(out)]
    if is_small or not has_gpu:
        # A window of the smaller split has block_size tokens and one more.
        fitting = min(splits.train.tokens, splits.val.tokens) - 1
        if fitting < load_preset("demo").model.block_size:
            words += ["--block-size", str(1 << max(fitting, 1).bit_length() - 1)]
        if manifest.tokenizer.n_vocab > DEMO_VOCABULARY:
            words += SHORT_RUN
        words += ["--out-dir", str(_free_folder(Path("runs") / name))]
    elif manifest.tokenizer.n_vocab not in RECOGNIZED["gpt2"]:  # whose size those presets have
        words += ["--vocab-size", str(padded_vocab_size(manifest.tokenizer.n_vocab))]
    return shlex.join(words)


def _free_folder(folder: Path) -> Path:
    """`folder`, with a number appended if it exists."""
    numbered = (folder.with_name(f"{folder.name}-{number}") for number in count(2))
    return next(path for path in chain([folder], numbered) if not path.exists())
