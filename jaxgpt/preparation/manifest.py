"""The manifest of what was prepared, by one process or by several on several machines."""

import hashlib
import re
import shlex
from collections import Counter
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from jaxgpt.data.manifest import MANIFEST, VERSION, fits, read_manifest, size_errors
from jaxgpt.data.token_file import PREPARE, refuse
from jaxgpt.data.tokenizer import Tokenizer
from jaxgpt.errors import UserError
from jaxgpt.files import write_json
from jaxgpt.preparation.journal import Plan
from jaxgpt.preparation.tokenize import Record
from jaxgpt.run.console import print_table

LISTED_INPUTS = 200  # more of them are in the manifest as a count and a hash


def text_manifest(
    plan: Plan, tokenizer: Tokenizer, shards: Sequence[dict[str, Any]], records: Sequence[Record]
) -> dict[str, Any]:
    """What was made of text. Free of dates and folders: equal for equal work."""
    s = plan.settings
    inputs = [item for round in plan.rounds for item in round]
    lines = "\n".join(f"{item.name} {item.size} {item.check}" for item in inputs)
    source: dict[str, Any] = {
        **plan.source,
        "inputs": len(inputs),
        "bytes": sum(item.size for item in inputs),
        "sha256_of_inputs": hashlib.sha256(lines.encode()).hexdigest(),
        "text_column": s.options.text_column,
        "sample_by": s.options.sample_by,
    }
    if len(inputs) <= LISTED_INPUTS:
        source["files"] = [item.path if "repo" in plan.source else item.name for item in inputs]
    rule: dict[str, Any] = {"rule": "first tokens", "tokens": s.val_tokens}
    if s.val_fraction is not None:
        rule = {"rule": "hash of the document", "fraction": s.val_fraction}
    skipped = Counter[str]()
    for record in records:
        skipped.update(record.skipped)
    examples = {k: Path(v).name for r in reversed(records) for k, v in r.examples.items()}
    manifest = base_manifest(tokenizer, source, rule, s.shard_tokens, shards)
    manifest["documents"] = {
        "used": sum(record.documents for record in records),
        "skipped": dict(sorted(skipped.items())),
        "skipped_for_example": dict(sorted(examples.items())),
    }
    # The column counts GPT-2's tokens; those of another tokenizer would be no error.
    manifest["token_count"] = _token_count(records) if tokenizer.name == "gpt2" else None
    return manifest


def base_manifest(
    tokenizer: Tokenizer,
    source: dict[str, Any],
    validation: dict[str, Any],
    shard_tokens: int | None,
    shards: Sequence[dict[str, Any]],
) -> dict[str, Any]:
    """What every manifest has."""
    return {
        "version": VERSION,
        "jaxgpt": version("jaxgpt"),
        "source": source,
        "tokenizer": {
            "name": tokenizer.name,
            "sha256": tokenizer.sha256,
            "n_vocab": tokenizer.n_vocab,
            "eot": tokenizer.eot,
        },
        "eot": "before each document",
        "dtype": "uint16",
        "validation": validation,
        "shard_tokens": shard_tokens,
        "splits": _splits(shards),
        "shards": sorted(shards, key=lambda shard: shard["file"]),
    }


def _splits(shards: Sequence[dict[str, Any]]) -> dict[str, dict[str, int]]:
    return {
        split: {
            name: sum(shard[name] for shard in shards if shard["split"] == split)
            for name in ("tokens", "documents")
        }
        for split in ("train", "val")
    }


def _token_count(records: Sequence[Record]) -> dict[str, Any] | None:
    """FineWeb's own count against ours, over the units that have one; None where none has."""
    counted = [record for record in records if record.token_count is not None]
    if not counted:
        return None
    theirs = sum(record.token_count or 0 for record in counted)
    ours = sum(sum(record.tokens.values()) - record.documents for record in counted)
    return {"source_says": theirs, "tokens_minus_documents": ours, "equal": theirs == ours}


def rank_manifest_name(rank: int, world_size: int) -> str:
    """Where one of several processes says what it made."""
    return f"manifest-{rank:03d}-of-{world_size:03d}.json"


def merge(out: Path) -> dict[str, Any]:
    """Join the manifests of all ranks in a folder into its manifest.json; returns it.

    Raises UserError if a rank is missing, if they were not made in one way, or if a shard is.
    """
    found = sorted(out.glob("manifest-*-of-*.json"))
    numbers = [re.findall(r"\d+", path.name) for path in found]
    sizes = {int(of) for _, of in numbers}
    if not found:
        raise UserError(
            f"{out}: holds no manifest-*-of-*.json; run python -m jaxgpt.prepare with --rank and "
            "--world-size first, and copy what the ranks wrote into one folder"
        )
    if len(sizes) > 1:
        raise UserError(
            f"{out}: holds ranks of {' and of '.join(map(str, sorted(sizes)))}; keep one set"
        )
    world_size = sizes.pop()
    missing = sorted(set(range(world_size)) - {int(rank) for rank, _ in numbers})
    if missing:
        raise UserError(
            f"{out}: rank {', '.join(map(str, missing))} of {world_size} has not finished, or its "
            "shards are elsewhere; run it again, or copy its files here"
        )
    manifests = []
    for path in found:
        manifest = read_manifest(path)
        if manifest is None or not _is_a_ranks(manifest):
            raise UserError(
                f"{path}: is not as its rank wrote it; delete it and run the rank again, which "
                "writes it anew"
            )
        manifests.append(manifest)
    merged = _join(out, manifests)
    refuse(list(size_errors(out, merged)))
    for split, counts in merged["splits"].items():
        if not counts["tokens"]:
            raise UserError(
                f"{out}: no rank has a token of {split!r}; prepare more text, or another share of "
                "it with --val-fraction, into another --out"
            )
    _check_first_tokens(out, merged)
    write_json(out / MANIFEST, merged)
    return merged


def _is_a_ranks(manifest: dict[str, Any]) -> bool:
    """Whether it has what is joined, which is more than training needs of a manifest."""
    documents, count = manifest.get("documents"), manifest.get("token_count", "missing")
    return (
        "shard_tokens" in manifest
        and type(manifest["validation"].get("tokens", 0)) is int
        and fits(documents, used=int, skipped=dict, skipped_for_example=dict)
        and all(type(n) is int for n in manifest["documents"]["skipped"].values())
        and (count is None or fits(count, source_says=int, tokens_minus_documents=int))
    )


def _check_first_tokens(out: Path, merged: dict[str, Any]) -> None:
    """Raises UserError where validation wants more first tokens than the first rank's share has."""
    wanted, got = merged["validation"].get("tokens", 0), merged["splits"]["val"]["tokens"]
    if got < wanted:
        raise UserError(
            f"{out}: validation is the first {wanted:,} tokens, and rank 0's share has only "
            f"{got:,}; lower --val-tokens, or split the text over fewer ranks, into another --out"
        )


def _content(manifest: dict[str, Any], name: str) -> Any:
    """A value that all ranks must have alike; commits of equal files may differ."""
    value = manifest[name]
    return {k: v for k, v in value.items() if k != "commit"} if name == "source" else value


def _join(out: Path, manifests: Sequence[dict[str, Any]]) -> dict[str, Any]:
    first = manifests[0]
    for name in ("version", "source", "tokenizer", "validation", "shard_tokens"):
        if any(_content(manifest, name) != _content(first, name) for manifest in manifests):
            raise UserError(
                f"{out}: the ranks were not prepared in one way: they differ in {name}; prepare "
                "them again with the same flags"
            )
    shards = [shard for manifest in manifests for shard in manifest["shards"]]
    skipped, examples = Counter[str](), dict[str, str]()
    for manifest in reversed(manifests):
        skipped.update(manifest["documents"]["skipped"])
        examples |= manifest["documents"]["skipped_for_example"]
    counts = [m["token_count"] for m in manifests if m["token_count"] is not None]
    sums = {k: sum(c[k] for c in counts) for k in ("source_says", "tokens_minus_documents")}
    return first | {
        "splits": _splits(shards),
        "shards": sorted(shards, key=lambda shard: shard["file"]),
        "documents": {
            "used": sum(manifest["documents"]["used"] for manifest in manifests),
            "skipped": dict(sorted(skipped.items())),
            "skipped_for_example": dict(sorted(examples.items())),
        },
        "token_count": {**sums, "equal": len(set(sums.values())) == 1} if counts else None,
    }


def describe(manifest: dict[str, Any]) -> dict[str, str]:
    """A manifest in rows for a table."""
    splits, shards = manifest["splits"], manifest["shards"]
    source = manifest["source"]
    rows = {
        "source": ", ".join(
            str(source[k]) for k in ("repo", "name", "kind", "revision") if source.get(k)
        ),
        "tokenizer": f"{manifest['tokenizer']['name']}, {manifest['tokenizer']['n_vocab']:,} ids",
    }
    for split, counts in splits.items():
        n = sum(shard["split"] == split for shard in shards)
        rows[split] = f"{counts['tokens']:,} tokens, {counts['documents']:,} documents, {n} shards"
    rule = manifest["validation"]
    if rule.get("tokens"):
        rows["validation"] = f"the first {rule['tokens']:,} tokens, as llm.c has it"
    elif rule.get("fraction"):
        rows["validation"] = f"{rule['fraction']:.3g} of the documents, by their hash"
    if documents := manifest.get("documents"):
        for reason, n in documents["skipped"].items():
            example = documents["skipped_for_example"].get(reason)
            rows[f"left out: {reason}"] = f"{n:,} documents, the first in {example}"
    if count := manifest.get("token_count"):
        verdict = "equal" if count["equal"] else "NOT EQUAL"
        rows["token_count"] = (
            f"the source says {count['source_says']:,}; tokens minus documents are "
            f"{count['tokens_minus_documents']:,}: {verdict}"
        )
    return rows


def announce(out: Path, manifest: dict[str, Any], world_size: int = 1) -> None:
    """Say what there is now, and what to do with it."""
    print_table(str(out), describe(manifest))
    if world_size > 1:
        print(f"when all ranks have finished: {PREPARE} --merge {shlex.quote(str(out))}")
        return
    command = "python -m jaxgpt.train"
    if out.parent == Path("data"):
        command += "" if out.name == "fineweb" else f" --dataset {shlex.quote(out.name)}"
    else:
        # The name as well: presets that train on the text in the package need another.
        command += f" --dataset {shlex.quote(out.name)} --data-dir {shlex.quote(str(out))}"
    tokenizer = manifest["tokenizer"]["name"]
    print(f"train on it: {command}" + (f" --tokenizer {tokenizer}" if tokenizer != "gpt2" else ""))
