"""`--inspect`: what a folder of tokens contains, and whether all its files are intact."""

import textwrap
from pathlib import Path

from jaxgpt.data.manifest import (
    MANIFEST,
    Manifest,
    checksum_errors,
    count_documents,
    listing_errors,
    load_manifest,
    unfinished_error,
)
from jaxgpt.data.shards import TokenStream, inspect_split
from jaxgpt.data.token_file import PREPARE, DataError, TokenFile
from jaxgpt.data.tokenizer import Tokenizer, load_tokenizer
from jaxgpt.preparation.progress import PreparationConsole
from jaxgpt.preparation.text_manifest import summarize
from jaxgpt.run.console import counted, print_table

EXCERPT = 200  # tokens


def inspect_folder(data_dir: Path, tokenizer_name: str) -> int:
    """Print what a folder contains; returns 0 if it is intact, 2 if not. Raises DataError.

    Every token is read: headers, sizes, checksums and ids are checked. `tokenizer_name` is used if
    there is no manifest.
    """
    if not data_dir.is_dir():
        what = "is a file" if data_dir.exists() else "no such folder"
        raise DataError(f"{data_dir}: {what}; name a folder of tokens: {PREPARE} --inspect FOLDER")
    manifest = load_manifest(data_dir)
    tokenizer = load_tokenizer(manifest.tokenizer.name if manifest else tokenizer_name, data_dir)
    files: dict[str, list[TokenFile]] = {}
    errors: list[str] = []
    for split in ("train", "val"):
        try:
            intact, faults = inspect_split(data_dir, split)
        except DataError as missing:
            intact, faults = [], [str(missing)]
        files |= {split: intact} if intact else {}
        errors += faults
    rows = summarize(manifest) if manifest else _file_rows(files, tokenizer)
    rows |= {f"{split} begins": _excerpt(files[split], tokenizer) for split in files}
    print_table(str(data_dir), rows)
    if manifest:
        errors += list(listing_errors(data_dir, manifest))
        if manifest.tokenizer.sha256 != tokenizer.sha256:
            errors.append(f"{data_dir}: {tokenizer.name!r} is not the tokenizer that made it")
    elif error := unfinished_error(data_dir):
        errors.append(error)
    errors += _content_errors(data_dir, manifest, files, tokenizer)
    for error in errors:
        print(f"ERROR  {error}")
    checked = "headers, sizes, checksums, ids" if manifest else "headers, sizes, ids (no manifest)"
    print(
        f"{data_dir}: "
        + (counted(len(errors), "error") if errors else f"intact: {checked} checked")
    )
    return 2 if errors else 0


def _file_rows(files: dict[str, list[TokenFile]], tokenizer: Tokenizer) -> dict[str, str]:
    rows = {"tokenizer": f"{tokenizer.name} (assumed: there is no {MANIFEST})"}
    for split, some in files.items():
        rows[split] = f"{sum(file.length for file in some):,} tokens, {counted(len(some), 'file')}"
    return rows


def _excerpt(files: list[TokenFile], tokenizer: Tokenizer) -> str:
    stream = TokenStream(files, "excerpt")
    ids = stream.window(0, min(EXCERPT, len(stream)))
    if ids.max(initial=0) >= tokenizer.n_vocab:
        return f"(ids outside tokenizer {tokenizer.name!r})"
    text = " ".join(tokenizer.decode(ids).split())
    return textwrap.shorten(text, 400, placeholder=" ...")


def _content_errors(
    data_dir: Path,
    manifest: Manifest | None,
    files: dict[str, list[TokenFile]],
    tokenizer: Tokenizer,
) -> list[str]:
    """A sentence for each error in the contents of the files."""
    errors = []
    total = sum(file.size for some in files.values() for file in some)
    documents = dict.fromkeys(files, 0)
    with PreparationConsole(total * (2 if manifest else 1), 0) as console:
        for split, some in files.items():
            for file in some:
                try:
                    documents[split] += count_documents(file, tokenizer, console.advance)
                except DataError as error:
                    errors.append(str(error))
        if manifest:
            errors += list(checksum_errors(data_dir, manifest, console.advance))
            for split, totals in manifest.splits.items():
                if split in documents and documents[split] != totals.documents:
                    errors.append(
                        f"{data_dir}: {split} has {documents[split]:,} end-of-text tokens, but "
                        f"{MANIFEST} lists {totals.documents:,} documents"
                    )
    return errors
