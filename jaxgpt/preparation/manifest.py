"""The manifest of prepared text: made by one process, or merged from those of several ranks."""

import hashlib
import re
import shlex
from collections import Counter
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import msgspec

from jaxgpt.data.manifest import (
    MANIFEST,
    Documents,
    Manifest,
    ShardEntry,
    Splits,
    SplitTotals,
    TokenCount,
    TokenizerEntry,
    Validation,
    listing_errors,
    read_manifest,
)
from jaxgpt.data.token_file import PREPARE, refuse
from jaxgpt.data.tokenizer import Tokenizer
from jaxgpt.errors import UserError
from jaxgpt.preparation.journal import Record
from jaxgpt.preparation.plan import HubSource, Plan
from jaxgpt.run.console import counted, print_table

RANK_NAME = re.compile(r"manifest-\d+-of-\d+\.json$")
LISTED_INPUTS = 200  # the manifest has only the number and a hash of more


class TextManifest(Manifest, frozen=True, kw_only=True):
    """The manifest of prepared text, of a folder or of one rank."""

    documents: Documents
    shard_tokens: int


def text_manifest(
    plan: Plan, tokenizer: Tokenizer, shards: Sequence[ShardEntry], records: Sequence[Record]
) -> TextManifest:
    """Make the manifest, without dates and folders: the same work makes the same manifest."""
    s = plan.settings
    inputs = [item for round in plan.rounds for item in round]
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
    if s.val_fraction is not None:
        validation = Validation(rule="hash of the document", fraction=s.val_fraction)
    return TextManifest(
        jaxgpt=version("jaxgpt"),
        source=source,
        tokenizer=tokenizer_entry(tokenizer),
        validation=validation,
        shard_tokens=s.shard_tokens,
        splits=total_splits(shards),
        shards=sorted(shards),
        documents=_sum_documents([_documents_of(record) for record in records]),
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


def _documents_of(record: Record) -> Documents:
    examples = {reason: Path(path).name for reason, path in record.examples.items()}
    return Documents(used=record.documents, skipped=record.skipped, skipped_for_example=examples)


def _sum_documents(parts: Sequence[Documents]) -> Documents:
    """The sums of the counts, and the first example of each reason."""
    skipped, examples = Counter[str](), dict[str, str]()
    for part in parts:
        skipped.update(part.skipped)
        examples = part.skipped_for_example | examples
    return Documents(
        used=sum(part.used for part in parts),
        skipped=dict(sorted(skipped.items())),
        skipped_for_example=dict(sorted(examples.items())),
    )


def _compare_counts(records: Sequence[Record]) -> TokenCount | None:
    """The source's own token counts and ours, over the units that have them; None without any."""
    return _sum_counts(
        [
            (record.token_count, sum(record.tokens.values()) - record.documents)
            for record in records
            if record.token_count is not None
        ]
    )


def _sum_counts(counts: Sequence[tuple[int, int]]) -> TokenCount | None:
    """The sums of (source's count, ours), None for none."""
    if not counts:
        return None
    theirs, ours = map(sum, zip(*counts, strict=True))
    return TokenCount(source_says=theirs, tokens_minus_documents=ours, equal=theirs == ours)


def manifest_name(rank: int, world_size: int) -> str:
    """manifest.json; with several processes, the name of this rank's manifest."""
    if world_size == 1:
        return MANIFEST
    return f"manifest-{rank:03d}-of-{world_size:03d}.json"


def load_text_manifest(path: Path) -> TextManifest | None:
    """A manifest that `prepare` wrote, None if there is none; raises DataError."""
    return read_manifest(path, TextManifest, "delete it and run its prepare command again")


def merge_ranks(out: Path) -> TextManifest:
    """Join the manifests of all ranks in a folder, write its manifest.json and return it.

    Raises UserError if a rank or a shard is missing, or if the ranks differ in their settings.
    """
    merged = _join(out, _load_ranks(out))
    refuse(list(listing_errors(out, merged)))
    for split, totals in merged.splits.items():
        if not totals.tokens:
            raise UserError(
                f"{out}: no rank has a token of {split!r}; prepare more text, or another fraction "
                "of it with --val-fraction, into another --out"
            )
    wanted, got = merged.validation.tokens or 0, merged.splits.val.tokens
    if got < wanted:
        raise UserError(
            f"{out}: validation is the first {wanted:,} tokens, but rank 0 has only {got:,}; lower "
            "--val-tokens, or split the text over fewer ranks, into another --out"
        )
    merged.save(out / MANIFEST)
    return merged


def _load_ranks(out: Path) -> list[TextManifest]:
    found = [path for path in sorted(out.glob("manifest-*.json")) if RANK_NAME.match(path.name)]
    numbers = [[int(digits) for digits in re.findall(r"\d+", path.name)] for path in found]
    sizes = {world_size for _, world_size in numbers}
    if not found:
        raise UserError(
            f"{out}: contains no manifest-*-of-*.json; run {PREPARE} with --rank and --world-size "
            "first, and copy what the ranks wrote into one folder"
        )
    if len(sizes) > 1:
        found_sizes = " and ".join(map(str, sorted(sizes)))
        raise UserError(f"{out}: contains manifests of world sizes {found_sizes}; keep one set")
    world_size = sizes.pop()
    if missing := sorted(set(range(world_size)) - {rank for rank, _ in numbers}):
        raise UserError(
            f"{out}: rank {', '.join(map(str, missing))} of {world_size} has not finished, or its "
            "shards are elsewhere; run it again, or copy its files here"
        )
    return [manifest for path in found if (manifest := load_text_manifest(path)) is not None]


def _join(out: Path, manifests: Sequence[TextManifest]) -> TextManifest:
    first = manifests[0]
    for name in ("source", "tokenizer", "validation", "shard_tokens"):
        if any(_comparable(manifest, name) != _comparable(first, name) for manifest in manifests):
            raise UserError(
                f"{out}: the ranks differ in {name}; prepare them again with the same flags"
            )
    shards = [shard for manifest in manifests for shard in manifest.shards]
    counts = [m.token_count for m in manifests if m.token_count is not None]
    return msgspec.structs.replace(
        first,
        splits=total_splits(shards),
        shards=sorted(shards),
        documents=_sum_documents([manifest.documents for manifest in manifests]),
        token_count=_sum_counts([(c.source_says, c.tokens_minus_documents) for c in counts]),
    )


def _comparable(manifest: Manifest, name: str) -> Any:
    """A value that must be equal in all ranks; two commits may have equal files."""
    value = getattr(manifest, name)
    return {k: v for k, v in value.items() if k != "commit"} if name == "source" else value


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


def print_result(out: Path, manifest: Manifest, world_size: int = 1) -> None:
    """Print what the folder contains now, and the next command."""
    print_table(str(out), summarize(manifest))
    if world_size > 1:
        print(f"when all ranks have finished: {PREPARE} --merge {shlex.quote(str(out))}")
        return
    command = "python -m jaxgpt.train"
    if out.parent == Path("data"):
        command += "" if out.name == "fineweb" else f" --dataset {shlex.quote(out.name)}"
    else:
        # The name as well: presets that train on the embedded text need another.
        command += f" --dataset {shlex.quote(out.name)} --data-dir {shlex.quote(str(out))}"
    tokenizer = manifest.tokenizer.name
    print(f"train on it: {command}" + (f" --tokenizer {tokenizer}" if tokenizer != "gpt2" else ""))
