"""From flags to a plan: tokenizer, inputs and settings, compared with the folder's old plan."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import msgspec

from jaxgpt.data.manifest import ShardEntry
from jaxgpt.data.tokenizer import EOT_TEXT, Tokenizer, load_tokenizer
from jaxgpt.data.tokenizer_json import MAIN_FILE, character_tokenizer
from jaxgpt.errors import UserError
from jaxgpt.files import user_path
from jaxgpt.preparation.flags import (
    CLIMBMIX_TOKENS,
    DATASETS,
    FINEWEB,
    LICENCES,
    VAL_RULES,
    PrepareFlags,
    parse_number,
)
from jaxgpt.preparation.hub import list_dataset
from jaxgpt.preparation.inputs import (
    Input,
    find_inputs,
    has_splits,
    saved_dataset,
    splits_of,
)
from jaxgpt.preparation.output_folder import OutputFolder, is_hub_name
from jaxgpt.preparation.readers import characters_of, find_separators, has_documents
from jaxgpt.preparation.text_manifest import total_splits
from jaxgpt.preparation.work_files import (
    FileSource,
    HubSource,
    Plan,
    Record,
    Settings,
    Source,
    nothing_finished,
    refuse_differences,
    with_inputs,
)

FINEWEB_VAL_TOKENS = 100_000_000  # as in llm.c
SMALL_TEXT = 100_000_000  # bytes; validation is a tenth of less, a hundredth of more
# Validation is chosen by document if about this many are expected to be in it: with ten, it is
# empty in one of 20,000 texts.
EXPECTED_VAL_DOCUMENTS = 10
VAL_SPLITS = ("validation", "valid", "val", "test")


def tokenizer_of_flags(flags: PrepareFlags, folder: OutputFolder) -> Tokenizer:
    """The tokenizer that the flags name; 'char' is made of the text. Raises UserError."""
    if flags.tokenizer != "char":
        return load_tokenizer(flags.tokenizer)
    if not nothing_finished(folder.work) and (folder.out / MAIN_FILE).is_file():
        return load_tokenizer("char", folder.out)
    if is_hub_name(flags.inputs):
        raise UserError(
            "--tokenizer char reads the text twice, so it needs files; use --tokenizer byte for a "
            "dataset of the Hub"
        )
    return character_tokenizer(
        characters_of(find_text(flags.inputs, flags.val), flags.read_options)
    )


def make_plan(flags: PrepareFlags, folder: OutputFolder, tokenizer: Tokenizer) -> Plan:
    """The plan of the folder: the old one if this command resumes it, or a new one.

    Raises UserError if the folder was started with other inputs or settings.
    """
    path = folder.work / "plan.json"
    if (folder.work / "ready.json").exists():
        raise UserError(f"{folder.out}: contains ready-made shards; choose another --out for text")
    # A plan without results may have been a mistake, such as a wrong column, and is replaced.
    old = None if nothing_finished(folder.work) else Plan.load(path)
    source: Source
    if not is_hub_name(flags.inputs):
        source, inputs = FileSource(), _find_files(flags, folder, old)
    elif old is None:
        source, inputs = _list_hub(flags, _hub_source(flags))
    else:  # it keeps its commit and files, without a request to the Hub
        source, inputs = _hub_source(flags), old.inputs
    settings = _settings(flags, folder, tokenizer, old, inputs)
    if old is None:
        plan = Plan(source=source, settings=settings, rounds=[inputs])
    else:
        refuse_differences(old, source, settings, folder.out)
        plan = with_inputs(old, inputs, folder.out)
    if plan != old:
        plan.save(path)
    return plan


def _find_files(flags: PrepareFlags, folder: OutputFolder, old: Plan | None) -> list[Input]:
    """The inputs on this machine, and hints about flags that are missing."""
    given = {"--name": flags.name, "--revision": flags.revision}
    if flags.split != "train":
        given["--split"] = flags.split
    if names := [name for name, value in given.items() if value is not None]:
        raise UserError(
            f"{' and '.join(names)}: only for datasets of the Hub, which {flags.inputs[0]} is "
            "not; leave them out"
        )
    val = named_validation(flags, old)
    inputs = find_text(flags.inputs, val)
    if val is None and (unused := unused_split(flags.inputs)):
        print(f"{unused}: is not used; --val {unused.name} makes it the validation split")
    if not any(item.size for item in inputs):
        raise UserError(f"{inputs[0].path}: is empty; name a file that has text")
    if flags.sample_by == "document" and (text := find_separators(inputs)):
        print(f"{text}: if {EOT_TEXT} ends its documents, give --sample-by '{EOT_TEXT}'")
    if any(folder.out.resolve() in (Path(i.path), Path(i.path).parent) for i in inputs):
        raise UserError(f"{folder.out}: contains the text itself; choose another folder with --out")
    return inputs


def _list_hub(flags: PrepareFlags, source: HubSource) -> tuple[HubSource, list[Input]]:
    """The source, with its commit, and the files of its split after those of --val."""
    name = source.name or None
    commit, inputs = list_dataset(source.repo, name, source.split, flags.revision)
    if flags.val is not None:
        if flags.val == source.split:
            raise UserError(f"--val {flags.val}: is the split to train on; name another")
        _, own = list_dataset(source.repo, name, flags.val, commit)
        inputs = [*(replace(item, split="val") for item in own), *inputs]
    return msgspec.structs.replace(source, commit=commit), inputs


def _hub_source(flags: PrepareFlags) -> HubSource:
    dataset = flags.inputs[0]
    if dataset in LICENCES:
        print(f"{dataset}: its licence is {LICENCES[dataset]}")
    return HubSource(
        repo=CLIMBMIX_TOKENS if flags.reads_ids else DATASETS.get(dataset, dataset),
        name=flags.name or ("sample-10BT" if dataset in FINEWEB else ""),
        split=flags.split,
        revision=flags.revision or "main",
    )


def _settings(
    flags: PrepareFlags,
    folder: OutputFolder,
    tokenizer: Tokenizer,
    old: Plan | None,
    inputs: Sequence[Input],
) -> Settings:
    """The settings from the flags, else from the folder's plan, else the defaults."""
    val_tokens, val_fraction = flags.number_of("val_tokens"), flags.val_fraction
    val, val_at_end = named_validation(flags, old), False
    if val is None and val_tokens is None and val_fraction is None:
        if old is not None:
            val_tokens, val_fraction = old.settings.val_tokens, old.settings.val_fraction
            val_at_end = old.settings.val_at_end
        elif _is_fineweb(flags):
            val_tokens = FINEWEB_VAL_TOKENS
        else:
            small = sum(item.text_bytes for item in inputs) < SMALL_TEXT
            val_fraction = 0.1 if small else 0.01
            if not is_hub_name(flags.inputs):
                least = round(EXPECTED_VAL_DOCUMENTS / val_fraction)
                val_at_end = not has_documents(inputs, flags.read_options, least)
            val_fraction = 0.1 if val_at_end else val_fraction
    return Settings(
        prefix=_prefix(flags, folder.out),
        tokenizer=tokenizer.name,
        tokenizer_sha256=tokenizer.sha256,
        options=flags.read_options,
        shard_tokens=parse_number("shard_tokens", flags.shard_tokens),
        val_tokens=val_tokens,
        val_fraction=val_fraction,
        val_at_end=val_at_end,
        val=val,
        unit_bytes=parse_number("unit_bytes", flags.unit_bytes),
    )


def named_validation(flags: PrepareFlags, old: Plan | None) -> str | None:
    """The validation text that the flags name, else the folder's plan."""
    if old is None or any(getattr(flags, name) is not None for name in ("val", *VAL_RULES)):
        return flags.val
    return old.settings.val


def unused_split(arguments: Sequence[str]) -> Path | None:
    """A validation split beside the split 'train' of an input, if there is one."""
    splits = (Path(a) / name for a in arguments for name in VAL_SPLITS if has_splits(Path(a)))
    return next((path for path in splits if path.is_dir()), None)


def find_text(arguments: Sequence[str], val: str | None) -> list[Input]:
    """The inputs of `find_inputs`, after those of `val`, which are validation and not trained on.

    `val` is a path or pattern, or a split of a save_to_disk folder among the arguments. Raises
    UserError.
    """
    if val is None:
        return find_inputs(arguments)
    dicts = [path for path in (user_path(a, "input") for a in arguments) if has_splits(path)]
    own = [saved_dataset(path / val) for path in dicts if (path / val / "state.json").is_file()]
    if dicts and not own and not user_path(val, "--val").exists():
        raise UserError(
            f"--val {val}: {dicts[0]} has no such split ({', '.join(splits_of(dicts[0]))}), and "
            "there is no such file"
        )
    own = own or find_inputs([val])
    names = {item.path for item in own}
    others = [item for item in find_inputs(arguments) if item.path not in names]
    if not others:
        raise UserError(f"--val {val}: is all of the text; name other text to train on")
    return [*(replace(item, split="val") for item in own), *others]


def _is_fineweb(flags: PrepareFlags) -> bool:
    """Whether the input is FineWeb or FineWeb-Edu on the Hub, by its short or full name."""
    return is_hub_name(flags.inputs) and flags.inputs[0] in {*FINEWEB, *FINEWEB.values()}


def _prefix(flags: PrepareFlags, out: Path) -> str:
    """The prefix of the shards' names: as in llm.c for FineWeb, else the folder's name."""
    if _is_fineweb(flags):
        return "edu_fineweb" if flags.inputs[0].endswith("-edu") else "fineweb"
    name = out.resolve().name[:50]  # of 255 bytes, with room for _train_000000.bin.tmp
    return "".join(c if c.isalnum() else "_" for c in name) or "text"


def refuse_bad_splits(
    out: Path, settings: Settings, shards: Sequence[ShardEntry], records: Sequence[Record]
) -> None:
    """Raises UserError if a split has no token, or validation has more than training."""
    splits = total_splits(shards)
    train, val = splits.train.tokens, splits.val.tokens
    if not train or not val:
        raise UserError(_empty_split_error(out, settings, train + val, records))
    fraction = settings.val_fraction
    if fraction is not None and fraction <= 0.1 and val > train:
        raise UserError(
            f"{out}: validation, chosen by document, has {val:,} tokens and training only "
            f"{train:,}, because a few documents are most of the text; choose another --out, and "
            f"the first tokens with --val-tokens {(train + val) // 10}"
        )


def _empty_split_error(
    out: Path, settings: Settings, tokens: int, records: Sequence[Record]
) -> str:
    """A sentence on why a split has no token."""
    examples = {reason: path for record in records for reason, path in record.examples.items()}
    if not any(record.documents or record.skipped for record in records):
        return f"{out}: the input has no documents; check the files, and choose another --out"
    if not any(record.documents for record in records):
        reasons = " or ".join(f"{reason} ({path})" for reason, path in sorted(examples.items()))
        return (
            f"{out}: none of the documents can be used, each is {reasons}; fix the files, or set "
            "--text-column or --encoding-errors, and choose another --out"
        )
    if settings.val_tokens is not None:
        return (
            f"{out}: all tokens are validation, which is the first {settings.val_tokens:,}; "
            f"choose another --out and --val-tokens {max(tokens // 10, 1)}, or prepare more text"
        )
    if settings.val is not None:
        return (
            f"{out}: --val {settings.val} or the other text has no tokens; name files that have "
            "text, and choose another --out"
        )
    if settings.val_at_end:
        return f"{out}: the text has only {tokens} tokens; prepare more into another --out"
    return (
        f"{out}: no document is in one of the splits, because there are few of them, or all are "
        "equal; choose another --out, and leave out --val-fraction, or take the first tokens with "
        f"--val-tokens {max(tokens // 10, 1)}"
    )
